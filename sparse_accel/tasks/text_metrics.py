"""Metrics of text classification: scikit-learn's and scipy's own, under the names that GLUE and SparseML give them.

Fractions from 0 to 1, as theirs. What is undefined (a correlation with something constant, the precision of a class that
nobody predicted) counts as 0, so that a run can go on and the best checkpoint can be found.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

# A label applies where its probability is higher than this, as in SparseML (and in the paper of GoEmotions).
THRESHOLD: Final = 0.3
_KINDS: Final = ("precision", "recall", "f1")


def class_metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """For float32 [N, C] and int [N]: accuracy, and F1 averaged over the classes that occur in labels or predictions (`f1` and
    `f1_macro`)."""
    from sklearn.metrics import f1_score

    predictions = logits.argmax(-1)
    f1 = float(f1_score(labels, predictions, average="macro", zero_division=0))
    accuracy = _mean(predictions == labels)
    return {"accuracy": accuracy, "f1": f1, "f1_macro": f1, "loss": cross_entropy(logits, labels)}


def glue_class_metrics(
    logits: np.ndarray, labels: np.ndarray, wanted: Sequence[str], positive: int | None
) -> dict[str, float]:
    """A GLUE task's own metrics; F1 is that of the class `positive`. Several have their mean as `combined_score`."""
    from sklearn.metrics import f1_score, matthews_corrcoef

    predictions = logits.argmax(-1)
    metrics: dict[str, float] = {}
    for name in wanted:
        if name == "accuracy":
            metrics[name] = _mean(predictions == labels)
        elif name == "f1":
            metrics[name] = float(f1_score(labels == positive, predictions == positive, zero_division=0))
        elif name == "matthews_correlation":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of one class in both; the correlation is then 0
                metrics[name] = float(matthews_corrcoef(labels, predictions))
        else:
            raise KeyError(name)
    return {**_combined(metrics), "loss": cross_entropy(logits, labels)}


def regression_metrics(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """For float [N] and float [N]: mean squared error (`mse` and `loss`), and both correlations."""
    errors = predictions.astype(np.float64) - labels.astype(np.float64)
    mse = float(np.mean(errors**2))
    return {"mse": mse, **correlations(predictions, labels), "loss": mse}


def glue_regression_metrics(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """STS-B's: both correlations and their mean, and the mean squared error as `loss`."""
    loss = float(np.mean((predictions.astype(np.float64) - labels.astype(np.float64)) ** 2))
    return {**_combined(correlations(predictions, labels)), "loss": loss}


def correlations(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Pearson's and Spearman's, 0 where one side is constant or there are fewer than two rows."""
    if len(labels) < 2:
        return {"pearson": 0.0, "spearmanr": 0.0}
    from scipy.stats import pearsonr, spearmanr

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy warns of what is constant, and gives nan
        found = {
            "pearson": float(pearsonr(predictions, labels)[0]),
            "spearmanr": float(spearmanr(predictions, labels)[0]),
        }
    return {name: value if math.isfinite(value) else 0.0 for name, value in found.items()}


def multi_label_metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """For float32 [N, L] and 0 or 1 [N, L]: `accuracy` counts rows that are right in all labels; `f1` and `f1_micro` are over
    all decisions together; the means over labels have SparseML's names, too (`macro_average_f1` is `f1_macro`)."""
    predictions, truth = probabilities(logits) > THRESHOLD, labels > 0.5
    macro = _yes_or_no(truth, predictions).mean(0)
    micro = _yes_or_no(truth.reshape(-1, 1), predictions.reshape(-1, 1))[0]
    return {
        "accuracy": _mean((predictions == truth).all(-1)),
        "f1": float(micro[2]),
        "f1_micro": float(micro[2]),
        "f1_macro": float(macro[2]),
        **{f"macro_average_{kind}": float(value) for kind, value in zip(_KINDS, macro, strict=True)},
        "loss": binary_cross_entropy(logits, labels),
    }


def metrics_by_label(logits: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """label -> precision, recall, F1 and in how many rows it is; `labels` are int [N], one each, or 0 or 1 [N, L]."""
    if labels.ndim == 1:
        places = np.arange(len(names))
        truth, predictions = labels[:, None] == places, logits.argmax(-1)[:, None] == places
    else:
        truth, predictions = labels > 0.5, probabilities(logits) > THRESHOLD
    return {
        name: {**{kind: float(value) for kind, value in zip(_KINDS, row, strict=True)}, "support": int(count)}
        for name, row, count in zip(names, _yes_or_no(truth, predictions), truth.sum(0), strict=True)
    }


def _yes_or_no(truth: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """float64 [L, 3]: precision, recall and F1 of each column of bool [N, L]."""
    from sklearn.metrics import precision_recall_fscore_support

    # Column by column: a single column in scikit-learn's table of several labels would mean two classes.
    columns = [
        precision_recall_fscore_support(truth[:, place], predictions[:, place], average="binary", zero_division=0)[:3]
        for place in range(truth.shape[1])
    ]
    return np.array(columns, dtype=np.float64)


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean over rows of log(sum(exp(logits))) - logits[label], in float64."""
    x = logits.astype(np.float64)
    highest = x.max(-1, keepdims=True)
    normalizer = np.log(np.exp(x - highest).sum(-1)) + highest[:, 0]
    return float(np.mean(normalizer - x[np.arange(len(x)), labels]))


def binary_cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean over rows and labels of log(1 + exp(x)) - x * label, in float64."""
    x = logits.astype(np.float64)
    return float(np.mean(np.logaddexp(0.0, x) - x * labels))


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities [N, C] of one class of several."""
    x = logits.astype(np.float64)
    x = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(x / x.sum(-1, keepdims=True))


def probabilities(logits: np.ndarray) -> np.ndarray:
    """The probability of each label for itself."""
    x = logits.astype(np.float64)
    # exp of a negative number only, which cannot overflow.
    small = np.exp(-np.abs(x))
    return np.asarray(np.where(x >= 0, 1.0, small) / (1.0 + small))


def _combined(metrics: dict[str, float]) -> dict[str, float]:
    if len(metrics) < 2:
        return metrics
    return {**metrics, "combined_score": _mean(np.array(list(metrics.values())))}


def _mean(values: Any) -> float:
    return float(np.mean(values))
