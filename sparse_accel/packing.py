"""Packed batches: N features that lie end to end in one row of T tokens, and how a model is called with them.

A packed batch has `cu_seq_lens_q` int32 [N + 1] (where each sequence begins and the last ends), and `rows` int64
[N, S], which of the T tokens is each feature's s-th (0 where it has none). Whether a batch is packed or padded, its
`attention_mask` int64 [N, S] says where features have tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

import torch
from torch import Tensor

# What a model is given of a packed batch beside its token columns.
BOUNDS: Final = "cu_seq_lens_q"
LONGEST: Final = "max_length_q"


def is_packed(batch: Mapping[str, Tensor]) -> bool:
    """Whether the features of a batch lie end to end."""
    return "rows" in batch


def model_inputs(batch: Mapping[str, Tensor], accepts: Collection[str]) -> dict[str, Any]:
    """The columns of a batch that a model's forward takes. A packed one comes with its bounds and the length S of its
    longest feature, an int, and without the mask of a padded one."""
    inputs: dict[str, Any] = {name: value for name, value in batch.items() if name in accepts}
    if is_packed(batch):
        inputs.pop("attention_mask", None)
        inputs |= {BOUNDS: batch[BOUNDS], LONGEST: batch["rows"].shape[1]}
    return inputs


def by_feature(outputs: Mapping[str, Any], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's outputs for a batch: those by token of a packed one, [1, T, ...], laid out as [N, S, ...].

    Where a feature has no s-th token stands another's output: what reads it must look at `attention_mask`.
    """
    tensors = {name: value for name, value in outputs.items() if isinstance(value, Tensor)}
    if not is_packed(batch):
        return tensors
    rows, shape = batch["rows"], batch["input_ids"].shape
    return {
        name: value.index_select(1, rows.flatten()).view(*rows.shape, *value.shape[2:])
        if value.shape[:2] == shape
        else value
        for name, value in tensors.items()
    }


def padded_inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A packed batch for a model that takes padded ones: every token column as [N, S], and the mask.

    Padding repeats the batch's first token; no position is named: the model counts for itself.
    """
    rows, shape = batch["rows"], batch["input_ids"].shape
    columns = {name: value[0, rows] for name, value in batch.items() if value.shape == shape and name != "position_ids"}
    return {**columns, "attention_mask": batch["attention_mask"]}


def places(bounds: Tensor, num_tokens: int, longest: int) -> tuple[Tensor, Tensor, Tensor]:
    """How T packed tokens lie in a padded batch of their sequences, from the bounds alone and without waiting for a device.

    Returns which token stands at each place, int64 [N, S] (the last of all where there is none); which places hold one,
    bool [N, S]; and the place of each token, int64 [T], counted through the N * S.
    """
    firsts = bounds[:-1].long()
    within = torch.arange(longest, device=bounds.device)
    tokens = (firsts[:, None] + within).clamp(max=num_tokens - 1)
    is_token = within < bounds.diff()[:, None]
    order = torch.arange(num_tokens, device=bounds.device)
    sequence = torch.searchsorted(bounds[1:].long(), order, right=True)
    return tokens, is_token, sequence * longest + order - firsts[sequence]
