"""Features of real lengths, random tokens and random labels; the histograms of lengths lie beside this file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import numpy as np

from sparse_accel.benchmarking.heads import (
    MASKED_LANGUAGE_MODELING,
    NUM_LABELS,
    QUESTION_ANSWERING,
    TEXT_CLASSIFICATION,
)
from sparse_accel.benchmarking.models import vocabulary_of
from sparse_accel.benchmarking.workloads import Workload
from sparse_accel.tasks.features import Features
from sparse_accel.tasks.mlm_masking import BEGINS_WORD, KINDS, SPECIAL

_FOLDER = Path(__file__).parent / "lengths"
# Ids below this are BERT's special and unused tokens.
_FIRST_WORD = 1000
# BERT's.
MASK_ID: Final = 103
# Where the question ends and the passage begins, in tokens, as far as the feature is that long; so the first of two texts.
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


def workload_features(workload: Workload, count: int, seed: int) -> Features:
    """`count` features as the workload has them: its lengths, its task, its model's vocabulary."""
    if workload.lengths is None:
        lengths = np.full(count, workload.max_length)
    else:
        lengths = spread_lengths(workload.lengths, count, longest=workload.max_length)
    return random_features(lengths, vocabulary_of(workload.shape), seed, workload.task)


def random_features(lengths: np.ndarray, vocabulary: int, seed: int, task: str = QUESTION_ANSWERING) -> Features:
    """Features of these lengths, in shuffled order: token ids drawn uniformly from the vocabulary's words.

    Of question answering: a question segment and a passage segment, an answer within the passage. Of text classification: two
    segments, and one of three classes. Of masked language modelling: one segment, whose first and last token are special.
    """
    generator = np.random.default_rng(seed)
    lengths = generator.permutation(lengths)
    bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    first_word = min(_FIRST_WORD, vocabulary // 4)
    firsts = np.minimum(_QUESTION_TOKENS, lengths // 2)
    labels: dict[str, np.ndarray] = {}
    extra: dict[str, np.ndarray] = {}
    if task == QUESTION_ANSWERING:
        starts = generator.integers(firsts, lengths)
        ends = generator.integers(starts, lengths)
        labels = {"start_positions": starts.astype(np.int32), "end_positions": ends.astype(np.int32)}
    elif task == TEXT_CLASSIFICATION:
        labels = {"labels": generator.integers(0, NUM_LABELS, len(lengths)).astype(np.int32)}
    elif task == MASKED_LANGUAGE_MODELING:
        firsts = lengths
        kinds = np.full(bounds[-1], BEGINS_WORD, np.uint8)
        kinds[bounds[:-1]] = kinds[bounds[1:] - 1] = SPECIAL
        extra = {KINDS: kinds}
    within = np.arange(bounds[-1]) - np.repeat(bounds[:-1], lengths)
    return Features(
        tokens={
            "input_ids": generator.integers(first_word, vocabulary, int(bounds[-1])).astype(np.int32),
            "token_type_ids": (within >= np.repeat(firsts, lengths)).astype(np.uint8),
        },
        bounds=bounds,
        labels=labels,
        facts={},
        extra=extra,
    )
