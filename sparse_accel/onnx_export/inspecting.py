"""What there is to see in an ONNX file, ours or another program's: its matrices, its quantizers and its sizes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import torch

from sparse_accel.compress.census import Census, Count, ParameterCount, kind_of_name
from sparse_accel.compress.inspection import (
    Inspection,
    MatrixFacts,
    QuantizerFacts,
    Sizes,
    in_order,
    module_of,
    packed_bytes,
    place_of,
    quantizers_in_order,
)
from sparse_accel.compress.structure import as_matrix, structure_of
from sparse_accel.errors import ModelError
from sparse_accel.onnx_export.graph_census import WEIGHT_NAME, GraphCensus, Initializer, counted, file_bytes

# Operators that multiply a matrix -> the input at which their weight is.
_PRODUCTS: Final = {
    "MatMul": 1, "Gemm": 1, "FusedMatMul": 1, "MatMulInteger": 1, "MatMulIntegerToFloat": 1, "DynamicQuantizeMatMul": 1,
    "QLinearMatMul": 3, "QGemm": 3, "Conv": 1, "ConvInteger": 1, "QLinearConv": 3,
}  # fmt: skip
_MOVES: Final = frozenset({"Identity", "Cast", "DequantizeLinear", "Transpose"})
# Operator -> inputs that are the scale or the zero point of another.
_NUMBERS: Final = {
    "QuantizeLinear": (1, 2),
    "DequantizeLinear": (1, 2),
    "MatMulInteger": (2, 3),
    "QLinearMatMul": (1, 2, 4, 5, 6, 7),
}
_NUMBER_NAMES: Final = ("scale", "zero_point")
_FLOATS: Final = frozenset({"float", "float16", "bfloat16", "double"})
# dtype of the integers -> bits, and whether they are signed.
_GRIDS: Final = {
    "int8": (8, True), "uint8": (8, False), "int4": (4, True), "uint4": (4, False), "int16": (16, True),
    "uint16": (16, False), "int2": (2, True), "uint2": (2, False),
}  # fmt: skip
# How our exporter calls the scale of an activation.
_ACTIVATION: Final = re.compile(r"(?P<module>.+)\.(?P<role>input|output|left|right)_quantizer\.scale")


def inspect_graph(path: str | Path, *, model: str | None = None) -> Inspection:
    """Count what an ONNX file holds. Raises ModelError for a file that is none, or whose external data is missing."""
    path = Path(path)
    try:
        graph = ir.load(path).graph
    except FileNotFoundError:
        raise ModelError(f"no such file: {path}") from None
    except Exception as error:  # protobuf and onnx_ir raise families of their own
        raise ModelError(f"{path} is no ONNX file, or is damaged: {_first_line(error)}") from error
    if not len(graph):
        raise ModelError(f"{path} is no ONNX file: it holds no graph")
    try:
        return _inspect(path, graph, model)
    except FileNotFoundError as error:
        raise ModelError(f"{path}: its weights lie in another file, which is not there: {error.filename}") from error


def _inspect(path: Path, graph: ir.Graph, model: str | None) -> Inspection:
    entries, parameters, matrices = [], [], []
    quantizers: dict[tuple[str, str], QuantizerFacts] = {}
    for entry, value, is_zero in counted(graph):
        entries.append(entry)
        if not _is_parameter(entry, value):
            continue
        use = _use(value)
        name = _name(entry, use)
        is_matrix = len(entry.shape) > 1
        is_product = use is not None and use[0].op_type in _PRODUCTS
        kind = kind_of_name(name) if is_matrix else "other"
        parameters.append(ParameterCount(entry.numel, entry.zeros, name, kind, is_matrix and is_product))
        if is_matrix:
            nonzero = torch.from_numpy(~is_zero.astype(bool))
            matrices.append(
                MatrixFacts(
                    name,
                    kind,
                    *place_of(name),
                    entry.shape,
                    entry.dtype,
                    Count(entry.numel, entry.zeros),
                    structure_of(as_matrix(nonzero, inputs_first=use[1])) if use is not None and is_product else None,
                    entry.num_bytes,
                    packed_bytes(Count(entry.numel, entry.zeros), max(1, entry.num_bytes // max(1, entry.numel))),
                )
            )
        if entry.dtype in _GRIDS:
            found = _weight_quantizer(module_of(name), entry, value)
            quantizers[found.module, found.role] = found
    for found in _activations(graph):
        quantizers.setdefault((found.module, found.role), found)
    modules = dict.fromkeys(module for module, _ in quantizers)
    census = Census(tuple(parameters), tuple(modules), len(quantizers))
    sizes = Sizes(4 * census.num_parameters, file_bytes(path, graph), GraphCensus(tuple(entries), 0).compressed_bytes)
    return Inspection(
        str(path), "ONNX file", model, census, in_order(matrices), quantizers_in_order(quantizers.values()), sizes
    )


def _is_parameter(entry: Initializer, value: ir.Value) -> bool:
    """Whether a constant is a weight: neither one number, nor shapes, nor the scale or zero point of others."""
    if entry.numel < 2 or entry.name.endswith(_NUMBER_NAMES):
        return False
    if entry.dtype == "int32":
        return "bias" in entry.name
    uses = list(value.uses())
    if uses and all(use.idx in _NUMBERS.get(use.node.op_type, ()) for use in uses):
        return False
    return entry.dtype in _FLOATS or entry.dtype in _GRIDS


def _use(value: ir.Value, turned: bool = False) -> tuple[ir.Node, bool] | None:
    """The operator that computes with a weight, behind what only moves it, and whether the weight is [inputs, outputs]
    as the file holds it."""
    for use in value.uses():
        node = use.node
        if node.op_type in _MOVES and use.idx == 0:
            found = _use(node.outputs[0], turned != (node.op_type == "Transpose"))
            if found is not None:
                return found
        elif _PRODUCTS.get(node.op_type) == use.idx:
            # The second operand of a product has the inputs in front, unless the operator turns it.
            turns = node.op_type in ("Gemm", "QGemm", "FusedMatMul") and node.attributes.get_int("transB")
            return node, (not turns) != turned
        elif node.op_type == "Gather" and use.idx == 0:
            return node, False
    return None


def _name(entry: Initializer, use: tuple[ir.Node, bool] | None) -> str:
    """What torch calls the weight, as far as the file tells: by the constant's name, or where that was made up on the
    way, by the node that reads it (`/bert/encoder/layer.0/output/dense/MatMul`)."""
    match = WEIGHT_NAME.fullmatch(entry.name)
    if match:
        return f"{match['module']}.weight"
    path = (use[0].name or "") if use is not None else ""
    if path.startswith("/") and "::" in entry.name:
        return ".".join(path.strip("/").split("/")[:-1]) + ".weight"
    return entry.name


def _weight_quantizer(module: str, entry: Initializer, value: ir.Value) -> QuantizerFacts:
    bits, signed = _GRIDS[entry.dtype]
    scale = zero_point = None
    for node, index in _dequantizers(value):
        if node.op_type == "DequantizeLinear":
            scale, zero_point = _constant(node, 1), _constant(node, 2)
        elif node.op_type == "MatMulInteger":
            zero_point = _constant(node, index + 2)
        elif node.op_type == "QLinearMatMul":
            scale, zero_point = _constant(node, index + 1), _constant(node, index + 2)
    num_scales = entry.num_scales if scale is None else scale.size
    return _facts(module, "weight", bits, signed, scale, zero_point, num_scales)


def _dequantizers(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """Nodes that read a weight's integers, also behind a gather or a transpose, and at which input."""
    for use in value.uses():
        yield use.node, use.idx
        if use.node.op_type in ("Gather", "Transpose", "Reshape", "Identity") and use.idx == 0:
            yield from _dequantizers(use.node.outputs[0])


def _activations(graph: ir.Graph) -> Iterator[QuantizerFacts]:
    """The tensors that the graph makes integers of while it runs."""
    for node in graph.all_nodes():
        source = node.inputs[0] if node.inputs else None
        if source is None:
            continue
        if node.op_type == "DynamicQuantizeLinear":
            yield QuantizerFacts(str(source.name), "activation", 8, False, False, False, 1, is_dynamic=True)
        elif node.op_type == "QuantizeLinear":
            scale, zero_point = _constant(node, 1), _constant(node, 2)
            given = node.inputs[1]
            match = _ACTIVATION.fullmatch(str(given.name)) if given is not None else None
            module, role = (match["module"], match["role"]) if match else (str(source.name), "activation")
            dtype = "uint8" if zero_point is None else str(zero_point.dtype)
            bits, signed = _GRIDS.get(dtype, (8, False))
            yield _facts(module, role, bits, signed, scale, zero_point, None if scale is None else scale.size)


def _facts(
    module: str,
    role: str,
    bits: int,
    signed: bool,
    scale: np.ndarray[Any, Any] | None,
    zero_point: np.ndarray[Any, Any] | None,
    num_scales: int | None,
) -> QuantizerFacts:
    middle = 0 if signed else 1 << (bits - 1)
    points = np.zeros((), np.int64) if zero_point is None else zero_point.astype(np.int64)
    return QuantizerFacts(
        module,
        role,
        bits,
        signed,
        bool((points == middle).all()),
        (num_scales or 1) > 1,
        num_scales,
        None if scale is None else (float(scale.min()), float(scale.max())),
        (int(points.min()), int(points.max())),
    )


def _constant(node: ir.Node, index: int) -> np.ndarray[Any, Any] | None:
    given = node.inputs[index] if index < len(node.inputs) else None
    tensor = None if given is None else ir.convenience.get_const_tensor(given)
    return None if tensor is None else tensor.numpy()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
