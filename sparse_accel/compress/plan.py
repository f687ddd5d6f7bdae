"""The compression plan: which module gets a mask and which quantizers, as data, and how a model takes it on and off."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_accel.compress.attention import CONTEXT_MATMUL, MATMULS, SCORES_MATMUL, self_attention_modules
from sparse_accel.compress.compact import CompactLinear
from sparse_accel.compress.fakequant import QuantSpec
from sparse_accel.compress.layers import (
    CompressedLayer,
    MaskRequest,
    Pruned,
    QuantizedMatMul,
    check_layer,
    compress_layer,
    compressed_layers,
    is_compressed,
    restore_layer,
)
from sparse_accel.compress.masks import count_dropped, nonzero_mask
from sparse_accel.compress.positions import mask_of, pack_positions
from sparse_accel.compress.ranges import (
    ObservationContext,
    Phase,
    quantization_state,
    quantizers,
    set_phase,
    structure_changed,
)
from sparse_accel.errors import ModelError, RecipeError, suggestion

__all__ = [
    "Compression",
    "CompressionPlan",
    "Phase",
    "check_masks",
    "copy_requests",
    "fold",
    "install",
    "masked_layers",
    "needs_quantized_attention",
    "prunable_parameters",
    "quantization_state",
    "request_masks",
    "set_phase",
]

_FORMAT = 1


@dataclass(frozen=True)
class Compression:
    """What one module gets. An attention product has two inputs and an output, a layer at most one of each.

    `compact` stores of a masked weight what it keeps; it says how a run holds the mask, not what the model is.
    """

    mask: bool = False
    compact: bool = False
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
        data: dict[str, Any] = {name: True for name in ("mask", "compact") if getattr(self, name)}
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
        known = ("mask", "compact", "weight", "inputs", "output")
        for name in data:
            if name not in known:
                raise ModelError(f"a compression plan has no entry {name!r}{suggestion(name, known)}")
        if data.get("compact") and not data.get("mask"):
            raise ModelError("a weight is compact without a mask")
        weight, output = data.get("weight"), data.get("output")
        return cls(
            mask=bool(data.get("mask", False)),
            compact=bool(data.get("compact", False)),
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
        # Whether all who asked for a module's mask hold it from the first step to the last.
        self._lasting: dict[str, bool] = {}
        # From which sparsity to which a weight is pruned while a recipe runs, by module.
        self.pruned_from_to: dict[str, tuple[float, float]] = {}

    def add_mask(self, module_name: str, owner: Hashable, *, lasting: bool = False) -> None:
        """Plan a mask for a module's weight; `owner` finds it again through `masked_by`. `lasting` is for one that does
        not change from the first step to the last."""
        self.modules[module_name] = replace(self.modules.get(module_name, Compression()), mask=True)
        self._owners.setdefault(owner, {})[module_name] = None
        self._lasting[module_name] = lasting and self._lasting.get(module_name, True)

    def masked_by(self, owner: Hashable) -> tuple[str, ...]:
        """The modules whose masks `owner` asked for, in that order."""
        return tuple(self._owners.get(owner, ()))

    def mask_is_lasting(self, module_name: str) -> bool:
        """Whether a module's mask is known to hold, unchanged, from the first step to the last."""
        return self._lasting.get(module_name, False)

    def make_compact(self, module_name: str) -> None:
        """Plan to store of a masked weight what its mask keeps. Raises RecipeError for a mask that may change."""
        if not self.mask_is_lasting(module_name):
            raise RecipeError(
                f"the weight of {module_name} cannot be stored compact: its mask does not hold from the first step to the "
                "last as it is; only a ConstantPruningModifier from epoch 0 to -1 holds one so"
            )
        self.modules[module_name] = replace(self.modules[module_name], compact=True)

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

    def fuse_attention(self) -> list[str]:
        """Let attention be fused while training where both of its products are quantized; the modules it is done for.

        Their operands are still quantized, and so is the context; scores are not, and probabilities, whose range is known,
        only outside training: 1/255 a step, for 8 bits.
        """
        fused = []
        for name, scores in list(self.modules.items()):
            attention, _, product = name.rpartition(".")
            context = self.modules.get(f"{attention}.{CONTEXT_MATMUL}")
            if product != SCORES_MATMUL or context is None or len(context.inputs) != 2 or len(scores.inputs) != 2:
                continue
            probabilities = replace(context.inputs[0], fixed_range=(0.0, 1.0))
            self.modules[name] = replace(scores, output=None)
            self.modules[f"{attention}.{CONTEXT_MATMUL}"] = replace(context, inputs=(probabilities, context.inputs[1]))
            fused.append(attention)
        return fused

    def with_whole_weights(self) -> CompressionPlan:
        """The plan with no weight compact: what is published, since that is a matter of the run."""
        return CompressionPlan({name: replace(c, compact=False) for name, c in self.modules.items()})

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
        masks, compact = (sum(getattr(c, name) for c in self.modules.values()) for name in ("mask", "compact"))
        stored = f" ({compact} compact)" if compact else ""
        return f"CompressionPlan({masks} masks{stored}, {self.num_quantizers} quantizers)"


def install(
    model: nn.Module,
    plan: CompressionPlan,
    *,
    observe_padding: bool = False,
    positions: Mapping[str, Tensor] | None = None,
) -> None:
    """Give the modules of `model` what the plan says, in place and before it is sharded; parameter names stay, but for
    compact weights: there `weight` becomes `values`.

    Quantizers start OFF and masks unrequested: the model computes what it did. Ranges leave padded tokens out (by the
    forward's `attention_mask` [batch, length]) unless `observe_padding`. A compact weight keeps what is not zero, or where
    `positions` names its module, what stands there: a mask (bool [out_features, in_features]) or a form of
    `compress.positions`, for a process that does not have the weights. Raises ModelError for a module that the model
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
                name,
                modules[name],
                compression.mask,
                compression.weight,
                compression.inputs,
                compression.output,
                compact=compression.compact,
            )
        elif compression.mask or compression.weight or len(compression.inputs) != 2:
            raise ModelError(f"{name} is a product of two activations: it has two input specs, no mask and no weight")
    kept = {
        name: _kept_positions(name, modules[name], (positions or {}).get(name))
        for name, compression in plan.modules.items()
        if compression.compact
    }
    context = ObservationContext(observe_padding)
    for name, compression in plan.modules.items():
        if name not in modules:
            attention, _, product = name.rpartition(".")
            device = next(modules[attention].parameters()).device
            left, right = compression.inputs
            modules[attention].add_module(product, QuantizedMatMul(left, right, compression.output, context, device))
        elif not is_compressed(modules[name]):  # one module may have two names
            compress_layer(
                modules[name],
                context,
                compression.mask,
                compression.weight,
                compression.inputs,
                compression.output,
                positions=kept.get(name),
            )
    if plan.num_quantizers:
        model.register_forward_pre_hook(context, with_kwargs=True)


def fold(model: nn.Module, *, bake_quantization: bool = False) -> None:
    """Take the machinery off: plain modules, whole weights and their own parameter names again, zeros written where masks
    hold.

    Weights stay float; `quantization_state`, taken before, holds the ranges and scales. `bake_quantization` writes the
    fake-quantized weight instead. For a whole model on one device, not a sharded one.
    """
    with torch.no_grad():
        for layer in compressed_layers(model).values():
            weight = layer.effective_weight() if bake_quantization else layer.masked_weight()
            if isinstance(layer, CompactLinear):
                restore_layer(layer)
            layer.weight.copy_(weight)
    for module in list(model.modules()):
        if is_compressed(module):
            restore_layer(module)
        for product in MATMULS:
            if isinstance(getattr(module, product, None), QuantizedMatMul):
                delattr(module, product)
    structure_changed()
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, ObservationContext):
            del model._forward_pre_hooks[key], model._forward_pre_hooks_with_kwargs[key]


def needs_quantized_attention(plan: CompressionPlan) -> bool:
    """Whether the model must compute attention through `quantized_attention`."""
    return any(name.rpartition(".")[2] in MATMULS for name in plan.modules)


def prunable_parameters(model: nn.Module) -> list[str]:
    """Names that `__ALL_PRUNABLE__` stands for: `.weight` of Linear, ConvNd and GPT-style Conv1D, in module order.

    Embeddings are left out, and so is a layer whose weight is an embedding's (the tied decoder of a language model). A
    compact weight goes by the name that it has when it is whole.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return [
        f"{name}.weight" if name else "weight"
        for name, module in model.named_modules()
        if _is_prunable(module) and (isinstance(module, CompactLinear) or id(module.weight) not in tables)
    ]


def request_masks(model: nn.Module, names: Iterable[str], request: MaskRequest) -> None:
    """Say which masks hold from the next forward on, for the modules `names`.

    "nonzero" holds the zeros that a weight had when first asked, `Pruned` those and, by magnitude, as many more as are missing,
    "held" the mask as it is; None releases them. Raises ModelError for a module without a mask, and where the weight is compact
    for what would change its zeros.
    """
    if request not in (None, "nonzero", "held") and not isinstance(request, Pruned):
        raise ValueError(f'a mask request is "nonzero", "held", Pruned or None, got {request!r}')
    masked = masked_layers(model)
    for name in names:
        layer = masked.get(name)
        if layer is None:
            raise ModelError(f"module {name!r} has no mask{suggestion(name, masked)}")
        if not isinstance(layer, CompactLinear):
            layer.mask_request = request
        elif request is None:
            raise ModelError(
                f"the mask of {name!r} cannot be released: its weight is compact, and its zeros are not stored"
            )
        elif isinstance(request, Pruned):
            raise ModelError(f"{name!r} cannot be pruned further: its weight is compact")


def masked_layers(model: nn.Module) -> dict[str, CompressedLayer]:
    """Every layer that has a mask, or is compact, by module name."""
    return {
        name: layer
        for name, layer in compressed_layers(model).items()
        if isinstance(layer, CompactLinear) or layer.mask is not None
    }


def copy_requests(source: nn.Module, target: nn.Module) -> None:
    """Let masks and quantizers of `target` do what those of `source`, a model with the same plan, do now."""
    for name, layer in compressed_layers(source).items():
        if not isinstance(layer, CompactLinear):  # which holds its zeros always
            target.get_submodule(name).mask_request = layer.mask_request  # type: ignore[assignment]
    for name, quantizer in quantizers(source).items():
        target.get_submodule(name).phase = quantizer.phase  # type: ignore[assignment]


def check_masks(model: nn.Module, parameters: Iterable[tuple[str, Tensor]] | None = None) -> dict[str, int]:
    """For each module whose mask holds now: how many stored weights under it are not zero. More than 0 is a broken
    promise. Under a mask that grows, stored weights are no part of the model; there it is how many blocks the mask lacks.

    `parameters` are the model's, by name and whole, one at a time, where its own are parts. A compact weight stores no
    zeros; there it is how many values have no place, or places no value. Waits for the device once.
    """
    counts: dict[str, Tensor] = {}
    held: dict[str, CompressedLayer] = {}
    for name, layer in compressed_layers(model).items():
        if isinstance(layer, CompactLinear):
            # Outside forward ZeRO-3 has no values here, and nothing is to be counted.
            stray = abs(layer.values.numel() - layer.num_values) if layer.values.numel() else 0
            counts[name] = torch.tensor(stray, device=layer.positions.device)
        elif layer.mask is not None and layer.holds_mask:
            request = layer.mask_request
            if isinstance(request, Pruned):
                wanted = request.mask_type.num_dropped(tuple(layer.mask.shape), request.sparsity)
                counts[name] = (wanted - count_dropped(layer.mask, request.mask_type)).clamp(min=0)
            elif not layer.has_stray_values:
                held[f"{name}.weight"] = layer
    if parameters is None:
        parameters = ((name, layer.weight) for name, layer in held.items())
    for name, weight in parameters if held else ():
        masked = held.get(name)
        if masked is not None and masked.mask is not None:
            counts[name.removesuffix(".weight")] = ((weight != 0) & ~masked.mask).sum()
    return dict(zip(counts, torch.stack(list(counts.values())).tolist(), strict=True)) if counts else {}


def _is_prunable(module: nn.Module) -> bool:
    # Conv1D is told by its name: its class belongs to a library that this layer does not import.
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return isinstance(module, kinds) or type(module).__name__ == "Conv1D"


def _kept_positions(name: str, layer: nn.Module, given: Tensor | None) -> Tensor:
    """Where the weight of a linear layer is kept: as `given`, else where it is not zero."""
    assert isinstance(layer, nn.Linear), "check_layer lets no other be compact"
    shape = (layer.out_features, layer.in_features)
    if not layer.weight.is_meta and layer.weight.shape != shape:
        raise ModelError(
            f"{name}: its weight is sharded already ({list(layer.weight.shape)} is here of {list(shape)}); a plan with compact "
            "weights is installed before"
        )
    if given is None:
        if layer.weight.is_meta:
            raise ModelError(f"{name}: its weight is not on this process, so that its positions must be given")
        return pack_positions(nonzero_mask(layer.weight))
    return pack_positions(mask_of(name, given, shape))


def _refuse_shared_weights(modules: Mapping[str, nn.Module], plan: CompressionPlan) -> None:
    """One parameter gets one treatment: two masks, or two grids, on the same numbers would contradict each other."""
    first_name: dict[int, str] = {}
    for name, module in modules.items():
        weight = module._parameters.get("weight")
        if weight is None:
            continue
        other = first_name.setdefault(id(weight), name)
        mine, theirs = plan.modules.get(name, Compression()), plan.modules.get(other, Compression())
        if modules[other] is not module and (mine.compact or theirs.compact):
            raise ModelError(f"{other} and {name} share one weight, which therefore cannot be compact")
        both = mine.weight is not None and theirs.weight is not None
        if (mine.mask, mine.compact) != (theirs.mask, theirs.compact) or (both and mine.weight != theirs.weight):
            raise ModelError(
                f"{other} and {name} share one weight, but the recipe masks or quantizes them differently; "
                "name both or neither"
            )
