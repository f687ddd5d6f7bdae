"""What a layer computes with, made once for all micro-batches of an optimizer step.

Between two optimizer steps a weight does not change, so that its masked, fake-quantized and cast form is the same in each
micro-batch. Each micro-batch still has its own place in the graph, and sends its own gradient to the parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sparse_accel.compress.kernels.straight_through import Inside


class KeptWeight(NamedTuple):
    """The form [out_features, in_features] of a weight, where fake quantization did not clamp it (None is everywhere),
    and what it was made from."""

    value: Tensor
    inside: Inside | None
    made_from: Hashable


class KeepingLayer(Protocol):
    """A layer whose weight can be kept."""

    def weight_facts(self) -> Hashable:
        """What the form of the weight depends on, without looking at numbers: equal facts, equal form."""

    def made_weight(self, dtype: torch.dtype) -> tuple[Tensor, Inside | None]:
        """The form of the weight, without a graph, and where it was not clamped."""

    def stored_gradient(self, gradient: Tensor, inside: Inside | None) -> Tensor:
        """The gradient of the parameter, from that of the form."""


def kept_weight(
    layer: KeepingLayer, parameter: Tensor, dtype: torch.dtype, kept: dict[Any, KeptWeight], step: int
) -> Tensor:
    """The form of `parameter` that `layer` computes with in this optimizer step, from `kept` or made and put there."""
    found = kept.get(layer)
    if found is None or found.made_from != (step, dtype, layer.weight_facts()):
        with torch.no_grad():
            value, inside = layer.made_weight(dtype)
        # Only now: making it may move the range, which is one of the facts.
        found = kept[layer] = KeptWeight(value, inside, (step, dtype, layer.weight_facts()))
    return _reused(parameter, layer, found)


def versions(*tensors: Tensor | None) -> tuple[tuple[int, int] | None, ...]:
    """Which tensors these are, and how often each was written to."""
    return tuple(None if tensor is None else (id(tensor), tensor._version) for tensor in tensors)


class _Reused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, layer: KeepingLayer, kept: KeptWeight) -> Tensor:
        ctx.layer, ctx.inside = layer, kept.inside
        return kept.value.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.layer.stored_gradient(grads[0], ctx.inside), None, None


_reused: Callable[[Tensor, KeepingLayer, KeptWeight], Tensor] = _Reused.apply
