"""Fake quantization of one tensor with one scale on a CPU: what is clamped is looked for in the rows that hold it.

Where time goes on a CPU is memory: a new tensor costs several times what it costs to work on one that is there. Moving
averages leave a few values of a few rows off the grid. So the smallest and largest value of each row are found first (an
observer wants them anyway), the tensor is scaled and rounded in one new tensor, and only rows that leave the grid are
clamped and remembered for backward. A tensor that stays on its grid has nothing to remember: its gradient passes as it is.

Numbers of the grid are read on the host, which waits for nothing on a CPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparse_accel.compress.kernels.straight_through import Inside, Rounded

# Below this many entries the plain form is as fast.
_SMALLEST = 4096
# The shortest row that is worth its own smallest and largest value.
_SHORTEST_ROW = 128
# With more than this share of rows off the grid, all are clamped.
_FEW = 0.25


class RowExtremes(NamedTuple):
    """The smallest and largest value of each row of a tensor; NaN where a row has one.

    Rows are runs of `length` entries that are neighbours in memory: `order` holds the tensor's dims from the slowest to
    the fastest there.
    """

    order: tuple[int, ...]
    length: int
    low: Tensor
    high: Tensor


def row_extremes(x: Tensor, smallest: int = _SMALLEST) -> RowExtremes | None:
    """The extremes of `x`, or None where this module has no form for it: not on a CPU, smaller than `smallest`, not dense
    in memory, or within a graph that is being traced."""
    # First of all: while a graph is traced, to look at a size would fix it.
    if torch.compiler.is_compiling() or not x.is_cpu or x.numel() < max(smallest, 1):
        return None
    strides = x.stride()
    order = tuple(sorted(range(x.dim()), key=lambda dim: -strides[dim]))
    ordered = x.detach().permute(order)
    if not ordered.is_contiguous():
        return None
    length = 1
    for size in reversed(ordered.shape):
        length *= size
        if length >= _SHORTEST_ROW:
            break
    rows = ordered.view(-1, length)
    # Not aminmax: along a dim it is ten times slower on CPU than amin and amax together.
    return RowExtremes(order, length, rows.amin(1), rows.amax(1))


@torch.no_grad()
def rounded(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, extremes: RowExtremes
) -> Rounded:
    """`x`, whose rows have these `extremes`, on the grid; the bits of `fakequant.reference_fake_quantize`."""
    # A tensor that had to be cast is ours to overwrite.
    own = x.dtype != torch.float32
    steps = x.detach().float().mul_((1.0 / scale).item()) if own else x.detach() * (1.0 / scale).item()
    inside = _put_on_grid(steps, scale, zero_point, quant_min, quant_max, extremes)
    return Rounded(steps.to(x.dtype), inside)


@torch.no_grad()
def rounded_in_place(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, extremes: RowExtremes
) -> Inside | None:
    """`rounded`, overwriting a float32 `x`."""
    return _put_on_grid(x.mul_((1.0 / scale).item()), scale, zero_point, quant_min, quant_max, extremes)


def _put_on_grid(
    steps: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, extremes: RowExtremes
) -> Inside | None:
    """Make of x * (1 / scale) what fake quantization makes of x, in place; `extremes` are those of x."""
    factor, offset = (1.0 / scale).item(), int(zero_point.item())
    # In steps of the grid away from 0.
    lowest, highest = float(quant_min - offset), float(quant_max - offset)
    steps.round_()
    # Scaling and rounding keep the order, so that the extremes of the steps are the steps of the extremes.
    low, high = (extreme.float().mul(factor).round_() for extreme in (extremes.low, extremes.high))
    # A NaN is not on the grid either.
    off = ((low >= lowest) & (high <= highest)).logical_not_().nonzero().squeeze(1)
    inside = None
    if off.numel():
        rows = steps.permute(extremes.order).view(-1, extremes.length)
        few = off.numel() <= _FEW * rows.shape[0]
        affected = rows.index_select(0, off) if few else rows
        clamped = affected.clamp(lowest, highest)
        inside = Inside(clamped == affected, off if few else None, extremes.order)
        if few:
            rows.index_copy_(0, off, clamped)
        else:
            rows.copy_(clamped)
    steps.mul_(scale.item())
    return inside
