"""The compression plan: which module gets a mask and which quantizers, as data, and how a model takes it on and off."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_accel.compress.attention import MATMULS, self_attention_modules
from sparse_accel.compress.fakequant import QuantSpec
from sparse_accel.compress.layers import (
    QuantizedMatMul,
    check_layer,
    compress_layer,
    compressed_layers,
    is_compressed,
    restore_layer,
)
from sparse_accel.compress.ranges import ObservationContext, Phase, quantization_state, quantizers, set_phase
from sparse_accel.errors import ModelError, RecipeError, suggestion

__all__ = [
    "Compression",
    "CompressionPlan",
    "Phase",
    "check_masks",
    "copy_requests",
    "fold",
    "install",
    "needs_quantized_attention",
    "prunable_parameters",
    "quantization_state",
    "request_masks",
    "set_phase",
]

_FORMAT = 1


@dataclass(frozen=True)
class Compression:
    """What one module gets. An attention product has two inputs and an output, a layer at most one of each."""

    mask: bool = False
    weight: QuantSpec | None = None
    inputs: tuple[QuantSpec, ...] = ()
    output: QuantSpec | None = None

    @property
    def num_quantizers(self) -> int:
        """Tensors that are quantized."""
        return (self.weight is not None) + len(self.inputs) + (self.output is not None)

    @property
    def is_quantized(self) -> bool:
        """Whether any tensor is quantized."""
        return self.num_quantizers > 0

    def to_json(self) -> dict[str, Any]:
        """Plain values; what is absent is left out."""
        data: dict[str, Any] = {"mask": True} if self.mask else {}
        if self.weight is not None:
            data["weight"] = self.weight.to_json()
        if self.inputs:
            data["inputs"] = [spec.to_json() for spec in self.inputs]
        if self.output is not None:
            data["output"] = self.output.to_json()
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Compression:
        """The inverse of `to_json`. Raises ModelError for what it does not know."""
        known = ("mask", "weight", "inputs", "output")
        for name in data:
            if name not in known:
                raise ModelError(f"a compression plan has no entry {name!r}{suggestion(name, known)}")
        weight, output = data.get("weight"), data.get("output")
        return cls(
            mask=bool(data.get("mask", False)),
            weight=None if weight is None else QuantSpec.from_json(weight),
            inputs=tuple(QuantSpec.from_json(spec) for spec in data.get("inputs", ())),
            output=None if output is None else QuantSpec.from_json(output),
        )


class CompressionPlan:
    """Module name of the unwrapped model -> Compression; attention products are `<self-attention module>.<product>`."""

    def __init__(self, modules: Mapping[str, Compression] | None = None) -> None:
        self.modules: dict[str, Compression] = dict(modules or {})
        # Who asked for which masks: needed while a recipe runs, meaningless in a file.
        self._owners: dict[Hashable, dict[str, None]] = {}

    def add_mask(self, module_name: str, owner: Hashable) -> None:
        """Plan a mask for a module's weight; `owner` finds it again through `masked_by`."""
        self.modules[module_name] = replace(self.modules.get(module_name, Compression()), mask=True)
        self._owners.setdefault(owner, {})[module_name] = None

    def masked_by(self, owner: Hashable) -> tuple[str, ...]:
        """The modules whose masks `owner` asked for, in that order."""
        return tuple(self._owners.get(owner, ()))

    def add_quantization(
        self,
        module_name: str,
        weight: QuantSpec | None = None,
        inputs: tuple[QuantSpec, ...] = (),
        output: QuantSpec | None = None,
    ) -> None:
        """Plan quantizers for a module. Raises RecipeError if it has some already."""
        present = self.modules.get(module_name, Compression())
        if present.is_quantized:
            raise RecipeError(f"module {module_name} is quantized twice; let one QuantizationModifier name it")
        self.modules[module_name] = replace(present, weight=weight, inputs=inputs, output=output)

    def masks_only(self) -> CompressionPlan:
        """The plan without its quantizers: what holds before quantization begins."""
        return CompressionPlan({name: Compression(mask=True) for name, c in self.modules.items() if c.mask})

    @property
    def num_quantizers(self) -> int:
        """Tensors that the plan quantizes."""
        return sum(compression.num_quantizers for compression in self.modules.values())

    def to_json(self) -> dict[str, Any]:
        """Plain values, readable by people."""
        return {"format": _FORMAT, "modules": {name: c.to_json() for name, c in self.modules.items()}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CompressionPlan:
        """The inverse of `to_json`. Raises ModelError for another format."""
        if data.get("format") != _FORMAT or not isinstance(data.get("modules"), Mapping):
            raise ModelError(f"not a compression plan of format {_FORMAT}: format is {data.get('format')!r}")
        for name, entry in data["modules"].items():
            if not isinstance(entry, Mapping):
                raise ModelError(f"the entry of {name!r} is not a mapping")
        return cls({name: Compression.from_json(entry) for name, entry in data["modules"].items()})

    def save(self, path: str | Path) -> None:
        """Write the plan as a JSON file."""
        Path(path).write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> CompressionPlan:
        """Read what `save` wrote. Raises ModelError for a file that is missing or malformed."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot read the compression plan {path}: {error}") from None
        if not isinstance(data, dict):
            raise ModelError(f"{path}: a compression plan is a JSON object")
        try:
            return cls.from_json(data)
        except ModelError as error:
            raise ModelError(f"{path}: {error}") from None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CompressionPlan) and self.modules == other.modules

    __hash__ = None  # type: ignore[assignment]  # a plan changes while a recipe is read

    def __repr__(self) -> str:
        masks = sum(c.mask for c in self.modules.values())
        return f"CompressionPlan({masks} masks, {self.num_quantizers} quantizers)"


def install(model: nn.Module, plan: CompressionPlan, *, observe_padding: bool = False) -> None:
    """Give the modules of `model` what the plan says, in place and before it is sharded; parameter names stay.

    Quantizers start OFF and masks unrequested: the model computes what it did. Ranges leave padded tokens out (by the
    forward's `attention_mask` [batch, length]) unless `observe_padding`. Raises ModelError for a module that the model
    lacks, that cannot be compressed, or whose weight is shared with one that is planned otherwise; nothing is changed
    then.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    products = {f"{attention}.{product}" for attention in self_attention_modules(model) for product in MATMULS}
    for name in plan.modules:
        if name not in modules and name not in products:
            raise ModelError(
                f"the plan names module {name!r}, which {type(model).__name__} does not have"
                f"{suggestion(name, [*modules, *products])}"
            )
    _refuse_shared_weights(modules, plan)
    for name, compression in plan.modules.items():
        if name in modules:
            check_layer(
                name, modules[name], compression.mask, compression.weight, compression.inputs, compression.output
            )
        elif compression.mask or compression.weight or len(compression.inputs) != 2:
            raise ModelError(f"{name} is a product of two activations: it has two input specs, no mask and no weight")
    context = ObservationContext(observe_padding)
    for name, compression in plan.modules.items():
        if name not in modules:
            attention, _, product = name.rpartition(".")
            device = next(modules[attention].parameters()).device
            left, right = compression.inputs
            modules[attention].add_module(product, QuantizedMatMul(left, right, compression.output, context, device))
        elif not is_compressed(modules[name]):  # one module may have two names
            compress_layer(
                modules[name], context, compression.mask, compression.weight, compression.inputs, compression.output
            )
    if plan.num_quantizers:
        model.register_forward_pre_hook(context, with_kwargs=True)


def fold(model: nn.Module, *, bake_quantization: bool = False) -> None:
    """Take the machinery off: plain modules and their own parameter names again, zeros written where masks hold.

    Weights stay float; `quantization_state`, taken before, holds the ranges and scales. `bake_quantization` writes the
    fake-quantized weight instead. For a whole model on one device, not a sharded one.
    """
    with torch.no_grad():
        for layer in compressed_layers(model).values():
            layer.weight.copy_(layer.effective_weight() if bake_quantization else layer.masked_weight())
    for module in list(model.modules()):
        if is_compressed(module):
            restore_layer(module)
        for product in MATMULS:
            if isinstance(getattr(module, product, None), QuantizedMatMul):
                delattr(module, product)
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, ObservationContext):
            del model._forward_pre_hooks[key], model._forward_pre_hooks_with_kwargs[key]


def needs_quantized_attention(plan: CompressionPlan) -> bool:
    """Whether the model must compute attention through `quantized_attention`."""
    return any(name.rpartition(".")[2] in MATMULS for name in plan.modules)


def prunable_parameters(model: nn.Module) -> list[str]:
    """Names that `__ALL_PRUNABLE__` stands for: `.weight` of Linear, ConvNd and GPT-style Conv1D, in module order.

    Embeddings are left out, and so is a layer whose weight is an embedding's (the tied decoder of a language model).
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return [
        f"{name}.weight" if name else "weight"
        for name, module in model.named_modules()
        if _is_prunable(module) and id(module.weight) not in tables
    ]


def request_masks(model: nn.Module, names: Iterable[str], request: str | None) -> None:
    """Say which masks hold from the next forward on, for the modules `names`.

    "nonzero" holds the zeros that a weight had when first asked, None releases them. Raises ModelError for a module
    without a mask.
    """
    if request not in (None, "nonzero"):
        raise ValueError(f'a mask request is "nonzero" or None, got {request!r}')
    masked = {name: layer for name, layer in compressed_layers(model).items() if layer.mask is not None}
    for name in names:
        if name not in masked:
            raise ModelError(f"module {name!r} has no mask{suggestion(name, masked)}")
        masked[name].mask_request = request


def copy_requests(source: nn.Module, target: nn.Module) -> None:
    """Let masks and quantizers of `target` do what those of `source`, a model with the same plan, do now."""
    for name, layer in compressed_layers(source).items():
        target.get_submodule(name).mask_request = layer.mask_request  # type: ignore[assignment]
    for name, quantizer in quantizers(source).items():
        target.get_submodule(name).phase = quantizer.phase  # type: ignore[assignment]


def check_masks(model: nn.Module, parameters: Iterable[tuple[str, Tensor]] | None = None) -> dict[str, int]:
    """For each module whose mask holds now: how many stored weights under it are not zero. More than 0 is a broken
    promise.

    `parameters` are the model's, by name and whole, one at a time, where its own are parts. Waits for the device once.
    """
    held = {
        f"{name}.weight": layer
        for name, layer in compressed_layers(model).items()
        if layer.mask is not None and layer.mask_request is not None and layer.captured
    }
    counts = {}
    for name, weight in parameters or ((name, layer.weight) for name, layer in held.items()):
        layer = held.get(name)
        if layer is not None and layer.mask is not None:
            counts[name.removesuffix(".weight")] = ((weight != 0) & ~layer.mask).sum()
    return dict(zip(counts, torch.stack(list(counts.values())).tolist(), strict=True)) if counts else {}


def _is_prunable(module: nn.Module) -> bool:
    # Conv1D is told by its name: its class belongs to a library that this layer does not import.
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return isinstance(module, kinds) or type(module).__name__ == "Conv1D"


def _refuse_shared_weights(modules: Mapping[str, nn.Module], plan: CompressionPlan) -> None:
    """One parameter gets one treatment: two masks, or two grids, on the same numbers would contradict each other."""
    first_name: dict[int, str] = {}
    for name, module in modules.items():
        weight = module._parameters.get("weight")
        if weight is None:
            continue
        other = first_name.setdefault(id(weight), name)
        mine, theirs = plan.modules.get(name, Compression()), plan.modules.get(other, Compression())
        both = mine.weight is not None and theirs.weight is not None
        if mine.mask != theirs.mask or (both and mine.weight != theirs.weight):
            raise ModelError(
                f"{other} and {name} share one weight, but the recipe masks or quantizes them differently; "
                "name both or neither"
            )
