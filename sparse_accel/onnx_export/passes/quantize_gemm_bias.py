"""Gemm keeps its bias in int32 where its operands are integers: runtimes have no integer Gemm with a float bias."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sparse_accel.onnx_export.passes.editing import array_of, initializer, nodes, replace, source


class QuantizeGemmBias(ir.passes.InPlacePass):
    """The float bias of a Gemm whose inputs are dequantized becomes int32 with scale s_x * s_w and zero point 0. One that
    int32 cannot hold on that scale, which is tiny for a channel of zeros, is added behind the Gemm instead.

    Before: FoldWeights ran. After: no Gemm with two dequantized operands has a constant float bias. The rounding is at
    most half of s_x * s_w, a 255th of a 127th of the product's range.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = [match for node in nodes(model, "Gemm") if (match := _float_bias(node)) is not None]
        for node, bias, left, right in found:
            scale = bias_scale(left, right)
            values = array_of(bias)
            assert values is not None
            integers = round_bias(values, scale)
            if integers is None:
                _add_behind(model.graph, node, bias)
                continue
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


def round_bias(values: np.ndarray, scale: np.ndarray) -> np.ndarray | None:
    """int32 integers of a bias; None where one would take more than half of the range, which the product needs too."""
    integers: np.ndarray = np.rint(values.astype(np.float64) / scale)
    return integers.astype(np.int32) if (np.abs(integers) <= np.iinfo(np.int32).max // 2).all() else None


def _add_behind(graph: ir.Graph, gemm: ir.Node, bias: ir.Value) -> None:
    product = ir.node("Gemm", gemm.inputs[:2], attributes=gemm.attributes)
    replace(graph, gemm, [product, ir.node("Add", [product.outputs[0], bias])])


def _float_bias(node: ir.Node) -> tuple[ir.Node, ir.Value, ir.Node, ir.Node] | None:
    left, right = source(node.inputs[0], "DequantizeLinear"), source(node.inputs[1], "DequantizeLinear")
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if left is None or right is None or bias is None or node.attributes.get_float("beta", 1.0) != 1.0:
        return None
    values = array_of(bias)
    return (node, bias, left, right) if values is not None and values.ndim <= 1 else None
