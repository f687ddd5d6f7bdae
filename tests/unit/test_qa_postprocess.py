"""The n-best search against a plain double loop over starts and ends, and against itself question by question."""

from __future__ import annotations

import gzip
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparse_accel.tasks.base import LazyFiles, Scored, write_predictions
from sparse_accel.tasks.features import Features
from sparse_accel.tasks.qa_postprocess import postprocess
from sparse_accel.tasks.qa_windows import Question, cut_windows, window_spec
from sparse_accel.tasks.reading import Row
from sparse_accel.tasks.squad_rows import BadRows, Example, check_rows
from tests import qa_question_by_question
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
    "bf16": lambda rng, size: (
        (8 * rng.standard_t(2, size=size)).astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    ).view(np.float32),
    "fp64": lambda rng, size: 8 * rng.standard_t(2, size=size),
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


def real_world(shared_data: Path, tokenizer: Any, version_2: bool, step: int = 1) -> World:
    """Every `step`-th question, so that all articles take part."""
    name = "dev-v2.0-subset.json.gz" if version_2 else "dev-v1.1.json.gz"
    document = json.loads(gzip.decompress((shared_data / "squad" / name).read_bytes()))
    rows = [
        {**question, "context": paragraph["context"]}
        for article in document["data"]
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]
    return world_of(rows[::step], tokenizer, max_length=384, stride=128)


@pytest.mark.parametrize("version_2", [False, True])
@pytest.mark.parametrize("family", ["peaked", "ties"])
def test_search_equals_a_plain_double_loop_on_real_questions(
    shared_data: Path, real_tokenizer: Any, family: str, version_2: bool
) -> None:
    world = real_world(shared_data, real_tokenizer, version_2, step=30)
    assert_same_search(world, family, version_2, n_best=20, longest=30, threshold=0.0)


@pytest.mark.parametrize("version_2", [False, True])
@pytest.mark.parametrize("family", ["peaked", "bf16", "ties", "first tokens"])
def test_search_equals_that_of_single_questions_on_real_ones(
    shared_data: Path, real_tokenizer: Any, family: str, version_2: bool
) -> None:
    world = real_world(shared_data, real_tokenizer, version_2, step=20)
    assert_same_as_one_by_one(world, family, version_2)


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("version_2", [False, True])
def test_search_equals_both_references_on_every_real_question(
    shared_data: Path, real_tokenizer: Any, version_2: bool
) -> None:
    world = real_world(shared_data, real_tokenizer, version_2)
    for family in ("peaked", "bf16", "ties", "first tokens"):
        assert_same_search(world, family, version_2, n_best=20, longest=30, threshold=0.0)
        assert_same_as_one_by_one(world, family, version_2)


def assert_same_as_one_by_one(world: World, family: str, version_2: bool, **limits: Any) -> None:
    examples, features = world
    rng = np.random.default_rng(11)
    starts, ends = ([FAMILIES[family](rng, size) for size in features.lengths] for _ in range(2))
    ours = postprocess(examples, features, starts, ends, version_2_with_negative=version_2, **limits)
    wanted = qa_question_by_question.postprocess(
        examples, features, starts, ends, version_2_with_negative=version_2, **limits
    )
    assert ours.predictions == wanted.predictions
    assert ours.null_odds == wanted.null_odds
    assert json.dumps(ours.nbest) == json.dumps(wanted.nbest)
    assert ours.spans == wanted.spans


@pytest.mark.parametrize("family", ["normal", "bf16", "ties"])
@pytest.mark.parametrize("version_2", [False, True])
@pytest.mark.parametrize("n_best", [1, 2, 20])
def test_tokens_that_cover_no_character_are_searched_as_ever(
    tiny_windows: World, family: str, version_2: bool, n_best: int
) -> None:
    """Byte-level and SentencePiece tokenizers have such tokens; a question may have no others, or no window at all."""
    examples, features = tiny_windows
    offsets = features.extra["offsets"].copy()
    empty = np.random.default_rng(3).random(len(offsets)) < 0.5
    offsets[empty, 1] = offsets[empty, 0]
    offsets[features.bounds[4] : features.bounds[9]] = 0
    kept = replace(features, extra={"offsets": offsets}).take(len(features) - 3)
    for longest in (30, 1):
        assert_same_as_one_by_one(
            (examples, kept),
            family,
            version_2,
            n_best_size=n_best,
            max_answer_length=longest,
            null_score_diff_threshold=0.3,
        )


def test_a_span_whose_score_is_not_a_number_is_no_candidate(tiny_windows: World) -> None:
    examples, features = tiny_windows
    starts, ends = ([FAMILIES["normal"](np.random.default_rng(5), size) for size in features.lengths] for _ in range(2))
    sound = postprocess(examples, features, starts, ends)
    broken = [
        np.full_like(row, np.nan) if owner == 2 else row
        for owner, row in zip(features.facts["example"], starts, strict=True)
    ]
    found = postprocess(examples, features, broken, ends)
    assert found.predictions == sound.predictions | {examples[2].id: "empty"}
    assert sound.predictions[examples[2].id] != "empty"


def test_an_infinitely_low_logit_is_a_candidate_like_others(tiny_windows: World) -> None:
    examples, features = tiny_windows
    lowest = [np.full(size, -np.inf, np.float32) for size in features.lengths]
    starts = [FAMILIES["normal"](np.random.default_rng(5), size) for size in features.lengths]
    with np.errstate(invalid="ignore"):  # the probabilities are not numbers
        wanted = qa_question_by_question.postprocess(examples, features, starts, lowest, n_best_size=5)
    assert postprocess(examples, features, starts, lowest, n_best_size=5).predictions == wanted.predictions


def test_files_are_made_when_they_are_read_and_whole_in_another_process() -> None:
    made: list[str] = []
    files = LazyFiles({"a": lambda: made.append("a") or {"x": 1}, "b": lambda: made.append("b") or {"y": 2}})
    assert (list(files), len(files), made) == (["a", "b"], 2, [])
    assert files["b"] == {"y": 2} and files["b"] is files["b"]
    assert made == ["b"]
    copy = pickle.loads(pickle.dumps(Scored({"f1": 1.0}, files)))
    assert copy.files == {"a": {"x": 1}, "b": {"y": 2}} == dict(files)


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
    logits = [np.zeros(size) for size in features.lengths]
    with pytest.raises(ValueError, match=rf"feature 1 has {features.lengths[1]} tokens, 99 start"):
        postprocess(examples, features, [logits[0], np.zeros(99), *logits[2:]], logits)


def test_files_are_named_by_prefix_and_replace_older_ones_whole(tmp_path: Path) -> None:
    write_predictions(tmp_path, "eval", Scored({}, {"predictions": {"a": "old"}}))
    written = write_predictions(tmp_path, "eval", Scored({}, {"predictions": {"a": "blé"}, "null_odds": {"a": -1.5}}))
    assert [path.name for path in written] == ["eval_predictions.json", "eval_null_odds.json"]
    assert json.loads(written[0].read_text()) == {"a": "blé"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eval_null_odds.json", "eval_predictions.json"]
