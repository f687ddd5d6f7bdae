"""Integer weights are stored as the product reads them: no Transpose is left between a weight and its MatMul."""

from __future__ import annotations

import onnx_ir as ir

from sparse_accel.onnx_export.passes.editing import array_of, initializer, integer_attribute, nodes, replace, source


class TransposeWeights(ir.passes.InPlacePass):
    """initializer -> DequantizeLinear -> Transpose becomes transposed initializer -> DequantizeLinear, and a float
    initializer -> Transpose a transposed one.

    Before: float weights and the integer ones of FoldWeights. After: no Transpose reads a dequantized or a constant
    tensor, unless its result is an output of the graph; the channel axis moved with its dimension.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = [node for node in nodes(model, "Transpose") if _constant_source(node) is not None]
        for node in found:
            value, dequantize = _weight(node)
            array = array_of(value)
            assert value is not None and array is not None
            order = list(node.attributes.get_ints("perm", list(range(array.ndim))[::-1]))
            stored = initializer(model.graph, f"{value.name}_transposed", array.transpose(order))
            if dequantize is None:
                node.outputs[0].replace_all_uses_with(stored)
                model.graph.remove(node, safe=True)
                continue
            scale, attributes = array_of(dequantize.inputs[1]), {}
            if scale is None or scale.ndim:
                attributes["axis"] = order.index(integer_attribute(dequantize, "axis", 1) % array.ndim)
            replace(
                model.graph,
                node,
                [ir.node("DequantizeLinear", [stored, *dequantize.inputs[1:]], attributes=attributes)],
            )
        return ir.passes.PassResult(model, modified=bool(found))

    def ensures(self, model: ir.Model) -> None:
        left = [node.name for node in nodes(model, "Transpose") if _constant_source(node) is not None]
        if left:
            raise ir.passes.PostconditionError(f"weights that are transposed in every forward: {left}")


def _weight(node: ir.Node) -> tuple[ir.Value | None, ir.Node | None]:
    """The constant that a Transpose reads, and the DequantizeLinear between them if there is one."""
    dequantize = source(node.inputs[0], "DequantizeLinear")
    return (dequantize.inputs[0] if dequantize is not None else node.inputs[0]), dequantize


def _constant_source(node: ir.Node) -> ir.Value | None:
    value, _ = _weight(node)
    return value if array_of(value) is not None and not node.outputs[0].is_graph_output() else None
