"""Gemm as MatMul and Add, the one form that the integer products are made from."""

from __future__ import annotations

import onnx_ir as ir

from sparse_accel.onnx_export.passes.editing import nodes, replace


class GemmToMatMul(ir.passes.InPlacePass):
    """Gemm(a, b, bias) with alpha = beta = 1 becomes MatMul and Add, with a Transpose where transB is set.

    Before: any graph. After: no Gemm of that kind.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = [node for node in nodes(model, "Gemm") if _is_plain(node)]
        for node in found:
            right, new = node.inputs[1], []
            if node.attributes.get_int("transB", 0):
                new.append(ir.node("Transpose", [right], attributes={"perm": [1, 0]}))
                right = new[0].outputs[0]
            new.append(ir.node("MatMul", [node.inputs[0], right]))
            if len(node.inputs) > 2 and node.inputs[2] is not None:
                new.append(ir.node("Add", [new[-1].outputs[0], node.inputs[2]]))
            replace(model.graph, node, new)
        return ir.passes.PassResult(model, modified=bool(found))

    def ensures(self, model: ir.Model) -> None:
        if any(_is_plain(node) for node in nodes(model, "Gemm")):
            raise ir.passes.PostconditionError("a Gemm is left")


def _is_plain(node: ir.Node) -> bool:
    attributes = node.attributes
    scaled = attributes.get_float("alpha", 1.0) != 1.0 or attributes.get_float("beta", 1.0) != 1.0
    return not scaled and not attributes.get_int("transA", 0)
