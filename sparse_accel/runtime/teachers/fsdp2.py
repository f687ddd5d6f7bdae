"""A teacher whose weights torch's own sharding (FSDP2) spreads over all ranks."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sparse_accel.runtime.teachers.placed import PlacedTeacher, freeze
from sparse_accel.runtime.teachers.units import units


def fsdp2(model: nn.Module, accelerator: Any, accepted: frozenset[str]) -> PlacedTeacher:
    """Each rank keeps a slice of every weight; a call gathers one unit after the other, in fp32, and lets it go again.

    The student may be trained in any way: the two share no state. Raises ModelError for a model without a list of layers.
    """
    freeze(model)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    # From the inside out: what a unit has claimed its owner leaves alone. Weights reach the device unit by unit too.
    for module in [*units(model), model]:
        # Said aloud for the model itself, which torch would otherwise keep whole between two calls.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return PlacedTeacher(model, accelerator, accepted)
