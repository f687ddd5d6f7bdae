"""Products of dequantized operands as MatMulInteger, the form that DeepSparse runs."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sparse_accel.onnx_export.passes.editing import array_of, initializer, nodes, only_consumer, replace, source
from sparse_accel.onnx_export.passes.quantize_gemm_bias import bias_scale, round_bias


class IntegerProducts(ir.passes.InPlacePass):
    """MatMul of two DequantizeLinear outputs becomes MatMulInteger -> Cast -> Mul; a constant bias behind it is added as
    int32 before the Cast, if int32 can hold it on the product's scale. Weights and activations are uint8 then, as in the
    graphs that SparseML wrote: an int8 weight moves by 128, with its zero point.

    Before: GemmToMatMul, FoldWeights and TransposeWeights ran; the scale of a right operand is per tensor or per column.
    After: no MatMul reads two dequantized operands.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = [match for node in nodes(model, "MatMul") if (match := _operands(node)) is not None]
        for node, left, right in found:
            _convert(model.graph, node, left, right)
        return ir.passes.PassResult(model, modified=bool(found))

    def requires(self, model: ir.Model) -> None:
        for node in nodes(model, "MatMul"):
            match = _operands(node)
            if match is None:
                continue
            scale = array_of(match[2].inputs[1])
            if scale is not None and scale.size > 1 and match[2].attributes.get_int("axis", 1) != 1:
                raise ir.passes.PreconditionError(f"{node.name}: the right operand has a scale for each row")

    def ensures(self, model: ir.Model) -> None:
        left = [node.name for node in nodes(model, "MatMul") if _operands(node) is not None]
        if left:
            raise ir.passes.PostconditionError(f"float products of integers are left: {left}")


def _operands(node: ir.Node) -> tuple[ir.Node, ir.Node, ir.Node] | None:
    left, right = source(node.inputs[0], "DequantizeLinear"), source(node.inputs[1], "DequantizeLinear")
    return None if left is None or right is None else (node, left, right)


def _convert(graph: ir.Graph, node: ir.Node, left: ir.Node, right: ir.Node) -> None:
    scale = bias_scale(left, right)
    right_integers, right_zero = _unsigned(graph, right)
    product = ir.node("MatMulInteger", [left.inputs[0], right_integers, left.inputs[2], right_zero])
    new, last = [product], node
    add = only_consumer(node.outputs[0], "Add")
    bias = None if add is None else (add.inputs[1] if add.inputs[0] is node.outputs[0] else add.inputs[0])
    values = array_of(bias)
    integers = round_bias(values, scale) if values is not None and values.ndim == 1 else None
    if add is not None and bias is not None and integers is not None:
        held = initializer(graph, f"{bias.name}_quantized", integers)
        new.append(ir.node("Add", [product.outputs[0], held]))
        last = add
    new.append(ir.node("Cast", [new[-1].outputs[0]], attributes={"to": ir.DataType.FLOAT}))
    name = (
        f"{right_integers.name}_product_scale"
        if array_of(right_integers) is not None
        else f"{node.outputs[0].name}_scale"
    )
    new.append(ir.node("Mul", [new[-1].outputs[0], initializer(graph, name, scale)]))
    replace(graph, last, new)
    if last is not node:
        graph.remove(node, safe=True)


def _unsigned(graph: ir.Graph, dequantize: ir.Node) -> tuple[ir.Value, ir.Value]:
    """Integers and zero point of a DequantizeLinear as uint8; one zero point where all channels share it."""
    integers, zero_point = dequantize.inputs[0], dequantize.inputs[2]
    values, zeros = array_of(integers), array_of(zero_point)
    assert integers is not None and zero_point is not None and zeros is not None
    if values is None or values.dtype != np.int8:
        return integers, zero_point
    moved = (values.astype(np.int16) + 128).astype(np.uint8)
    zero = (zeros.astype(np.int16) + 128).astype(np.uint8)
    if (zero == zero.flat[0]).all():
        zero = zero.reshape(-1)[0]
    name = str(integers.name)
    return initializer(graph, f"{name}_unsigned", moved), initializer(graph, f"{name}_zero_point", zero)
