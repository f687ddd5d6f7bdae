"""From features of many lengths to a batch of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Batches that are padded to their longest feature are padded on to a multiple of this: tensor cores like it.
PAD_TO_MULTIPLE_OF = 8


@dataclass(frozen=True)
class Collator:
    """Pads a list of features to one length.

    That is `max_length` when `pad_to_max_length`, else the length of the longest among them, rounded up to a multiple
    of 8 but never beyond `max_length`. `pad_values` names the token columns and what fills them; all other columns are
    labels, and those in `position_labels` count tokens, so that padding on the left moves them.
    """

    pad_values: Mapping[str, int]
    max_length: int
    pad_to_max_length: bool
    padding_side: str = "right"
    position_labels: tuple[str, ...] = ()

    def __call__(self, features: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Tensor]:
        """int64 tensors: each token column [B, S], `attention_mask` [B, S] with 1 on tokens, each label [B]."""
        sizes = [len(feature["input_ids"]) for feature in features]
        length = self.max_length if self.pad_to_max_length else self._rounded(max(sizes))
        starts = [0 if self.padding_side == "right" else length - size for size in sizes]
        batch: dict[str, np.ndarray] = {}
        for name, value in self.pad_values.items():
            column = np.full((len(features), length), value, dtype=np.int64)
            for row, start, size, feature in zip(column, starts, sizes, features, strict=True):
                row[start : start + size] = feature[name]
            batch[name] = column
        mask = np.zeros((len(features), length), dtype=np.int64)
        for row, start, size in zip(mask, starts, sizes, strict=True):
            row[start : start + size] = 1
        batch["attention_mask"] = mask
        for name in (name for name in features[0] if name not in self.pad_values):
            batch[name] = np.array([feature[name] for feature in features], dtype=np.int64)
            if name in self.position_labels:
                batch[name] += np.array(starts)
        return {name: torch.from_numpy(column) for name, column in batch.items()}

    def _rounded(self, longest: int) -> int:
        return min(self.max_length, -(-longest // PAD_TO_MULTIPLE_OF) * PAD_TO_MULTIPLE_OF)
