"""A teacher whose layers lie on several devices of one machine, behind a single process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import get_balanced_memory
from torch import nn

from sparse_accel.errors import ModelError
from sparse_accel.runtime.teachers.placed import PlacedTeacher, freeze
from sparse_accel.runtime.teachers.units import blocks


def device_map(model: nn.Module, accelerator: Any, accepted: frozenset[str]) -> PlacedTeacher:
    """Activations travel from device to device through the layers, and the outputs back to the student's."""
    free = {index: torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())}
    return PlacedTeacher(spread(model, layer_map(model, free)), accelerator, accepted)


def layer_map(model: nn.Module, free: Mapping[int, int]) -> dict[str, int]:
    """Module name -> device; nothing on the first one, where the student trains, if the others hold it all. `free` are the
    bytes of each device. Raises ModelError for a model that they do not hold."""
    whole = sorted({type(block).__name__ for block in blocks(model)})
    apart = get_balanced_memory(model, dict(free), no_split_module_classes=whole, low_zero=len(free) > 1)
    for memory in (apart, dict(free)):
        found: dict[str, int] = dict(infer_auto_device_map(model, memory, no_split_module_classes=whole))
        if set(found.values()) <= set(free):
            return found
    held = ", ".join(f"{size / 1e9:.2f} GB on {index}" for index, size in free.items())
    raise ModelError(f"--teacher_placement device_map: the teacher does not fit on the devices ({held} free)")


def spread(model: nn.Module, placed: Mapping[str, Any]) -> nn.Module:
    """The frozen model with its modules on the devices of `placed`; its outputs come back to where its inputs were."""
    freeze(model)
    # Forced: a teacher that lies on one device only is still not where the student is.
    dispatched: nn.Module = dispatch_model(model, dict(placed), force_hooks=True)
    return dispatched
