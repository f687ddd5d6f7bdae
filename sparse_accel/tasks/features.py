"""Tokenized features in flat arrays, without padding."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparse_accel.tasks.files import replacing


@dataclass(frozen=True)
class Features:
    """N features of T tokens in all, stored end to end: about 5 bytes a token.

    tokens: name -> [T, ...], one entry a token (`input_ids` int32, `token_type_ids` uint8, ...);
    bounds: int64 [N + 1], feature n owns tokens bounds[n] to bounds[n + 1];
    labels: name -> int32 [N], what training wants beside the inputs;
    facts: name -> int32 [N], and extra: name -> [T, ...], what scoring wants and the model never sees.
    """

    tokens: Mapping[str, np.ndarray]
    bounds: np.ndarray
    labels: Mapping[str, np.ndarray]
    facts: Mapping[str, np.ndarray]
    extra: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """What the model is given of one feature: arrays of its own length, and 0-d arrays for the labels."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"feature {index} of {len(self)}")
        index %= len(self)
        first, last = self.bounds[index], self.bounds[index + 1]
        feature = {name: column[first:last] for name, column in self.tokens.items()}
        return feature | {name: column[index] for name, column in self.labels.items()}

    @property
    def lengths(self) -> np.ndarray:
        """int64 [N]: tokens of each feature, for grouping by length."""
        lengths: np.ndarray = np.diff(self.bounds)
        return lengths

    def extra_of(self, index: int, name: str) -> np.ndarray:
        """One feature's part of an `extra` column."""
        return self.extra[name][self.bounds[index] : self.bounds[index + 1]]

    def take(self, count: int | None) -> Features:
        """The first `count` features (all of them for None); no copy is made."""
        if count is None or count >= len(self):
            return self
        bounds = self.bounds[: count + 1]
        num_tokens = bounds[-1]
        return Features(
            tokens={name: column[:num_tokens] for name, column in self.tokens.items()},
            bounds=bounds,
            labels={name: column[:count] for name, column in self.labels.items()},
            facts={name: column[:count] for name, column in self.facts.items()},
            extra={name: column[:num_tokens] for name, column in self.extra.items()},
        )


def concatenate(parts: Sequence[Features]) -> Features:
    """Features of several parts, one after the other."""
    shift = np.cumsum([0, *(part.bounds[-1] for part in parts)])
    bounds = [part.bounds[1:] + offset for part, offset in zip(parts, shift, strict=False)]

    def joined(columns: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        return {name: np.concatenate([column[name] for column in columns]) for name in columns[0]}

    return Features(
        tokens=joined([part.tokens for part in parts]),
        bounds=np.concatenate([np.zeros(1, np.int64), *bounds]),
        labels=joined([part.labels for part in parts]),
        facts=joined([part.facts for part in parts]),
        extra=joined([part.extra for part in parts]),
    )


def length_sorted_batches(lengths: np.ndarray, batch_size: int, rank: int = 0, world_size: int = 1) -> list[np.ndarray]:
    """A rank's batches of feature indices, longest first: little padding, and memory trouble shows at once."""
    order = np.argsort(-lengths, kind="stable")[rank::world_size]
    return [order[at : at + batch_size] for at in range(0, len(order), batch_size)]


def save_features(path: Path, features: Features) -> None:
    """Write features to one .npz file, whole or not at all."""
    groups = {"tokens": features.tokens, "labels": features.labels, "facts": features.facts, "extra": features.extra}
    arrays = {f"{group}/{name}": column for group, columns in groups.items() for name, column in columns.items()}
    with replacing(path) as file:
        np.savez(file, bounds=features.bounds, **arrays)  # type: ignore[arg-type]


def load_features(path: Path) -> Features | None:
    """Features from a file of `save_features`; None when it is absent or damaged, as its checksums tell."""
    groups: dict[str, dict[str, np.ndarray]] = {"tokens": {}, "labels": {}, "facts": {}, "extra": {}}
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            bounds = archive["bounds"]
            for key in archive.files:
                if "/" in key:
                    group, name = key.split("/", 1)
                    groups[group][name] = archive[key]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return Features(bounds=bounds, **groups)
