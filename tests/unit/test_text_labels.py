"""Labels of texts: their kind, their order, and every way in which one can be wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sparse_accel.errors import DataError
from sparse_accel.tasks.glue import GLUE
from sparse_accel.tasks.text_labels import (
    BadLabelError,
    LabelSet,
    glue_labels,
    label_kind,
    label_set,
    model_label_set,
    order_in,
)


def placed(labels: list[Any]) -> list[tuple[str, Any]]:
    return [(f"d.csv: row {number}", label) for number, label in enumerate(labels, start=1)]


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        (["joy", "fear", "joy"], "classes"),
        (["0", "12", "3"], "classes"),
        ([0, 1, 2], "classes"),
        ([True, False], "classes"),
        ([0.5, 1, 2.0], "regression"),
        (["0.5", "1", "2e1"], "regression"),
        ([["joy"], [], ["joy", "fear"]], "multi"),
        (['["joy"]', "[]", "['joy', 'fear']"], "multi"),
        ([[0, 2], [1]], "multi"),
        ([[1.0, 0.0], [0.0, 0.0]], "multi"),
        (["[not a list", "other]"], "classes"),
    ],
)
def test_the_kind_of_labels(labels: list[Any], kind: str) -> None:
    assert label_kind(placed(labels)) == (kind, {})


@pytest.mark.parametrize(
    ("labels", "index", "problem"),
    [
        (["joy", "", "fear"], 1, "has no label"),
        ([1, 2, None], 2, "has no label"),
        ([1, 2, "joy", 3], 2, r"the label 'joy' is text, and most labels are a number \(d.csv: row 1: 1\)"),
        (["joy", 3.5, "fear"], 1, "the label 3.5 is a number, and most labels are text"),
        ([["joy"], "joy", ["fear"]], 1, "the label 'joy' is text, and most labels are a list"),
        (["joy", {"label": 1}], 1, "the label should be text or a number, it is an object"),
        ([["joy"], [{"label": 1}], ["fear"]], 1, "the label should be text or a number, it is an object"),
        ([["joy"], ["joy", "joy"], ["fear"]], 1, "names the label 'joy' twice"),
        (["joy", "[" * 100_000 + "]" * 100_000, 1, "fear"], 2, "the label 1 is a number"),
        (["joy", "1" * 5000, 1, "fear"], 2, "the label 1 is a number"),
    ],
)
def test_labels_of_another_kind_than_most_are_named(labels: list[Any], index: int, problem: str) -> None:
    _, problems = label_kind(placed(labels))
    assert list(problems) == [index]
    with pytest.raises(DataError, match=problem):
        raise DataError(problems[index])


def test_data_without_any_label_is_an_error() -> None:
    with pytest.raises(DataError, match=r"d.csv: row 1: has no label, and neither has any other row"):
        label_kind(placed(["", None]))


def test_a_one_or_zero_for_every_label_is_not_taken_for_the_names_of_two_labels() -> None:
    with pytest.raises(
        DataError, match=r"row 1: names the label 0 twice, \[0, 1, 0\]; .*1.0 and 0.0, and no row has a label"
    ):
        label_kind(placed([[0, 1, 0], [1, 1, 0]]))


def test_labels_are_in_order_or_in_the_models_own() -> None:
    assert label_set(["b", "a", "b"], "classes", None, "d")[0].names == ("a", "b")
    assert label_set(["10", 9, "-1"], "classes", None, "d")[0].names == ("-1", "9", "10")
    assert label_set(["b", "a"], "classes", ("b", "a"), "d")[0].names == ("b", "a")
    assert label_set(["b", "a"], "classes", ("B", "A"), "d")[0].encode("b") == 0
    assert label_set([["b"], ["c", "a"]], "multi", ("c", "b", "a"), "d")[0].names == ("c", "b", "a")
    taken, notes = label_set([0, 1, 1], "classes", ("bad", "good"), "d")
    assert taken.names == ("bad", "good") and taken.encode("1") == 1 and "0 is 'bad', 1 is 'good'" in notes[0]
    new, notes = label_set(["good", "fair"], "classes", ("bad", "good"), "d")
    assert new.names == ("fair", "good") and "its head is kept" in notes[0]
    assert "its head begins anew" in label_set(["good", "fair", "poor"], "classes", ("bad", "good"), "d")[1][0]
    assert label_set([0, 1, 2], "classes", ("bad", "good"), "d")[0].names == ("0", "1", "2")


def test_a_column_of_many_labels_is_doubted_and_one_of_a_single_label_refused() -> None:
    _, notes = label_set([f"text {number}" for number in range(50)], "classes", None, "d")
    assert "50 different labels in 50 rows" in notes[0]
    with pytest.raises(DataError, match="every row has the label 'a'; at least two"):
        label_set(["a", "a"], "classes", None, "d")


def test_glue_numbers_mean_its_own_order_whatever_the_models() -> None:
    labels = glue_labels(GLUE["mnli"], ("CONTRADICTION", "NEUTRAL", "ENTAILMENT"))
    assert labels.names == ("CONTRADICTION", "NEUTRAL", "ENTAILMENT")
    assert [labels.encode(0), labels.encode("1"), labels.encode("contradiction")] == [2, 1, 0]
    assert glue_labels(GLUE["rte"], ("yes", "no")).names == ("entailment", "not_entailment")
    assert glue_labels(GLUE["stsb"], None).encode("3.8") == 3.8


THREE = LabelSet("classes", ("joy", "fear", "love"), ("joy", "fear", "love"))
SEVERAL = LabelSet("multi", ("joy", "fear", "love"), ("joy", "fear", "love"))


@pytest.mark.parametrize(
    ("labels", "value", "problem"),
    [
        (THREE, "laugh", "the label 'laugh' is not one of the 3 labels; known: fear, joy, love"),
        (THREE, "joi", "did you mean 'joy'"),
        (THREE, 3, "the label 3 is out of range: there are 3 labels, 0 to 2"),
        (THREE, "-1", r"out of range: there are 3 labels, 0 to 2 \(-1 stands for a row without a label\)"),
        (THREE, ["joy", "fear"], "has 2 labels.*each row has exactly one label"),
        (THREE, "", "has no label"),
        (THREE, 0.5, "0.5 is a number with a fraction; the labels are 'joy', 'fear', 'love'"),
        (SEVERAL, [1.0, 0.0], "has 2 labels, a 1 or 0 for each of 3 is expected"),
        (SEVERAL, [1.0, 0.0, 0.5], "should be 0 or 1 each"),
        (SEVERAL, ["joy", "fera"], "'fera' is not one of the 3 labels; did you mean 'fear'"),
        (SEVERAL, "joy", "the labels should be a list, they are text"),
        (LabelSet("regression"), "joy", "the label 'joy' is no number"),
        (LabelSet("regression"), float("nan"), "the label is nan, which is no number that could be learned"),
        (LabelSet("regression"), "inf", "the label is inf"),
        (LabelSet("regression"), 1e300, "larger than single precision"),
        (LabelSet("regression"), 10**400, "larger than single precision"),
        (LabelSet("classes"), "joy", "the model's config does not name its labels"),
        (LabelSet("classes"), 10**12, "the model's config does not name its labels"),
        (SEVERAL, [0, 1, 0], "names the label 0 twice"),
    ],
)
def test_a_bad_label_says_what_would_be_right(labels: LabelSet, value: Any, problem: str) -> None:
    with pytest.raises(BadLabelError, match=problem):
        labels.encode(value)


def test_good_labels_become_numbers() -> None:
    assert [THREE.encode(value) for value in ("love", "LOVE", 2, "2", np.int64(2))] == [2] * 5
    assert LabelSet("classes").encode("7") == 7
    for value in (["joy", "love"], '["joy", "love"]', [0, 2], [1.0, 0.0, 1.0], [True, False, True]):
        assert SEVERAL.encode(value).tolist() == [1.0, 0.0, 1.0]
    assert SEVERAL.encode([]).tolist() == [0.0, 0.0, 0.0]
    assert LabelSet("classes", ("false", "true")).encode(True) == 1
    vectors = label_set([[0.0, 1.0], [1.0, 1.0]], "multi", None, "d")[0]
    assert vectors.names == ("0", "1") and vectors.encode([0.0, 1.0]).tolist() == [0.0, 1.0]


def test_without_training_the_models_labels_count() -> None:
    assert model_label_set("classes", ("a", "b"), "d").encode("1") == 1
    assert model_label_set("classes", None, "d").names is None
    with pytest.raises(DataError, match="does not name its labels"):
        model_label_set("multi", None, "d")


def test_two_orders_of_the_same_labels() -> None:
    assert order_in(("a", "b", "c"), ("c", "a", "b")) == [1, 2, 0]
    assert order_in(("a", "b"), ("B", "A")) == [1, 0]
    assert order_in(("a", "b"), ("a", "c")) is None and order_in(("a",), ("a", "b")) is None
