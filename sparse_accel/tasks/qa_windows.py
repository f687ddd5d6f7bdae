"""Questions and contexts as windows of tokens: the features of extractive question answering."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from sparse_accel.errors import DataError, ModelError
from sparse_accel.tasks.features import Features, concatenate

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
    parts = list(_cut_all(chunks, spec, num_workers))
    for start, part in zip(starts, parts, strict=True):
        part.features.facts["example"][:] += start
    refused = {
        start + index: why for start, part in zip(starts, parts, strict=True) for index, why in part.refused.items()
    }
    return Windows(concatenate([part.features for part in parts]), refused)


def _cut_all(chunks: list[Sequence[Question]], spec: WindowSpec, num_workers: int | None) -> Iterator[Windows]:
    cutter = Cutter(spec)  # in every case: a spec that cannot work is an error of this process
    num_workers = min(num_workers or 1, len(chunks))
    if num_workers <= 1:
        yield from map(cutter, chunks)
        return
    # Spawned, not forked: a fork of a process with threads (torch, tokenizers) may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context, _start_worker, (spec,)) as pool:
        try:
            yield from pool.map(_cut_in_worker, chunks)
        except BrokenProcessPool as error:
            raise DataError(f"one of {num_workers} preprocessing processes died (out of memory?); try fewer") from error


_worker_cutter: Cutter


def _start_worker(spec: WindowSpec) -> None:
    global _worker_cutter
    _worker_cutter = Cutter(spec)


def _cut_in_worker(chunk: Sequence[Question]) -> Windows:
    return _worker_cutter(chunk)


class Cutter:
    """Cuts windows with a tokenizer of its own, whose truncation and padding settings are the spec's alone."""

    def __init__(self, spec: WindowSpec) -> None:
        self.spec = spec
        # Two tokenizers, because truncation is a state: tokenizer.json files often bring their own.
        self.whole = Tokenizer.from_str(spec.backend)
        self.whole.no_truncation()
        self.whole.no_padding()
        self.cutting = Tokenizer.from_str(spec.backend)
        self.cutting.no_padding()
        self.room = spec.max_length - self.whole.num_special_tokens_to_add(True)
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
        refused = self._too_long(questions)
        kept = [index for index in range(len(questions)) if index not in refused]
        pairs = [(questions[index].question.lstrip(), questions[index].context) for index in kept]
        if not spec.question_first:
            pairs = [(context, question) for question, context in pairs]
        columns = _Columns()
        for index, encoding in zip(kept, self.cutting.encode_batch(pairs), strict=True):
            windows = [encoding, *encoding.overflowing]
            regions = [_context_region(window, 1 if spec.question_first else 0) for window in windows]
            if None in regions:
                refused[index] = "the context has no token"
                continue
            for window, region in zip(windows, regions, strict=True):
                assert region is not None
                columns.add(window, region, index, questions[index], spec)
        return Windows(columns.features(spec), refused)

    def _too_long(self, questions: Sequence[Question]) -> dict[int, str]:
        """Questions that leave a window no longer than the stride for a context that needs several windows."""
        refused = {}
        lengths = self._num_tokens([question.question.lstrip() for question in questions])
        suspects = [index for index, length in enumerate(lengths) if self.room - length <= self.spec.stride]
        contexts = self._num_tokens([questions[index].context for index in suspects])
        for index, context_length in zip(suspects, contexts, strict=True):
            left = self.room - lengths[index]
            if context_length > left:
                refused[index] = (
                    f"the question has {lengths[index]} tokens, which leaves {max(left, 0)} of max_seq_length "
                    f"{self.spec.max_length} for the context: more than doc_stride {self.spec.stride} are needed"
                )
        return refused

    def _num_tokens(self, texts: list[str]) -> list[int]:
        return [len(encoding) for encoding in self.whole.encode_batch(texts, add_special_tokens=False)] if texts else []


def _context_region(window: Encoding, sequence: int) -> tuple[int, int] | None:
    """First token of the context and the one after its last; None when there is none."""
    owners = window.sequence_ids
    count = owners.count(sequence)
    if not count:
        return None
    first = owners.index(sequence)
    return first, first + count


class _Columns:
    """Windows of a chunk, collected in lists."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.types: list[int] = []
        self.offsets: list[tuple[int, int]] = []
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
            self.offsets.extend(window.offsets)
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
            extra={} if spec.labels else {"offsets": _int32(self.offsets).reshape(-1, 2)},
        )


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
