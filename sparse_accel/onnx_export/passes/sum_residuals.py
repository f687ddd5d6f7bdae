"""Residual sums are written as Sum, which keeps ONNX Runtime from a slow fused kernel."""

from __future__ import annotations

import onnx_ir as ir

from sparse_accel.onnx_export.passes.editing import array_of, nodes


class SumResiduals(ir.passes.InPlacePass):
    """Add of two activations in front of a LayerNormalization becomes Sum of the same two.

    ONNX Runtime fuses Add and LayerNormalization, and a bias before them, into SkipLayerNormalization, whose kernel on
    CPUs is scalar: it takes four to six times as long as the two apart (1.32, 128 x 768 floats, AVX512), which is a
    seventh of an int8 BERT. It does not look for Sum; other runtimes read Sum of two as Add.

    Before: any graph. After: no LayerNormalization reads an Add of two tensors that are computed.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = [add for node in nodes(model, "LayerNormalization") if (add := _residual(node)) is not None]
        for add in found:
            add.op_type = "Sum"
        return ir.passes.PassResult(model, modified=bool(found))

    def ensures(self, model: ir.Model) -> None:
        if any(_residual(node) is not None for node in nodes(model, "LayerNormalization")):
            raise ir.passes.PostconditionError("a LayerNormalization reads an Add")


def _residual(node: ir.Node) -> ir.Node | None:
    source = node.inputs[0].producer() if node.inputs[0] is not None else None
    if source is None or source.op_type != "Add" or any(array_of(value) is not None for value in source.inputs):
        return None
    return source
