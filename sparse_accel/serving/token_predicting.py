"""Finds names (or whatever a model labels) in texts with a deployment; numpy alone where there is a graph."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np

from sparse_accel.errors import DataError
from sparse_accel.serving.predicting import open_to_predict, run_features
from sparse_accel.tasks.entity_metrics import Entity, find_entities
from sparse_accel.tasks.reading import kind_of
from sparse_accel.tasks.tag_schemes import Scheme, find_scheme, iobes
from sparse_accel.tasks.word_pieces import OUTSIDE, Sentence, by_word, cut_pieces, piece_spec
from sparse_accel.tasks.words import split_words

TASK: Final = "token_classification"
OUTPUTS: Final = ("logits",)
# Texts that are batched together: enough to sort by length, few enough to answer soon.
_CHUNK: Final = 64


@dataclass(frozen=True)
class FoundEntity:
    """Words that belong together: `text` == the text's [start:end], offsets in characters. `score` is the mean of the
    probabilities that its words have their labels."""

    text: str
    label: str
    score: float
    start: int
    end: int


@dataclass(frozen=True)
class Tagging:
    """A text with the label of each of its words, and the entities that these make, in order. Of a list of words, the text
    is the words with a space between them."""

    text: str
    words: tuple[str, ...]
    tags: tuple[str, ...]
    entities: tuple[FoundEntity, ...]


class TokenPredictor:
    """Labels the words of texts with a deployment folder, or with a plain model folder through torch.

    `engine` is onnxruntime, openvino or torch (left out: by what the folder holds). A text that is longer than the model
    reads is cut between words. Raises ModelError, OptionError and DataError, all of them before the first text.
    """

    def __init__(
        self,
        folder: str | Path,
        engine: str | None = None,
        *,
        threads: int | None = None,
        batch_size: int = 8,
        max_seq_length: int | None = None,
    ) -> None:
        opened = open_to_predict(
            folder, engine, threads, batch_size, TASK, "labels words", OUTPUTS, max_seq_length=max_seq_length
        )
        self.deployment, self.engine, self.notes = opened.deployment, opened.engine, opened.notes
        self.batch_size = batch_size
        self._spec = piece_spec(self.deployment.tokenizer, max_length=self.deployment.facts.max_seq_length, labels=())

    def __call__(self, text: str | Sequence[str]) -> Tagging | list[Tagging]:
        """What is found in a text, or in each of several. Raises DataError for an empty one."""
        texts = [text] if isinstance(text, str) else list(text)
        found = []
        for number, tagging in enumerate(self.taggings(texts), start=1):
            if isinstance(tagging, DataError):
                raise DataError(f"text {number}: {tagging}" if len(texts) > 1 else str(tagging)) from tagging
            found.append(tagging)
        return found[0] if isinstance(text, str) else found

    def taggings(self, texts: Iterable[str | Sequence[str]], *, chunk: int = _CHUNK) -> Iterator[Tagging | DataError]:
        """What is found in each text (or list of words), in order, as they come; for one that cannot be used, the error that
        says why. `chunk` of them are read ahead, so that features of like length share a batch: 1 answers at once."""
        remaining = iter(texts)
        while taken := list(islice(remaining, chunk)):
            yield from self._tagged(taken)

    def _tagged(self, texts: Sequence[str | Sequence[str]]) -> list[Tagging | DataError]:
        problems = [problem_of(text) for text in texts]
        kept = [_worded(text) for text, problem in zip(texts, problems, strict=True) if problem is None]
        found = iter(self._of_words(kept))
        return [next(found) if problem is None else DataError(problem) for problem in problems]

    def _of_words(self, worded: Sequence[tuple[str, list[tuple[int, int]]]]) -> list[Tagging]:
        if not worded:
            return []
        words = [tuple(text[start:end] for start, end in spans) for text, spans in worded]
        features = cut_pieces([Sentence(own, None) for own in words], self._spec)
        logits = run_features(self.engine, self.deployment, features, self.batch_size, OUTPUTS)["logits"]
        scores = by_word(features, logits, [len(own) for own in words])
        return [
            _tagging(text, spans, own, rows, self._names(rows))
            for (text, spans), own, rows in zip(worded, words, scores, strict=True)
        ]

    def _names(self, rows: Sequence[np.ndarray | None]) -> Sequence[str]:
        """The labels' names; transformers' own stand-ins where the folder has none."""
        if self.deployment.labels is not None:
            return self.deployment.labels
        num_labels = next((len(row) for row in rows if row is not None), 0)
        return [f"LABEL_{index}" for index in range(num_labels)]


def problem_of(text: Any) -> str | None:
    """Why a text, or a list of words, cannot be labelled; None when it can."""
    if isinstance(text, str):
        half = re.search(r"[\ud800-\udfff]", text)
        if half:
            return f"the text has half of a surrogate pair at character {half.start()}: a broken \\u escape"
        return None if split_words(text) else "the text holds no word"
    if not isinstance(text, list | tuple):
        return f"a text, or a list of words, was expected, and it is {kind_of(text)}"
    if not text:
        return "the list of words is empty"
    for number, word in enumerate(text, start=1):
        if not isinstance(word, str):
            return f"word {number} should be text, it is {kind_of(word)}"
        if not word:
            return f"word {number} is empty"
        if re.search(r"[\ud800-\udfff]", word):
            return f"word {number} has half of a surrogate pair: a broken \\u escape"
    return None


def _worded(text: str | Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
    """A text and the characters of each word."""
    if isinstance(text, str):
        return text, split_words(text)
    spans, place = [], 0
    for word in text:
        spans.append((place, place + len(word)))
        place += len(word) + 1
    return " ".join(text), spans


def _tagging(
    text: str,
    spans: Sequence[tuple[int, int]],
    words: tuple[str, ...],
    rows: Sequence[np.ndarray | None],
    names: Sequence[str],
) -> Tagging:
    seen = [place for place, row in enumerate(rows) if row is not None]
    tags = [OUTSIDE] * len(words)
    sure = [0.0] * len(words)
    for place in seen:
        row = rows[place]
        assert row is not None
        label = int(row.argmax())
        tags[place], sure[place] = names[label], _probability(row, label)
    entities = []
    # Words that the model did not see part nothing, as in scoring.
    for entity in entities_of([tags[place] for place in seen], names):
        first, last = seen[entity.first], seen[entity.last]
        start, end = spans[first][0], spans[last][1]
        score = float(np.mean([sure[place] for place in seen[entity.first : entity.last + 1]]))
        entities.append(FoundEntity(text[start:end], entity.label, score, start, end))
    return Tagging(text, words, tuple(tags), tuple(entities))


def entities_of(tags: Sequence[str], names: Sequence[str]) -> list[Entity]:
    """The entities that tags mark in a sentence, by the scheme of the label set `names`; where that has none (parts of
    speech), each word that is not O is one."""
    scheme = find_scheme([names])
    if scheme is Scheme.PLAIN:
        return [Entity(place, place, tag) for place, tag in enumerate(tags) if tag != OUTSIDE]
    return find_entities(iobes(tags) if scheme is Scheme.BILOU else tags)


def _probability(logits: np.ndarray, label: int) -> float:
    scores = logits.astype(np.float64)
    shares = np.exp(scores - scores.max())
    return float(shares[label] / shares.sum())
