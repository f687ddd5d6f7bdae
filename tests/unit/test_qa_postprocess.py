"""The n-best search against a plain double loop over starts and ends, ties included."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparse_accel.tasks.base import Scored, write_predictions
from sparse_accel.tasks.features import Features
from sparse_accel.tasks.qa_postprocess import postprocess
from sparse_accel.tasks.qa_windows import Question, cut_windows, window_spec
from sparse_accel.tasks.reading import Row
from sparse_accel.tasks.squad_rows import BadRows, Example, check_rows
from tests.tiny import tiny_rows, tiny_tokenizer


def plain_search(
    examples: list[Example],
    features: Features,
    starts: list[np.ndarray],
    ends: list[np.ndarray],
    version_2: bool,
    n_best: int,
    longest: int,
    threshold: float,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, float]]:
    """Candidate by candidate: what the documentation of the search says, in loops and lists."""
    answers: dict[str, Any] = {}
    lists: dict[str, Any] = {}
    odds: dict[str, float] = {}
    for number, example in enumerate(examples):
        found = []
        nothing: dict[str, Any] | None = None
        for window in np.flatnonzero(features.facts["example"] == number):
            start, end = starts[window], ends[window]
            if nothing is None or start[0] + end[0] < nothing["score"]:
                nothing = {"span": (0, 0), "score": start[0] + end[0], "start_logit": start[0], "end_logit": end[0]}
            first, last = features.facts["context_start"][window], features.facts["context_end"][window]
            spans = features.extra_of(int(window), "offsets")
            for i in np.argsort(start)[::-1][:n_best]:
                for j in np.argsort(end)[::-1][:n_best]:
                    if first <= i < last and first <= j < last and i <= j < i + longest:
                        span = (int(spans[i][0]), int(spans[j][1]))
                        score = start[i] + end[j]
                        found.append({"span": span, "score": score, "start_logit": start[i], "end_logit": end[j]})
        if version_2 and nothing is not None:
            found.append(nothing)
        best = sorted(found, key=lambda entry: entry["score"], reverse=True)[:n_best]
        if version_2 and nothing is not None and all(entry["span"] != (0, 0) for entry in best):
            best.append(nothing)
        for entry in best:
            entry["text"] = example.context[slice(*entry.pop("span"))]
        if not best or (len(best) == 1 and best[0]["text"] == ""):
            best.insert(0, {"text": "empty", "start_logit": 0.0, "end_logit": 0.0, "score": 0.0})
        scores = np.array([entry.pop("score") for entry in best])
        weights = np.exp(scores - scores.max())
        for entry, weight in zip(best, weights / weights.sum(), strict=True):
            entry["probability"] = weight
        answers[example.id] = best[0]["text"]
        if version_2 and nothing is not None:
            chosen = next(entry for entry in best if entry["text"] != "")
            odds[example.id] = float(
                nothing["start_logit"] + nothing["end_logit"] - chosen["start_logit"] - chosen["end_logit"]
            )
            answers[example.id] = "" if odds[example.id] > threshold else chosen["text"]
        lists[example.id] = [
            {key: value if isinstance(value, str) else float(value) for key, value in entry.items()} for entry in best
        ]
    return answers, lists, odds


World = tuple[list[Example], Features]


def world_of(rows: list[dict[str, Any]], tokenizer: Any, max_length: int, stride: int) -> World:
    examples, _ = check_rows(
        [Row(f"rows: {n}", row) for n, row in enumerate(rows)], BadRows("error"), answers="optional"
    )
    spec = window_spec(tokenizer, max_length=max_length, stride=stride, labels=False)
    questions = [Question(example.question, example.context, None, None) for example in examples]
    return examples, cut_windows(questions, spec, None).features


@pytest.fixture(scope="module")
def tiny_windows(tmp_path_factory: pytest.TempPathFactory) -> World:
    tokenizer = tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return world_of(tiny_rows(24, seed=4), tokenizer, max_length=40, stride=12)


Logits = Callable[[np.random.Generator, int], np.ndarray]

# What models give: ordinary numbers, confident ones, numbers with 8 bits of precision, ties everywhere, and logits
# whose best positions lie outside the context, so that no candidate is left.
FAMILIES: dict[str, Logits] = {
    "normal": lambda rng, size: rng.normal(size=size).astype(np.float32),
    "peaked": lambda rng, size: (8 * rng.standard_t(2, size=size)).astype(np.float32),
    "rounded": lambda rng, size: np.round(rng.normal(size=size) * 8).astype(np.float32) / 8,
    "ties": lambda rng, size: rng.integers(0, 2, size=size).astype(np.float32),
    "all equal": lambda rng, size: np.zeros(size, dtype=np.float32),
    "first tokens": lambda rng, size: -np.arange(size, dtype=np.float32),
}


def assert_same_search(world: World, family: str, version_2: bool, n_best: int, longest: int, threshold: float) -> None:
    examples, features = world
    rng = np.random.default_rng(7)
    starts, ends = ([FAMILIES[family](rng, size) for size in features.lengths] for _ in range(2))
    answers, lists, odds = plain_search(examples, features, starts, ends, version_2, n_best, longest, threshold)
    ours = postprocess(
        examples,
        features,
        starts,
        ends,
        version_2_with_negative=version_2,
        n_best_size=n_best,
        max_answer_length=longest,
        null_score_diff_threshold=threshold,
    )
    assert ours.predictions == answers
    assert ours.nbest == lists
    assert json.dumps(ours.nbest) == json.dumps(lists)
    assert ours.null_odds == (odds if version_2 else None)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("version_2", [False, True])
@pytest.mark.parametrize(("n_best", "longest", "threshold"), [(20, 30, 0.0), (5, 3, 1.5), (1, 30, -1.0), (100, 1, 0.0)])
def test_search_equals_a_plain_double_loop(
    tiny_windows: World, family: str, version_2: bool, n_best: int, longest: int, threshold: float
) -> None:
    assert_same_search(tiny_windows, family, version_2, n_best, longest, threshold)


@pytest.mark.parametrize("version_2", [False, True])
@pytest.mark.parametrize("family", ["normal", "ties"])
def test_search_equals_a_plain_double_loop_on_real_questions(
    shared_data: Path, real_tokenizer: Any, family: str, version_2: bool
) -> None:
    name = "dev-v2.0-subset.json.gz" if version_2 else "dev-v1.1.json.gz"
    document = json.loads(gzip.decompress((shared_data / "squad" / name).read_bytes()))
    rows = [
        {**question, "context": paragraph["context"]}
        for article in document["data"]
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]
    # Every twentieth question, so that all articles take part and the test stays quick.
    world = world_of(rows[::20], real_tokenizer, max_length=384, stride=128)
    assert_same_search(world, family, version_2, n_best=20, longest=30, threshold=0.0)


def test_an_example_without_any_window_is_answered_by_the_placeholder(tiny_windows: World) -> None:
    """So it is with --max_eval_samples, which limits the features after the examples."""
    examples, features = tiny_windows
    one = features.take(1)
    logits = [np.zeros(size, dtype=np.float32) for size in one.lengths]
    found = postprocess(examples, one, logits, logits)
    assert found.predictions[examples[-1].id] == "empty"
    assert found.nbest[examples[-1].id] == [{"text": "empty", "start_logit": 0.0, "end_logit": 0.0, "probability": 1.0}]
    assert found.predictions[examples[0].id] != "empty"


def test_a_model_that_knows_the_answer_gives_it(tiny_windows: World) -> None:
    examples, features = tiny_windows
    starts, ends = [], []
    for index, size in enumerate(features.lengths):
        example = examples[features.facts["example"][index]]
        begin = example.answer_starts[0]
        spans = features.extra_of(index, "offsets")
        inside = np.arange(size) >= features.facts["context_start"][index]
        starts.append(np.where(inside & (spans[:, 0] == begin), 9.0, 0.0).astype(np.float32))
        ends.append(
            np.where(inside & (spans[:, 1] == begin + len(example.answer_texts[0])), 9.0, 0.0).astype(np.float32)
        )
    assert postprocess(examples, features, starts, ends).predictions == {e.id: e.answer_texts[0] for e in examples}


def test_logits_of_another_split_are_refused(tiny_windows: World) -> None:
    examples, features = tiny_windows
    with pytest.raises(ValueError, match="features, 1 start and 1 end logits"):
        postprocess(examples, features, [np.zeros(3)], [np.zeros(3)])


def test_files_are_named_by_prefix_and_replace_older_ones_whole(tmp_path: Path) -> None:
    write_predictions(tmp_path, "eval", Scored({}, {"predictions": {"a": "old"}}))
    written = write_predictions(tmp_path, "eval", Scored({}, {"predictions": {"a": "blé"}, "null_odds": {"a": -1.5}}))
    assert [path.name for path in written] == ["eval_predictions.json", "eval_null_odds.json"]
    assert json.loads(written[0].read_text()) == {"a": "blé"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eval_null_odds.json", "eval_predictions.json"]
