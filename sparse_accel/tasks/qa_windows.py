"""Questions and contexts as windows of tokens: the features of extractive question answering."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer
from tokenizers.processors import TemplateProcessing

from sparse_accel.errors import DataError, ModelError
from sparse_accel.tasks.features import Features, concatenate
from sparse_accel.tasks.processes import map_chunks

# Examples that one process tokenizes at a time; the features do not depend on it.
CHUNK = 256
# Raise it when features change for the same input: cached ones of other versions are not used.
FORMAT_VERSION = 1


@dataclass(frozen=True)
class WindowSpec:
    """How windows are cut: plain values, so that a worker process needs no more than this.

    `backend` is the tokenizer in the JSON of the `tokenizers` library. With `question_first` false (tokenizers that pad
    on the left) the context comes first. `cls_ids` are tried in order for the position that means "no answer here".
    """

    backend: str
    max_length: int
    stride: int
    question_first: bool
    truncation_side: str
    token_types: bool
    cls_ids: tuple[int, ...]
    labels: bool

    def digest(self) -> str:
        """A name for all that the features depend on beside the examples."""
        parts = [FORMAT_VERSION, self.backend, self.max_length, self.stride, self.question_first]
        parts += [self.truncation_side, self.token_types, list(self.cls_ids), self.labels]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Question:
    """What the windows of one example depend on; `start` and `end` are the answer's characters, None for no answer."""

    question: str
    context: str
    start: int | None
    end: int | None


@dataclass(frozen=True)
class Windows:
    """The features of some examples, and the examples that gave none: index -> why."""

    features: Features
    refused: dict[int, str]


def cut_windows(questions: Sequence[Question], spec: WindowSpec, num_workers: int | None) -> Windows:
    """All windows of all examples, in order; the result does not depend on `num_workers` (None or 1: this process).

    features.facts holds `example` (index into `questions`), `context_start` and `context_end` (token positions, the end
    exclusive). With `spec.labels`, features.labels holds `start_positions` and `end_positions` (inclusive, the CLS
    position where the window lacks the answer); without, features.extra holds `offsets`, int32 [T, 2]: the characters
    of the context that each token covers.
    """
    starts = range(0, len(questions), CHUNK)
    chunks = [questions[start : start + CHUNK] for start in starts]
    parts = list(map_chunks(Cutter, spec, chunks, num_workers))
    for start, part in zip(starts, parts, strict=True):
        part.features.facts["example"][:] += start
    refused = {
        start + index: why for start, part in zip(starts, parts, strict=True) for index, why in part.refused.items()
    }
    return Windows(concatenate([part.features for part in parts]), refused)


class Cutter:
    """Cuts windows with a tokenizer of its own, whose truncation and padding settings are the spec's alone.

    Many questions share a context, so each text is tokenized once, and the tokenizer's own last stage (truncation,
    special tokens, offsets) makes the pairs: what `Tokenizer.encode` would give for each of them.
    """

    def __init__(self, spec: WindowSpec) -> None:
        self.spec = spec
        # Two tokenizers, because truncation is a state: tokenizer.json files often bring their own.
        self.plain = Tokenizer.from_str(spec.backend)
        self.plain.no_truncation()
        self.plain.no_padding()
        self.cutting = Tokenizer.from_str(spec.backend)
        self.cutting.no_padding()
        self.room = spec.max_length - self.cutting.num_special_tokens_to_add(True)
        if self.room <= spec.stride:
            raise DataError(
                f"doc_stride {spec.stride} is too large for max_seq_length {spec.max_length}: a window has {self.room} "
                "tokens for question and context, and windows that overlap by doc_stride must be longer than it"
            )
        self.cutting.enable_truncation(
            spec.max_length,
            stride=spec.stride,
            strategy="only_second" if spec.question_first else "only_first",
            direction=spec.truncation_side,
        )

    def __call__(self, questions: Sequence[Question]) -> Windows:
        spec = self.spec
        context_place = 1 if spec.question_first else 0
        asked = self._tokens([question.question.lstrip() for question in questions], 1 - context_place)
        told = self._tokens([question.context for question in questions], context_place)
        refused: dict[int, str] = {}
        columns = _Columns()
        for index, (question, context) in enumerate(zip(asked, told, strict=True)):
            problem = self._too_long(len(question), len(context))
            if problem is not None:
                refused[index] = problem
                continue
            pair = (question, context) if spec.question_first else (context, question)
            first = self.cutting.post_process(*pair, True)
            windows = [first, *first.overflowing]
            regions = [_context_region(window, len(question), spec.question_first) for window in windows]
            if None in regions:
                refused[index] = "the context has no token"
                continue
            for window, region in zip(windows, regions, strict=True):
                assert region is not None
                columns.add(window, region, index, questions[index], spec)
        return Windows(columns.features(spec), refused)

    def _tokens(self, texts: Sequence[str], place: int) -> list[Encoding]:
        """The tokens of each text alone, as the first (0) or second (1) of a pair: no special ones, nothing cut off."""
        # The second of a pair has segment 1 before the last stage, which does not set it in all windows. This stands
        # in for the tokenizer's own last stage, which may move offsets: twice would be once too often.
        self.plain.post_processor = TemplateProcessing(single=f"$A:{place}", pair="$A:0 $B:1", special_tokens=[])
        different = list(dict.fromkeys(texts))
        encodings = dict(zip(different, self.plain.encode_batch(different), strict=True))
        return [encodings[text] for text in texts]

    def _too_long(self, question_length: int, context_length: int) -> str | None:
        """Why no windows can be cut: the question leaves no more than the stride to a context that needs several."""
        left = self.room - question_length
        if left > self.spec.stride or context_length <= left:
            return None
        return (
            f"the question has {question_length} tokens, which leaves {max(left, 0)} of max_seq_length "
            f"{self.spec.max_length} for the context: more than doc_stride {self.spec.stride} are needed"
        )


def _context_region(window: Encoding, question_length: int, question_first: bool) -> tuple[int, int] | None:
    """First token of the context and the one after its last; None when there is none.

    All that is not a special token of the pair is the question, which is whole in each window, or the context.
    """
    special = window.special_tokens_mask
    count = special.count(0) - question_length
    if count <= 0:
        return None
    if not question_first:
        first = special.index(0)
        return first, first + count
    end = len(special) - special[::-1].index(0)
    return end - count, end


class _Columns:
    """Windows of a chunk, collected in lists."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.types: list[int] = []
        self.offsets: list[list[tuple[int, int]]] = []
        self.lengths: list[int] = []
        self.examples: list[int] = []
        self.regions: list[tuple[int, int]] = []
        self.labels: list[tuple[int, int]] = []

    def add(self, window: Encoding, region: tuple[int, int], index: int, question: Question, spec: WindowSpec) -> None:
        ids = window.ids
        self.ids.extend(ids)
        self.lengths.append(len(ids))
        self.examples.append(index)
        self.regions.append(region)
        if spec.token_types:
            self.types.extend(window.type_ids)
        if not spec.labels:
            self.offsets.append(window.offsets)
        else:
            found = None
            if question.start is not None and question.end is not None:
                found = answer_span(window.offsets, region, question.start, question.end)
            if found is None:
                absent = cls_position(ids, spec.cls_ids)
                found = absent, absent
            self.labels.append(found)

    def features(self, spec: WindowSpec) -> Features:
        tokens = {"input_ids": _int32(self.ids)}
        if spec.token_types:
            tokens["token_type_ids"] = np.array(self.types, dtype=np.uint8)
        labels, regions = _int32(self.labels).reshape(-1, 2), _int32(self.regions).reshape(-1, 2)
        return Features(
            tokens=tokens,
            bounds=np.concatenate([np.zeros(1, np.int64), np.cumsum(np.array(self.lengths, dtype=np.int64))]),
            labels={"start_positions": labels[:, 0].copy(), "end_positions": labels[:, 1].copy()}
            if spec.labels
            else {},
            facts={
                "example": _int32(self.examples),
                "context_start": regions[:, 0].copy(),
                "context_end": regions[:, 1].copy(),
            },
            extra={} if spec.labels else {"offsets": self._flat_offsets()},
        )

    def _flat_offsets(self) -> np.ndarray:
        """int32 [T, 2] of all windows; number by number, because numpy is slow to take tuples."""
        numbers = chain.from_iterable(chain.from_iterable(self.offsets))
        return np.fromiter(numbers, np.int32, 2 * sum(self.lengths)).reshape(-1, 2)


def _int32(values: Sequence[Any]) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def cls_position(ids: Sequence[int], cls_ids: Iterable[int]) -> int:
    """Where the label of "no answer in this window" points: the CLS token, else the BOS token, else the first."""
    return next((ids.index(token) for token in cls_ids if token in ids), 0)


def answer_span(
    offsets: Sequence[tuple[int, int]], region: tuple[int, int], start: int, end: int
) -> tuple[int, int] | None:
    """First and last token (inclusive) of the characters `start` to `end` (exclusive), None when the window lacks some.

    The last token that begins at or before `start`, and the first that ends at or after `end`, within the context.
    Where one character is the whole answer and has several tokens (byte-level tokenizers), they cross, and are put in
    order.
    """
    first, last = region
    if offsets[first][0] > start or offsets[last - 1][1] < end:
        return None
    start_token = bisect_right(offsets, start, first, last, key=lambda span: span[0]) - 1
    end_token = bisect_left(offsets, end, first, last, key=lambda span: span[1])
    return min(start_token, end_token), max(start_token, end_token)


def window_spec(tokenizer: Any, *, max_length: int, stride: int, labels: bool) -> WindowSpec:
    """The spec for a transformers tokenizer. Raises ModelError for one that is not fast (no offsets) or cannot pad."""
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{type(tokenizer).__name__} is a slow tokenizer: it cannot say which characters a token covers. "
            "Question answering needs a fast one (a folder with tokenizer.json)"
        )
    if tokenizer.pad_token_id is None:
        raise ModelError(f"{type(tokenizer).__name__} has no padding token, and batches need one")
    candidates = (tokenizer.cls_token_id, tokenizer.bos_token_id)
    return WindowSpec(
        backend=tokenizer.backend_tokenizer.to_str(),
        max_length=max_length,
        stride=stride,
        question_first=tokenizer.padding_side == "right",
        truncation_side=tokenizer.truncation_side,
        token_types="token_type_ids" in tokenizer.model_input_names,
        cls_ids=tuple(token for token in candidates if token is not None),
        labels=labels,
    )
