"""Attention by quantized products over packed sequences on a CPU: one sequence at a time, and no padding.

What lies between the two products is the largest part of a quantized model's memory traffic. One autograd function holds
it, so that scores, probabilities and their gradients are worked on in place, in the order of `attention_by_products`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_accel.compress.kernels.rows import rounded, rounded_in_place, row_extremes
from sparse_accel.compress.kernels.straight_through import Inside
from sparse_accel.compress.layers import QuantizedMatMul
from sparse_accel.compress.ranges import ActivationQuantizer


class Settings(NamedTuple):
    """How attention is computed: the sequences' bounds (host), the scale of the scores, the share that dropout drops now,
    and the quantizers of scores and probabilities (None: left as they are)."""

    bounds: list[int]
    scale: float
    dropout: float
    scores: ActivationQuantizer | None
    probabilities: ActivationQuantizer | None


def has_packed_products(query: Tensor) -> bool:
    """Whether `packed_products` takes such a tensor: float32 on a CPU, eagerly and without autocast."""
    return (
        query.is_cpu
        and query.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def packed_products(
    scores: QuantizedMatMul | None,
    context: QuantizedMatMul | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    scale: float,
    dropout: float,
) -> Tensor:
    """softmax(query @ key.T * scale) @ value within each sequence, [1, heads, T, head_dim] to [1, T, heads, head_dim], with
    both products quantized as `scores` and `context` say (None: not quantized)."""
    if scores is not None:
        query = _quantized(scores.left_quantizer, query)
        key = _quantized(scores.right_quantizer, key)
    if context is not None:
        value = _quantized(context.right_quantizer, value)
    settings = Settings(
        bounds.tolist(),
        scale,
        dropout,
        None if scores is None else scores.output_quantizer,
        None if context is None else context.left_quantizer,
    )
    attended = _attend(query, key, value, settings)
    return attended if context is None else _quantized(context.output_quantizer, attended, (1,))


def _quantized(quantizer: ActivationQuantizer | None, x: Tensor, token_dims: tuple[int, ...] = (2,)) -> Tensor:
    return x if quantizer is None else quantizer(x, token_dims)


def _sequences(bounds: list[int]) -> Iterator[slice]:
    return (slice(first, last) for first, last in pairwise(bounds) if last > first)


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, settings: Settings) -> Tensor:
        ctx.settings, ctx.orders = settings, []
        saved: list[Tensor | None] = [query, key, value]
        q, k, v = query[0], key[0], value[0]
        attended = query.new_zeros(q.shape[1], q.shape[0], v.shape[2])
        for part in _sequences(settings.bounds):
            scores = torch.bmm(q[:, part], k[:, part].transpose(1, 2))
            on_scores = _round_in_place(settings.scores, scores)
            noise = None
            probabilities = torch.softmax(scores.mul_(settings.scale), dim=-1)
            if settings.dropout:
                # As torch's dropout draws it.
                noise = torch.empty_like(probabilities).bernoulli_(1 - settings.dropout).div_(1 - settings.dropout)
                dropped = torch.mul(probabilities, noise, out=scores)
                on_grid, on_probabilities = dropped, _round_in_place(settings.probabilities, dropped)
            else:
                on_grid, on_probabilities = _round(settings.probabilities, probabilities)
            attended[part] = torch.bmm(on_grid, v[:, part]).transpose(0, 1)
            saved += [probabilities, noise, on_grid, *_tensors(on_scores), *_tensors(on_probabilities)]
            ctx.orders.append([None if inside is None else inside.order for inside in (on_scores, on_probabilities)])
        ctx.save_for_backward(*saved)
        return attended[None]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        settings: Settings = ctx.settings
        query, key, value, *saved = ctx.saved_tensors
        q, k, v = query[0], key[0], value[0]
        gradient = grads[0][0]
        # In memory as their tensors most likely are: [T, heads, head_dim].
        sums = [x.new_zeros(x.shape[1], x.shape[0], x.shape[2]) for x in (q, k, v)]
        for number, part in enumerate(_sequences(settings.bounds)):
            probabilities, noise, on_grid, *insides = saved[7 * number : 7 * number + 7]
            orders = ctx.orders[number]
            upstream = gradient[part].transpose(0, 1)
            sums[2][part] = torch.bmm(on_grid.transpose(1, 2), upstream).transpose(0, 1)
            of_probabilities = torch.bmm(upstream, v[:, part].transpose(1, 2))
            if insides[2] is not None:
                Inside(insides[2], insides[3], orders[1]).mask_in_place(of_probabilities)
            if noise is not None:
                of_probabilities.mul_(noise)
            of_scores = torch._softmax_backward_data(of_probabilities, probabilities, -1, torch.float32)
            of_scores.mul_(settings.scale)
            if insides[0] is not None:
                Inside(insides[0], insides[1], orders[0]).mask_in_place(of_scores)
            sums[0][part] = torch.bmm(of_scores, k[:, part]).transpose(0, 1)
            sums[1][part] = torch.bmm(of_scores.transpose(1, 2), q[:, part]).transpose(0, 1)
        return *(total.transpose(0, 1)[None] for total in sums), None


_attend: Callable[[Tensor, Tensor, Tensor, Settings], Tensor] = _Products.apply


def _tensors(inside: Inside | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if inside is None else (inside.rows, inside.indices)


def _round_in_place(quantizer: ActivationQuantizer | None, x: Tensor) -> Inside | None:
    """`x` [heads, queries, keys] on the grid of its quantizer, which looks at it first."""
    if quantizer is None or quantizer.is_idle:
        return None
    extremes = row_extremes(x, smallest=0)
    assert extremes is not None, "a fresh product is dense in memory"
    quantizer.see_rows(extremes)
    if quantizer.calibrating:
        return None
    spec = quantizer.spec
    return rounded_in_place(x, quantizer.scale, quantizer.zero_point, spec.quant_min, spec.quant_max, extremes)


def _round(quantizer: ActivationQuantizer | None, x: Tensor) -> tuple[Tensor, Inside | None]:
    if quantizer is None or quantizer.is_idle:
        return x, None
    extremes = row_extremes(x, smallest=0)
    assert extremes is not None, "a fresh softmax is dense in memory"
    quantizer.see_rows(extremes)
    if quantizer.calibrating:
        return x, None
    spec = quantizer.spec
    return rounded(x, quantizer.scale, quantizer.zero_point, spec.quant_min, spec.quant_max, extremes)
