"""Tensors as a bitmask and the values that it marks: what is left when positions of zeros are not stored."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# Integers as wide as a value: what is compared and copied are bits, so that a NaN keeps its payload.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def packed_bytes(tensor: Tensor, *, signs: bool = False) -> int:
    """How many bytes `pack` takes for n entries of which it keeps k: ceil(n / 8) + k * itemsize, and with `signs`
    ceil((n - k) / 8) more."""
    size, count = tensor.numel(), int(torch.count_nonzero(_marked(_bits(tensor), signs)))
    return _num_bytes(size) + count * tensor.itemsize + (_num_bytes(size - count) if signs else 0)


def pack(tensor: Tensor, *, signs: bool = False) -> list[Tensor]:
    """The bitmask uint8 [ceil(n / 8)] and the kept values [k], in row-major order and `tensor`'s dtype.

    Bit i % 8 (the lowest is 0) of byte i // 8 says whether entry i is kept. Dropped are entries whose every bit is 0:
    +0.0 or the integer 0. With `signs` also those whose highest bit alone is 1, which is -0.0; the highest bits of the
    n - k dropped entries follow as a third tensor, uint8 [ceil((n - k) / 8)] in the same bit order.
    """
    bits = _bits(tensor)
    marked = _marked(bits, signs)
    packed = [_to_bytes(marked), bits[marked].view(tensor.dtype)]
    return [*packed, _to_bytes(bits[~marked] != 0)] if signs else packed


def unpack(shape: Sequence[int], mask: Tensor, values: Tensor, signs: Tensor | None = None) -> Tensor:
    """The inverse of `pack`: a tensor of `shape` in the dtype of `values`. Raises ValueError when the parts do not
    fit."""
    if values.dim() != 1 or values.itemsize not in _INTEGERS:
        raise ValueError(f"its values are no vector of real numbers, but {values.dtype} {list(values.shape)}")
    marked = _from_bytes(mask, math.prod(shape), "bitmask")
    count = int(torch.count_nonzero(marked))
    if count != values.numel():
        raise ValueError(f"its bitmask marks {count:,} entries, but {values.numel():,} values are stored")
    bits = torch.zeros(marked.numel(), dtype=_INTEGERS[values.itemsize])
    bits[marked] = values.view(bits.dtype)
    if signs is not None:
        negative = _from_bytes(signs, marked.numel() - count, "sign vector")
        bits[~marked] = negative.to(bits.dtype) * torch.iinfo(bits.dtype).min
    return bits.view(values.dtype).reshape(tuple(shape))


def _bits(tensor: Tensor) -> Tensor:
    """The entries' bits as integers [n], in row-major order."""
    return tensor.contiguous().flatten().view(_INTEGERS[tensor.itemsize])


def _marked(bits: Tensor, signs: bool) -> Tensor:
    """Which entries are kept, bool [n]."""
    return (bits & torch.iinfo(bits.dtype).max if signs else bits) != 0


def _num_bytes(num_bits: int) -> int:
    return -(-num_bits // 8)


def _to_bytes(flags: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(flags.numpy(), bitorder="little"))


def _from_bytes(packed: Tensor, size: int, what: str) -> Tensor:
    if packed.dtype != torch.uint8 or packed.shape != (_num_bytes(size),):
        raise ValueError(
            f"its {what} is {packed.dtype} {list(packed.shape)}, where {size:,} bits are uint8 [{_num_bytes(size)}]"
        )
    flags = np.unpackbits(packed.numpy(), bitorder="little")
    if flags[size:].any():
        raise ValueError(f"its {what} has marks beyond the end of the tensor")
    return torch.from_numpy(flags[:size]).bool()
