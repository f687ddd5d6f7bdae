"""The scaling of attention scores moves into the scale with which they are dequantized."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sparse_accel.onnx_export.passes.editing import array_of, initializer, nodes, only_consumer, replace


class FoldScaling(ir.passes.InPlacePass):
    """DequantizeLinear -> Mul(constant c) becomes DequantizeLinear with c times its scale, where nothing else reads it.

    Before: any graph. After: no Mul by a positive constant scalar follows a per-tensor DequantizeLinear of an
    activation that only it reads. (q - z) * s * c is (q - z) * (s * c) up to the rounding of one float32 product.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = 0
        for node in nodes(model, "DequantizeLinear"):
            match = _scaling(node)
            if match is None:
                continue
            product, factor, scale = match
            # Named after the activation: layers that share a quantizer may scale by different factors.
            name = f"{node.outputs[0].name}_scale"
            folded = initializer(model.graph, name, np.asarray(scale * factor, np.float32).reshape(scale.shape))
            new = ir.node("DequantizeLinear", [node.inputs[0], folded, *node.inputs[2:]])
            replace(model.graph, product, [new])
            model.graph.remove(node, safe=True)
            found += 1
        return ir.passes.PassResult(model, modified=found > 0)

    def ensures(self, model: ir.Model) -> None:
        if any(_scaling(node) is not None for node in nodes(model, "DequantizeLinear")):
            raise ir.passes.PostconditionError("a dequantized activation is still multiplied by a constant")


def _scaling(node: ir.Node) -> tuple[ir.Node, np.float32, np.ndarray] | None:
    scale = array_of(node.inputs[1])
    product = only_consumer(node.outputs[0], "Mul")
    if scale is None or scale.size != 1 or product is None or array_of(node.inputs[0]) is not None:
        return None
    other = product.inputs[1] if product.inputs[0] is node.outputs[0] else product.inputs[0]
    factor = array_of(other)
    if factor is None or factor.size != 1 or factor.ndim > 1 or float(factor.reshape(())) <= 0:
        return None
    return product, np.float32(factor.reshape(())), scale.astype(np.float32)
