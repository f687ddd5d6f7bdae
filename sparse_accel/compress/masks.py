"""Masks: which weights are kept (True) and which are zero (False), as pure functions of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class MaskType:
    """How zeros lie in a weight [rows, columns], where columns are inputs: in whole blocks of `rows` x `columns`, or, where
    `kept` is not None, `kept` of each `columns` neighbours in a row stay (N:M).

    A single weight is a block of 1 x 1. -1 is the weight's whole dimension. A weight is cut into blocks without a rest, but
    that the last block of a row may be shorter where blocks are one row high.
    """

    rows: int = 1
    columns: int = 1
    kept: int | None = None

    @property
    def sparsity(self) -> float | None:
        """The only sparsity besides 0 that N:M knows; None for blocks, which know any."""
        return None if self.kept is None else 1.0 - self.kept / self.columns

    def obstacle(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of this shape cannot be cut so, as a clause; None if it can."""
        if self == UNSTRUCTURED:
            return None
        if len(shape) != 2:
            return f"a weight of {len(shape)} dimensions has no {self} pattern"
        rows, columns = _block(self, shape)
        if shape[0] % rows:
            return f"its {shape[0]} rows are no multiple of {rows}"
        if shape[1] % columns and (self.kept is not None or rows > 1):
            return f"its {shape[1]} columns are no multiple of {columns}"
        return None

    def num_units(self, shape: tuple[int, ...]) -> int:
        """Blocks, or groups, in a weight of this shape."""
        if self == UNSTRUCTURED:
            return math.prod(shape)
        rows, columns = _block(self, shape)
        return shape[0] // rows * -(-shape[1] // columns)

    def num_dropped(self, shape: tuple[int, ...], sparsity: float) -> int:
        """The units of a weight of this shape that are dropped at `sparsity`: round(sparsity * units), as SparseML counts; of
        N:M all or none."""
        if not 0.0 <= sparsity <= 1.0:
            raise ValueError(f"a sparsity lies between 0 and 1, got {sparsity}")
        units = self.num_units(shape)
        if self.sparsity is not None:
            return units if sparsity >= self.sparsity - NM_TOLERANCE else 0
        return round(sparsity * units)

    def __str__(self) -> str:
        return f"{self.rows} x {self.columns}" if self.kept is None else f"{self.kept}:{self.columns}"


UNSTRUCTURED: Final = MaskType()
BLOCK4: Final = MaskType(1, 4)
# A sparsity this close to that of N:M means it.
NM_TOLERANCE: Final = 1e-2


def nonzero_mask(weight: Tensor) -> Tensor:
    """Bool tensor of `weight`'s shape, True where it is not zero: the pattern that constant pruning holds."""
    return weight.detach() != 0


def held(weight: Tensor, mask: Tensor) -> Tensor:
    """`weight` where `mask` is True, else 0.0; the gradient is the same of the gradient."""
    # Neither is a product: an infinite gradient times False would be NaN.
    on_bits = weight.device.type == "cpu" and weight.dtype in _INTEGERS and not torch.compiler.is_compiling()
    return _held_bits(weight, mask) if on_bits else torch.where(mask, weight, 0.0)


def magnitude_mask(weight: Tensor, sparsity: float) -> Tensor:
    """Bool tensor of `weight`'s shape with exactly round(sparsity * numel) entries False: the smallest magnitudes.

    Entries of equal magnitude go in storage order, so that the mask is the same on every device and rank; zeros have
    the smallest magnitude and therefore go first. `sparsity` lies in [0, 1], else ValueError.
    """
    dropped = UNSTRUCTURED.num_dropped(tuple(weight.shape), sparsity)
    scores = weight.detach().abs().to(torch.promote_types(weight.dtype, torch.float32))
    return _keep_largest(scores.flatten(), dropped).view(weight.shape)


def pruned_mask(weight: Tensor, mask: Tensor, mask_type: MaskType, num_dropped: int) -> Tensor:
    """`mask` (bool, of `weight`'s shape) with more entries False, so that `num_dropped` units are dropped whole: those that
    are already, then those of the smallest mean magnitude.

    What is False stays False, whatever `weight` holds there. Units of equal score go in storage order. Of N:M, `num_dropped` is
    0 or all groups.
    """
    if not num_dropped:
        return mask
    if mask_type.kept is not None:
        return mask & _keep_of_each(weight.detach(), mask, mask_type)
    keep = _keep_largest(unit_scores(weight, mask, mask_type), num_dropped)
    return mask & spread(keep, mask_type, tuple(weight.shape))


def unit_scores(weight: Tensor, mask: Tensor, mask_type: MaskType) -> Tensor:
    """The mean magnitude of what `mask` keeps of each block, float32 [units]; -1 for one that is dropped whole, so that it
    comes before all others."""
    scores = held(weight.detach(), mask).abs().float()
    if mask_type == UNSTRUCTURED:
        return torch.where(mask, scores, -1.0).flatten()
    means = _blocks(scores, mask_type).sum((1, 3)) / _entries(mask_type, scores)
    return torch.where(_blocks(mask, mask_type).any(3).any(1), means, -1.0).flatten()


def spread(keep: Tensor, mask_type: MaskType, shape: tuple[int, ...]) -> Tensor:
    """Bool [units] as a mask of this shape, each unit over its block."""
    if mask_type == UNSTRUCTURED:
        return keep.view(shape)
    rows, columns = _block(mask_type, shape)
    blocks = keep.view(shape[0] // rows, -1)
    return blocks.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[:, : shape[1]]


def count_dropped(mask: Tensor, mask_type: MaskType) -> Tensor:
    """How many units `mask` drops, as an integer tensor: whole blocks, or groups of which no more than N is kept."""
    if mask_type == UNSTRUCTURED:
        return (~mask).sum()
    if mask_type.kept is not None:
        return (mask.reshape(-1, mask_type.columns).sum(1) <= mask_type.kept).sum()
    return (~_blocks(mask, mask_type).any(3).any(1)).sum()


def global_magnitude_masks(weights: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """One magnitude threshold over all `weights`: exactly round(sparsity * total numel) entries are False in all."""
    total = sum(weight.numel() for weight in weights.values())
    dropped = UNSTRUCTURED.num_dropped((total,), sparsity)
    scores = {name: weight.detach().abs().float().flatten() for name, weight in weights.items()}
    return {name: keep.view(weights[name].shape) for name, keep in global_keep(scores.items, dropped)}


def global_keep(scores: Callable[[], Iterable[tuple[str, Tensor]]], dropped: int) -> Iterator[tuple[str, Tensor]]:
    """For each of several vectors of scores, which entries stay: bool of its length. `dropped` of all together go, the lowest
    first, equal ones in their order.

    `scores` gives the same pairs of name and float32 [n] each time that it is called, which is three times; no two vectors need
    be in memory at once. A score is -1 or at least 0. Waits for the device.
    """
    if not dropped:
        yield from ((name, torch.ones_like(vector, dtype=torch.bool)) for name, vector in scores())
        return
    upper, before = _bucket((_keys(vector) >> _LOW_BITS for _, vector in scores()), dropped)
    lower, among = _bucket((_lower(_keys(vector), upper) for _, vector in scores()), dropped - before)
    threshold, ties_left = (upper << _LOW_BITS) + lower, dropped - before - among
    for name, vector in scores():
        keys = _keys(vector)
        ties = keys == threshold
        rank = ties.cumsum(0)
        yield name, (keys > threshold) | (ties & (rank > ties_left))
        ties_left = max(0, ties_left - int(ties.sum()))


def sparsity(tensor: Tensor) -> float:
    """Share of zeros in [0, 1]; an empty tensor has none. Waits for the device."""
    return 1.0 - int(torch.count_nonzero(tensor)) / tensor.numel() if tensor.numel() else 0.0


def _keep_largest(scores: Tensor, dropped: int) -> Tensor:
    """Flat bool mask with `dropped` entries False, the lowest scores first; ties by position. Does not wait for the device."""
    if not dropped:
        return torch.ones_like(scores, dtype=torch.bool)
    # Selection, not a sort: tens of times as fast. Which of the entries at the threshold go is counted off afterwards.
    threshold = scores.kthvalue(dropped).values
    ties = scores == threshold
    return (scores > threshold) | (ties & (ties.cumsum(0) > dropped - (scores < threshold).sum()))


def _keep_of_each(weight: Tensor, mask: Tensor, mask_type: MaskType) -> Tensor:
    """The N largest kept entries of each M neighbours; of equal ones the later stay, as in `_keep_largest`."""
    assert mask_type.kept is not None
    groups = torch.where(mask, weight.abs().float(), -1.0).reshape(-1, mask_type.columns)
    smallest = groups.argsort(dim=1, stable=True)[:, : mask_type.columns - mask_type.kept]
    return torch.ones_like(groups, dtype=torch.bool).scatter_(1, smallest, False).view(weight.shape)


def _block(mask_type: MaskType, shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a block, with -1 resolved."""
    rows, columns = mask_type.rows, mask_type.columns
    return shape[0] if rows == -1 else rows, shape[1] if columns == -1 else columns


def _blocks(tensor: Tensor, mask_type: MaskType) -> Tensor:
    """[rows, columns] as [row of blocks, row in block, column of blocks, column in block]; a short last block is filled with
    zeros or False."""
    rows, columns = _block(mask_type, tuple(tensor.shape))
    rest = -tensor.shape[1] % columns
    whole = F.pad(tensor, (0, rest)) if rest else tensor
    return whole.reshape(tensor.shape[0] // rows, rows, -1, columns)


def _entries(mask_type: MaskType, weight: Tensor) -> Tensor:
    """How many entries the blocks have, by their column: [columns of blocks]. Only the last may have fewer."""
    rows, columns = _block(mask_type, tuple(weight.shape))
    starts = torch.arange(0, weight.shape[1], columns, device=weight.device)
    return rows * (weight.shape[1] - starts).clamp(max=columns)


# Scores as integers of 31 bits and a little, found digit by digit: two digits of which the lower has this many bits.
_LOW_BITS: Final = 16
_BUCKETS: Final = (1 << 31 - _LOW_BITS) + 1


def _keys(scores: Tensor) -> Tensor:
    """Integers in the order of the scores, int64 in [0, 2^31]: floats that are not negative are ordered as their bits are."""
    return torch.where(scores < 0.0, 0, scores.view(torch.int32).long() + 1)


def _lower(keys: Tensor, upper: int) -> Tensor:
    """The lower digits of the keys whose upper digit is `upper`."""
    return keys[keys >> _LOW_BITS == upper] & (1 << _LOW_BITS) - 1


def _bucket(digits: Iterable[Tensor], rank: int) -> tuple[int, int]:
    """The digit of the `rank`-th smallest (from 1) and how many have a smaller one."""
    counts: Tensor | None = None
    for part in digits:
        found = torch.bincount(part, minlength=max(_BUCKETS, 1 << _LOW_BITS))
        counts = found if counts is None else counts + found
    assert counts is not None
    up_to = counts.cumsum(0)
    bucket = int(torch.searchsorted(up_to, rank))
    return bucket, int(up_to[bucket - 1]) if bucket else 0


# As wide as the floats.
_INTEGERS = {
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float64: torch.int64,
}


class _HeldBits(torch.autograd.Function):
    """torch.where(mask, weight, 0.0) as an AND of bits, which processors do on whole vectors: seven times as fast as torch
    2.13's where."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        integer = _INTEGERS[weight.dtype]
        # True is 1, thus -1 is all ones, in any width.
        bits = mask.view(torch.int8).neg().to(integer)
        return bits.bitwise_and_(weight.view(integer)).view(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        return held(grads[0], mask), None


_held_bits: Callable[..., Tensor] = _HeldBits.apply
