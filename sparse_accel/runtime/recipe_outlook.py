"""What a recipe makes of a model, before training: what is masked and quantized, and estimates of memory and bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sparse_accel.compress.census import Census, KindCount
from sparse_accel.compress.plan import CompressionPlan, install
from sparse_accel.compress.weight_storage import WeightZeros, compact_where_it_pays, model_zeros
from sparse_accel.errors import RecipeError
from sparse_accel.modifiers.constant_pruning import ConstantPruningModifier
from sparse_accel.modifiers.quantization import QuantizationModifier
from sparse_accel.recipe.schema import Recipe
from sparse_accel.recipe.timeline_plan import Held
from sparse_accel.runtime.checkpoint import checkpoint_bytes
from sparse_accel.runtime.launch_advice import STRATEGIES, Estimate, Machine, Workload, estimate, sized
from sparse_accel.runtime.setup import choose_attention


@dataclass(frozen=True)
class KindOutlook:
    """One kind of layer: its weights and zeros, and how many of its modules get a mask and how many a quantizer."""

    count: KindCount
    masked: int


@dataclass(frozen=True)
class Bytes:
    """What lies on disk. `deployed` has quantized weights as integers, `packed` those and every weight that gains by it as a
    bitmask and what it keeps."""

    checkpoint: int
    model: int
    deployed: float
    packed: float


@dataclass(frozen=True)
class Outlook:
    """A recipe on a model. `held` is the share of zeros in the weights that each pruning modifier holds; `compact` counts the
    layers of which only what is kept is stored."""

    kinds: tuple[KindOutlook, ...]
    census: Census
    held: Held
    compact: int
    bytes: Bytes
    memory: Estimate


def target_problems(recipe: Recipe, model: Any) -> list[RecipeError]:
    """What of a recipe the model cannot have, such as targets that match nothing; of each modifier the first. The model is
    as before afterwards."""
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    problems = []
    try:
        for modifier in recipe.modifiers:
            try:
                modifier.plan(CompressionPlan(), model)
            except RecipeError as error:
                problems.append(error.at(recipe.where(modifier)))
        if not problems:
            plan = CompressionPlan()
            recipe.plan(plan, model)
            choose_attention(model, plan, torch.device("cpu"))
    except RecipeError as error:
        problems.append(error)
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trains[name])
    return problems


def idle_on(recipe: Recipe, model: Any) -> list[str]:
    """What a recipe says in vain about this model."""
    has_batch_norm = any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in model.modules())
    return [
        f"{recipe.where(modifier)}: QuantizationModifier: freeze_bn_stats_epoch has no effect: {type(model).__name__} has no "
        "batch norm"
        for modifier in recipe.of(QuantizationModifier)
        if modifier.freeze_bn_stats_epoch is not None and not has_batch_norm
    ]


def outlook(
    recipe: Recipe,
    model: Any,
    *,
    num_processes: int = 1,
    batch_size: int = 8,
    sequence_length: int = 384,
    num_teacher_parameters: int = 0,
) -> Outlook:
    """Plan the recipe on the model, which has its masks and quantizers afterwards. Raises RecipeError for what it cannot have.

    Memory is that of float32 with AdamW: a process alone, or several that hold all of it each (DDP).
    """
    plan = CompressionPlan()
    recipe.plan(plan, model)
    census, zeros = Census.of(model, plan), model_zeros(model)
    held = {modifier: _share(plan.masked_by(modifier), zeros) for modifier in recipe.of(ConstantPruningModifier)}
    masked = {f"{name}.weight" for name, compression in plan.modules.items() if compression.mask}
    kinds = tuple(
        KindOutlook(row, sum(p.kind == row.kind and p.name in masked for p in census.parameters))
        for row in census.kinds()
    )
    compact_where_it_pays(plan, zeros, "auto")
    compact = [name for name, compression in plan.modules.items() if compression.compact]
    size = sized(model.config.to_dict(), census.num_parameters, census.prunable.numel)
    workload = Workload(
        size,
        num_teacher_parameters=num_teacher_parameters,
        sparsity=sum(zeros[name].zeros for name in compact) / max(1, size.num_prunable),
        batch_size=batch_size,
        sequence_length=sequence_length,
    )
    strategy = STRATEGIES["single_gpu" if num_processes == 1 else "ddp"]
    memory = estimate(strategy, Machine(num_processes, 0.0), workload)
    deployed, packed = _deployed_bytes(census, plan)
    choose_attention(model, plan, torch.device("cpu"))
    install(model, plan)
    return Outlook(
        kinds=kinds,
        census=census,
        held=held,
        compact=len(compact),
        bytes=Bytes(checkpoint_bytes(model, num_moments=2), 4 * census.num_parameters, deployed, packed),
        memory=memory,
    )


def _share(names: tuple[str, ...], zeros: Mapping[str, WeightZeros]) -> float:
    """Zeros in all of these weights together."""
    found = [zeros[name] for name in names if name in zeros]
    return sum(count.zeros for count in found) / max(1, sum(count.numel for count in found))


def _deployed_bytes(census: Census, plan: CompressionPlan) -> tuple[float, float]:
    """All parameters with quantized weights at their bits, and the same with bitmasks: a bit for each weight, and the kept
    ones whole. Zeros are those at the end: gradual pruning makes more."""
    deployed = packed = 0.0
    for parameter in census.parameters:
        module = parameter.name.removesuffix(".weight")
        compression = plan.modules.get(module)
        _, final = plan.pruned_from_to.get(module, (0.0, 0.0))
        zeros = max(parameter.zeros, round(final * parameter.numel))
        # Fewer bits than 8 are stored in bytes all the same.
        each = 1.0 if compression is not None and compression.weight is not None else 4.0
        whole = each * parameter.numel
        deployed += whole
        packed += min(whole, parameter.numel / 8 + each * (parameter.numel - zeros))
    return deployed, packed
