"""A linear layer whose parameter is the vector of its kept weights, for masks that hold from the first step to the last.

Gradients, optimizer state, shards and what goes over the wire are as short as that vector on every backend; a zero
cannot be revived, since nothing is stored of it. The weight itself exists from forward to backward only.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_accel.compress.kept_weights import kept_weight, versions
from sparse_accel.compress.kernels.straight_through import Inside
from sparse_accel.compress.positions import kept_indices, mask_of, unpack_positions
from sparse_accel.compress.ranges import ActivationQuantizer, ObservationContext, WeightQuantizer
from sparse_accel.errors import ModelError


class CompactLinear(nn.Linear):
    """nn.Linear as output_quantizer(input_quantizer(x) @ fake_quant(weight).T + bias); absent parts are None.

    The weight is `values`, in row-major order, at the entries that the buffer `positions` marks (one of the forms of
    `compress.positions`), and zero elsewhere. `values` ends in zeros that are no weights and stay zero: it is [num_kept]
    rounded up as `num_values` says. It is whole inside forward; outside, a backend may hold a shard.
    """

    values: Tensor
    positions: Tensor
    num_kept: int
    context: ObservationContext
    weight_quantizer: WeightQuantizer | None
    input_quantizer: ActivationQuantizer | None
    output_quantizer: ActivationQuantizer | None

    # `positions` unpacked, so that a forward costs no device sync; None is not unpacked yet.
    _indices: Tensor | None = None

    # What a masked layer says of its mask: here it always holds.
    mask_request = "nonzero"
    captured = True

    @property
    def mask(self) -> Tensor:
        """Bool [out_features, in_features], True where a weight is kept; unpacked anew at each call."""
        return unpack_positions(self.positions, self.num_weights).view(self.out_features, self.in_features)

    @property
    def num_weights(self) -> int:
        """Entries of the weight. From the shape: under ZeRO-3 the parameter itself has none outside forward."""
        return self.out_features * self.in_features

    @property
    def num_values(self) -> int:
        """The length of `values`."""
        return num_values(self.num_kept)

    @property
    def indices(self) -> Tensor:
        """The kept entries, int32 [kept]; waits for the device after building or moving, and never again."""
        if self._indices is None or self._indices.device != self.positions.device:
            # Backward needs them too, also where the first forward is an evaluation.
            with torch.inference_mode(False):
                self._indices = kept_indices(self.positions, self.num_weights)
        return self._indices

    def masked_weight(self) -> Tensor:
        """The weight [out_features, in_features], with exact zeros where nothing is kept."""
        return self._placed(self.values)

    def effective_weight(self) -> Tensor:
        """What forward computes with: the weight, fake-quantized; in the dtype of `values`."""
        return self._effective_weight(self.values.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        x = input if self.input_quantizer is None else self.input_quantizer(input)
        # What autocast would do to the whole weight is done to the values.
        dtype = computing_dtype(self.values, x)
        if self.context.keeps_weight_of(self):
            weight = kept_weight(self, self.values, dtype, self.context.kept_weights, self.context.step)
        else:
            weight = self._effective_weight(dtype)
        y = F.linear(x, weight, self.bias)
        return y if self.output_quantizer is None else self.output_quantizer(y)

    def _effective_weight(self, dtype: torch.dtype) -> Tensor:
        quantizer, values = self.weight_quantizer, self.values
        if quantizer is not None and not self._rounds_values(quantizer):
            return quantizer(self.masked_weight()).to(dtype)  # type: ignore[no-any-return]
        if quantizer is not None:
            quantizer.observe(values[: self.num_kept], and_zeros=self.num_kept < self.num_weights)
            values = quantizer.quantize(values)
        return self._placed(values.to(dtype))

    def weight_facts(self) -> Hashable:
        """What the effective weight depends on, without looking at numbers."""
        return None if self.weight_quantizer is None else self.weight_quantizer.facts(), versions(self.values)

    def made_weight(self, dtype: torch.dtype) -> tuple[Tensor, Inside | None]:
        """`effective_weight` in `dtype`, without a graph, and where the whole weight, or else the values, were not clamped
        (None: nowhere)."""
        quantizer, values, inside = self.weight_quantizer, self.values.detach(), None
        if quantizer is not None and not self._rounds_values(quantizer):
            whole = self._placed(values)
            quantizer.observe(whole)
            whole, inside = quantizer.rounded(whole)
            return whole.to(dtype), inside
        if quantizer is not None:
            quantizer.observe(values[: self.num_kept], and_zeros=self.num_kept < self.num_weights)
            values, inside = quantizer.rounded(values)
        return self._placed(values.to(dtype)), inside

    def stored_gradient(self, gradient: Tensor, inside: Inside | None) -> Tensor:
        """The gradient of `values`, from that of what `made_weight` gave."""
        if inside is not None and self.weight_quantizer is not None and not self._rounds_values(self.weight_quantizer):
            gradient, inside = inside.masked(gradient.to(self.values.dtype)), None
        taken = _taken(gradient, self.indices, self.values.numel()).to(self.values.dtype)
        return taken if inside is None else inside.masked(taken)

    def _rounds_values(self, quantizer: WeightQuantizer) -> bool:
        """Whether rounding the kept values alone is the same as rounding the weight, and far cheaper: with one scale, 0 is
        on its grid."""
        return quantizer.spec.channel_axis is None and self.num_kept > 0

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kept={self.num_kept}"

    def _placed(self, values: Tensor) -> Tensor:
        return _scattered(values, self.indices, (self.out_features, self.in_features))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompactLinear:
        # Positions are structure, not numbers: to_empty() and the way over the meta device must not lose them.
        before = self.positions
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = self.positions.device
        self._buffers["positions"] = before if device.type == "meta" else before.to(device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        key = f"{prefix}positions"
        if key in state_dict:
            check_positions(prefix.removesuffix("."), self, state_dict[key])
            # The same pattern, though the file may have it in the other form.
            state_dict[key] = self.positions
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


# No processor works on more numbers at once; torch's fused AdamW rounds what is left over at the end in another way.
_VECTOR = 32


def num_values(num_kept: int) -> int:
    """How long `values` is for that many kept weights: a multiple of 32, so that an optimizer treats each weight as it
    does where all of them are stored."""
    return -(-num_kept // _VECTOR) * _VECTOR


def padded(values: Tensor) -> Tensor:
    """Kept weights, or an optimizer's numbers about them, [num_kept], as long as `values` is."""
    return F.pad(values, (0, num_values(values.numel()) - values.numel()))


def check_positions(name: str, layer: CompactLinear, saved: Tensor) -> None:
    """Raise ModelError unless `saved`, in either form, holds the positions of `layer`, which is called `name`."""
    own = layer.positions
    if saved.dtype == own.dtype and torch.equal(saved.to(own.device), own):
        return
    mask = mask_of(name, saved.to(own.device), (layer.out_features, layer.in_features))
    differing = int((mask != layer.mask).sum())
    if differing:
        raise ModelError(
            f"{name}: the saved zeros are not those of this run's model: {differing:,} of {layer.num_weights:,} positions differ"
        )


def make_compact(layer: nn.Linear, positions: Tensor) -> None:
    """Turn a linear layer into one that stores the weights at `positions`, in place; quantizers are for the caller to
    set. The layer's weight may be on the meta device."""
    weight = layer.weight
    indices = kept_indices(positions, layer.out_features * layer.in_features)
    if not weight.is_meta:
        positions, indices = positions.to(weight.device), indices.to(weight.device)
        values = padded(weight.detach().flatten()[indices])
    else:
        values = weight.new_empty(num_values(indices.numel()))
    layer.__class__ = CompactLinear
    _swap_parameter(layer, "weight", "values", nn.Parameter(values, requires_grad=weight.requires_grad))
    layer.register_buffer("positions", positions)
    assert isinstance(layer, CompactLinear)
    layer.num_kept = indices.numel()
    layer._indices = indices


def make_whole(layer: CompactLinear) -> None:
    """Undo `make_compact`: nn.Linear with the whole weight and exact zeros in it. Quantizers are left as they are."""
    with torch.no_grad():
        weight = nn.Parameter(layer.masked_weight(), requires_grad=layer.values.requires_grad)
    del layer.positions, layer.num_kept
    layer.__dict__.pop("_indices", None)
    layer.__class__ = nn.Linear  # type: ignore[assignment]
    _swap_parameter(layer, "values", "weight", weight)


def _swap_parameter(layer: nn.Linear, old: str, new: str, parameter: nn.Parameter) -> None:
    """One parameter in the place of another, before the bias, as nn.Linear has them."""
    delattr(layer, old)
    bias = layer._parameters.pop("bias")
    layer.register_parameter(new, parameter)
    layer._parameters["bias"] = bias


def computing_dtype(weight: Tensor, x: Tensor) -> torch.dtype:
    """The dtype in which a linear layer computes with `weight` on `x`'s device: autocast's, where it is on."""
    device = x.device.type
    casts = weight.dtype == torch.float32 and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if casts else weight.dtype


def _taken(gradient: Tensor, indices: Tensor, num_values: int) -> Tensor:
    """The entries at `indices`, and zeros up to [num_values]."""
    taken = gradient.new_zeros(num_values)
    torch.index_select(gradient.reshape(-1), 0, indices, out=taken[: indices.numel()])
    return taken


class _Scatter(torch.autograd.Function):
    """The first values, one for each index, to their places in a tensor of zeros; backward takes the gradient from there
    and is zero for the other values."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, shape: tuple[int, ...]) -> Tensor:
        # Not saved for backward: the layer holds them anyway, and nobody need move or recompute them.
        ctx.indices, ctx.num_values = indices, values.numel()
        whole = values.new_zeros(shape)
        # It takes long indices only; kept as int32 they are half as large for the time in between.
        whole.view(-1).index_copy_(0, indices.long(), values[: indices.numel()])
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _taken(grads[0], ctx.indices, ctx.num_values), None, None


_scattered: Callable[..., Tensor] = _Scatter.apply
