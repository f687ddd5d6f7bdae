"""Folders with SparseML's quantization-aware state dict, opened with the scales that SparseML trained.

SparseML saves torch.ao's FakeQuantize modules where its wrappers put them. A Linear `X` becomes `X.module` (or stays
`X`) with its input at `X.quant`; an embedding stays `X`; an attention product has stubs for its operands and its
output. Every FakeQuantize brings scale, zero point and the range that its observer saw, but not its bits: these follow
from scale and range, see `grid_of`.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from sparse_accel.compress.attention import SCORES_MATMUL
from sparse_accel.compress.fakequant import QuantSpec, scale_and_zero_point
from sparse_accel.compress.plan import Compression, CompressionPlan, install, needs_quantized_attention, set_phase
from sparse_accel.compress.ranges import Phase, load_quantization_state
from sparse_accel.errors import ModelError, suggestion
from sparse_accel.folders.loading import HUB_DEFAULTS, HubOptions, load_tokenizer
from sparse_accel.folders.sources import WEIGHT_FILES, check_source
from sparse_accel.folders.trained import TrainedModel, use_own_attention

if TYPE_CHECKING:
    from sparse_accel.tasks.base import Task

# The buffer that every FakeQuantize of torch.ao has, and nothing in a plain model.
_SWITCH: Final = ".fake_quant_enabled"
_OBSERVER: Final = ".activation_post_process"
_NUMBERS: Final = ("scale", "zero_point", "activation_post_process.min_val", "activation_post_process.max_val")
_UNUSED: Final = ("observer_enabled", "activation_post_process.eps")

# How a FakeQuantize's name ends -> which tensor of the module before it is quantized. The first that fits counts.
_PLACES: Final = {
    ".input_quant_stubs.0.activation_post_process": "left",
    ".input_quant_stubs.1.activation_post_process": "right",
    ".output_quant_stubs.0.activation_post_process": "output",
    ".module.weight_fake_quant": "weight",
    ".weight_fake_quant": "weight",
    ".quant.activation_post_process": "input",
    ".module.activation_post_process": "output",
    ".activation_post_process": "output",
}

# (symmetric, signed) of the grids in SparseML's recipes, by tensor, likeliest first: the order decides between grids
# with the same numbers.
_UNSIGNED_FIRST: Final = ((False, False), (True, False), (True, True), (False, True))
_KINDS: Final = {
    "weight": ((True, True), (False, True), (True, False), (False, False)),
    "input": _UNSIGNED_FIRST,
    "left": _UNSIGNED_FIRST,
    "right": ((True, False), (True, True), (False, False), (False, True)),
    "output": _UNSIGNED_FIRST,
}
_BITS: Final = (8, 7, 6, 5, 4, 3, 2)

# Scales follow from ranges to the last bit in fp32 and to 0.001 in a state that was saved in half precision; those of
# two grids differ by 0.004 or more.
_AGREES: Final = 1e-5
_FITS: Final = 0.05

# Models whose SparseML code divides the query by sqrt(head_dim) before the product of the scores, where
# `quantized_attention` divides the scores after it.
_SCALES_THE_QUERY: Final = frozenset({"distilbert"})


@dataclass(frozen=True)
class FakeQuantized:
    """One FakeQuantize of the state dict: `role` is the tensor of `module` (plain names) that it quantizes.

    The numbers are fp32 (zero_point int32), of shape () or [channels].
    """

    name: str
    module: str
    role: str
    scale: Tensor
    zero_point: Tensor
    min_val: Tensor
    max_val: Tensor

    def times(self, factor: float) -> FakeQuantized:
        """The quantizer of the same tensor in another unit."""
        return replace(self, scale=self.scale * factor, min_val=self.min_val * factor, max_val=self.max_val * factor)


def is_sparseml_state(folder: str | Path) -> bool:
    """Whether a folder's weights are a quantization-aware state dict of SparseML; reads names, no numbers.

    False too for what is no folder or cannot be read: opening it as a plain model says what is wrong.
    """
    try:
        return any(name.endswith(_SWITCH) for name in _names(Path(folder)))
    except ModelError:
        return False


def open_sparseml(folder: str | Path, task: Task, hub: HubOptions = HUB_DEFAULTS) -> TrainedModel:
    """Open a folder with SparseML's state dict for `task`: in eval mode, quantizers frozen at SparseML's scales.

    Zeros are as they were saved; the plan has quantizers only. Raises ModelError when the state cannot be taken over
    whole: a name that is unknown or missing, a quantizer that never saw data, a scale without a grid.
    """
    source = str(folder)
    folder = Path(folder)
    check_source(source, "MODEL", weights=True)
    tokenizer = load_tokenizer(source, hub, "MODEL")
    state, notes = read_state(folder)
    try:
        plain, quantized, switched_off = split_state(state)
        model = _float_model(folder, task, plain)
        if model.config.model_type in _SCALES_THE_QUERY:
            quantized = [_before_scaling(one, model) for one in quantized]
        plan, inexact = plan_of(quantized)
        if needs_quantized_attention(plan) and not use_own_attention(model):
            raise ModelError(f"{type(model).__name__} does not go through transformers' attention interface")
        install(model, plan)
        _check_channels(model, quantized)
    except ModelError as error:
        raise ModelError(f"{source}: SparseML's state dict cannot be taken over: {error}") from error
    load_quantization_state(model, numbers_of(quantized))
    set_phase(model, Phase.FROZEN)
    model.eval()
    notes.append(f"{source}: SparseML's state dict, {plan.num_quantizers} tensors quantized with the scales it holds")
    if switched_off:
        notes.append(f"left float, since the state switches their quantizers off: {_some(switched_off)}")
    if inexact:
        notes.append(f"the scales do not follow from the ranges and are used as they are: {_some(inexact)}")
    return TrainedModel(folder, model, tokenizer, plan, tuple(notes))


def split_state(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[FakeQuantized], list[str]]:
    """A state dict as: plain names -> weights, the quantizers that are on, the names of those that are off.

    What is neither stays among the weights under its name. Raises ModelError for a quantizer whose numbers are not all
    there, whose place is unknown, that has a second one in its place, or that never saw data.
    """
    names = {key.removesuffix(_SWITCH) for key in state if key.endswith(_SWITCH)}
    plain: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if not _belongs_to(key, names):
            name = _unwrapped(key)
            if name in plain:
                raise ModelError(f"two of its weights are {name}")
            plain[name] = tensor

    on, off, blind = dict[tuple[str, str], FakeQuantized](), [], []
    for name in sorted(names):
        if not bool(state[name + _SWITCH].any()):
            off.append(name)
            continue
        one = _fake_quantized(name, state)
        if one is None:
            blind.append(name)
        elif (one.module, one.role) in on:
            raise ModelError(f"{on[one.module, one.role].name} and {name} both quantize the {one.role} of {one.module}")
        else:
            on[one.module, one.role] = one
    if blind:
        raise ModelError(
            f"{len(blind)} of its quantizers never saw data, so they have no scale: {_some(blind)}; save the model after"
            " quantization-aware training has begun"
        )
    return plain, list(on.values()), off


def plan_of(quantized: Iterable[FakeQuantized]) -> tuple[CompressionPlan, list[str]]:
    """The plan for these quantizers, and the names of those whose scale is only nearly that of their range. Raises
    ModelError for a quantizer without a grid."""
    specs: dict[str, dict[str, QuantSpec]] = {}
    inexact = []
    for one in quantized:
        spec, deviation = grid_of(one)
        specs.setdefault(one.module, {})[one.role] = spec
        if deviation > _AGREES:
            inexact.append(one.name)
    return CompressionPlan({module: _compression(roles) for module, roles in specs.items()}), inexact


def grid_of(one: FakeQuantized) -> tuple[QuantSpec, float]:
    """The grid whose scale and zero point, computed from the observed range, are the ones stored, and the relative
    difference that is left between the scales.

    The scales of two widths never coincide: with m the larger end of a range, those of b bits lie between
    m / (2^b - 1) and 2m / (2^b - 1). Raises ModelError when no grid of 2 to 8 bits fits.
    """
    axis = 0 if one.scale.dim() else None
    grids = [QuantSpec(bits, *kind, axis) for bits, kind in itertools.product(_BITS, _KINDS[one.role])]
    # A zero point may be off by one: rounding falls the other way in half precision, and some observers centre a
    # symmetric uint8 grid at 127.
    for slack in (0, 1):
        best, least = None, _FITS
        for spec in grids:
            scale, zero_point = scale_and_zero_point(one.min_val, one.max_val, spec)
            deviation = float(((one.scale - scale) / scale).abs().max())
            if deviation < least and int((zero_point - one.zero_point).abs().max()) <= slack:
                best, least = spec, deviation
        if best is not None:
            return best, least
    raise ModelError(
        f"{one.name} has scale {_first(one.scale):g} and zero point {_first(one.zero_point):g} for the range"
        f" [{_first(one.min_val):g}, {_first(one.max_val):g}], which no grid of 2 to 8 bits gives"
    )


def _names(folder: Path) -> Iterable[str]:
    """The names in a folder's state dict."""
    file = _weight_file(folder)
    if file.name.endswith(".index.json"):
        return _weight_map(file)
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as tensors:
                return list(tensors.keys())
        except Exception as error:  # safetensors has an error class of its own, beside OSError
            raise ModelError(f"{file} cannot be read: {error}") from error
    return _read(file)


def _weight_file(folder: Path) -> Path:
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    raise ModelError(f"{folder} has no weights: expected one of {', '.join(WEIGHT_FILES)}")


def _weight_map(index: Path) -> dict[str, str]:
    """Weight name -> file name, of a state dict in shards."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if all(Path(shard).name == shard for shard in weight_map.values()):
            return dict(weight_map)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ModelError(f"{index} is no index of shards: expected a weight_map of names to files beside it")


def read_state(folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The whole state dict on the CPU, and what is to be said about its files."""
    file = _weight_file(folder)
    files = [file]
    if file.name.endswith(".index.json"):
        files = [folder / shard for shard in sorted(set(_weight_map(file).values()))]
    notes = []
    if files[0].suffix == ".bin":
        notes.append(f"{files[0]}: read as tensors alone (weights_only), no other content of a pickle is run")
    return {name: tensor for part in files for name, tensor in _read(part).items()}, notes


def _read(file: Path) -> dict[str, Tensor]:
    """One weight file; a .bin stays on the disk until its numbers are used."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # both readers raise whatever their parsers raise
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(f"{file} cannot be read as a state dict of tensors: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ModelError(f"{file} holds other things than tensors; save the model's state_dict() alone")
    return dict(state)


def _belongs_to(key: str, quantizers: set[str]) -> bool:
    """Whether `key` is a known buffer of one of `quantizers`."""
    owner, _, buffer = key.rpartition(".")
    if f".{buffer}" == _SWITCH:
        return owner in quantizers
    if owner not in quantizers and owner.endswith(_OBSERVER):
        owner, buffer = owner.removesuffix(_OBSERVER), f"{_OBSERVER[1:]}.{buffer}"
    return owner in quantizers and buffer in (*_NUMBERS, *_UNUSED)


def _unwrapped(key: str) -> str:
    """The plain name of a weight: `X.weight` for the `X.module.weight` of a wrapped layer."""
    return re.sub(r"\.module(?=\.[^.]+$)", "", key)


def _fake_quantized(name: str, state: Mapping[str, Tensor]) -> FakeQuantized | None:
    """The quantizer of that name; None if its observer never saw data."""
    ending = next((ending for ending in _PLACES if name.endswith(ending)), None)
    if ending is None:
        raise ModelError(
            f"it has a quantizer {name}, and none of SparseML's places is called that: {', '.join(_PLACES)}"
        )
    missing = [f"{name}.{number}" for number in _NUMBERS if f"{name}.{number}" not in state]
    if missing:
        raise ModelError(f"it has a quantizer {name}, but no {missing[0]}")
    scale, zero_point, low, high = (state[f"{name}.{number}"] for number in _NUMBERS)
    # A range per channel is empty until its first observation, one for the tensor is (inf, -inf).
    if low.numel() == 0 or bool((low > high).any()):
        return None
    if len({scale.numel(), zero_point.numel(), low.numel(), high.numel()}) > 1:
        raise ModelError(
            f"{name} has {scale.numel()} scales, {zero_point.numel()} zero points and {low.numel()} ranges"
        )
    shape = () if scale.numel() == 1 else (scale.numel(),)
    return FakeQuantized(
        name=name,
        module=name.removesuffix(ending),
        role=_PLACES[ending],
        scale=scale.float().reshape(shape),
        zero_point=zero_point.to(torch.int32).reshape(shape),
        min_val=low.float().reshape(shape),
        max_val=high.float().reshape(shape),
    )


def _compression(specs: Mapping[str, QuantSpec]) -> Compression:
    inputs = tuple(specs[role] for role in ("input", "left", "right") if role in specs)
    return Compression(weight=specs.get("weight"), inputs=inputs, output=specs.get("output"))


def _float_model(folder: Path, task: Task, weights: dict[str, Tensor]) -> Any:
    """The task's model in fp32 with `weights`. Raises ModelError unless these are all of its weights and no others."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            empty = task.model_class.from_config(config)
        model, info = type(empty).from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below
        )
    except Exception as error:  # transformers raises whatever its readers raise
        raise ModelError((str(error).strip().splitlines() or [type(error).__name__])[0]) from error
    unknown, missing = sorted(info["unexpected_keys"]), sorted(info["missing_keys"])
    what = f"{type(model).__name__}, the model for {task.name.replace('_', ' ')},"
    if unknown:
        hint = suggestion(unknown[0], missing or list(empty.state_dict()))
        raise ModelError(f"{what} has no {_some(unknown)}{hint if hint.startswith('; did') else ''}")
    for name, found, expected in sorted(info["mismatched_keys"]):
        raise ModelError(f"{name} has the shape {list(found)}, but config.json says {list(expected)}")
    if missing:
        raise ModelError(f"there is no {_some(missing)}, which {what} needs")
    return model


def _before_scaling(one: FakeQuantized, model: Any) -> FakeQuantized:
    """A quantizer of scores, or of the query that they are made of, as it is before the division by sqrt(head_dim)."""
    if one.module.endswith(f".{SCORES_MATMUL}") and one.role in ("left", "output"):
        config = model.config
        return one.times(float(config.hidden_size // config.num_attention_heads) ** 0.5)
    return one


def _check_channels(model: Any, quantized: Iterable[FakeQuantized]) -> None:
    """Refuse scales per channel that are not one per row of their weight."""
    for one in quantized:
        if one.role == "weight" and one.scale.dim():
            rows = model.get_submodule(one.module).weight.shape[0]
            if one.scale.numel() != rows:
                raise ModelError(f"{one.name} has {one.scale.numel()} scales for {rows} rows of the weight")


def numbers_of(quantized: Iterable[FakeQuantized]) -> dict[str, Tensor]:
    """The quantizers' numbers by the names that `quantization_state` gives them."""
    return {
        f"{one.module}.{one.role}_quantizer.{buffer}": getattr(one, buffer)
        for one in quantized
        for buffer in ("min_val", "max_val", "scale", "zero_point")
    }


def _first(tensor: Tensor) -> float:
    return float(tensor.reshape(-1)[0])


def _some(names: list[str]) -> str:
    """Three of the names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
