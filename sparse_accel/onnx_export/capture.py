"""Captures a trained model as an ONNX graph in which every fake-quantizer is a QuantizeLinear and a DequantizeLinear."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import onnx_ir as ir
import torch
from torch import Tensor, nn

from sparse_accel.compress.attention import attention_by_products
from sparse_accel.compress.ranges import ActivationQuantizer, Quantizer, WeightQuantizer, quantizers

# The name under which the exported form of attention is known to transformers while a model is captured.
_ATTENTION: Final = "sparse_accel_export"
# Neither 1 nor a power of two: the exporter must not take the example's sizes for fixed ones.
_EXAMPLE_BATCH, _EXAMPLE_LENGTH = 3, 13


class _Outputs(nn.Module):
    """The model from positional inputs to the outputs that are wanted, in their order."""

    def __init__(self, model: nn.Module, input_names: Sequence[str], output_names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.input_names = input_names
        self.output_names = output_names

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model(**dict(zip(self.input_names, inputs, strict=True)))
        return tuple(outputs[name] for name in self.output_names)


def capture(
    model: nn.Module,
    input_names: Sequence[str],
    output_names: Sequence[str],
    *,
    opset: int,
    sequence_length: int | None,
) -> ir.Model:
    """The forward of `model` (eval mode, frozen quantizers or none) as a graph; the model is left as it was.

    Inputs are int64 [batch, sequence], both free, or the sequence fixed to `sequence_length`. Initializers carry the names
    of the model's parameters and buffers. Weights are float still: a pass turns them into integers. Raises whatever the
    exporter raises for a model that it cannot trace.
    """
    length = sequence_length or _EXAMPLE_LENGTH
    example = {
        "input_ids": torch.full((_EXAMPLE_BATCH, length), 5),
        "attention_mask": torch.ones(_EXAMPLE_BATCH, length, dtype=torch.long),
        "token_type_ids": torch.zeros(_EXAMPLE_BATCH, length, dtype=torch.long),
    }
    free = {0: torch.export.Dim("batch")}
    if sequence_length is None:
        free[1] = torch.export.Dim("sequence")
    with _exported_attention(model), _quantize_nodes(model, opset), _quiet(), torch.no_grad():
        program = torch.onnx.export(
            _Outputs(model, input_names, output_names).eval(),
            tuple(example[name] for name in input_names),
            dynamo=True,
            opset_version=opset,
            input_names=list(input_names),
            output_names=list(output_names),
            dynamic_shapes=((free,) * len(input_names),),
            # The passes decide what is folded and how: rounding is training's, not the runtime's.
            optimize=False,
            verbose=False,
        )
    assert program is not None
    graph = program.model.graph
    for value in list(graph.initializers.values()):
        value.name = str(value.name).removeprefix("model.")
    return program.model


@contextmanager
def _quantize_nodes(model: nn.Module, opset: int) -> Iterator[None]:
    """Within, a quantizer that would fake-quantize emits its two nodes instead, at the same place in the same forward."""
    held = quantizers(model).values()
    for quantizer in held:
        quantizer.register_buffer("integer_zero_point", integer_zero_point(quantizer))
        quantizer.__dict__["fake_quantize"] = partial(_emit, quantizer, opset)
    try:
        yield
    finally:
        for quantizer in held:
            del quantizer.__dict__["fake_quantize"]
            del quantizer.integer_zero_point


def integer_zero_point(quantizer: Quantizer) -> Tensor:
    """The zero point in the integer type of the graph: int8 for weights, uint8 for activations, which is the pair that
    runtimes on CPUs have the fastest kernels for."""
    dtype = torch.int8 if isinstance(quantizer, WeightQuantizer) else torch.uint8
    return (quantizer.zero_point + _grid_shift(quantizer)).to(dtype)


def _grid_shift(quantizer: Quantizer) -> int:
    """How far the grid moves, with its zero point, to fit the integer type of the graph; that changes no value."""
    if isinstance(quantizer, WeightQuantizer):
        return 0 if quantizer.spec.signed else -128
    return 128 if quantizer.spec.signed else 0


def _emit(quantizer: Any, opset: int, x: Tensor) -> Tensor:
    dtype = quantizer.integer_zero_point.dtype
    axis = {} if quantizer.spec.channel_axis is None else {"axis": quantizer.spec.channel_axis}
    # A weight's grid may be narrower than its integer type; the pass that rounds weights reads and removes these.
    shift = _grid_shift(quantizer)
    grid = {"quant_min": quantizer.spec.quant_min + shift, "quant_max": quantizer.spec.quant_max + shift}
    attributes = {**axis, **grid} if isinstance(quantizer, WeightQuantizer) else axis
    emit: Callable[..., Tensor] = torch.onnx.ops.symbolic
    parameters = (quantizer.scale, quantizer.integer_zero_point)
    integers = emit("QuantizeLinear", (x, *parameters), attributes, dtype=dtype, shape=x.shape, version=opset)
    return emit("DequantizeLinear", (integers, *parameters), axis, dtype=torch.float32, shape=x.shape, version=opset)


@contextmanager
def _exported_attention(model: Any) -> Iterator[None]:
    """Within, attention is two matrix products and a softmax, and its mask is [batch, 1, 1, keys]: what runtimes know."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(_ATTENTION, attention_by_products)
    AttentionMaskInterface.register(_ATTENTION, _padding_mask)
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(_ATTENTION)
    except (ValueError, KeyError):  # a model with attention of its own is captured with that
        yield
        return
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _padding_mask(attention_mask: Tensor | None = None, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    """Additive mask [batch, 1, 1, keys] of an encoder, in which each token sees all others; the library's for the rest."""
    from transformers.masking_utils import bidirectional_mask_function, eager_mask

    if attention_mask is None or kwargs.get("mask_function") is not bidirectional_mask_function:
        return eager_mask(attention_mask=attention_mask, dtype=dtype, **kwargs)
    lowest = torch.tensor(torch.finfo(dtype).min, dtype=dtype)
    return torch.where(attention_mask[:, None, None, :].bool(), torch.zeros((), dtype=dtype), lowest)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's remarks on its own workings, which no user can act on."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def unsupported(model: nn.Module) -> dict[str, str]:
    """Quantizers that have no integer form in the graph: name -> why. Weights of up to 8 bits and activations of 8 bits
    have one."""
    refused = {}
    for name, quantizer in quantizers(model).items():
        bits = quantizer.spec.bits
        if bits > 8:
            refused[name] = f"{bits} bits, and integer kernels have 8"
        elif bits < 8 and isinstance(quantizer, ActivationQuantizer):
            refused[name] = f"an activation of {bits} bits; only weights may have fewer than 8"
    return refused
