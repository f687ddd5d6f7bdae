"""Which tokens a masked language model has to guess, anew in every epoch, and what it sees in their place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from sparse_accel.tasks.features import Features

# The column of `Features.extra` that says what each token is, uint8: one of these three.
KINDS: Final = "kind"
SPECIAL: Final = 0  # [CLS] and the like: never masked
BEGINS_WORD: Final = 1
CONTINUES_WORD: Final = 2

# The column of `Features.facts` with a name for each feature where its index is none: in what is read while training.
NAMES: Final = "name"

# The label of a token that is not to be guessed: what torch's cross entropy leaves out.
NOT_MASKED: Final = -100
# The epoch of an evaluation. The seed plays no part in it, so that scores of two runs are about the same tokens.
EVALUATION: Final = -1

# Of the chosen tokens, BERT turns 80% into the mask token and 10% into any token; the rest stays (Devlin et al. 2019, 3.1).
_TO_MASK: Final = 0.8
_TO_RANDOM: Final = 0.1

# The streams of random numbers of a token.
_CHOICE, _ACTION, _REPLACEMENT = range(3)


@dataclass(frozen=True)
class Masking:
    """How tokens are masked. `whole_words` chooses words, all of whose pieces are guessed together."""

    mask_id: int
    vocab_size: int
    probability: float = 0.15
    whole_words: bool = False
    seed: int = 0

    def prepare(self, features: Features, indices: np.ndarray, epoch: int) -> Features:
        """The features at `indices`, in that order, with masked `input_ids` and `extra["labels"]` int32 [T]: the token
        where it is to be guessed, else NOT_MASKED. Depends on seed, epoch and each feature's index alone, not on which
        features come together; where facts[NAMES], int64 [N], are there they take the indices' place."""
        features = gathered(features, indices)
        names = features.facts.get(NAMES, indices)
        lengths = features.lengths
        keys = np.repeat(_feature_keys(0 if epoch == EVALUATION else self.seed, epoch, names), lengths)
        positions = np.arange(features.bounds[-1]) - np.repeat(features.bounds[:-1], lengths)
        kinds = features.extra[KINDS]
        drawn_at = _word_starts(kinds, positions) if self.whole_words else positions
        is_chosen = (_uniform(keys, drawn_at, _CHOICE) < self.probability) & (kinds != SPECIAL)

        # Few are chosen, and only they need the other two numbers. Each piece of a word has its own, as in BERT's script.
        chosen = np.flatnonzero(is_chosen)
        keys, positions = keys[chosen], positions[chosen]
        action = _uniform(keys, positions, _ACTION)
        anything = (_uniform(keys, positions, _REPLACEMENT) * self.vocab_size).astype(np.int32)
        original = features.tokens["input_ids"][chosen]
        seen = np.where(
            action < _TO_MASK, self.mask_id, np.where(action < _TO_MASK + _TO_RANDOM, anything, original)
        ).astype(np.int32)
        ids = features.tokens["input_ids"].copy()
        ids[chosen] = seen
        labels = np.full(len(ids), NOT_MASKED, np.int32)
        labels[chosen] = original
        return Features(
            tokens={**features.tokens, "input_ids": ids},
            bounds=features.bounds,
            labels=features.labels,
            facts=features.facts,
            extra={"labels": labels},
        )


def gathered(features: Features, indices: np.ndarray) -> Features:
    """Copies of the features at `indices`, in that order."""
    firsts, lasts = features.bounds[indices], features.bounds[indices + 1]
    parts = [slice(first, last) for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True)]
    bounds = np.zeros(len(indices) + 1, np.int64)
    np.cumsum(lasts - firsts, out=bounds[1:])

    def joined(column: np.ndarray) -> np.ndarray:
        return np.concatenate([column[part] for part in parts])

    return Features(
        tokens={name: joined(column) for name, column in features.tokens.items()},
        bounds=bounds,
        labels={name: column[indices] for name, column in features.labels.items()},
        facts={name: column[indices] for name, column in features.facts.items()},
        extra={name: joined(column) for name, column in features.extra.items()},
    )


def _word_starts(kinds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The position in its feature at which each token's word begins. A word that was cut at the feature's beginning begins
    there; a special token is a word of its own."""
    begins = (kinds != CONTINUES_WORD) | (positions == 0)
    last_start = np.maximum.accumulate(np.where(begins, np.arange(len(kinds)), 0))
    starts: np.ndarray = positions[last_start]
    return starts


def _feature_keys(seed: int, epoch: int, names: np.ndarray) -> np.ndarray:
    """uint64 [N], one key for each feature in an epoch."""
    start = _mixed(np.array([seed & 0xFFFFFFFFFFFFFFFF], np.uint64))
    start = _mixed(start ^ np.array([epoch & 0xFFFFFFFFFFFFFFFF], np.uint64))
    return _mixed(start + _GOLDEN * (names.astype(np.uint64) + _ONE))


def _uniform(keys: np.ndarray, positions: np.ndarray, stream: int) -> np.ndarray:
    """float64 in [0, 1): the number of a key, a position and a stream, which is no other's."""
    counters = positions.astype(np.uint64) * np.uint64(3) + np.uint64(stream + 1)
    numbers = _mixed(keys + _GOLDEN * counters) >> np.uint64(11)
    uniform: np.ndarray = numbers.astype(np.float64) * 2.0**-53
    return uniform


_ONE: Final = np.uint64(1)
_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)


def _mixed(values: np.ndarray) -> np.ndarray:
    """SplitMix64's output function (Steele, Lea, Flood 2014): counters become random numbers, each without the others, so
    that a batch can have those of its own features and no more. uint64 arithmetic wraps."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed
