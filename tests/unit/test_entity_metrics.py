"""Entity metrics: fixed values that seqeval gave, seqeval itself where it is installed, and what must hold in any case."""

from __future__ import annotations

import importlib.util
import random
import warnings

import pytest

from sparse_accel.tasks.entity_metrics import Entity, count_entities, entity_metrics, find_entities

# Tags of all schemes, and some of none.
TAGS = [
    "O",
    "O",
    "B-A",
    "I-A",
    "B-B",
    "I-B",
    "E-A",
    "S-A",
    "E-B",
    "S-B",
    "B",
    "I",
    "O-A",
    "L-A",
    "U-A",
    "NN",
    ".",
    "B-A-b",
]

TRUTH = [
    ["B-PER", "I-PER", "O", "B-LOC", "O"],
    ["I-ORG", "I-ORG", "B-ORG", "O"],
    ["O", "O", "S-MISC", "B-PER", "E-PER"],
    ["B-PER"],
]
GUESSES = [
    ["B-PER", "I-PER", "O", "I-LOC", "I-LOC"],
    ["B-ORG", "I-ORG", "I-ORG", "O"],
    ["B-LOC", "O", "S-MISC", "B-PER", "I-PER"],
    ["O"],
]
# seqeval 1.2.2: classification_report(TRUTH, GUESSES, output_dict=True) and accuracy_score.
SEQEVAL = {
    "precision": 0.5,
    "recall": 0.42857142857142855,
    "f1": 0.4615384615384615,
    "accuracy": 0.5333333333333333,
    "LOC_precision": 0.0,
    "LOC_recall": 0.0,
    "LOC_f1": 0.0,
    "LOC_number": 1.0,
    "MISC_f1": 1.0,
    "ORG_number": 2.0,
    "PER_precision": 1.0,
    "PER_recall": 0.6666666666666666,
    "PER_f1": 0.8,
    "PER_number": 3.0,
    "overall_f1": 0.4615384615384615,
}


def test_the_values_are_those_that_seqeval_gave() -> None:
    metrics = entity_metrics(TRUTH, GUESSES, by_type=True)
    assert {name: metrics[name] for name in SEQEVAL} == SEQEVAL


def random_tags(rng: random.Random, count: int) -> list[list[str]]:
    return [[rng.choice(TAGS) for _ in range(rng.randint(1, 8))] for _ in range(count)]


needs_seqeval = pytest.mark.skipif(
    importlib.util.find_spec("seqeval") is None or importlib.util.find_spec("sklearn") is None,
    reason="seqeval (and scikit-learn) is not installed: the fixed values above stand for it",
)


@needs_seqeval
@pytest.mark.filterwarnings("ignore")
def test_random_tags_give_the_entities_and_scores_of_seqeval() -> None:
    from seqeval.metrics import accuracy_score, classification_report
    from seqeval.metrics.sequence_labeling import get_entities

    warnings.simplefilter("ignore")
    rng = random.Random(0)
    for tags in random_tags(rng, 3000):
        assert [(found.label, found.first, found.last) for found in find_entities(tags)] == get_entities(tags)
    for _ in range(50):
        truth = random_tags(rng, 6)
        guesses = [[rng.choice(TAGS) for _ in tags] for tags in truth]
        metrics = entity_metrics(truth, guesses, by_type=True)
        report = classification_report(truth, guesses, output_dict=True, zero_division=0)
        total = report.pop("micro avg")
        del report["macro avg"], report["weighted avg"]
        for name, theirs in {**report, "overall": total}.items():
            ours = {key: metrics[f"{name}_{key}"] for key in ("precision", "recall", "f1")}
            assert ours == {key: theirs["f1-score" if key == "f1" else key] for key in ours}
        assert metrics["accuracy"] == metrics["overall_accuracy"] == accuracy_score(truth, guesses)
        assert metrics["f1"] == metrics["overall_f1"]
        assert {key for key in metrics if key.endswith("_number")} == {f"{name}_number" for name in report}


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        (["B-A", "I-A", "B-A", "O"], [Entity(0, 1, "A"), Entity(2, 2, "A")]),
        (["I-A", "I-A", "I-B"], [Entity(0, 1, "A"), Entity(2, 2, "B")]),
        (["S-A", "S-A", "B-A", "I-A", "E-A"], [Entity(0, 0, "A"), Entity(1, 1, "A"), Entity(2, 4, "A")]),
        (["O", "B-A-b"], [Entity(1, 1, "A-b")]),
        (["O", "O"], []),
        ([], []),
    ],
)
def test_entities_of_all_schemes(tags: list[str], found: list[Entity]) -> None:
    assert find_entities(tags) == found


def test_nothing_found_in_nothing_scores_0_and_is_all_accurate() -> None:
    scores = {"precision": 0.0, "recall": 0.0, "f1": 0.0, "accuracy": 1.0}
    overall = {f"overall_{name}": value for name, value in scores.items()}
    assert entity_metrics([["O", "O"]], [["O", "O"]], by_type=True) == {**scores, **overall}
    assert count_entities([["O"]], [["O"]]) == {}
