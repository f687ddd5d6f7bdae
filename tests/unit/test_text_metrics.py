"""Metrics of text classification against scikit-learn, scipy and torch, on noisy predictions, with ties and at the edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from sklearn import metrics

from sparse_accel.tasks import text_metrics


def noisy(num_rows: int, num_classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and logits that are right more often than not; rounded, so that some rows have ties."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, num_rows)
    logits = rng.normal(size=(num_rows, num_classes)).round(1)
    logits[np.arange(num_rows), labels] += 1.0
    return logits.astype(np.float32), labels


@pytest.mark.parametrize(("num_rows", "num_classes"), [(500, 3), (300, 77), (1, 2)])
def test_metrics_of_classes_are_those_of_scikit_learn(num_rows: int, num_classes: int) -> None:
    logits, labels = noisy(num_rows, num_classes)
    predictions = logits.argmax(-1)
    found = text_metrics.class_metrics(logits, labels)
    assert found["accuracy"] == metrics.accuracy_score(labels, predictions)
    assert found["f1"] == found["f1_macro"] == metrics.f1_score(labels, predictions, average="macro", zero_division=0)
    by_class = metrics.precision_recall_fscore_support(
        labels, predictions, labels=range(num_classes), average=None, zero_division=0
    )
    table = text_metrics.metrics_by_label(logits, labels, [str(place) for place in range(num_classes)])
    assert [tuple(row.values()) for row in table.values()] == list(zip(*by_class, strict=True))
    loss = F.cross_entropy(torch.from_numpy(logits).double(), torch.from_numpy(labels))
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-12)


def test_a_glue_tasks_metrics_speak_of_its_positive_class_wherever_the_model_has_it() -> None:
    logits, labels = noisy(400, 2)
    expected = metrics.f1_score(labels, logits.argmax(-1))
    plain = text_metrics.glue_class_metrics(logits, labels, ("accuracy", "f1"), positive=1)
    turned = text_metrics.glue_class_metrics(logits[:, ::-1], 1 - labels, ("accuracy", "f1"), positive=0)
    ties = logits[:, 0] == logits[:, 1]  # the first of equals wins, and which is first has changed
    assert ties.any() and not ties.all()
    assert plain["f1"] == expected
    assert plain["combined_score"] == (plain["accuracy"] + plain["f1"]) / 2
    kept = ~ties
    assert (
        text_metrics.glue_class_metrics(logits[kept][:, ::-1], 1 - labels[kept], ("f1",), positive=0)["f1"]
        == text_metrics.glue_class_metrics(logits[kept], labels[kept], ("f1",), positive=1)["f1"]
    )
    assert turned["loss"] == pytest.approx(plain["loss"], rel=1e-12)
    cola = text_metrics.glue_class_metrics(logits, labels, ("matthews_correlation",), positive=None)
    assert cola["matthews_correlation"] == metrics.matthews_corrcoef(labels, logits.argmax(-1))
    assert "combined_score" not in cola


def test_correlations_are_those_of_scipy_and_0_where_there_is_none() -> None:
    rng = np.random.default_rng(1)
    labels = rng.uniform(0, 5, 200).round(1).astype(np.float32)  # ties on both sides
    predictions = (labels + rng.normal(size=200)).round(1).astype(np.float32)
    found = text_metrics.glue_regression_metrics(predictions, labels)
    assert found["pearson"] == pytest.approx(stats.pearsonr(predictions, labels)[0], rel=1e-12)
    assert found["spearmanr"] == pytest.approx(stats.spearmanr(predictions, labels)[0], rel=1e-12)
    assert found["combined_score"] == pytest.approx((found["pearson"] + found["spearmanr"]) / 2, rel=1e-12)
    own = text_metrics.regression_metrics(predictions, labels)
    assert own["mse"] == own["loss"] == pytest.approx(metrics.mean_squared_error(labels, predictions), rel=1e-6)
    nothing = {"pearson": 0.0, "spearmanr": 0.0}
    assert text_metrics.correlations(np.zeros(9), np.arange(9.0)) == nothing
    assert text_metrics.correlations(np.ones(1), np.ones(1)) == nothing


def test_metrics_of_several_labels_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(2)
    labels = (rng.random((300, 6)) < 0.3).astype(np.float32)
    labels[:, 4] = 0.0  # a label that never applies
    logits = (rng.normal(size=labels.shape) + 2 * labels - 1).astype(np.float32)
    logits[:, 5] = -50.0  # one that is never predicted
    found = text_metrics.multi_label_metrics(logits, labels)
    predictions = torch.from_numpy(logits).double().sigmoid().numpy() > 0.3
    by_label = metrics.precision_recall_fscore_support(labels, predictions, average=None, zero_division=0)
    table = text_metrics.metrics_by_label(logits, labels, list("abcdef"))
    assert np.allclose([list(row.values()) for row in table.values()], np.array(by_label).T, rtol=1e-12, atol=0)
    for average in ("macro", "micro"):
        score = metrics.f1_score(labels, predictions, average=average, zero_division=0)
        assert found[f"f1_{average}"] == pytest.approx(score, rel=1e-12)
    assert found["f1"] == found["f1_micro"] and found["macro_average_f1"] == found["f1_macro"]
    assert found["macro_average_recall"] == pytest.approx(by_label[1].mean(), rel=1e-12)
    assert found["accuracy"] == metrics.accuracy_score(labels, predictions)
    loss = F.binary_cross_entropy_with_logits(torch.from_numpy(logits).double(), torch.from_numpy(labels).double())
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-12)


def test_one_class_alone_and_logits_of_any_size_give_numbers() -> None:
    logits = np.array([[1e4, -1e4], [3e4, 0.0]], np.float32)
    found = text_metrics.glue_class_metrics(logits, np.zeros(2, int), ("accuracy", "f1", "matthews_correlation"), 1)
    assert found == {"accuracy": 1.0, "f1": 0.0, "matthews_correlation": 0.0, "combined_score": 1 / 3, "loss": 0.0}
    several = text_metrics.multi_label_metrics(logits, np.zeros((2, 2), np.float32))
    assert np.isfinite(list(several.values())).all()
    assert text_metrics.probabilities(logits)[0].tolist() == [1.0, 0.0]
    assert text_metrics.softmax(logits)[0].tolist() == [1.0, 0.0]
