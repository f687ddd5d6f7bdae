"""Fake quantization of one tensor with one scale on a GPU, in one pass that also finds the range of what it read.

Imported only where Triton is there. Runs in Triton's interpreter on a CPU too, which is how its numbers are tested.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048


class Observed(NamedTuple):
    """Which entries of a tensor an observer looks at: those whose every token is real.

    `tokens` is bool, contiguous; counted through the tensor's memory, entry i belongs to the tokens
    i // batch * length + i // first % length, and the same with `second`. None for all entries.
    """

    tokens: Tensor | None = None
    batch: int = 1
    length: int = 1
    first: int = 1
    second: int = 1


def fake_quantize_and_observe(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, observed: Observed | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`x` on the grid as `fakequant.reference_fake_quantize` puts it there, and the smallest and largest of the `observed`
    entries (fp32, 0-dimensional; None when nothing observes; (inf, -inf) when it looks at none, NaN where one is NaN).

    `x` is fp32, bf16 or fp16 and dense in memory. One kernel, and one more for each end of the range; no wait.
    """
    value, lows, highs = _apply(x, scale, zero_point, quant_min, quant_max, observed)
    if observed is None:
        return value, None, None
    return value, lows.amin(), highs.amax()


def is_dense(x: Tensor) -> bool:
    """Whether the entries of `x` lie in memory without gaps and each for itself."""
    strides = x.stride()
    order = sorted(range(x.dim()), key=lambda dim: -strides[dim])
    return x.numel() > 0 and x.permute(order).is_contiguous()


@triton.jit
def _forward(
    x_pointer,
    scale_pointer,
    zero_point_pointer,
    value_pointer,
    inside_pointer,
    lows_pointer,
    highs_pointer,
    tokens_pointer,
    num_entries,
    batch,
    length,
    first,
    second,
    QUANT_MIN: tl.constexpr,
    QUANT_MAX: tl.constexpr,
    OBSERVES: tl.constexpr,
    HAS_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    entries = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = entries < num_entries
    x = tl.load(x_pointer + entries, mask=exists, other=0.0).to(tl.float32)
    scale = tl.load(scale_pointer)
    zero_point = tl.load(zero_point_pointer).to(tl.float32)
    lowest, highest = QUANT_MIN - zero_point, QUANT_MAX - zero_point
    steps = x * tl.div_rn(1.0 + scale * 0.0, scale)
    # Adding and taking away 1.5 * 2^23 rounds to even, for numbers that are not larger; one step off the grid is as good
    # as many. A NaN compares with nothing and stays.
    steps = tl.where(steps < lowest - 1.0, lowest - 1.0, steps)
    steps = tl.where(steps > highest + 1.0, highest + 1.0, steps)
    steps = (steps + 12582912.0) - 12582912.0
    inside = (steps >= lowest) & (steps <= highest)
    steps = tl.where(steps < lowest, lowest, steps)
    steps = tl.where(steps > highest, highest, steps)
    tl.store(value_pointer + entries, (steps * scale).to(value_pointer.dtype.element_ty), mask=exists)
    bits = tl.reshape(inside.to(tl.int32), (BLOCK // 8, 8)) << tl.arange(0, 8)[None, :]
    eighths = program.to(tl.int64) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    tl.store(inside_pointer + eighths, tl.sum(bits, axis=1).to(tl.uint8))
    if OBSERVES:
        seen = exists
        if HAS_TOKENS:
            rows = entries // batch * length
            seen = seen & (tl.load(tokens_pointer + rows + entries // first % length, mask=exists, other=0) != 0)
            seen = seen & (tl.load(tokens_pointer + rows + entries // second % length, mask=exists, other=0) != 0)
        low = tl.min(tl.where(seen, x, float("inf")), axis=0)
        high = tl.max(tl.where(seen, x, float("-inf")), axis=0)
        has_nan = tl.max((seen & (x != x)).to(tl.int32), axis=0) > 0
        tl.store(lows_pointer + program, tl.where(has_nan, float("nan"), low))
        tl.store(highs_pointer + program, tl.where(has_nan, float("nan"), high))


@triton.jit
def _backward(upstream_pointer, inside_pointer, gradient_pointer, num_entries, BLOCK: tl.constexpr):
    entries = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = entries < num_entries
    upstream = tl.load(upstream_pointer + entries, mask=exists, other=0.0)
    eighths = tl.load(inside_pointer + entries // 8, mask=exists, other=0).to(tl.int32)
    inside = (eighths >> (entries % 8).to(tl.int32)) & 1
    tl.store(gradient_pointer + entries, upstream * inside.to(upstream.dtype), mask=exists)


class _KernelGrid(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        quant_min: int,
        quant_max: int,
        observed: Observed | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_blocks = triton.cdiv(x.numel(), _BLOCK)
        value = torch.empty_like(x)
        inside = torch.empty(num_blocks * (_BLOCK // 8), dtype=torch.uint8, device=x.device)
        ends = torch.empty(2, num_blocks if observed is not None else 0, dtype=torch.float32, device=x.device)
        tokens = None if observed is None else observed.tokens
        sizes = observed or Observed()
        _forward[(num_blocks,)](
            x,
            scale,
            zero_point,
            value,
            inside,
            ends[0],
            ends[1],
            x if tokens is None else tokens.view(torch.uint8),
            x.numel(),
            sizes.batch,
            sizes.length,
            sizes.first,
            sizes.second,
            QUANT_MIN=quant_min,
            QUANT_MAX=quant_max,
            OBSERVES=observed is not None,
            HAS_TOKENS=tokens is not None,
            BLOCK=_BLOCK,
            enable_fp_fusion=False,  # a product that is not rounded before it is rounded to the grid is another number
        )
        ctx.save_for_backward(inside)
        ctx.strides = x.stride()
        lows, highs = ends[0], ends[1]
        ctx.mark_non_differentiable(lows, highs)
        return value, lows, highs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        upstream = grads[0]
        if upstream.stride() != ctx.strides:
            upstream = torch.empty_strided(
                upstream.shape, ctx.strides, dtype=upstream.dtype, device=upstream.device
            ).copy_(upstream)
        gradient = torch.empty_like(upstream)
        grid = (triton.cdiv(upstream.numel(), _BLOCK),)
        _backward[grid](upstream, inside, gradient, upstream.numel(), BLOCK=_BLOCK)
        return gradient, None, None, None, None, None


_apply: Callable[..., tuple[Tensor, Tensor, Tensor]] = _KernelGrid.apply
