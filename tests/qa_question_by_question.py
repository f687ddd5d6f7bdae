"""The n-best search as it was first written, question by question: the reference of the one that takes all at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparse_accel.tasks.features import Features
from sparse_accel.tasks.squad_rows import Example


@dataclass(frozen=True)
class Answers:
    """What was found, by example id.

    predictions: the answer; nbest: the candidates, best first, with logits and probability; null_odds: how far the
    score of "no answer" lies above that of the best answer (None unless unanswerable questions are allowed); spans: the
    characters of the context that each candidate covers, the end exclusive, (0, 0) for none.
    """

    predictions: dict[str, str]
    nbest: dict[str, list[dict[str, Any]]]
    null_odds: dict[str, float] | None
    spans: dict[str, list[tuple[int, int]]]


@dataclass(frozen=True)
class _Candidates:
    """Spans in the order of the search, [M] each: characters of the context, and logits."""

    begins: np.ndarray
    ends: np.ndarray
    start_logits: np.ndarray
    end_logits: np.ndarray

    @property
    def scores(self) -> np.ndarray:
        sums: np.ndarray = self.start_logits + self.end_logits
        return sums


def postprocess(
    examples: Sequence[Example],
    features: Features,
    start_logits: Sequence[np.ndarray],
    end_logits: Sequence[np.ndarray],
    *,
    version_2_with_negative: bool = False,
    n_best_size: int = 20,
    max_answer_length: int = 30,
    null_score_diff_threshold: float = 0.0,
) -> Answers:
    """The best spans of every example over all its windows.

    `start_logits[n]` and `end_logits[n]` belong to feature n, one number a token, without padding. Per window the
    `n_best_size` highest starts meet the `n_best_size` highest ends; spans that leave the context, run backwards or
    have more than `max_answer_length` tokens are dropped. Ties are resolved as the example does: `np.argsort`
    within a window, first come first served among spans. Raises ValueError when the numbers of
    features and logits differ.
    """
    if not len(features) == len(start_logits) == len(end_logits):
        raise ValueError(f"{len(features)} features, {len(start_logits)} start and {len(end_logits)} end logits")
    windows: list[list[int]] = [[] for _ in examples]
    for feature, example in enumerate(features.facts["example"].tolist()):
        windows[example].append(feature)

    predictions: dict[str, str] = {}
    nbest: dict[str, list[dict[str, Any]]] = {}
    null_odds: dict[str, float] = {}
    spans: dict[str, list[tuple[int, int]]] = {}
    for example, indices in zip(examples, windows, strict=True):
        candidates = [
            _window_candidates(features, index, start_logits[index], end_logits[index], n_best_size, max_answer_length)
            for index in indices
        ]
        null = _null_candidate(indices, start_logits, end_logits) if version_2_with_negative else None
        ranked, spans[example.id] = _ranked(candidates, null, n_best_size, example.context)
        nbest[example.id] = [
            {key: value if isinstance(value, str) else float(value) for key, value in entry.items()} for entry in ranked
        ]
        if null is None:
            predictions[example.id] = ranked[0]["text"]
        else:
            # Spans without text (tokens that cover no character) are no answers either.
            best = next((entry for entry in ranked if entry["text"]), ranked[0])
            odds = sum(null) - best["start_logit"] - best["end_logit"]
            null_odds[example.id] = float(odds)
            predictions[example.id] = "" if odds > null_score_diff_threshold else best["text"]
    return Answers(predictions, nbest, null_odds if version_2_with_negative else None, spans)


def _window_candidates(
    features: Features,
    index: int,
    start_logits: np.ndarray,
    end_logits: np.ndarray,
    n_best_size: int,
    max_answer_length: int,
) -> _Candidates:
    starts = np.argsort(start_logits)[-1 : -n_best_size - 1 : -1]
    ends = np.argsort(end_logits)[-1 : -n_best_size - 1 : -1]
    first, last = features.facts["context_start"][index], features.facts["context_end"][index]
    starts = starts[(starts >= first) & (starts < last)]
    ends = ends[(ends >= first) & (ends < last)]
    lengths = ends[None, :] - starts[:, None] + 1
    rows, columns = np.nonzero((lengths >= 1) & (lengths <= max_answer_length))
    starts, ends = starts[rows], ends[columns]
    offsets = features.extra_of(index, "offsets")
    return _Candidates(offsets[starts, 0], offsets[ends, 1], start_logits[starts], end_logits[ends])


def _null_candidate(
    indices: Sequence[int], start_logits: Sequence[np.ndarray], end_logits: Sequence[np.ndarray]
) -> tuple[np.floating[Any], np.floating[Any]] | None:
    """Start and end logit of the first token, of the window where their sum is lowest; None without windows."""
    pairs = [(start_logits[index][0], end_logits[index][0]) for index in indices]
    return min(pairs, key=sum, default=None)


def _ranked(
    candidates: Sequence[_Candidates], null: tuple[Any, Any] | None, n_best_size: int, context: str
) -> tuple[list[dict[str, Any]], list[tuple[int, int]]]:
    """The best candidates with text and probability, best first, and the characters of each; never empty."""
    spans = [(span.begins, span.ends, span.start_logits, span.end_logits) for span in candidates]
    if null is not None:
        spans.append(tuple(np.array([value]) for value in (0, 0, *null)))  # type: ignore[arg-type]
    entries: list[dict[str, Any]] = []
    scores: list[Any] = []
    characters: list[tuple[int, int]] = []
    if spans:
        begins, ends, starts, stops = (np.concatenate(column) for column in zip(*spans, strict=True))
        sums = starts + stops
        # A stable sort of the negative keeps the first of equals first, as sorted(reverse=True) does.
        best = np.argsort(-sums, kind="stable")[:n_best_size]
        if null is not None and not np.any((begins[best] == 0) & (ends[best] == 0)):
            best = np.append(best, len(sums) - 1)
        entries = [
            {"start_logit": starts[i], "end_logit": stops[i], "text": context[begins[i] : ends[i]]}
            for i in best.tolist()
        ]
        scores = list(sums[best])
        characters = [(int(begins[i]), int(ends[i])) for i in best.tolist()]
    if not entries or (len(entries) == 1 and not entries[0]["text"]):
        entries.insert(0, {"text": "empty", "start_logit": 0.0, "end_logit": 0.0})
        scores.insert(0, 0.0)
        characters.insert(0, (0, 0))
    powers = np.exp(np.array(scores) - np.max(scores))
    for entry, probability in zip(entries, powers / powers.sum(), strict=True):
        entry["probability"] = probability
    return entries, characters
