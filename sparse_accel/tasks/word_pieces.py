"""From sentences of words to features: the words' pieces, with each word's label on its first piece."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from sparse_accel.errors import DataError, ModelError
from sparse_accel.tasks.features import Features, concatenate
from sparse_accel.tasks.processes import map_chunks
from sparse_accel.tasks.tag_schemes import inside_tag

# The label of a token that has none: the loss leaves it out.
NO_LABEL = -100
# What a word is called that no feature holds.
OUTSIDE = "O"
# Sentences that are tokenized at once.
CHUNK = 1000


@dataclass(frozen=True)
class PieceSpec:
    """All that pieces and windows depend on beside the sentences; small and picklable.

    `backend` is the tokenizer's own JSON; a window has `max_length` tokens at most, special ones included; `labels` are the
    names of the classes in order.
    """

    backend: str
    max_length: int
    token_types: bool
    labels: tuple[str, ...]
    label_all_tokens: bool = False


@dataclass(frozen=True)
class Sentence:
    """The words of one sentence, and their tags where they are known."""

    words: tuple[str, ...]
    tags: tuple[str, ...] | None


def piece_spec(tokenizer: Any, *, max_length: int, labels: Sequence[str], label_all_tokens: bool = False) -> PieceSpec:
    """The spec for a transformers tokenizer. Raises ModelError for one that is not fast or cannot pad."""
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{type(tokenizer).__name__} is a slow tokenizer: it cannot say which word a token belongs to. "
            "Token classification needs a fast one (a folder with tokenizer.json)"
        )
    if tokenizer.pad_token_id is None:
        raise ModelError(f"{type(tokenizer).__name__} has no padding token, and batches need one")
    return PieceSpec(
        backend=with_prefix_space(tokenizer.backend_tokenizer.to_str()),
        max_length=max_length,
        token_types="token_type_ids" in tokenizer.model_input_names,
        labels=tuple(labels),
        label_all_tokens=label_all_tokens,
    )


def with_prefix_space(backend: str) -> str:
    """The tokenizer such that each word of a list begins like one after a space: byte-level tokenizers (RoBERTa) otherwise
    take all words of a list for one without spaces. Hugging Face's example asks for the same (`add_prefix_space`)."""
    content = json.loads(backend)
    stage = content.get("pre_tokenizer") or {}
    for part in stage.get("pretokenizers", [stage]):
        if part.get("type") == "ByteLevel":
            part["add_prefix_space"] = True
    return json.dumps(content)


def cut_pieces(sentences: Sequence[Sentence], spec: PieceSpec, num_workers: int | None = None) -> Features:
    """The features of all sentences, in order: one for a sentence, or several windows for one that is too long. The result
    does not depend on `num_workers` (None or 1: this process).

    A window holds as many of the words that are left as fit, each whole; so every word is in one window and has one label.
    A word that has more pieces than a window holds is cut off.

    features.extra holds `labels`, int32 [T]: the class of the token's word on its first piece (with `label_all_tokens` on
    its other pieces, too, where B- becomes I-), NO_LABEL on all others and where the sentence has no tags; and `word`,
    int32 [T]: which word of the sentence has its first piece here, else -1. features.facts holds `example`, the index into
    `sentences`, and `cut_words`, how many words of the feature are cut off. A word without a piece (a tokenizer drops
    control characters, say) is in no feature; a sentence of such words alone has none.
    """
    starts = range(0, len(sentences), CHUNK)
    chunks = [sentences[start : start + CHUNK] for start in starts]
    parts = list(map_chunks(_Cutter, spec, chunks, num_workers))
    for start, part in zip(starts, parts, strict=True):
        part.facts["example"][:] += start
    return concatenate(parts)


def by_word(
    features: Features, logits: Sequence[np.ndarray], num_words: Sequence[int]
) -> list[list[np.ndarray | None]]:
    """For each sentence (which has so many words) the logits of each word's first piece, [labels]; None for a word that no
    feature holds. `logits` has [T, labels] for each feature."""
    found: list[list[np.ndarray | None]] = [[None] * count for count in num_words]
    for index, rows in enumerate(logits):
        words = features.extra_of(index, "word")
        row = found[features.facts["example"][index]]
        for place in np.flatnonzero(words >= 0).tolist():
            row[words[place]] = rows[place]
    return found


class _Cutter:
    """Cuts with a tokenizer of its own, whose truncation and padding settings are the spec's alone."""

    def __init__(self, spec: PieceSpec) -> None:
        self.spec = spec
        # Two tokenizers, because truncation is a state: tokenizer.json files often bring their own.
        self.plain = Tokenizer.from_str(spec.backend)
        self.plain.no_truncation()
        self.plain.no_padding()
        self.cutting = Tokenizer.from_str(spec.backend)
        self.cutting.no_padding()
        self.room = spec.max_length - self.cutting.num_special_tokens_to_add(False)
        if self.room < 1:
            raise DataError(f"max_seq_length {spec.max_length} leaves no token for a word beside the special tokens")
        self.cutting.enable_truncation(spec.max_length)
        classes = {label: index for index, label in enumerate(spec.labels)}
        # Class of a word's tag on its first piece, and on the others.
        self.first_class = classes
        self.other_class = {
            label: classes.get(inside_tag(label), index) if spec.label_all_tokens else NO_LABEL
            for label, index in classes.items()
        }

    def __call__(self, sentences: Sequence[Sentence]) -> Features:
        columns = _Columns()
        encodings = self.plain.encode_batch([list(sentence.words) for sentence in sentences], is_pretokenized=True)
        for index, (sentence, encoding) in enumerate(zip(sentences, encodings, strict=True)):
            counts = _pieces_of_words(encoding, len(sentence.words))
            if not counts.any():
                continue
            if len(encoding.ids) <= self.spec.max_length:
                self._add(columns, encoding, index, sentence, 0, 0)
                continue
            for first, last in _windows(counts.tolist(), self.room):
                window = self.cutting.encode(list(sentence.words[first:last]), is_pretokenized=True)
                self._add(columns, window, index, sentence, first, int((counts[first:last] > self.room).sum()))
        return columns.features(self.spec.token_types)

    def _add(
        self, columns: _Columns, encoding: Encoding, index: int, sentence: Sentence, first_word: int, cut_words: int
    ) -> None:
        before = None
        tags = sentence.tags
        for word in encoding.word_ids:
            place, label = -1, NO_LABEL
            if word is not None:
                is_first = word != before
                place = first_word + word if is_first else -1
                if tags is not None:
                    classes = self.first_class if is_first else self.other_class
                    label = classes[tags[first_word + word]]
            columns.words.append(place)
            columns.labels.append(label)
            before = word
        columns.ids.extend(encoding.ids)
        columns.types.extend(encoding.type_ids)
        columns.lengths.append(len(encoding.ids))
        columns.examples.append(index)
        columns.cut_words.append(cut_words)


def _pieces_of_words(encoding: Encoding, num_words: int) -> np.ndarray:
    """int64 [num_words]: how many pieces each word has."""
    words = [word for word in encoding.word_ids if word is not None]
    return np.bincount(np.array(words, dtype=np.int64), minlength=num_words)


def _windows(counts: Sequence[int], room: int) -> list[tuple[int, int]]:
    """First word and the one after the last of each window; words without a piece go with the word before them."""
    windows = []
    first = used = 0
    for word, count in enumerate(counts):
        count = min(count, room)
        if used + count > room:
            windows.append((first, word))
            first, used = word, 0
        used += count
    windows.append((first, len(counts)))
    return windows


class _Columns:
    """Features of a split, collected in lists."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.types: list[int] = []
        self.labels: list[int] = []
        self.words: list[int] = []
        self.lengths: list[int] = []
        self.examples: list[int] = []
        self.cut_words: list[int] = []

    def features(self, token_types: bool) -> Features:
        tokens = {"input_ids": np.array(self.ids, dtype=np.int32)}
        if token_types:
            tokens["token_type_ids"] = np.array(self.types, dtype=np.uint8)
        return Features(
            tokens=tokens,
            bounds=np.concatenate([np.zeros(1, np.int64), np.cumsum(np.array(self.lengths, dtype=np.int64))]),
            labels={},
            facts={
                "example": np.array(self.examples, dtype=np.int32),
                "cut_words": np.array(self.cut_words, dtype=np.int32),
            },
            extra={"labels": np.array(self.labels, dtype=np.int32), "word": np.array(self.words, dtype=np.int32)},
        )
