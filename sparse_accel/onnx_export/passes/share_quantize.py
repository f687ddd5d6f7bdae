"""One activation that several layers read in the same grid is quantized once."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from sparse_accel.onnx_export.passes.editing import array_of, integer_attribute, nodes


class ShareQuantize(ir.passes.InPlacePass):
    """QuantizeLinear nodes with one input and equal scale and zero point become one; query, key and value read the same
    hidden states, and their quantizers saw the same ranges.

    Before: any graph. After: no two QuantizeLinear nodes compute the same, but for those whose integers are an output of
    the graph. Each reader keeps its own DequantizeLinear, which is what runtimes look for beside a product.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        first: dict[Any, ir.Node] = {}
        duplicates = 0
        for node in nodes(model, "QuantizeLinear"):
            kept = first.setdefault(_key(node), node)
            if kept is not node:
                node.outputs[0].replace_all_uses_with(kept.outputs[0])
                model.graph.remove(node, safe=True)
                duplicates += 1
        return ir.passes.PassResult(model, modified=duplicates > 0)

    def ensures(self, model: ir.Model) -> None:
        keys = [_key(node) for node in nodes(model, "QuantizeLinear")]
        if len(keys) != len(set(keys)):
            raise ir.passes.PostconditionError("the same activation is quantized twice in the same way")


def _key(node: ir.Node) -> Any:
    scale, zero_point = array_of(node.inputs[1]), array_of(node.inputs[2])
    if scale is None or zero_point is None or node.outputs[0].is_graph_output():
        return id(node)
    axis = integer_attribute(node, "axis", 1) if scale.size > 1 else None
    return id(node.inputs[0]), axis, scale.tobytes(), zero_point.tobytes(), str(zero_point.dtype)
