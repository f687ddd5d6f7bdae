"""Counts what an ONNX file holds: integer weights, zeros, bytes, and the kernels that ONNX Runtime makes of its products."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from sparse_accel.compress.attention import MATMULS, self_attention_modules
from sparse_accel.compress.layers import CompressedEmbedding, CompressedLinear, QuantizedMatMul, effective_weight
from sparse_accel.compress.ranges import Quantizer
from sparse_accel.errors import ModelError
from sparse_accel.folders.trained import TrainedModel

# ONNX Runtime's operators that multiply integers, and those that multiply floats.
INTEGER_PRODUCTS: Final = frozenset(
    {"MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm", "QAttention"}
)
FLOAT_PRODUCTS: Final = frozenset({"MatMul", "Gemm", "FusedMatMul", "FusedGemm", "TransposeMatMul", "Attention"})

# How the exporter calls the weight of a module: as integers or not, transposed or not, moved to unsigned or not.
WEIGHT_NAME: Final = re.compile(r"(?P<module>.+)\.weight(?P<integer>_quantized)?(_transposed)?(_unsigned)?")
# Operator -> {input that holds integers: input that holds their zero point}.
_ZERO_POINTS: Final[dict[str, dict[int, int]]] = {
    "DequantizeLinear": {0: 2},
    "MatMulInteger": {0: 2, 1: 3},
    "QLinearMatMul": {0: 2, 3: 5},
}
# Operators that hand integers on as they are.
_MOVES: Final = frozenset({"Gather", "Transpose", "Reshape", "Identity", "Slice"})
# A forward that only counts calls: a token that no model takes for padding.
_PROBE_TOKEN, _PROBE_LENGTH = 5, 4


@dataclass(frozen=True)
class Initializer:
    """One constant of the graph. `zeros` counts zeros, of integers those at their zero point; `num_scales` is 1 for
    integers with one scale, the number of channels for one each, None for what has no scale."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    zeros: int
    num_scales: int | None

    @property
    def numel(self) -> int:
        """How many numbers it holds."""
        return int(np.prod(self.shape))

    @property
    def sparsity(self) -> float:
        """Share of zeros in [0, 1]."""
        return self.zeros / self.numel if self.numel else 0.0

    @property
    def is_integer(self) -> bool:
        """Whether it is an 8-bit integer, signed or not."""
        return self.dtype in ("int8", "uint8")

    @property
    def compressed_bytes(self) -> int:
        """As it is, or as one bit a number and the numbers that are not zero, whichever is smaller."""
        item = self.num_bytes // self.numel if self.numel else 0
        return min(self.num_bytes, -(-self.numel // 8) + (self.numel - self.zeros) * item)


@dataclass(frozen=True)
class TypeCount:
    """All constants of one dtype."""

    tensors: int
    numel: int
    num_bytes: int
    zeros: int


@dataclass(frozen=True)
class GraphCensus:
    """Every constant of an ONNX file that its graph holds by name, and the bytes of the file with its external data."""

    initializers: tuple[Initializer, ...]
    file_bytes: int

    def by_dtype(self) -> dict[str, TypeCount]:
        """Totals for each dtype that occurs, those with most bytes first."""
        groups: dict[str, list[Initializer]] = {}
        for entry in self.initializers:
            groups.setdefault(entry.dtype, []).append(entry)
        counts = {
            dtype: TypeCount(
                len(group),
                sum(entry.numel for entry in group),
                sum(entry.num_bytes for entry in group),
                sum(entry.zeros for entry in group),
            )
            for dtype, group in groups.items()
        }
        return dict(sorted(counts.items(), key=lambda item: -item[1].num_bytes))

    def weight_of(self, module: str, *, integer: bool) -> Initializer | None:
        """The weight of a module, as 8-bit integers or as floats; None when the file does not hold it that way."""
        for entry in self.initializers:
            match = WEIGHT_NAME.fullmatch(entry.name)
            if match and match["module"] == module and entry.is_integer == integer == bool(match["integer"]):
                return entry
        return None

    def unnamed_matrix(self, shape: tuple[int, ...], zeros: Collection[int]) -> Initializer | None:
        """A float matrix of that shape, transposed or not, and that many zeros whose name is not that of a weight: the
        optimizer that folds the transpose of a small weight gives the result a name of its own."""
        return next(
            (
                entry
                for entry in self.initializers
                if sorted(entry.shape) == sorted(shape)
                and entry.zeros in zeros
                and not entry.is_integer
                and not WEIGHT_NAME.fullmatch(entry.name)
            ),
            None,
        )

    @property
    def integer_weights(self) -> tuple[Initializer, ...]:
        """The weights that are 8-bit integers."""
        return tuple(entry for entry in self.initializers if entry.is_integer and WEIGHT_NAME.fullmatch(entry.name))

    @property
    def compressed_bytes(self) -> int:
        """What the constants take as bitmasks and surviving values, the smaller of both forms for each."""
        return sum(entry.compressed_bytes for entry in self.initializers)

    def to_json(self) -> dict[str, Any]:
        """Totals, and every integer weight and float matrix, as plain values."""
        weights = [entry for entry in self.initializers if entry.is_integer or len(entry.shape) > 1]
        return {
            "file_bytes": self.file_bytes,
            "compressed_bytes": self.compressed_bytes,
            "by_dtype": {dtype: asdict(count) for dtype, count in self.by_dtype().items()},
            "weights": {
                entry.name: {
                    "dtype": entry.dtype,
                    "shape": list(entry.shape),
                    "zeros": entry.zeros,
                    "sparsity": entry.sparsity,
                    "scales": entry.num_scales,
                }
                for entry in weights
            },
        }


def census_of(path: str | Path) -> GraphCensus:
    """Count the constants of an ONNX file."""
    path = Path(path)
    graph = ir.load(path).graph
    return GraphCensus(tuple(entry for entry, _, _ in counted(graph)), file_bytes(path, graph))


def file_bytes(path: Path, graph: ir.Graph) -> int:
    """Bytes of an ONNX file and of its external data."""
    tensors = (value.const_value for value in graph.initializers.values())
    files = {path} | {path.parent / tensor.location for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    return sum(file.stat().st_size for file in files)


def counted(graph: ir.Graph) -> Iterator[tuple[Initializer, ir.Value, np.ndarray[Any, Any]]]:
    """Every constant of a graph that it holds by name, counted, with its value and where it is zero: bool of its shape."""
    scales = {str(name): value for name, value in graph.initializers.items()}
    for name, value in graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None, "an initializer has a value"
        array = tensor.numpy()
        zero_point = _zero_point(value) if array.dtype.kind in "iu" else 0
        is_zero = np.asarray(array == zero_point)
        entry = Initializer(
            name=str(name),
            dtype=tensor.dtype.name.lower(),
            shape=tuple(array.shape),
            num_bytes=tensor.nbytes,
            zeros=int(np.count_nonzero(is_zero)),
            num_scales=_num_scales(value, scales),
        )
        yield entry, value, is_zero


def _zero_point(value: ir.Value) -> Any:
    """What stands for zero in an integer tensor: a number, or an array that broadcasts against it."""
    for node, index in readers(value):
        slot = _ZERO_POINTS.get(node.op_type, {}).get(index)
        if slot is None:
            continue
        given = node.inputs[slot] if slot < len(node.inputs) else None
        tensor = None if given is None else ir.convenience.get_const_tensor(given)
        if tensor is None:
            return 0
        points = tensor.numpy()
        if (points == points.flat[0]).all():
            return points.flat[0]
        shape = [1] * len(value.shape or ())
        shape[node.attributes.get_int("axis", 1) if node.op_type == "DequantizeLinear" else -1] = -1
        return points.reshape(shape)
    return 0


def _num_scales(value: ir.Value, initializers: dict[str, ir.Value]) -> int | None:
    """How many scales an integer tensor has; a product of integers keeps them with those of its other operand."""
    for node, index in readers(value):
        if node.op_type == "DequantizeLinear" and index == 0:
            scale = node.inputs[1]
            tensor = None if scale is None else ir.convenience.get_const_tensor(scale)
            return None if tensor is None else tensor.size
    product = initializers.get(f"{value.name}_product_scale")
    return None if product is None or product.const_value is None else product.const_value.size


def readers(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """Nodes that read a tensor, and at which input; through those that only move it."""
    for use in value.uses():
        yield use.node, use.idx
        if use.node.op_type in _MOVES and use.idx == 0:
            yield from readers(use.node.outputs[0])


def check_census(census: GraphCensus, trained: TrainedModel, *, integer: bool = True) -> list[str]:
    """Compare a file with the model that it was made from; a sentence for each thing that is not as planned.

    Of every layer that the forward uses: a weight that the plan quantizes is 8-bit integers with the planned number of
    scales and in no place float, and as many of them are zero as of the weight that training computed with; any other
    weight has the zeros that it has in the model. `integer` False is for a graph without quantizers, whose weights
    are all float.
    """
    used = num_calls(trained.model)
    owners: dict[int, list[str]] = {}
    for name, module in trained.model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            owners.setdefault(id(module.weight), []).append(name)
    sentences: list[str] = []
    for name, module in trained.model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) and used[name]:
            # A weight that two modules share is in the file once, under either name.
            names = [name, *owners[id(module.weight)]]
            sentences += _check_weight(census, module, names, integer and _is_active(module, "weight_quantizer"))
    return sentences


@torch.no_grad()
def _check_weight(census: GraphCensus, module: Any, names: Sequence[str], quantized: bool) -> Iterator[str]:
    """Sentences on the weight of one module, which the file may hold under any of `names`, the module's own first."""
    name, weight = names[0], effective_weight(module)
    allowed = {weight.numel() - int(torch.count_nonzero(weight))}
    if not quantized and isinstance(module, CompressedLinear | CompressedEmbedding):
        # A float graph of a quantized model may hold the weight as it is or as it was rounded.
        allowed.add(weight.numel() - int(torch.count_nonzero(module.masked_weight())))
    found = next(filter(None, (census.weight_of(owner, integer=quantized) for owner in names)), None)
    left = census.weight_of(name, integer=False) if quantized else None
    if found is None and not quantized:
        found = census.unnamed_matrix(tuple(weight.shape), allowed)
    if left is not None:
        yield f"{name}: the plan quantizes its weight, and the file holds it in {left.dtype}"
    elif found is None:
        yield f"{name}: the file does not hold its weight{' as 8-bit integers' if quantized else ''}"
    elif found.numel != weight.numel():
        yield f"{name}: the file holds {found.numel} numbers for a weight of {weight.numel()}"
    elif found.zeros not in allowed:
        wanted = " or ".join(str(count) for count in sorted(allowed))
        yield f"{name}: {found.zeros} of {found.numel} weights in the file are zero, {wanted} are in the model"
    elif quantized and found.num_scales not in (None, module.weight_quantizer.scale.numel()):
        yield (
            f"{name}: its weight has {found.num_scales} scales in the file and "
            f"{module.weight_quantizer.scale.numel()} in the model"
        )


def _is_active(module: nn.Module, quantizer: str) -> bool:
    held = getattr(module, quantizer, None)
    return isinstance(held, Quantizer) and not held.is_idle


@dataclass(frozen=True)
class MatMuls:
    """Matrix products of a forward, those of integers and those of floats."""

    integer: int
    floating: int


def integer_kernels(path: str | Path) -> Counter[str]:
    """How often each operator that multiplies matrices occurs in the graph that ONNX Runtime makes of a file on a CPU,
    its fusions of quantized operators done. Raises ModelError when it cannot open the file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # Beyond this level come layouts of the machine at hand, which cannot be written to a file.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        options.optimized_model_filepath = str(optimized)
        try:
            onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises a family of its own without a common name
            raise ModelError(f"{path}: ONNX Runtime cannot open it: {error}") from error
        kinds = Counter(node.op_type for node in ir.load(optimized).graph.all_nodes())
    return Counter({kind: count for kind, count in kinds.items() if kind in INTEGER_PRODUCTS | FLOAT_PRODUCTS})


def matmuls_of(kernels: Mapping[str, int]) -> MatMuls:
    """Sums over the operators that `integer_kernels` counted."""
    return MatMuls(
        integer=sum(count for kind, count in kernels.items() if kind in INTEGER_PRODUCTS),
        floating=sum(count for kind, count in kernels.items() if kind in FLOAT_PRODUCTS),
    )


def expected_matmuls(trained: TrainedModel) -> MatMuls:
    """The products of one forward of the model: of integers where weight and input, or both operands of a product of
    attention, are quantized. A layer that is called several times counts as often, one that is not called does not."""
    used = num_calls(trained.model)
    total = integer = 0
    for name, module in trained.model.named_modules():
        if isinstance(module, nn.Linear):
            total += used[name]
            if _is_active(module, "weight_quantizer") and _is_active(module, "input_quantizer"):
                integer += used[name]
        elif isinstance(module, QuantizedMatMul):
            if _is_active(module, "left_quantizer") and _is_active(module, "right_quantizer"):
                integer += used[name]
    total += sum(len(MATMULS) * used[name] for name in self_attention_modules(trained.model))
    return MatMuls(integer, total - integer)


def expected_integer_matmuls(trained: TrainedModel) -> int:
    """The products of integers that ONNX Runtime should make of the model's graph; see `expected_matmuls`."""
    return expected_matmuls(trained).integer


def check_kernels(kernels: Mapping[str, int], trained: TrainedModel) -> list[str]:
    """Sentences on products that the plan makes products of integers and ONNX Runtime computes in float."""
    found, expected = matmuls_of(kernels), expected_matmuls(trained)
    listed = ", ".join(f"{count} {kind}" for kind, count in sorted(kernels.items()))
    sentences = []
    if found.integer < expected.integer:
        sentences.append(
            f"ONNX Runtime multiplies integers {found.integer} times, {expected.integer} were expected ({listed})"
        )
    if found.floating > expected.floating:
        sentences.append(
            f"ONNX Runtime multiplies floats {found.floating} times, {expected.floating} were expected ({listed})"
        )
    return sentences


@torch.no_grad()
def num_calls(model: nn.Module) -> Counter[str]:
    """How often one forward calls each module, by name; the model's mode is left as it is."""
    calls: Counter[str] = Counter()

    def count(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: calls.update([name])

    hooks = [module.register_forward_hook(count(name)) for name, module in model.named_modules()]
    try:
        device = next(model.parameters()).device
        ids = torch.full((1, _PROBE_LENGTH), _PROBE_TOKEN, device=device)
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    finally:
        for hook in hooks:
            hook.remove()
    return calls
