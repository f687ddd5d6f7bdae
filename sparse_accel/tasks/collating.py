"""From features of many lengths to a batch of tensors: padded to one length, or packed end to end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sparse_accel.tasks.features import Features

# Batches that are padded to their longest feature are padded on to a multiple of this: tensor cores like it.
PAD_TO_MULTIPLE_OF = 8

# What a task does to features anew in each epoch: given features, the indices of some and the epoch (-1: evaluation, the
# same each time), it returns just those, in that order. It depends on the indices, not on what else is in the batch.
Prepare = Callable[[Features, np.ndarray, int], Features]


class Collate(Protocol):
    """What makes a batch of the features at `indices`, int64 [N].

    However it is laid out for the model, a batch says in `attention_mask` int64 [N, S], with 1 on tokens, how its outputs
    are laid out by feature (`packing.by_feature`). Labels of features are [N] or [N, L], int64 (those that are positions
    count tokens of their own feature) or float32; labels of tokens are int64 [N, S].
    """

    def __call__(self, features: Features, indices: np.ndarray, epoch: int = -1) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Collator:
    """Pads features to one length.

    That is `max_length` when `pad_to_max_length`, else the length of the longest among them, rounded up to a multiple
    of 8 but never beyond `max_length`. `pad_values` names the token columns and what fills them; `token_labels` those of
    `features.extra` that are labels of tokens, and what fills them. The labels in `position_labels` count tokens, so that
    padding on the left moves them.
    """

    pad_values: Mapping[str, int]
    max_length: int
    pad_to_max_length: bool
    padding_side: str = "right"
    position_labels: tuple[str, ...] = ()
    token_labels: Mapping[str, int] = field(default_factory=dict)
    prepare: Prepare | None = None

    def __call__(self, features: Features, indices: np.ndarray, epoch: int = -1) -> dict[str, Tensor]:
        """Each token column and label of tokens int64 [N, S], `attention_mask` [N, S] with 1 on tokens, each label of
        features [N] or [N, L]."""
        features, indices = _prepared(self.prepare, features, indices, epoch)
        firsts, sizes = _places(features, indices)
        length = self.max_length if self.pad_to_max_length else self._rounded(int(sizes.max()))
        # The token that each place holds, counted from the first of its feature.
        shift = 0 if self.padding_side == "right" else length - sizes[:, None]
        own = np.arange(length) - shift
        is_token = (own >= 0) & (own < sizes[:, None])
        places = np.where(is_token, firsts[:, None] + own, 0)
        batch = {
            name: np.where(is_token, features.tokens[name][places].astype(np.int64), value)
            for name, value in self.pad_values.items()
        }
        for name, value in self.token_labels.items():
            batch[name] = np.where(is_token, features.extra[name][places].astype(np.int64), value)
        batch["attention_mask"] = is_token.astype(np.int64)
        for name, column in features.labels.items():
            batch[name] = _labels(column, indices)
            if name in self.position_labels and self.padding_side != "right":
                batch[name] += length - sizes
        return {name: torch.from_numpy(column) for name, column in batch.items()}

    def _rounded(self, longest: int) -> int:
        return min(self.max_length, -(-longest // PAD_TO_MULTIPLE_OF) * PAD_TO_MULTIPLE_OF)


@dataclass(frozen=True)
class PackedCollator:
    """Lays features end to end, without padding: what attention by boundaries needs.

    `pad_values`, `token_labels` and `prepare` are a Collator's; positions within a feature start at `first_position`.
    """

    pad_values: Mapping[str, int]
    first_position: int = 0
    token_labels: Mapping[str, int] = field(default_factory=dict)
    prepare: Prepare | None = None

    def __call__(self, features: Features, indices: np.ndarray, epoch: int = -1) -> dict[str, Tensor]:
        """T tokens of N features: each token column and `position_ids` int64 [1, T]; `cu_seq_lens_q` int32 [N + 1], where
        each begins and the last ends; `rows` int64 [N, S], which of the T tokens is each feature's s-th (0 where it has
        none); `attention_mask` int64 [N, S]; labels as a Collator's."""
        features, indices = _prepared(self.prepare, features, indices, epoch)
        firsts, sizes = _places(features, indices)
        bounds = np.zeros(len(indices) + 1, np.int64)
        np.cumsum(sizes, out=bounds[1:])
        # Slices, not an index for each token: a copy of what lies together anyway.
        parts = [slice(first, first + size) for first, size in zip(firsts.tolist(), sizes.tolist(), strict=True)]
        columns = {}
        for name in self.pad_values:
            column = features.tokens[name]
            columns[name] = np.concatenate([column[part] for part in parts], dtype=np.int64)
        longest = int(sizes.max())
        counted = np.arange(self.first_position, self.first_position + longest)
        columns["position_ids"] = np.concatenate([counted[: part.stop - part.start] for part in parts])
        within = np.arange(longest)
        mask = (within < sizes[:, None]).astype(np.int64)
        rows = bounds[:-1, None] + within
        rows *= mask
        batch: dict[str, np.ndarray] = {"rows": rows, "attention_mask": mask}
        batch |= {name: column[None] for name, column in columns.items()}
        batch["cu_seq_lens_q"] = bounds.astype(np.int32)
        for name, value in self.token_labels.items():
            labels = np.concatenate([features.extra[name][part] for part in parts], dtype=np.int64)
            batch[name] = np.where(mask.astype(bool), labels[rows], value)
        batch |= {name: _labels(column, indices) for name, column in features.labels.items()}
        return {name: torch.from_numpy(column) for name, column in batch.items()}


def _prepared(
    prepare: Prepare | None, features: Features, indices: np.ndarray, epoch: int
) -> tuple[Features, np.ndarray]:
    if prepare is None:
        return features, indices
    return prepare(features, indices, epoch), np.arange(len(indices))


def _labels(column: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Labels of features: whole numbers as int64, others as float32."""
    chosen = column[indices]
    labels: np.ndarray = chosen.astype(np.float32 if chosen.dtype.kind == "f" else np.int64)
    return labels


def _places(features: Features, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the tokens of each feature begin, and how many there are, int64 [N]."""
    firsts = features.bounds[indices]
    return firsts, features.bounds[indices + 1] - firsts
