"""Layers that mask and fake-quantize inside `forward`, where every backend has gathered the weight.

A layer becomes compressed by changing its class: parameters, their names, hooks and attributes stay the same objects (but
for compact weights, whose parameter is another), and `restore_layer` changes it back.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_accel.compress.compact import CompactLinear, computing_dtype, make_compact, make_whole
from sparse_accel.compress.fakequant import QuantSpec
from sparse_accel.compress.kept_weights import kept_weight, versions
from sparse_accel.compress.kernels.straight_through import Inside
from sparse_accel.compress.masks import MaskType, count_dropped, held, nonzero_mask, pruned_mask
from sparse_accel.compress.ranges import ActivationQuantizer, ObservationContext, WeightQuantizer, structure_changed
from sparse_accel.errors import ModelError


@dataclass(frozen=True)
class Pruned:
    """Asks for a mask that drops so much by magnitude; one that drops as much or more already stays as it is."""

    sparsity: float
    mask_type: MaskType


# "nonzero": hold the zeros that the weight has when the request is first served. "held": hold the mask as it stands. None: no
# mask.
MaskRequest = Literal["nonzero", "held"] | Pruned | None


class _Compressed(nn.Module):
    """What compressed Linear and Embedding share: a mask, and a weight quantizer."""

    weight: Tensor
    context: ObservationContext
    mask: Tensor | None
    mask_captured: Tensor | None
    weight_quantizer: WeightQuantizer | None
    output_quantizer: ActivationQuantizer | None

    mask_request: MaskRequest = None
    # Host mirrors of the buffers, so that a forward costs no device sync: `mask_captured`, and how many units of a mask type
    # `mask` drops. None is not read yet.
    _captured: bool | None = None
    _dropped: tuple[MaskType, int] | None = None

    @property
    def captured(self) -> bool:
        """Whether the mask holds a pattern; reads the device once after building or loading."""
        if self._captured is None:
            self._captured = self.mask_captured is not None and bool(self.mask_captured)
        return self._captured

    @property
    def holds_mask(self) -> bool:
        """Whether what the weight stores under the mask is no part of the model now."""
        return self.mask_request is not None and self.captured

    @property
    def has_stray_values(self) -> bool:
        """Whether the weight may store other numbers than zeros under its mask: gradual pruning leaves there what a weight was,
        and an optimizer's momentum may move it."""
        return self.holds_mask and self.mask_request != "nonzero"

    def num_dropped(self, mask_type: MaskType) -> int:
        """How many units of this type the mask drops; reads the device once after building or loading."""
        if self._dropped is None or self._dropped[0] != mask_type:
            assert self.mask is not None, "only a mask drops anything"
            self._dropped = mask_type, int(count_dropped(self.mask, mask_type))
        return self._dropped[1]

    @torch.no_grad()
    def set_mask(self, mask: Tensor, mask_type: MaskType, num_dropped: int | None = None) -> None:
        """Put another mask in place, which drops so many units of this type; None is not known."""
        assert self.mask is not None and self.mask_captured is not None, "masks are set on masked layers only"
        self.mask.copy_(mask)
        self.mask_captured.fill_(True)
        self._captured = True
        self._dropped = None if num_dropped is None else (mask_type, num_dropped)

    @torch.no_grad()
    def clear_mask(self) -> None:
        """Forget the mask: as if none had ever been asked for."""
        assert self.mask is not None and self.mask_captured is not None, "masks are cleared on masked layers only"
        self.mask.fill_(True)
        self.mask_captured.fill_(False)
        self._captured, self._dropped = False, None

    def masked_weight(self) -> Tensor:
        """The weight with exact zeros under the mask, and exactly zero gradient there, while a mask is requested."""
        return _masked(self.weight, self._serve_mask_request())

    def effective_weight(self) -> Tensor:
        """What forward computes with: masked, then fake-quantized; in the weight's shape and dtype."""
        weight = self.masked_weight()
        return weight if self.weight_quantizer is None else self.weight_quantizer(weight)

    def weight_facts(self) -> Hashable:
        """What the effective weight depends on, without looking at numbers."""
        quantizer = None if self.weight_quantizer is None else self.weight_quantizer.facts()
        return self.mask_request, quantizer, versions(self.weight, self.mask)

    def made_weight(self, dtype: torch.dtype) -> tuple[Tensor, Inside | None]:
        """`effective_weight` in `dtype`, without a graph, and where it was not clamped (None: nowhere)."""
        weight, inside = _masked(self.weight.detach(), self._serve_mask_request()), None
        if self.weight_quantizer is not None:
            self.weight_quantizer.observe(weight)
            weight, inside = self.weight_quantizer.rounded(weight)
        return weight.to(dtype), inside

    def stored_gradient(self, gradient: Tensor, inside: Inside | None) -> Tensor:
        """The gradient of `weight`, from that of what `made_weight` gave."""
        gradient = gradient.to(self.weight.dtype)
        if inside is not None:
            gradient = inside.masked(gradient)
        return _masked(gradient, self.mask if self.mask_request is not None else None)

    def _serve_mask_request(self) -> Tensor | None:
        """The mask to apply now, made from the weight where it is not yet what is asked for."""
        request = self.mask_request
        if request is None:
            return None
        assert self.mask is not None and self.mask_captured is not None, "masks are requested of masked layers only"
        if isinstance(request, Pruned):
            wanted = request.mask_type.num_dropped(tuple(self.mask.shape), request.sparsity)
            if self.num_dropped(request.mask_type) < wanted:
                mask = pruned_mask(self.weight, self.mask, request.mask_type, wanted)
                self.set_mask(mask, request.mask_type, wanted)
        elif request == "nonzero" and not self.captured:
            with torch.no_grad():
                self.mask.copy_(nonzero_mask(self.weight))
                self.mask_captured.fill_(True)
            self._captured, self._dropped = True, None
        return self.mask

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._captured = self._dropped = None


class CompressedLinear(_Compressed, nn.Linear):
    """nn.Linear as output_quantizer(input_quantizer(x) @ fake_quant(weight * mask).T + bias); absent parts are None."""

    input_quantizer: ActivationQuantizer | None

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        x = input if self.input_quantizer is None else self.input_quantizer(input)
        y = F.linear(x, self._weight_for(x), self.bias)
        return y if self.output_quantizer is None else self.output_quantizer(y)

    def _weight_for(self, x: Tensor) -> Tensor:
        quantizer = self.weight_quantizer
        is_itself = self.mask_request is None and (quantizer is None or quantizer.is_idle)
        if is_itself or not self.context.keeps_weight_of(self):
            return self.effective_weight()
        dtype = computing_dtype(self.weight, x)
        return kept_weight(self, self.weight, dtype, self.context.kept_weights, self.context.step)


class CompressedEmbedding(_Compressed, nn.Embedding):
    """nn.Embedding as output_quantizer(fake_quant(weight * mask)[ids]); absent parts are None."""

    def forward(self, input: Tensor) -> Tensor:
        """Integer ids [...] to rows [..., embedding_dim]."""
        mask = self._serve_mask_request()
        if self.weight_quantizer is not None:
            self.weight_quantizer.observe(_masked(self.weight.detach(), mask))
        rows = _masked(super().forward(input), None if mask is None else mask[input])
        # One scale for the whole table: quantizing the rows that were looked up is the same and far cheaper.
        if self.weight_quantizer is not None:
            rows = self.weight_quantizer.quantize(rows)
        return rows if self.output_quantizer is None else self.output_quantizer(rows)


class OutputQuantizedLayerNorm(nn.LayerNorm):
    """nn.LayerNorm whose output is quantized, for schemes that do not exclude it."""

    output_quantizer: ActivationQuantizer

    def forward(self, input: Tensor) -> Tensor:
        """[..., normalized_shape] to the same."""
        quantized: Tensor = self.output_quantizer(super().forward(input))
        return quantized


class QuantizedMatMul(nn.Module):
    """torch.matmul of two activations, with a quantizer for each operand and for the product; absent ones are None."""

    left_quantizer: ActivationQuantizer | None
    right_quantizer: ActivationQuantizer | None
    output_quantizer: ActivationQuantizer | None

    def __init__(
        self,
        left: QuantSpec | None,
        right: QuantSpec | None,
        output: QuantSpec | None,
        context: ObservationContext,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.left_quantizer = ActivationQuantizer(left, context, device=device) if left else None
        self.right_quantizer = ActivationQuantizer(right, context, device=device) if right else None
        self.output_quantizer = ActivationQuantizer(output, context, device=device) if output else None

    @property
    def is_idle(self) -> bool:
        """Whether this is plain torch.matmul at present."""
        return all(quantizer.is_idle for quantizer in self.children() if isinstance(quantizer, ActivationQuantizer))

    def forward(
        self,
        left: Tensor,
        right: Tensor,
        left_tokens: tuple[int, ...],
        right_tokens: tuple[int, ...],
        output_tokens: tuple[int, ...],
    ) -> Tensor:
        """left [..., m, k] @ right [..., k, n]; `*_tokens` are the dims of each that run over tokens."""
        if self.left_quantizer is not None:
            left = self.left_quantizer(left, left_tokens)
        if self.right_quantizer is not None:
            right = self.right_quantizer(right, right_tokens)
        product = torch.matmul(left, right)
        return product if self.output_quantizer is None else self.output_quantizer(product, output_tokens)


CompressedLayer = CompressedLinear | CompressedEmbedding | CompactLinear

# Plain class <-> the class that takes its place.
_COMPRESSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: CompressedLinear,
    nn.Embedding: CompressedEmbedding,
    nn.LayerNorm: OutputQuantizedLayerNorm,
}
_PLAIN = {compressed: plain for plain, compressed in _COMPRESSED.items()} | {CompactLinear: nn.Linear}


def check_layer(
    name: str,
    layer: nn.Module,
    mask: bool,
    weight: QuantSpec | None,
    inputs: tuple[QuantSpec, ...],
    output: QuantSpec | None,
    *,
    compact: bool = False,
) -> None:
    """Raise ModelError if `layer`, called `name`, or this combination of parts cannot be compressed."""
    refusal = _refusal(layer, mask, weight, inputs, output, compact)
    if refusal is not None:
        raise ModelError(f"{name} ({type(layer).__name__}) {refusal}")


def compress_layer(
    layer: nn.Module,
    context: ObservationContext,
    mask: bool,
    weight: QuantSpec | None,
    inputs: tuple[QuantSpec, ...],
    output: QuantSpec | None,
    *,
    positions: Tensor | None = None,
) -> None:
    """Give a layer that `check_layer` accepts a mask and quantizers, by changing its class in place; with `positions`
    (a form of `compress.positions`) it becomes compact and keeps the weights there."""
    structure_changed()
    device = next(layer.parameters(), torch.empty(0)).device
    if positions is None:
        layer.__class__ = _COMPRESSED[type(layer)]
    else:
        assert isinstance(layer, nn.Linear), "only linear layers become compact"
        make_compact(layer, positions)
    if isinstance(layer, CompressedLayer):
        layer.context = context
        # The shape comes from the layer: under ZeRO-3 the weight itself has none outside forward.
        if not isinstance(layer, CompressedEmbedding):
            shape = (layer.out_features, layer.in_features)
            layer.input_quantizer = ActivationQuantizer(inputs[0], context, device=device) if inputs else None
        else:
            shape = (layer.num_embeddings, layer.embedding_dim)
        if not isinstance(layer, CompactLinear):
            layer.register_buffer("mask", torch.ones(shape, dtype=torch.bool, device=device) if mask else None)
            layer.register_buffer("mask_captured", torch.zeros((), dtype=torch.bool, device=device) if mask else None)
        channels = None if weight is None or weight.channel_axis is None else shape[weight.channel_axis]
        layer.weight_quantizer = WeightQuantizer(weight, context, channels, device) if weight else None
        layer.output_quantizer = ActivationQuantizer(output, context, device=device) if output else None
    elif isinstance(layer, OutputQuantizedLayerNorm) and output:
        layer.output_quantizer = ActivationQuantizer(output, context, device=device)


def restore_layer(layer: nn.Module) -> None:
    """Undo `compress_layer`: the plain class, without masks and quantizers; the stored weight is left as it is, and whole
    again where it was compact."""
    structure_changed()
    if isinstance(layer, CompactLinear):
        make_whole(layer)
    else:
        layer.__class__ = _PLAIN[type(layer)]
    for name in ("mask", "mask_captured", "weight_quantizer", "input_quantizer", "output_quantizer"):
        if hasattr(layer, name):
            delattr(layer, name)
    for name in ("mask_request", "_captured", "_dropped", "context"):
        layer.__dict__.pop(name, None)


def is_compressed(layer: nn.Module) -> bool:
    """Whether `layer` is one that `compress_layer` made."""
    return type(layer) in _PLAIN


def compressed_layers(model: nn.Module) -> dict[str, CompressedLayer]:
    """Every layer whose weight is masked or fake-quantized, by module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CompressedLayer)}


def effective_weight(module: nn.Module) -> Tensor:
    """What a layer multiplies with: its weight, masked and fake-quantized as far as these are on."""
    if isinstance(module, CompressedLayer):
        return module.effective_weight()
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _masked(weight: Tensor, mask: Tensor | None) -> Tensor:
    return weight if mask is None else held(weight, mask)


def _refusal(
    layer: nn.Module,
    mask: bool,
    weight: QuantSpec | None,
    inputs: tuple[QuantSpec, ...],
    output: QuantSpec | None,
    compact: bool,
) -> str | None:
    if is_compressed(layer):
        return "is compressed already; fold the model before installing another plan"
    if type(layer) not in _COMPRESSED:
        return "cannot be masked or quantized; nn.Linear and nn.Embedding can, leave it out of the recipe's targets"
    if compact and not (mask and isinstance(layer, nn.Linear)):
        return "cannot be compact: only nn.Linear can, with a mask"
    if isinstance(layer, nn.LayerNorm) and (mask or weight or inputs):
        return "can have its output quantized, not its weight or input"
    if isinstance(layer, nn.Embedding) and inputs:
        return "takes token ids: its input cannot be quantized"
    if isinstance(layer, nn.Embedding) and weight is not None and weight.channel_axis is not None:
        return "has one scale for its table; channel_axis must be None"
    if any(spec.channel_axis is not None for spec in (*inputs, output) if spec is not None):
        return "has an activation with a scale per channel; integer kernels have one per tensor"
    if len(inputs) > 1:
        return f"has one input, not {len(inputs)}"
    return None
