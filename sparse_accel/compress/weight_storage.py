"""How a run stores its masked weights: whole, or compact, which is what their masks keep."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from sparse_accel.compress.plan import CompressionPlan
from sparse_accel.compress.positions import mask_of
from sparse_accel.errors import OptionError, suggestion

STORAGES: Final = ("auto", "masked", "compact")


@dataclass(frozen=True)
class WeightZeros:
    """How many of a weight's entries are zero, and why it cannot be compact, if it cannot: a clause."""

    numel: int
    zeros: int
    obstacle: str | None = None

    @property
    def pays(self) -> bool:
        """Whether compact is worth it: at least half of the weight is zero, and something is not."""
        return self.numel <= 2 * self.zeros < 2 * self.numel


def model_zeros(model: nn.Module, positions: Mapping[str, Tensor] | None = None) -> dict[str, WeightZeros]:
    """The zeros in every weight that can be masked, by module name, before anything is installed.

    `positions` is as for `install`, and counts where it names a module; a weight that is not on this process and not
    named there counts as dense. Waits for the device.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append(name)
    found = {}
    for name, layer in layers.items():
        others = [other for other in owners[id(layer.weight)] if other != name]
        obstacle = f"it shares its weight with {others[0]}" if others else None
        if type(layer) is not nn.Linear:
            obstacle = f"it is no nn.Linear but {type(layer).__name__}"
        found[name] = _count(name, layer, (positions or {}).get(name), obstacle)
    return found


def compact_where_it_pays(plan: CompressionPlan, zeros: Mapping[str, WeightZeros], storage: str) -> list[str]:
    """Plan which masked weights are compact, and return notes for the person.

    "masked" is none. "auto" is each that can be and of which at least half is zero, where no mask of the plan changes;
    "compact" is each that can be, however dense, and a mask that changes is an error (RecipeError).
    """
    if storage not in STORAGES:
        raise OptionError(f"masked weights are not stored {storage!r}{suggestion(storage, STORAGES)}")
    masked = [name for name, compression in plan.modules.items() if compression.mask]
    if storage == "masked" or (storage == "auto" and not all(map(plan.mask_is_lasting, masked))):
        return []
    # What is neither linear nor embedding is refused by `install`.
    masked = [name for name in masked if name in zeros]
    able = [name for name in masked if zeros[name].obstacle is None]
    chosen = able if storage == "compact" else [name for name in able if zeros[name].pays]
    for name in chosen:
        plan.make_compact(name)
    notes = []
    if chosen:
        total = sum(zeros[name].numel for name in chosen)
        kept = total - sum(zeros[name].zeros for name in chosen)
        notes.append(f"of {total:,} masked weights in {len(chosen)} layers, the {kept:,} that are kept are stored")
    if storage == "compact":
        notes += [f"{name} stays masked: {zeros[name].obstacle}" for name in masked if name not in chosen]
        if not masked:
            notes.append("no weight is stored compact: the recipe masks none")
    return notes


def _count(name: str, layer: nn.Linear | nn.Embedding, positions: Tensor | None, obstacle: str | None) -> WeightZeros:
    if isinstance(layer, nn.Linear):
        shape = (layer.out_features, layer.in_features)
    else:
        shape = (layer.num_embeddings, layer.embedding_dim)
    numel = math.prod(shape)
    if positions is not None:
        return WeightZeros(numel, numel - int(mask_of(name, positions, shape).sum()), obstacle)
    is_here = not layer.weight.is_meta and layer.weight.shape == shape
    return WeightZeros(numel, numel - int(torch.count_nonzero(layer.weight)) if is_here else 0, obstacle)
