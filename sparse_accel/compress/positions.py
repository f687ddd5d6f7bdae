"""Positions of kept weights: a zero pattern in as few bytes as it takes, and back.

A pattern over n entries in row-major order, of which k are kept, is stored in one of two forms, told apart by dtype:

* bitmask, uint8 [ceil(n / 8)]: bit i % 8 (the lowest is 0) of byte i // 8 says whether entry i is kept, which is
  `numpy.packbits(..., bitorder="little")`; bits past the end are 0.
* indices, int32 [k]: the kept entries, ascending.

The indices are the smaller form where less than one entry in 32 is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_accel.errors import ModelError


def pack_positions(mask: Tensor) -> Tensor:
    """The positions where `mask` (bool, any shape) is True, in the form that takes fewer bytes; the bitmask for equal
    ones."""
    indices = mask.flatten().nonzero().flatten().int()
    return indices if indices.nbytes < bitmask_bytes(mask.numel()) else _to_bits(mask.flatten())


def unpack_positions(positions: Tensor, numel: int) -> Tensor:
    """The mask, bool [numel], from either form. Raises ValueError for what is no pattern over `numel` entries."""
    _check_form(positions, numel)
    if positions.dtype == torch.uint8:
        return _from_bits(positions)[:numel]
    mask = torch.zeros(numel, dtype=torch.bool, device=positions.device)
    mask[positions] = True
    return mask


def kept_indices(positions: Tensor, numel: int) -> Tensor:
    """The kept entries, int32 [k] and ascending, from either form. Raises ValueError as `unpack_positions`.

    Waits for the device.
    """
    if positions.dtype == torch.int32:
        _check_form(positions, numel)
        return positions
    return unpack_positions(positions, numel).nonzero().flatten().int()


def mask_of(name: str, positions: Tensor, shape: Sequence[int]) -> Tensor:
    """The mask of a layer called `name`, bool `shape`, from either form or a mask itself. Raises ModelError for what is no
    pattern of that shape."""
    numel = math.prod(shape)
    if positions.dtype == torch.bool:
        if positions.shape != tuple(shape):
            raise ModelError(f"{name}: its weight is {list(shape)}, but the mask that is given {list(positions.shape)}")
        return positions
    try:
        return unpack_positions(positions, numel).view(tuple(shape))
    except ValueError as error:
        raise ModelError(f"{name}: its positions do not fit a weight of {list(shape)}: {error}") from None


def bitmask_bytes(numel: int) -> int:
    """Bytes of a bitmask over `numel` entries."""
    return -(-numel // 8)


def _check_form(positions: Tensor, numel: int) -> None:
    if positions.dtype == torch.uint8:
        if positions.shape != (bitmask_bytes(numel),):
            raise ValueError(f"a bitmask over {numel:,} entries is uint8 [{bitmask_bytes(numel)}]")
        if numel % 8 and int(positions[-1]) >> numel % 8:
            raise ValueError(f"the bitmask has marks past the last of {numel:,} entries")
    elif positions.dtype == torch.int32 and positions.dim() == 1:
        ends = torch.tensor([-1, numel], device=positions.device)
        steps = torch.diff(positions.long(), prepend=ends[:1], append=ends[1:])
        if bool((steps <= 0).any()):
            raise ValueError(f"the indices do not ascend from 0 to at most {numel - 1:,}")
    else:
        raise ValueError(f"positions are uint8 or int32 vectors, got {positions.dtype} {list(positions.shape)}")


def _to_bits(flags: Tensor) -> Tensor:
    padded = torch.zeros(bitmask_bytes(flags.numel()) * 8, dtype=torch.uint8, device=flags.device)
    padded[: flags.numel()] = flags
    return (padded.view(-1, 8) << _shifts(flags)).sum(1, dtype=torch.uint8)


def _from_bits(bits: Tensor) -> Tensor:
    return ((bits.unsqueeze(1) >> _shifts(bits)) & 1).bool().flatten()


def _shifts(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)
