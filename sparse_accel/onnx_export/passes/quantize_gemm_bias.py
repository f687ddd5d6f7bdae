"""Gemm keeps its bias in int32 where its operands are integers: runtimes have no integer Gemm with a float bias."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sparse_accel.onnx_export.passes.editing import array_of, initializer, nodes, source


class QuantizeGemmBias(ir.passes.InPlacePass):
    """The float bias of a Gemm whose inputs are dequantized becomes int32 with scale s_x * s_w and zero point 0.

    Before: FoldWeights ran. After: no Gemm with two dequantized operands has a float bias. The rounding is at most half
    of s_x * s_w, a 255th of a 127th of the product's range.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = [match for node in nodes(model, "Gemm") if (match := _float_bias(node)) is not None]
        for node, bias, left, right in found:
            scale = bias_scale(left, right)
            values = array_of(bias)
            assert values is not None
            integers = round_bias(values, scale)
            parameters = [
                initializer(model.graph, f"{bias.name}_quantized", integers),
                initializer(model.graph, f"{bias.name}_scale", scale),
                initializer(model.graph, f"{bias.name}_zero_point", np.zeros(scale.shape, np.int32)),
            ]
            new = ir.node("DequantizeLinear", parameters, attributes={"axis": 0} if scale.ndim else {})
            model.graph.insert_before(node, new)
            node.replace_input_with(2, new.outputs[0])
        return ir.passes.PassResult(model, modified=bool(found))

    def ensures(self, model: ir.Model) -> None:
        if any(_float_bias(node) is not None for node in nodes(model, "Gemm")):
            raise ir.passes.PostconditionError("an integer Gemm has a float bias")


def bias_scale(left: ir.Node, right: ir.Node) -> np.ndarray:
    """Scale of the integer products of two DequantizeLinear nodes, float32, of the second's shape."""
    scales = array_of(left.inputs[1]), array_of(right.inputs[1])
    assert scales[0] is not None and scales[1] is not None
    product: np.ndarray = (scales[0].astype(np.float32) * scales[1].astype(np.float32)).astype(np.float32)
    return product


def round_bias(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """int32 integers of a bias."""
    limits = np.iinfo(np.int32)
    integers: np.ndarray = np.clip(np.rint(values.astype(np.float64) / scale), limits.min, limits.max).astype(np.int32)
    return integers


def _float_bias(node: ir.Node) -> tuple[ir.Node, ir.Value, ir.Node, ir.Node] | None:
    left, right = source(node.inputs[0], "DequantizeLinear"), source(node.inputs[1], "DequantizeLinear")
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if left is None or right is None or bias is None or source(bias, "DequantizeLinear") is not None:
        return None
    return (node, bias, left, right) if array_of(bias) is not None else None
