"""Exact match and F1 against the published scores and against rules worked out by hand."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from sparse_accel.tasks.squad_metrics import Reference, normalize_answer, squad_v1, squad_v2, word_f1


def read(path: Path) -> Any:
    return json.loads(gzip.decompress(path.read_bytes()))


def references_of(document: Any) -> list[Reference]:
    return [
        Reference(question["id"], [answer["text"] for answer in question["answers"]])
        for article in document["data"]
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]


# The data folder's README gives these figures; the baseline lacks 13 questions and answers 28 that are not asked.
PUBLISHED = {
    "bert-ensemble": {"exact_match": 86.20624408703878, "f1": 92.19557978351145},
    "logistic-regression": {"exact_match": 40.14191106906339, "f1": 50.98153647324461},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_predictions_score_what_they_are_known_to_score(name: str, shared_data: Path) -> None:
    references = references_of(read(shared_data / "squad" / "dev-v1.1.json.gz"))
    predictions = read(shared_data / "squad" / "predictions-dev-v1.1" / f"{name}.json.gz")
    assert squad_v1(predictions, references) == PUBLISHED[name]


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Cat, in-a \n hat!", "cat ina hat"),
        ("theatre", "theatre"),
        ("a an the", ""),
        ("“quoted”", "“quoted”"),  # only ASCII punctuation is dropped
        ("القرآن الكريم", "القرآن الكريم"),
        ("中文，答案", "中文，答案"),  # noqa: RUF001
    ],
)
def test_normalization(text: str, normal: str) -> None:
    assert normalize_answer(text) == normal


def test_f1_counts_words_as_often_as_both_have_them() -> None:
    # "red red blue" against "red blue green": 2 shared; precision 2/3, recall 2/3.
    assert word_f1("red red blue".split(), "red blue green".split()) == pytest.approx(2 / 3)
    assert word_f1(["red"], ["blue"]) == 0.0


def test_v1_takes_the_best_answer_and_gives_nothing_for_a_missing_prediction() -> None:
    references = [Reference("a", ["red", "blue sky"]), Reference("b", ["two"]), Reference("c", ["three"])]
    scores = squad_v1({"a": "blue sea", "b": "the two", "x": "nobody asked"}, references)
    assert scores["exact_match"] == pytest.approx(100 / 3)
    assert scores["f1"] == pytest.approx(100 * (0.5 + 1.0) / 3)


def test_v1_and_v2_differ_where_nothing_is_left_after_normalization() -> None:
    assert squad_v1({"a": "the"}, [Reference("a", ["a"])]) == {"exact_match": 100.0, "f1": 0.0}
    assert squad_v2({"a": "the"}, [Reference("a", ["a"])])["f1"] == 100.0


def test_v1_refuses_a_question_without_an_answer() -> None:
    with pytest.raises(ValueError, match="question 'a' has no answer"):
        squad_v1({"a": ""}, [Reference("a", [])])


def test_v2_worked_out_by_hand() -> None:
    references = [
        Reference("right", ["red"]),
        Reference("half", ["red car"]),
        Reference("silent", ["blue"]),
        Reference("rightly silent", []),
        Reference("wrongly loud", []),
    ]
    predictions = {"right": "red", "half": "a car", "silent": "", "rightly silent": "", "wrongly loud": "green"}
    odds = {"right": 0.1, "half": 0.2, "wrongly loud": 0.3, "silent": 0.8, "rightly silent": 0.9}
    scores = squad_v2(predictions, references, odds)
    assert scores == pytest.approx(
        {
            "exact": 40.0,  # right, rightly silent
            "f1": 100 * (1 + 2 / 3 + 1) / 5,
            "total": 5,
            "HasAns_exact": 100 / 3,
            "HasAns_f1": 100 * (1 + 2 / 3) / 3,
            "HasAns_total": 3,
            "NoAns_exact": 50.0,
            "NoAns_f1": 50.0,
            "NoAns_total": 2,
            # Silence everywhere gives 2; answering up to 0.1 adds the right one, up to 0.2 the half; 0.3 costs one.
            "best_exact": 60.0,
            "best_exact_thresh": 0.1,
            "best_f1": 100 * (2 + 1 + 2 / 3) / 5,
            "best_f1_thresh": 0.2,
        }
    )


def test_v2_reports_no_group_that_has_no_question() -> None:
    assert not any(key.startswith("NoAns") for key in squad_v2({"a": "red"}, [Reference("a", ["red"])]))
    assert not any(key.startswith("HasAns") for key in squad_v2({"a": ""}, [Reference("a", [])]))


def test_v2_a_probability_above_the_threshold_is_an_answer_of_none() -> None:
    references = [Reference("a", ["red"]), Reference("b", [])]
    scores = squad_v2({"a": "red", "b": "blue"}, references, {"a": 0.9, "b": 0.9}, no_answer_threshold=0.5)
    assert (scores["HasAns_exact"], scores["NoAns_exact"]) == (0.0, 100.0)


def test_v2_best_threshold_is_the_best_of_all_thresholds() -> None:
    """Against trying every threshold: below it the prediction counts, above it the question is left unanswered."""
    rng = random.Random(0)
    references = [Reference(str(n), ["red"] if rng.random() < 0.6 else []) for n in range(200)]
    predictions = {r.id: rng.choice(["red", "blue"]) for r in references}
    odds = {r.id: rng.random() for r in references}
    scores = squad_v2(predictions, references, odds)

    def exact_at(threshold: float) -> float:
        given = [predictions[r.id] if odds[r.id] <= threshold else "" for r in references]
        return 100 * sum(text in (r.answers or [""]) for text, r in zip(given, references, strict=True)) / 200

    assert scores["best_exact"] == pytest.approx(max(exact_at(threshold) for threshold in [-1.0, *odds.values()]))
    assert exact_at(scores["best_exact_thresh"]) == pytest.approx(scores["best_exact"])


def test_v2_on_real_questions_is_perfect_for_the_first_answers(shared_data: Path) -> None:
    references = references_of(read(shared_data / "squad" / "dev-v2.0-subset.json.gz"))
    scores = squad_v2({r.id: r.answers[0] if r.answers else "" for r in references}, references)
    assert (scores["exact"], scores["f1"], scores["total"]) == (100.0, 100.0, 6078)
    assert (scores["HasAns_total"], scores["NoAns_total"]) == (2910, 3168)
    silent = squad_v2({r.id: "" for r in references}, references)
    assert silent["exact"] == pytest.approx(100 * 3168 / 6078)
    assert silent["best_exact"] == silent["exact"]
