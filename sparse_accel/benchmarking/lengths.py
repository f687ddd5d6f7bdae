"""Features of real lengths and random tokens, from histograms that lie beside this file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from sparse_accel.tasks.features import Features

_FOLDER = Path(__file__).parent / "lengths"
# Ids below this are BERT's special and unused tokens.
_FIRST_WORD = 1000
# Where the question ends and the passage begins, in tokens, as far as the feature is that long.
_QUESTION_TOKENS = 13


def histogram(name: str) -> dict[str, Any]:
    """A file of `lengths/`: how it was made, and for each part of the data how many features have which length."""
    document: dict[str, Any] = json.loads((_FOLDER / f"{name}.json").read_text("utf-8"))
    return document


def length_counts(name: str, part: str = "train") -> tuple[np.ndarray, np.ndarray]:
    """The lengths that occur in a part, ascending, and how many features have each: int64 [L] both."""
    counts = histogram(name)["parts"][part]["counts"]
    lengths = np.array(sorted(map(int, counts)), np.int64)
    return lengths, np.array([counts[str(length)] for length in lengths], np.int64)


def spread_lengths(name: str, count: int, *, longest: int, part: str = "train") -> np.ndarray:
    """`count` lengths, ascending, that stand for the whole histogram: its quantiles (i + 1/2) / count; int64 [count].

    What is longer than `longest` is cut to it.
    """
    lengths, counts = length_counts(name, part)
    reached = np.cumsum(counts) / counts.sum()
    chosen = lengths[np.searchsorted(reached, (np.arange(count) + 0.5) / count)]
    return np.minimum(chosen, longest)


def random_features(lengths: np.ndarray, vocabulary: int, seed: int) -> Features:
    """Question-answering features of these lengths, in shuffled order: token ids drawn uniformly from the vocabulary's words,
    a question segment and a passage segment, an answer within the passage."""
    generator = np.random.default_rng(seed)
    lengths = generator.permutation(lengths)
    bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    within = np.arange(bounds[-1]) - np.repeat(bounds[:-1], lengths)
    first_word = min(_FIRST_WORD, vocabulary // 4)
    questions = np.minimum(_QUESTION_TOKENS, lengths // 2)
    starts = generator.integers(questions, lengths)
    ends = generator.integers(starts, lengths)
    return Features(
        tokens={
            "input_ids": generator.integers(first_word, vocabulary, int(bounds[-1])).astype(np.int32),
            "token_type_ids": (within >= np.repeat(questions, lengths)).astype(np.uint8),
        },
        bounds=bounds,
        labels={"start_positions": starts.astype(np.int32), "end_positions": ends.astype(np.int32)},
        facts={},
        extra={},
    )
