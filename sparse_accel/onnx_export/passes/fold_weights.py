"""Weights become integers: initializer -> QuantizeLinear is replaced by an int8 initializer."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sparse_accel.onnx_export.passes.editing import (
    array_of,
    initializer,
    integer_attribute,
    is_parameter_quantizer,
    nodes,
)


class FoldWeights(ir.passes.InPlacePass):
    """Round quantized weights, exactly as training's fake-quantizer did, and store them as int8.

    Before: a QuantizeLinear that capture marked reads a float initializer, or the rows that a Gather takes from one.
    After: none is marked; each such weight W of `module` is `module.weight_quantized` (int8, W's shape) with
    `module.weight_scale` and `module.weight_zero_point`; a Gather reads the integers. A zero is the zero point.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        marked = [node for node in nodes(model, "QuantizeLinear") if is_parameter_quantizer(node)]
        for node in marked:
            gather = node.inputs[0].producer() if node.inputs[0] is not None else None
            if gather is not None and gather.op_type == "Gather":
                integers = _quantized(model.graph, node, gather.inputs[0])
                gather.replace_input_with(0, integers)
                gather.outputs[0].type = ir.TensorType(ir.DataType.INT8)
                node.outputs[0].replace_all_uses_with(gather.outputs[0])
            else:
                node.outputs[0].replace_all_uses_with(_quantized(model.graph, node, node.inputs[0]))
            model.graph.remove(node, safe=True)
        return ir.passes.PassResult(model, modified=bool(marked))

    def requires(self, model: ir.Model) -> None:
        for node in nodes(model, "QuantizeLinear"):
            if not is_parameter_quantizer(node):
                continue
            value = node.inputs[0]
            gather = value.producer() if value is not None else None
            if gather is not None and gather.op_type == "Gather":
                if len(gather.outputs[0].uses()) != 1 or gather.outputs[0].is_graph_output():
                    raise ir.passes.PreconditionError(
                        f"the rows of {gather.inputs[0]} are read before they are quantized"
                    )
                value = gather.inputs[0]
            if array_of(value) is None:
                raise ir.passes.PreconditionError(f"the weight quantizer {node.name} reads {value}, which is no weight")

    def ensures(self, model: ir.Model) -> None:
        left = [node.name for node in nodes(model, "QuantizeLinear") if is_parameter_quantizer(node)]
        if left:
            raise ir.passes.PostconditionError(f"weights that are still float: {left}")


def _quantized(graph: ir.Graph, node: ir.Node, weight: ir.Value | None) -> ir.Value:
    """The integers of one weight, whose scale and zero point the node and its DequantizeLinear readers share."""
    values, scale, zero_point = array_of(weight), array_of(node.inputs[1]), array_of(node.inputs[2])
    assert weight is not None and values is not None and scale is not None and zero_point is not None
    module = str(weight.name).removesuffix(".weight")
    low, high = integer_attribute(node, "quant_min", -128), integer_attribute(node, "quant_max", 127)
    axis = integer_attribute(node, "axis", 0) if scale.ndim else None
    integers = rounded(values, scale, zero_point, axis, low, high)
    parameters = (
        initializer(graph, f"{module}.weight_scale", scale),
        initializer(graph, f"{module}.weight_zero_point", zero_point),
    )
    for reader in list(node.outputs[0].consumers()):
        assert reader.op_type == "DequantizeLinear", f"{reader.op_type} reads the integers of {module}"
        reader.replace_input_with(1, parameters[0])
        reader.replace_input_with(2, parameters[1])
    return initializer(graph, f"{module}.weight_quantized", integers)


def rounded(
    values: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, axis: int | None, low: int, high: int
) -> np.ndarray:
    """int8 integers of a float32 weight: clamp(round(w * (1 / scale)) + zero_point, low, high), in float32 as
    `compress.fakequant` computes it; QuantizeLinear divides instead, which now and then rounds the other way."""
    shape = [1] * values.ndim
    if axis is not None:
        shape[axis] = -1
    inverse = (np.float32(1.0) / scale.astype(np.float32)).reshape(shape if axis is not None else ())
    steps = np.rint(values.astype(np.float32) * inverse)
    offset = zero_point.astype(np.float32).reshape(shape if axis is not None else ())
    return np.clip(steps + offset, low, high).astype(np.int8)
