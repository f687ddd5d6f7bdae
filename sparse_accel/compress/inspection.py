"""What there is to see in a model: its matrices with their zeros, its quantizers and its sizes, whatever file it lies in."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from sparse_accel.compress.census import Census, Count, kind_of_name
from sparse_accel.compress.fakequant import QuantSpec
from sparse_accel.compress.plan import CompressionPlan
from sparse_accel.compress.structure import Structure, as_matrix, structure_of

# A weight's grid of up to so many bits is what an integer of one byte holds.
_BYTE: Final = 8
# What matrices are called in a layer, in the order in which people name them.
_COLUMNS: Final = (
    "word_embeddings", "position_embeddings", "token_type_embeddings", "query", "q_lin", "q_proj", "key", "k_lin",
    "k_proj", "value", "v_lin", "v_proj", "c_attn", "out_lin", "out_proj", "intermediate", "lin1", "fc1", "c_fc", "ffn",
    "output", "c_proj", "lin2", "fc2", "ffn_output",
)  # fmt: skip
_KINDS: Final = ("embeddings", "attention", "feed-forward", "head")
_ROLES: Final = {1: ("input",), 2: ("left", "right")}


@dataclass(frozen=True)
class MatrixFacts:
    """One matrix of a model. `row` and `column` are its place in the picture of its kind: the layer's number ("" outside
    of layers), and what it is there ("query"). `structure` is None for a table, whose rows are no sums. `plain_bytes`
    are those of its dtype, `packed_bytes` those of a bitmask and what is not zero, where that is less; `integer_bytes`
    the same with the weight as int8, None for one that is not quantized."""

    name: str
    kind: str
    row: str
    column: str
    shape: tuple[int, ...]
    dtype: str
    count: Count
    structure: Structure | None
    plain_bytes: int
    packed_bytes: int
    integer_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        data = {
            "kind": self.kind,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "zeros": self.count.zeros,
            "sparsity": self.count.sparsity,
            "bytes": self.plain_bytes,
            "bytes_without_zeros": self.packed_bytes,
        }
        if self.integer_bytes is not None:
            data["int8_bytes_without_zeros"] = self.integer_bytes
        return data | (self.structure.to_json() if self.structure is not None else {})


@dataclass(frozen=True)
class QuantizerFacts:
    """One quantized tensor: the `role` of a module. `scale` and `zero_point` are the least and the largest of its
    `num_scales`, None where the file does not say them; `is_dynamic`: they are made anew for every input."""

    module: str
    role: str
    bits: int
    signed: bool
    symmetric: bool
    per_channel: bool
    num_scales: int | None = None
    scale: tuple[float, float] | None = None
    zero_point: tuple[int, int] | None = None
    is_dynamic: bool = False

    @property
    def grid(self) -> str:
        """The integers as programmers call them: int8, uint8."""
        return f"{'int' if self.signed else 'uint'}{self.bits}"


@dataclass(frozen=True)
class Sizes:
    """Bytes: every parameter in float32; the files that hold the weights; without the zeros, in the dtypes of the file;
    and the same with quantized weights as int8, None where nothing is quantized, or integers are what the file holds."""

    dense_bytes: int
    disk_bytes: int
    packed_bytes: int
    integer_bytes: int | None = None


@dataclass(frozen=True)
class Inspection:
    """A model as its files show it. `form` says what kind of files they are, `model` is the architecture's name where
    it is known, `notes` are sentences for the person."""

    source: str
    form: str
    model: str | None
    census: Census
    matrices: tuple[MatrixFacts, ...]
    quantizers: tuple[QuantizerFacts, ...]
    sizes: Sizes
    notes: tuple[str, ...] = field(default=())

    def quantizers_of(self, name: str) -> tuple[QuantizerFacts, ...]:
        """The quantizers of the module that a parameter belongs to."""
        module = module_of(name)
        return tuple(quantizer for quantizer in self.quantizers if quantizer.module == module)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        census = {name: value for name, value in self.census.to_json().items() if name != "by_parameter"}
        return {
            "sparse_accel_inspection": 1,
            "source": self.source,
            "form": self.form,
            "model": self.model,
            **census,
            "sizes": asdict(self.sizes),
            "matrices": {matrix.name: matrix.to_json() for matrix in self.matrices},
            "quantized": [
                {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(quantizer).items()}
                for quantizer in self.quantizers
            ],
            "notes": list(self.notes),
        }


def module_of(name: str) -> str:
    """The module of a weight.

    >>> module_of("encoder.layer.0.output.dense.weight")
    'encoder.layer.0.output.dense'
    """
    return name.removesuffix(".weight")


def place_of(name: str) -> tuple[str, str]:
    """The layer's number and what the matrix is in it; "" for a number where there is none.

    >>> place_of("bert.encoder.layer.3.attention.self.query.weight")
    ('3', 'query')
    >>> place_of("bert.encoder.layer.3.output.dense.weight")
    ('3', 'output')
    >>> place_of("bert.embeddings.word_embeddings.weight")
    ('', 'word_embeddings')
    """
    parts = module_of(name).split(".")
    numbers = [part for part in parts if part.isdigit()]
    words = [part for part in parts if not part.isdigit() and part != "dense"]
    return ".".join(numbers), words[-1] if words else name


def in_order(matrices: Iterable[MatrixFacts]) -> tuple[MatrixFacts, ...]:
    """Matrices as they follow each other in a model: by layer, and as people name them in one."""
    return tuple(sorted(matrices, key=lambda matrix: rank_of(matrix.name)))


def quantizers_in_order(quantizers: Iterable[QuantizerFacts]) -> tuple[QuantizerFacts, ...]:
    """Quantizers by the order of their modules; those of one module stay as they were."""
    return tuple(sorted(quantizers, key=lambda quantizer: rank_of(quantizer.module)))


def rank_of(name: str) -> tuple[Any, ...]:
    """Where a module or weight stands in a model, to sort by: embeddings, layers by their numbers, what comes after
    them."""
    row, column = place_of(name)
    numbers = [int(number) for number in row.split(".") if number]
    kind = kind_of_name(name)
    part = 0 if kind == "embeddings" else 1 if numbers else 2
    place = _COLUMNS.index(column) if column in _COLUMNS else len(_COLUMNS)
    return part, numbers, _KINDS.index(kind) if kind in _KINDS else len(_KINDS), place, name


def packed_bytes(count: Count, itemsize: int) -> int:
    """Bytes of n numbers of which k are zero, as they are or as one bit each and the others, whichever is less:
    min(n * itemsize, ceil(n / 8) + (n - k) * itemsize)."""
    return min(count.numel * itemsize, -(-count.numel // 8) + (count.numel - count.zeros) * itemsize)


def inspect_tensors(
    state: Mapping[str, Tensor],
    plan: CompressionPlan,
    ranges: Mapping[str, Tensor],
    *,
    source: str,
    form: str,
    model: str | None,
    disk_bytes: int,
    inputs_first: re.Pattern[str] | None = None,
    notes: tuple[str, ...] = (),
) -> Inspection:
    """What there is to see in a state dict of plain weights, of which `plan` quantizes some; `ranges` has the numbers of
    `quantization_state`, as far as they are known, and `inputs_first` finds by name the weights that are [inputs, outputs].

    A tensor with several names counts once. Waits for the device.
    """
    tensors = _once({name: tensor for name, tensor in state.items() if tensor.is_floating_point()})
    census = Census.of(tensors, plan)
    packed = in_integers = 0
    matrices = []
    for parameter in census.parameters:
        tensor = tensors[parameter.name]
        spec = _weight_spec(plan, parameter.name)
        size = packed_bytes(parameter, tensor.itemsize)
        integer_size = packed_bytes(parameter, 1) if spec is not None and spec.bits <= _BYTE else None
        packed += size
        in_integers += size if integer_size is None else integer_size
        if tensor.dim() > 1:
            is_turned = inputs_first is not None and bool(inputs_first.search(parameter.name))
            nonzero = as_matrix(tensor != 0, inputs_first=is_turned) if parameter.prunable else None
            matrices.append(
                MatrixFacts(
                    parameter.name,
                    parameter.kind,
                    *place_of(parameter.name),
                    tuple(tensor.shape),
                    str(tensor.dtype).removeprefix("torch."),
                    Count(parameter.numel, parameter.zeros),
                    None if nonzero is None else structure_of(nonzero),
                    tensor.nbytes,
                    size,
                    integer_size,
                )
            )
    quantizes_weights = any(compression.weight is not None for compression in plan.modules.values())
    sizes = Sizes(4 * census.num_parameters, disk_bytes, packed, in_integers if quantizes_weights else None)
    return Inspection(
        source,
        form,
        model,
        census,
        in_order(matrices),
        quantizers_in_order(quantizer_facts(plan, ranges)),
        sizes,
        notes,
    )


def quantizer_facts(plan: CompressionPlan, ranges: Mapping[str, Tensor]) -> list[QuantizerFacts]:
    """All that a plan quantizes, with the numbers of `ranges` by the names of `quantization_state`."""
    facts = []
    for module, compression in plan.modules.items():
        roles = zip(_ROLES.get(len(compression.inputs), ()), compression.inputs, strict=True)
        for role, spec in (("weight", compression.weight), *roles, ("output", compression.output)):
            if spec is not None:
                facts.append(_quantizer(module, role, spec, ranges))
    return facts


def _quantizer(module: str, role: str, spec: QuantSpec, ranges: Mapping[str, Tensor]) -> QuantizerFacts:
    scale, zero_point, low, high = (
        ranges.get(f"{module}.{role}_quantizer.{name}") for name in ("scale", "zero_point", "min_val", "max_val")
    )
    known = scale is not None and zero_point is not None and scale.numel() > 0
    if known and low is not None and high is not None and bool((low > high).any()):
        known = False  # it never saw data
    return QuantizerFacts(
        module,
        role,
        spec.bits,
        spec.signed,
        spec.symmetric,
        spec.channel_axis is not None,
        scale.numel() if known and scale is not None else None,
        _extremes(scale) if known and scale is not None else None,
        _extremes(zero_point, int) if known and zero_point is not None else None,
    )


def _extremes(numbers: Tensor, kind: Any = float) -> tuple[Any, Any]:
    low, high = torch.aminmax(numbers)
    return kind(low), kind(high)


def _weight_spec(plan: CompressionPlan, name: str) -> QuantSpec | None:
    compression = plan.modules.get(module_of(name))
    return compression.weight if compression is not None and name.endswith(".weight") else None


def _once(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the first of their names each."""
    seen: set[tuple[Any, ...]] = set()
    kept = {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else (name,)
        if place not in seen:
            kept[name] = tensor
        seen.add(place)
    return kept
