"""Model folders whose weights take little space: `model.compressed.safetensors`, written, read and turned back.

The format, version 1. The file is a safetensors file whose metadata has the one key `sparse_accel_compressed`: JSON
`{"version": 1, "tensors": {NAME: {"kind", "shape", "dtype", ...}}}`, with one entry for each tensor of the model. `shape`
and `dtype` (torch's name: "float32") are those of the tensor that reading gives; `kind` says what the file holds of it:

    kind           in the file                              the tensor
    dense          NAME                                     as it is; any dtype
    bitmask        NAME/bitmask, NAME/values                floats; entries that are not marked are +0.0
    bitmask_signs  NAME/bitmask, NAME/values, NAME/signs    floats; entries that are not marked are +0.0 or -0.0
    int8           NAME, NAME/scale, NAME/zero_point        (integer - zero point) * scale, in float32
    int8_bitmask   NAME/bitmask, NAME/values, NAME/scale,   the same; integers that are not marked are 0
                   NAME/zero_point
    shared         nothing                                  the same storage as the tensor `shared_with`

* NAME/bitmask is uint8 [ceil(n / 8)] over the n entries in row-major order: bit i % 8 (the lowest is 0) of byte i // 8
  says whether entry i is stored. NAME/values holds the stored ones in order, in the tensor's dtype or int8.
* NAME/signs has one bit for each entry that is not stored, packed in the same way: 1 is -0.0. (Weights that were
  multiplied by a mask are full of those.)
* NAME/scale (float32) and NAME/zero_point (int32) have shape [], or [channels]: one per index of the axis
  `channel_axis`, which the entry then names.
* A float tensor is dense, bitmask or bitmask_signs, integers are int8 or int8_bitmask, whichever takes fewest bytes.

What reading gives back has the same bits as what was written, -0.0 and the payloads of NaNs included, but for int8: there
it is the value that the quantized model computes with (a zero may change its sign), on which the model's quantizers,
whose ranges are in `quantization.safetensors` beside it, change nothing. A weight goes to int8 where the compression plan
gives it a signed grid of at most 8 bits and all layers that share it the same one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparse_accel.compress.fakequant import QuantSpec, fake_quantize
from sparse_accel.compress.plan import CompressionPlan
from sparse_accel.errors import ModelError, OutputError, suggestion
from sparse_accel.folders.bitmask import pack, packed_bytes, unpack
from sparse_accel.folders.publishing import COMPRESSED_FILE, published_model
from sparse_accel.folders.sources import WEIGHT_FILES, check_source, neighbour
from sparse_accel.folders.trained import RANGES_FILE, trained_plan
from sparse_accel.zoo.resolving import open_zoo, resolve
from sparse_accel.zoo.stubs import is_stub

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VERSION: Final = 1
_PLAIN_FILE: Final = "model.safetensors"
_KEY: Final = "sparse_accel_compressed"

# Files that hold weights or can run code; everything else beside a model goes along. `run.json` stays: it lets a training
# run clear the folder that it lies in. So does the report of that run, whose folder it tells of.
_WEIGHT_SUFFIXES = frozenset(
    ".safetensors .bin .pt .pth .pkl .ckpt .h5 .ot .msgpack .gguf .onnx .onnx_data .tflite".split()
)
_LEFT_BEHIND = frozenset({"run.json", "report.html", "report.json"})


class Kind(StrEnum):
    """How a tensor is stored."""

    DENSE = "dense"
    BITMASK = "bitmask"
    BITMASK_SIGNS = "bitmask_signs"
    INT8 = "int8"
    INT8_BITMASK = "int8_bitmask"
    SHARED = "shared"


# What the file holds of a tensor of each kind, by the end of its name.
_PARTS: Final[dict[Kind, tuple[str, ...]]] = {
    Kind.DENSE: ("",),
    Kind.BITMASK: ("/bitmask", "/values"),
    Kind.BITMASK_SIGNS: ("/bitmask", "/values", "/signs"),
    Kind.INT8: ("", "/scale", "/zero_point"),
    Kind.INT8_BITMASK: ("/bitmask", "/values", "/scale", "/zero_point"),
    Kind.SHARED: (),
}


@dataclass(frozen=True)
class KindTotal:
    """How many tensors are stored in one way, their bytes as plain tensors, and the bytes that they take stored."""

    num_tensors: int = 0
    plain_bytes: int = 0
    stored_bytes: int = 0


@dataclass(frozen=True)
class StorageReport:
    """What `compress_folder` or `decompress_folder` did: bytes of the weight files read and written, and the tensors of
    the compressed one by kind."""

    output_dir: Path
    bytes_before: int
    bytes_after: int
    kinds: Mapping[Kind, KindTotal]


@dataclass(frozen=True)
class _Entry:
    """A tensor's line in the metadata."""

    kind: Kind
    shape: tuple[int, ...]
    dtype: torch.dtype
    channel_axis: int | None = None
    shared_with: str | None = None

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {
            "kind": str(self.kind),
            "shape": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        if self.channel_axis is not None:
            data["channel_axis"] = self.channel_axis
        if self.shared_with is not None:
            data["shared_with"] = self.shared_with
        return data

    @classmethod
    def from_json(cls, data: Any) -> _Entry:
        """Raises ValueError for what `to_json` does not write."""
        if not isinstance(data, dict) or data.get("kind") not in list(Kind):
            kind = data.get("kind") if isinstance(data, dict) else data
            raise ValueError(f"its kind is {kind!r}; known: {', '.join(Kind)}")
        shape, axis, shared_with = data.get("shape"), data.get("channel_axis"), data.get("shared_with")
        dtype = getattr(torch, str(data.get("dtype")), None)
        if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"its shape is {shape!r}")
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"its dtype is {data.get('dtype')!r}")
        if axis is not None and not (type(axis) is int and 0 <= axis < len(shape)):
            raise ValueError(f"its channel_axis is {axis!r}, its shape {shape}")
        kind = Kind(data["kind"])
        if (kind is Kind.SHARED) != isinstance(shared_with, str):
            raise ValueError(f"its kind is {kind}, and it is shared with {shared_with!r}")
        return cls(kind, tuple(shape), dtype, axis, shared_with)


@dataclass(frozen=True)
class _Grid:
    """The integers that a weight is rounded to: its spec, scale (fp32) and zero point (int32), both [] or [channels]."""

    spec: QuantSpec
    scale: Tensor
    zero_point: Tensor

    def is_same(self, other: _Grid) -> bool:
        return (
            self.spec == other.spec
            and torch.equal(self.scale, other.scale)
            and torch.equal(self.zero_point, other.zero_point)
        )


def is_compressed(folder: str | Path) -> bool:
    """Whether the folder's weights are compressed; where plain ones lie beside them, those count, as everywhere else."""
    path = Path(folder)
    return (path / COMPRESSED_FILE).is_file() and not any((path / name).is_file() for name in WEIGHT_FILES)


def load(folder: str | Path, **options: Any) -> PreTrainedModel:
    """Open a model folder (compressed or plain; or a hub id) with the class that its config names, in eval mode.

    Compressed weights are unpacked in memory. `options` go to transformers' `from_pretrained` as they are (dtype,
    attn_implementation, ...). Weights stored as int8 come back as the values that the quantized model computes with;
    activations are not quantized. A `zoo:` stub is looked up first. Raises ModelError and ZooError.
    """
    if is_stub(str(folder)):
        folder = resolve(str(folder), "model", open_zoo(None, (), os.environ)).value
    name = str(folder)
    state = read_compressed(folder) if is_compressed(folder) else None
    if state is None:
        check_source(name, "MODEL", weights=True)
    config, model_class = _architecture(name, options.pop("config", None))
    try:
        model, info = model_class.from_pretrained(
            name if state is None else None, config=config, state_dict=state, output_loading_info=True, **options
        )
    except Exception as error:  # transformers raises whatever its readers raise
        raise ModelError(f"{name} cannot be loaded: {_first_line(error)}") from error
    for problem in ("missing_keys", "mismatched_keys"):
        if info[problem]:
            raise ModelError(
                f"{name}: {problem.replace('_', ' ')} of {type(model).__name__}: {sorted(info[problem])[:3]}"
            )
    opened: PreTrainedModel = model.eval()
    return opened


def compress_folder(source: str | Path, output: str | Path, *, overwrite: bool = False) -> StorageReport:
    """Write the model folder `source` to the folder `output` with compressed weights; all else that lies in it (config,
    tokenizer, plan, ranges, recipe, README, but no sub-folders) goes along.

    Raises ModelError and OutputError; `output` is complete or untouched.
    """
    source, output = Path(source), Path(output)
    _check_folders(source, output, overwrite)
    if is_compressed(source):
        raise ModelError(f"{source} is compressed already ({COMPRESSED_FILE})")
    check_source(str(source), "MODEL", weights=True)
    plan = trained_plan(str(source)) or CompressionPlan()
    with published_model(output) as folder:
        state, bytes_before = read_plain(source)
        is_quantized = any(compression.weight is not None for compression in plan.modules.values())
        kinds = write_compressed(
            state,
            folder / COMPRESSED_FILE,
            plan,
            _read_ranges(source) if is_quantized else None,
            tied=_tied_names(source) if is_quantized else (),
        )
        _copy_companions(source, folder)
    return StorageReport(output, bytes_before, (output / COMPRESSED_FILE).stat().st_size, kinds)


def decompress_folder(source: str | Path, output: str | Path, *, overwrite: bool = False) -> StorageReport:
    """Write the compressed folder `source` to the folder `output` as a plain Hugging Face one.

    Weights that were stored as int8 are fp32, on their grid; plan and ranges go along, so that the folder opens as it
    was trained. Raises ModelError and OutputError; `output` is complete or untouched.
    """
    source, output = Path(source), Path(output)
    _check_folders(source, output, overwrite)
    if not is_compressed(source):
        plain = [name for name in WEIGHT_FILES if (source / name).is_file()]
        raise ModelError(
            f"{source}: its weights are plain already ({plain[0]})"
            if plain
            else f"{source} holds no {COMPRESSED_FILE}, so it is not a compressed model folder"
        )
    with published_model(output) as folder:
        state, kinds = _read(source / COMPRESSED_FILE)
        save_file(_apart(state), folder / _PLAIN_FILE, metadata={"format": "pt"})
        _copy_companions(source, folder)
    bytes_before = (source / COMPRESSED_FILE).stat().st_size
    return StorageReport(output, bytes_before, (output / _PLAIN_FILE).stat().st_size, kinds)


def write_compressed(
    state: Mapping[str, Tensor],
    path: str | Path,
    plan: CompressionPlan | None = None,
    ranges: Mapping[str, Tensor] | None = None,
    *,
    tied: Iterable[Sequence[str]] = (),
) -> Mapping[Kind, KindTotal]:
    """Write the tensors of a model to the file `path`, and return what was stored how.

    `ranges` are the numbers of `quantization_state`; without plan or ranges nothing is stored as integers. `tied` are
    groups of names that are one parameter in the model, for those that `state` has under one of them only: a weight
    becomes integers only if everything that uses it does. Raises ModelError when plan, ranges and state do not fit.
    """
    names: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in state.items():
        if "/" in name:
            raise ModelError(f"a tensor called {name!r} cannot be stored: the format uses the slash itself")
        names.setdefault(_place(tensor), []).append(name)
    users = {group[0]: [*group, *_others(group, tied)] for group in names.values()}
    if plan is not None and ranges is not None:
        _refuse_missing(plan, (user for group in users.values() for user in group))
    entries: dict[str, _Entry] = {}
    parts: dict[str, Tensor] = {}
    totals: dict[Kind, KindTotal] = {}
    for name, *others in names.values():
        tensor = state[name].detach().cpu().contiguous()
        grid = None if plan is None or ranges is None else _common_grid(tensor, users[name], plan, ranges)
        entry, stored = _encode(tensor, grid)
        entries[name] = entry
        parts |= {name + end: part for end, part in zip(_PARTS[entry.kind], stored, strict=True)}
        _count(totals, entry.kind, tensor.nbytes, sum(part.nbytes for part in stored))
        for other in others:
            entries[other] = _Entry(Kind.SHARED, entry.shape, entry.dtype, shared_with=name)
            _count(totals, Kind.SHARED, 0, 0)
    header = {"version": VERSION, "tensors": {name: entry.to_json() for name, entry in entries.items()}}
    save_file(_apart(parts), path, metadata={_KEY: json.dumps(header)})
    return totals


def read_compressed(folder: str | Path) -> dict[str, Tensor]:
    """The tensors of a compressed folder as plain ones, on the CPU; shared ones are the same object. Raises ModelError,
    naming the tensor, for a file that is damaged or of another version."""
    return _read(Path(folder) / COMPRESSED_FILE)[0]


def _read(path: Path) -> tuple[dict[str, Tensor], dict[Kind, KindTotal]]:
    state: dict[str, Tensor] = {}
    totals: dict[Kind, KindTotal] = {}
    try:
        with safe_open(path, framework="pt") as file:
            entries = _entries(path, file.metadata() or {})
            present = set(file.keys())
            for name, entry in entries.items():
                try:
                    missing = [name + end for end in _PARTS[entry.kind] if name + end not in present]
                    if missing:
                        raise ValueError(f"the file lacks {missing[0]!r}")
                    parts = {end: file.get_tensor(name + end) for end in _PARTS[entry.kind]}
                    state[name] = _decode(entry, parts, state)
                except ValueError as error:
                    raise ModelError(f"{path}: tensor {name}: {error}") from None
                shared = entry.kind is Kind.SHARED
                _count(
                    totals, entry.kind, 0 if shared else state[name].nbytes, sum(part.nbytes for part in parts.values())
                )
    except FileNotFoundError:
        raise ModelError(f"no such file: {path}") from None
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} is damaged or cut off: {_first_line(error)}") from error
    return state, totals


def _entries(path: Path, metadata: Mapping[str, str]) -> dict[str, _Entry]:
    if _KEY not in metadata:
        raise ModelError(
            f"{path} is a safetensors file, but not one of compressed weights (no {_KEY!r} in its metadata)"
        )
    try:
        header = json.loads(metadata[_KEY])
    except ValueError as error:
        raise ModelError(f"{path}: its metadata is damaged: {error}") from None
    version = header.get("version") if isinstance(header, dict) else None
    if type(version) is int and version > VERSION:
        raise ModelError(
            f"{path} has version {version} of the format, and this sparse_accel reads version {VERSION}; use a newer one"
        )
    if version != VERSION or not isinstance(header.get("tensors"), dict):
        raise ModelError(f"{path}: unknown version of the format: {version!r}; this sparse_accel reads {VERSION}")
    entries = {}
    for name, data in header["tensors"].items():
        try:
            entries[name] = _Entry.from_json(data)
        except ValueError as error:
            raise ModelError(f"{path}: tensor {name}: {error}") from None
    return entries


def _encode(tensor: Tensor, grid: _Grid | None) -> tuple[_Entry, list[Tensor]]:
    """A tensor's entry and its parts, in the order of `_PARTS`. Without `grid`, or where it would lose something, the
    tensor keeps its bits."""
    shape = tuple(tensor.shape)
    if grid is not None:
        integers = quantized_integers(tensor, grid.scale, grid.zero_point, grid.spec)
        values = dequantized(integers, grid.scale, grid.zero_point, grid.spec.channel_axis)
        wanted = fake_quantize(tensor.float(), grid.scale, grid.zero_point, grid.spec)
        kept = fake_quantize(values, grid.scale, grid.zero_point, grid.spec)
        # Unequal where a weight is NaN, for instance, which no integer says.
        if torch.equal(values, wanted) and torch.equal(kept, wanted):
            is_sparse = packed_bytes(integers) < integers.nbytes
            kind, stored = (Kind.INT8_BITMASK, pack(integers)) if is_sparse else (Kind.INT8, [integers])
            return _Entry(kind, shape, torch.float32, grid.spec.channel_axis), [*stored, grid.scale, grid.zero_point]
    sizes = {Kind.DENSE: tensor.nbytes}
    if tensor.is_floating_point():
        sizes |= {Kind.BITMASK: packed_bytes(tensor), Kind.BITMASK_SIGNS: packed_bytes(tensor, signs=True)}
    smallest = min(sizes, key=lambda kind: sizes[kind])
    stored = [tensor] if smallest is Kind.DENSE else pack(tensor, signs=smallest is Kind.BITMASK_SIGNS)
    return _Entry(smallest, shape, tensor.dtype), stored


def _decode(entry: _Entry, parts: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Tensor:
    """The tensor of an entry from its parts, which `_PARTS` names; raises ValueError when they do not belong together."""
    if entry.kind is Kind.SHARED:
        if entry.shared_with is None or entry.shared_with not in state:
            raise ValueError(f"it is shared with {entry.shared_with!r}, which does not come before it")
        tensor = state[entry.shared_with]
    else:
        tensor = (
            parts[""] if "" in parts else unpack(entry.shape, parts["/bitmask"], parts["/values"], parts.get("/signs"))
        )
    if "/scale" in parts:
        scale, zero_point = parts["/scale"], parts["/zero_point"]
        if tensor.dtype != torch.int8 or scale.dtype != torch.float32 or zero_point.dtype != torch.int32:
            raise ValueError("its integers must be int8, its scale float32 and its zero point int32")
        channels = () if entry.channel_axis is None else (entry.shape[entry.channel_axis],)
        if scale.shape != channels or zero_point.shape != channels or tensor.shape != entry.shape:
            raise ValueError(
                f"its integers are {list(tensor.shape)}, its scale {list(scale.shape)} and its zero point "
                f"{list(zero_point.shape)}, where the metadata say {list(entry.shape)} and {list(channels)}"
            )
        tensor = dequantized(tensor, scale, zero_point, entry.channel_axis)
    if tensor.shape != entry.shape or tensor.dtype != entry.dtype:
        raise ValueError(
            f"it is {tensor.dtype} {list(tensor.shape)}, where the metadata say {entry.dtype} {list(entry.shape)}"
        )
    return tensor


def quantized_integers(weight: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """The integers, int8 in the weight's shape, of a signed grid of at most 8 bits: those that `fake_quantize` rounds to.

    clamp(round(weight * (1 / scale)) + zero_point, quant_min, quant_max), in fp32, halves to even; NaN gives an
    arbitrary one.
    """
    scale, zero_point = _along(weight, scale, spec.channel_axis), _along(weight, zero_point, spec.channel_axis)
    steps = torch.round(weight.float() * (1.0 / scale))
    return (steps + zero_point).clamp_(spec.quant_min, spec.quant_max).nan_to_num_(0.0).to(torch.int8)


def dequantized(integers: Tensor, scale: Tensor, zero_point: Tensor, channel_axis: int | None) -> Tensor:
    """(integers - zero_point) * scale in fp32; scale and zero point are [] or one per index of `channel_axis`."""
    return (integers.float() - _along(integers, zero_point, channel_axis)) * _along(integers, scale, channel_axis)


def _along(tensor: Tensor, numbers: Tensor, channel_axis: int | None) -> Tensor:
    if channel_axis is None:
        return numbers
    shape = [1] * tensor.dim()
    shape[channel_axis] = -1
    return numbers.view(shape)


def _common_grid(
    weight: Tensor, users: Sequence[str], plan: CompressionPlan, ranges: Mapping[str, Tensor]
) -> _Grid | None:
    """The grid of a weight, if all layers that use it have the same one and its integers fit into int8."""
    grids = [_grid(user, weight, plan, ranges) for user in users]
    first = grids[0]
    if first is None or not all(grid is not None and grid.is_same(first) for grid in grids):
        return None
    return first


def _grid(user: str, weight: Tensor, plan: CompressionPlan, ranges: Mapping[str, Tensor]) -> _Grid | None:
    """The grid of one layer's weight; None where it has none, where int8 does not hold it, or where it never saw the
    weight. Raises ModelError for numbers that are missing or of another shape."""
    module = user.removesuffix(".weight")
    compression = plan.modules.get(module)
    if module == user or compression is None or compression.weight is None:
        return None
    spec = compression.weight
    numbers = []
    channels = () if spec.channel_axis is None else (weight.shape[spec.channel_axis],)
    for key in ("min_val", "max_val", "scale", "zero_point"):
        name = f"{module}.weight_quantizer.{key}"
        if name not in ranges:
            raise ModelError(f"the plan quantizes {user}, but its range has no {name!r}{suggestion(name, ranges)}")
        if ranges[name].shape != channels:
            raise ModelError(f"{name} has shape {list(ranges[name].shape)}; {user} needs {list(channels)}")
        numbers.append(ranges[name].detach().cpu())
    min_val, max_val, scale, zero_point = numbers
    if bool((min_val > max_val).any()) or not spec.signed or spec.bits > 8:
        return None
    return _Grid(spec, scale.float(), zero_point.to(torch.int32))


def _refuse_missing(plan: CompressionPlan, users: Iterable[str]) -> None:
    """Raise ModelError for a weight that the plan quantizes and that is not among `users`."""
    present = set(users)
    for module, compression in plan.modules.items():
        if compression.weight is not None and f"{module}.weight" not in present:
            raise ModelError(
                f"the plan quantizes {module}.weight, which the weights do not have"
                f"{suggestion(f'{module}.weight', present)}"
            )


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """What two tensors have in common only if they are the same numbers in memory."""
    if tensor.numel() == 0:  # has no place
        return (id(tensor),)
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, each in memory of its own: safetensors writes no others."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return apart


def _others(names: Sequence[str], tied: Iterable[Sequence[str]]) -> list[str]:
    """The names tied to one of `names` that are not among them."""
    return [other for group in tied if set(group) & set(names) for other in group if other not in names]


def _count(totals: dict[Kind, KindTotal], kind: Kind, plain_bytes: int, stored_bytes: int) -> None:
    before = totals.get(kind, KindTotal())
    totals[kind] = KindTotal(
        before.num_tensors + 1, before.plain_bytes + plain_bytes, before.stored_bytes + stored_bytes
    )


def _architecture(name: str, config: Any | None) -> tuple[Any, type[Any]]:
    """The config of a model folder, and the class that it names."""
    import transformers

    try:
        config = config or transformers.AutoConfig.from_pretrained(name)
    except Exception as error:  # transformers raises whatever its readers raise
        raise ModelError(f"{name}: its config cannot be read: {_first_line(error)}") from error
    architecture = (config.architectures or ["AutoModel"])[0]
    model_class = getattr(transformers, architecture, None)
    if model_class is None:
        raise ModelError(f"{name}: its config names the class {architecture}, which transformers does not have")
    return config, model_class


def _tied_names(folder: Path) -> list[list[str]]:
    """Groups of parameter names that are one parameter in the folder's model."""
    config, model_class = _architecture(str(folder), None)
    with torch.device("meta"):
        model = model_class(config) if hasattr(model_class, "tie_weights") else model_class.from_config(config)
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def _read_ranges(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(folder / RANGES_FILE)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder / RANGES_FILE} cannot be read: {_first_line(error)}") from error


def read_plain(folder: Path) -> tuple[dict[str, Tensor], int]:
    """The tensors of a folder's plain weights, whole or in shards, and the bytes of their files."""
    weights = next(folder / name for name in WEIGHT_FILES if (folder / name).is_file())
    files = [weights] if weights.suffix != ".json" else shards(weights)
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            if file.suffix == ".safetensors":
                found = load_file(file)
            else:
                found = torch.load(file, weights_only=True, map_location="cpu")
        except Exception as error:  # torch raises whatever its readers raise
            raise ModelError(f"{file} cannot be read: {_first_line(error)}") from error
        if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
            raise ModelError(f"{file} is not a state dict: names and their tensors")
        state |= found
    return state, sum(file.stat().st_size for file in files)


def shards(index: Path) -> list[Path]:
    """The weight files that an index names. Raises ModelError when it is none, or one of them is missing."""
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is not an index of weight files: {_first_line(error)}") from None
    for name in names:
        if not (index.parent / name).is_file():
            raise ModelError(f"{index} names {name}, which is not there")
    return [index.parent / name for name in names]


def _check_folders(source: Path, output: Path, overwrite: bool) -> None:
    if not source.is_dir():
        raise ModelError(
            f"{source} is a file; expected a model folder"
            if source.exists()
            else f"no such folder: {source}{neighbour(source)}"
        )
    if not output.exists():
        return
    if not output.is_dir():
        raise OutputError(f"the output is a file, not a folder: {output}")
    if output.samefile(source):
        raise OutputError(f"the output is the model's own folder, {output}; name another")
    if any(output.iterdir()) and not overwrite:
        raise OutputError(f"{output} is not empty; name another, or pass --overwrite to replace the model in it")


def _copy_companions(source: Path, output: Path) -> None:
    for file in source.iterdir():
        is_weights = file.suffix in _WEIGHT_SUFFIXES or file.name.endswith(".index.json")
        if file.name == RANGES_FILE or not (is_weights or file.name in _LEFT_BEHIND or file.name.startswith(".")):
            if file.is_file():
                shutil.copyfile(file, output / file.name)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
