"""Fake quantization: how one tensor is put on an integer grid while it stays a float tensor."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sparse_accel.compress.kernels.rows import RowExtremes, rounded, row_extremes
from sparse_accel.compress.kernels.straight_through import Inside, Rounded, straight_through
from sparse_accel.errors import ModelError, suggestion

# The smallest scale, so that a tensor of zeros has one (the value of torch.ao's observers).
_SMALLEST_SCALE = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class QuantSpec:
    """The grid of one tensor and how its range is followed.

    `bits` wide, from -2^(bits-1) if `signed`, else from 0. `symmetric` ranges reach equally far on both sides of zero.
    `channel_axis` is the axis that has one scale per index (weights only); None is one scale for the tensor. The range
    moves by `averaging_constant` of the distance to each new observation; `fixed_range` is one that is known and never moves.
    """

    bits: int = 8
    symmetric: bool = False
    signed: bool = False
    channel_axis: int | None = None
    averaging_constant: float = 0.01
    fixed_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise ValueError(f"a quantized tensor has 2 to 16 bits, got {self.bits}")
        if not 0.0 < self.averaging_constant <= 1.0:
            raise ValueError(f"the averaging constant lies in (0, 1], got {self.averaging_constant}")
        if self.fixed_range is not None and not self.fixed_range[0] <= 0.0 <= self.fixed_range[1]:
            raise ValueError(f"a fixed range holds 0, got {self.fixed_range}")

    @property
    def quant_min(self) -> int:
        """The lowest integer of the grid."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def quant_max(self) -> int:
        """The highest integer of the grid."""
        return self.quant_min + (1 << self.bits) - 1

    def to_json(self) -> dict[str, Any]:
        """The fields as plain values; a fixed range only where there is one."""
        return {name: value for name, value in asdict(self).items() if name != "fixed_range" or value is not None}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> QuantSpec:
        """The inverse of `to_json`. Raises ModelError for an unknown field or a bad value."""
        known = [field.name for field in fields(cls)]
        for name in data:
            if name not in known:
                raise ModelError(f"a quantization spec has no field {name!r}{suggestion(name, known)}")
        try:
            fixed = data.get("fixed_range")
            return cls(**{**data, "fixed_range": None if fixed is None else tuple(map(float, fixed))})
        except (TypeError, ValueError) as error:
            raise ModelError(f"a quantization spec is malformed: {error}") from None


def scale_and_zero_point(min_val: Tensor, max_val: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale (fp32) and zero point (int32) of the range [min_val, max_val], widened to hold 0; elementwise.

    Symmetric: scale = max(|min|, |max|) / ((2^bits - 1) / 2), zero point 0, or the middle of an unsigned grid (128 for
    8 bits). Affine: scale = (max - min) / (2^bits - 1), zero point = quant_min - round(min / scale). These are
    torch.ao's MovingAverageMinMaxObserver numbers. An empty range (min above max: nothing observed) gives 1 and 0.
    """
    low = min_val.float().clamp(max=0.0)
    high = max_val.float().clamp(min=0.0)
    empty = min_val > max_val
    steps = float(spec.quant_max - spec.quant_min)
    if spec.symmetric:
        scale = (torch.maximum(-low, high) / (steps / 2)).clamp(min=_SMALLEST_SCALE)
        zero_point = torch.full_like(scale, _symmetric_zero_point(spec), dtype=torch.int32)
    else:
        scale = ((high - low) / steps).clamp(min=_SMALLEST_SCALE)
        centre = torch.where(empty, 0.0, spec.quant_min - torch.round(low / scale))
        zero_point = centre.clamp(spec.quant_min, spec.quant_max).to(torch.int32)
    return torch.where(empty, 1.0, scale), torch.where(empty, 0, zero_point)


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, extremes: RowExtremes | None = None
) -> Tensor:
    """`reference_fake_quantize`, in the form that is fastest for `x`; the same bits, values and gradients.

    `extremes` are those of x, for a caller that has them. Never waits for a device.
    """
    if spec.channel_axis is None and not torch.compiler.is_compiling():
        extremes = row_extremes(x) if extremes is None else extremes
        if extremes is not None:
            return straight_through(x, rounded(x, scale, zero_point, spec.quant_min, spec.quant_max, extremes))
        kernel = kernel_for(x)
        if kernel is not None:
            value, *_ = kernel.fake_quantize_and_observe(x, scale, zero_point, spec.quant_min, spec.quant_max, None)
            return value  # type: ignore[no-any-return]
        if x.is_cuda:
            return torch.fake_quantize_per_tensor_affine(
                x.float(), scale, zero_point, spec.quant_min, spec.quant_max
            ).to(x.dtype)
    return reference_fake_quantize(x, scale, zero_point, spec)


def kernel_for(x: Tensor) -> Any:
    """The module `kernels.triton_grid` if `x` is for it: on a GPU, dense in memory, not being traced; else None."""
    if not x.is_cuda or torch.compiler.is_compiling():
        return None
    kernel = _triton_grid()
    return kernel if kernel is not None and kernel.is_dense(x) else None


@cache
def _triton_grid() -> Any:
    """The GPU's kernels, or None where Triton is missing."""
    found = importlib.util.find_spec("triton") is not None
    return importlib.import_module("sparse_accel.compress.kernels.triton_grid") if found else None


@torch.no_grad()
def round_to_grid(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Rounded:
    """The value of `fake_quantize`, and where its gradient passes, for a caller that uses them several times."""
    extremes = row_extremes(x) if spec.channel_axis is None else None
    if extremes is not None:
        return rounded(x, scale, zero_point, spec.quant_min, spec.quant_max, extremes)
    scale, zero_point = _per_channel(x, scale, zero_point, spec)
    value, inside = _clamped(x, scale, zero_point, spec.quant_min, spec.quant_max)
    return Rounded(value, Inside(inside))


def reference_fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """`x` rounded to the grid, in x's dtype; computed in fp32 without waiting for the device.

    (clamp(round(x * (1 / scale)) + zero_point, quant_min, quant_max) - zero_point) * scale. The gradient passes straight
    through where x lies on the grid's range and is 0 where it was clamped (Bengio et al. 2013). Scale and zero point
    are 0-dimensional, or one per index of `spec.channel_axis`. Plain operations: what a compiler fuses, and what the
    other forms are tested against.
    """
    scale, zero_point = _per_channel(x, scale, zero_point, spec)
    return _on_grid(x, scale, zero_point, spec.quant_min, spec.quant_max)


def _per_channel(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point in a shape that is broadcast over `x`."""
    if spec.channel_axis is None:
        return scale, zero_point
    shape = [1] * x.dim()
    shape[spec.channel_axis] = -1
    return scale.view(shape), zero_point.view(shape)


def _clamped(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> tuple[Tensor, Tensor]:
    """`x` on the grid, in its dtype, and where it lay on the grid's range (bool)."""
    inverse = 1.0 / scale
    # Steps of the grid away from 0. A tensor that had to be cast is ours to overwrite.
    steps = (x * inverse if x.dtype == torch.float32 else x.float().mul_(inverse)).round_()
    clamped = torch.clamp(steps, (quant_min - zero_point).float(), (quant_max - zero_point).float())
    inside = clamped == steps
    return clamped.mul_(scale).to(x.dtype), inside


def _symmetric_zero_point(spec: QuantSpec) -> int:
    if spec.signed:
        return 0
    # torch.ao centres its own 8-bit grid at 128 and a narrower one at (low + high) // 2.
    return 128 if spec.bits == 8 else (spec.quant_min + spec.quant_max) // 2


class _Grid(torch.autograd.Function):
    """Fake quantization for one scale or one per channel; torch's own per-channel kernel reads its zero points on the host
    each call. The same bits as torch.fake_quantize_per_tensor_affine."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
        value, inside = _clamped(x, scale, zero_point, quant_min, quant_max)
        ctx.save_for_backward(inside)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        return grads[0] * inside, None, None, None, None


_on_grid: Callable[..., Tensor] = _Grid.apply
