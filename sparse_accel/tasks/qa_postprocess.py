"""From start and end logits to answers: the n-best search of Hugging Face's question-answering example."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from sparse_accel.tasks.features import Features
from sparse_accel.tasks.squad_rows import Example

# Spans that are scored at a time, so that memory does not grow with the data.
_SPANS_AT_A_TIME = 1 << 18


class Answers:
    """What was found, by example id.

    predictions: the answer; null_odds: how far the score of "no answer" lies above that of the best answer (None unless
    unanswerable questions are allowed). The candidates are gathered when they are first asked for, since only the last
    of many evaluations writes them; until then the logits stay in memory.
    """

    def __init__(self, predictions: dict[str, str], null_odds: dict[str, float] | None, search: _Search) -> None:
        self.predictions = predictions
        self.null_odds = null_odds
        self._search = search

    @property
    def nbest(self) -> dict[str, list[dict[str, Any]]]:
        """The candidates of each question, best first, with logits and probability."""
        return self._lists[0]

    @property
    def spans(self) -> dict[str, list[tuple[int, int]]]:
        """The characters of the context that each candidate covers, the end exclusive, (0, 0) for none."""
        return self._lists[1]

    @cached_property
    def _lists(self) -> tuple[dict[str, list[dict[str, Any]]], dict[str, list[tuple[int, int]]]]:
        examples = self._search.examples
        lists, spans = self._search.candidates(np.arange(len(examples)))
        names = [example.id for example in examples]
        return dict(zip(names, lists, strict=True)), dict(zip(names, spans, strict=True))


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
    have more than `max_answer_length` tokens are dropped, and so are those whose score is not a number. Ties are
    resolved as the example does: `np.argsort` within a window, first come first served among spans. Raises ValueError
    when the numbers of features and logits differ, or of tokens and logits in one of them.
    """
    if not len(features) == len(start_logits) == len(end_logits):
        raise ValueError(f"{len(features)} features, {len(start_logits)} start and {len(end_logits)} end logits")
    for index, length in enumerate(features.lengths.tolist()):
        if not length == len(start_logits[index]) == len(end_logits[index]):
            given = f"{len(start_logits[index])} start and {len(end_logits[index])} end logits"
            raise ValueError(f"feature {index} has {length} tokens, {given}")
    search = _Search(
        examples, features, start_logits, end_logits, version_2_with_negative, n_best_size, max_answer_length
    )
    texts, start, end = search.best_answers()
    names = [example.id for example in examples]
    if not version_2_with_negative:
        return Answers(dict(zip(names, texts, strict=True)), None, search)
    # In the logits' own precision, also the comparison with the threshold.
    odds = search.null_scores - start - end
    silent = search.has_windows & (odds > null_score_diff_threshold)
    predictions = {name: "" if no else text for name, no, text in zip(names, silent.tolist(), texts, strict=True)}
    known = zip(names, odds.tolist(), search.has_windows.tolist(), strict=True)
    return Answers(predictions, {name: float(value) for name, value, has in known if has}, search)


@dataclass(frozen=True)
class _Spans:
    """Candidates: window [M], first and last token [M]."""

    windows: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


class _Search:
    """The search over N windows of E examples: the best span of each example, and all candidates of some."""

    def __init__(
        self,
        examples: Sequence[Example],
        features: Features,
        start_logits: Sequence[np.ndarray],
        end_logits: Sequence[np.ndarray],
        version_2: bool,
        n_best_size: int,
        max_answer_length: int,
    ) -> None:
        self.examples = examples
        self.features = features
        self.version_2 = version_2
        self.n_best_size = n_best_size
        self.max_answer_length = max_answer_length
        self.owners = features.facts["example"]
        # [T]: of all windows, end to end, as the features' tokens are.
        self.start_logits, self.end_logits = (
            np.concatenate(rows) if len(rows) else np.empty(0, np.float32) for rows in (start_logits, end_logits)
        )
        # [N, n]: tokens, best first.
        self.top_starts = _highest(start_logits, n_best_size)
        self.top_ends = _highest(end_logits, n_best_size)

        # "No answer" is the first token, in the window where it scores lowest.
        first = features.bounds[:-1]
        nulls = self.start_logits[first] + self.end_logits[first]
        self.null_windows = _first_of_each(self.owners, nulls, np.arange(len(features)), len(examples))
        self.has_windows = self.null_windows >= 0
        self.null_scores = np.zeros(len(examples), nulls.dtype)
        self.null_scores[self.has_windows] = nulls[self.null_windows[self.has_windows]]

    def best_answers(self) -> tuple[list[str], np.ndarray, np.ndarray]:
        """Text, start and end logit of the best answer of each example, [E] each."""
        spans = self._best_spans()
        start, end, scores = self._logits(spans)
        best = _first_of_each(self.owners[spans.windows], -scores, np.arange(len(scores)), len(self.examples))
        found = best >= 0
        begins, stops = np.zeros((2, len(best)), np.int64)
        begins[found], stops[found] = self._characters(spans, best[found])
        texts = [
            example.context[begin:stop] if known else "empty"
            for example, begin, stop, known in zip(
                self.examples, begins.tolist(), stops.tolist(), found.tolist(), strict=True
            )
        ]
        start_of, end_of = np.zeros((2, len(best)), scores.dtype)
        start_of[found], end_of[found] = start[best[found]], end[best[found]]

        # Spans without text (tokens that cover no character) are no answers where others follow, nor is a list whose
        # one place "no answer" may take: there the list itself has to be looked at.
        unclear = found & ((begins >= stops) | (self.version_2 and self.n_best_size == 1))
        numbers = np.flatnonzero(unclear)
        for number, entries in zip(numbers.tolist(), self.candidates(numbers)[0] if len(numbers) else [], strict=True):
            chosen = entries[0]
            if self.version_2:
                chosen = next((entry for entry in entries if entry["text"]), chosen)
            texts[number], start_of[number], end_of[number] = (
                chosen[key] for key in ("text", "start_logit", "end_logit")
            )
        return texts, start_of, end_of

    def candidates(self, numbers: np.ndarray) -> tuple[list[list[dict[str, Any]]], list[list[tuple[int, int]]]]:
        """Of each of the examples `numbers` (ascending): the best candidates with text and probability, best first, and
        the characters of each; never empty."""
        spans = self._best_of_windows(np.flatnonzero(np.isin(self.owners, numbers)))
        start, end, scores = self._logits(spans)
        begins, stops = self._characters(spans, slice(None))
        owners = self.owners[spans.windows]
        is_null = np.zeros(len(owners), bool)
        if self.version_2:
            # Behind all others, where a stable sort leaves them among equals.
            silent = numbers[self.has_windows[numbers]]
            first = self.features.bounds[self.null_windows[silent]]
            owners, is_null = np.append(owners, silent), np.append(is_null, np.ones(len(silent), bool))
            start, end = np.append(start, self.start_logits[first]), np.append(end, self.end_logits[first])
            scores = np.append(scores, self.null_scores[silent])
            begins, stops = (np.append(column, np.zeros_like(silent)) for column in (begins, stops))
        order = np.lexsort((-scores, owners))
        owners, is_null, covers_none = owners[order], is_null[order], ((begins == 0) & (stops == 0))[order]
        kept = np.arange(len(order)) - np.searchsorted(owners, owners) < self.n_best_size
        # "No answer" is always shown.
        kept |= is_null & ~np.isin(owners, owners[kept & covers_none])
        order, owners = order[kept], owners[kept]
        start, end, scores, begins, stops = (column[order] for column in (start, end, scores, begins, stops))

        lows, highs = (np.searchsorted(owners, numbers, side) for side in ("left", "right"))
        characters = list(zip(begins.tolist(), stops.tolist(), strict=True))
        entries = [
            {"start_logit": a, "end_logit": b, "text": self.examples[owner].context[begin:stop], "probability": p}
            for a, b, p, owner, (begin, stop) in zip(
                start.tolist(),
                end.tolist(),
                _probabilities(scores, lows, highs).tolist(),
                owners.tolist(),
                characters,
                strict=True,
            )
        ]
        lists, places = [], []
        for low, high in zip(lows.tolist(), highs.tolist(), strict=True):
            found, covered = entries[low:high], characters[low:high]
            if not found or (len(found) == 1 and not found[0]["text"]):
                found.insert(0, {"text": "empty", "start_logit": 0.0, "end_logit": 0.0})
                covered.insert(0, (0, 0))
                powers = np.array([0.0, *scores[low:high]])
                powers = np.exp(powers - powers.max())
                for entry, probability in zip(found, (powers / powers.sum()).tolist(), strict=True):
                    entry["probability"] = probability
            lists.append(found)
            places.append(covered)
        return lists, places

    def _best_spans(self) -> _Spans:
        """The best span of each window that has any; the first in the order of the search among equals."""
        found = []
        for windows, scores in self._scored(np.arange(len(self.features))):
            highest = np.fmax.reduce(scores, axis=1)
            rows = np.flatnonzero(~np.isnan(highest))
            found.append(self._spans(windows, rows, (scores == highest[:, None]).argmax(axis=1)[rows]))
        return _joined(found)

    def _best_of_windows(self, windows: np.ndarray) -> _Spans:
        """As many of the best spans of each window as a list can hold, best first."""
        found = []
        for part, scores in self._scored(windows):
            # A stable sort of the negative keeps the first of equals first, as sorted(reverse=True) does.
            cells = np.argsort(-scores, axis=1, kind="stable")[:, : self.n_best_size]
            rows, ranks = np.nonzero(~np.isnan(np.take_along_axis(scores, cells, axis=1)))
            found.append(self._spans(part, rows, cells[rows, ranks]))
        return _joined(found)

    def _scored(self, windows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Some windows [W] at a time with the scores of their spans [W, n * n]: start by start, each with every end, in
        the order of the search; NaN where the two make no answer."""
        width = self.top_starts.shape[1]
        step = max(1, _SPANS_AT_A_TIME // max(1, width * width))
        for at in range(0, len(windows), step):
            part = windows[at : at + step]
            starts, ends = self.top_starts[part], self.top_ends[part]
            first, last = (self.features.facts[f"context_{side}"][part, None] for side in ("start", "end"))
            shift = self.features.bounds[part, None]
            scores = self.start_logits[shift + starts][:, :, None] + self.end_logits[shift + ends][:, None, :]
            # An end before all starts and a start behind all ends, so that no span has them.
            ends = np.where((ends >= first) & (ends < last), ends, -1)
            starts = np.where((starts >= first) & (starts < last), starts, np.iinfo(starts.dtype).max)
            lengths = ends[:, None, :] - starts[:, :, None]
            scores[(lengths < 0) | (lengths >= self.max_answer_length)] = np.nan
            yield part, scores.reshape(len(part), -1)

    def _spans(self, windows: np.ndarray, rows: np.ndarray, cells: np.ndarray) -> _Spans:
        """What the cells of `_scored` stand for."""
        windows = windows[rows]
        row, column = np.divmod(cells, self.top_starts.shape[1])
        return _Spans(windows, self.top_starts[windows, row], self.top_ends[windows, column])

    def _logits(self, spans: _Spans) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        shift = self.features.bounds[spans.windows]
        start, end = self.start_logits[shift + spans.starts], self.end_logits[shift + spans.ends]
        return start, end, start + end

    def _characters(self, spans: _Spans, which: Any) -> tuple[np.ndarray, np.ndarray]:
        offsets, shift = self.features.extra["offsets"], self.features.bounds[spans.windows[which]]
        return offsets[shift + spans.starts[which], 0], offsets[shift + spans.ends[which], 1]


def _highest(rows: Sequence[np.ndarray], count: int) -> np.ndarray:
    """int32 [N, n]: where the `count` highest numbers of each row are, best first; -1 behind the last.

    `np.argsort` of the row as it is: among equals its order is the reference's, and depends on all of the row.
    """
    count = min(count, max((len(row) for row in rows), default=0))
    found = np.full((len(rows), count), -1, np.int32)
    for places, row in zip(found, rows, strict=True):
        best = row.argsort()[: -count - 1 : -1]
        places[: len(best)] = best
    return found


def _joined(parts: Sequence[_Spans]) -> _Spans:
    none = np.empty(0, np.int64)
    columns = ([none, *(getattr(part, name) for part in parts)] for name in ("windows", "starts", "ends"))
    return _Spans(*(np.concatenate(column) for column in columns))


def _first_of_each(groups: np.ndarray, keys: np.ndarray, places: np.ndarray, count: int) -> np.ndarray:
    """int64 [count]: of each group the place whose key is lowest, the first of equals; -1 for a group without any."""
    order = np.lexsort((keys, groups))
    present, firsts = np.unique(groups[order], return_index=True)
    found = np.full(count, -1, np.int64)
    found[present] = places[order[firsts]]
    return found


def _probabilities(scores: np.ndarray, lows: np.ndarray, highs: np.ndarray) -> np.ndarray:
    """Softmax of each stretch of `scores`; stretches of one length together, which rounds as each alone does."""
    found = np.empty_like(scores)
    sizes = highs - lows
    for size in np.unique(sizes[sizes > 0]).tolist():
        places = lows[sizes == size][:, None] + np.arange(size)
        powers = np.exp(scores[places] - scores[places].max(axis=1, keepdims=True))
        found[places] = powers / powers.sum(axis=1, keepdims=True)
    return found
