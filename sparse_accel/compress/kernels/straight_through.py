"""What fake quantization hands to backward: a value on the grid, and where its gradient passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Inside(NamedTuple):
    """Where a tensor lay on its grid's range.

    Without `order`: bool `rows`, which may be broadcast to the tensor. With it: bool [num_rows, length] for the rows
    `indices` (True in all others), or for all rows where `indices` is None; rows are runs of `length` entries of the
    tensor whose dims have been permuted to `order`.
    """

    rows: Tensor
    indices: Tensor | None = None
    order: tuple[int, ...] | None = None

    def masked(self, gradient: Tensor) -> Tensor:
        """A new tensor: the gradient where this is True, times 0 elsewhere."""
        if self.order is None:
            return gradient * self.rows
        ordered = gradient.permute(self.order).contiguous()
        shape, length = ordered.shape, self.rows.shape[-1]
        if self.indices is None:
            ordered = (ordered.view(-1, length) * self.rows).view(shape)
        else:
            if ordered.data_ptr() == gradient.data_ptr():
                ordered = ordered.clone()
            rows = ordered.view(-1, length)
            rows[self.indices] = rows[self.indices] * self.rows
        return ordered.permute(sorted(range(len(shape)), key=self.order.__getitem__))

    def mask_in_place(self, gradient: Tensor) -> None:
        """`masked`, on a gradient that is dense in memory and the caller's own."""
        if self.order is None:
            gradient.mul_(self.rows)
            return
        rows = gradient.permute(self.order).view(-1, self.rows.shape[-1])
        if self.indices is None:
            rows.mul_(self.rows)
        else:
            rows[self.indices] = rows[self.indices] * self.rows


class Rounded(NamedTuple):
    """A tensor on its grid, and where it was not clamped; None is everywhere."""

    value: Tensor
    inside: Inside | None


def straight_through(x: Tensor, rounded: Rounded) -> Tensor:
    """The rounded value as a function of `x`: the gradient passes where x lay on the grid's range, else it is 0.

    A value may serve several times; each is a tensor of its own to autograd.
    """
    return _pass(x, rounded)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Rounded) -> Tensor:
        ctx.order, ctx.is_masked = None, rounded.inside is not None
        if rounded.inside is not None:
            rows, indices, ctx.order = rounded.inside
            ctx.save_for_backward(rows, indices)
        return rounded.value.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.is_masked:
            return grads[0], None
        rows, indices = ctx.saved_tensors
        return Inside(rows, indices, ctx.order).masked(grads[0]), None


_pass: Callable[[Tensor, Rounded], Tensor] = _StraightThrough.apply
