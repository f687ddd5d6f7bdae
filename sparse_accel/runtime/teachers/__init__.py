"""Teachers: how one is checked, and how its weights are spread; `PLACEMENTS` is the table of ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from torch import nn

from sparse_accel.runtime.teachers.device_map import device_map
from sparse_accel.runtime.teachers.fsdp2 import fsdp2
from sparse_accel.runtime.teachers.placed import PlacedTeacher
from sparse_accel.runtime.teachers.replicated import replicated
from sparse_accel.runtime.teachers.zero3 import zero3

# From a whole model on the CPU, the accelerator and the inputs that the model is given to a teacher that answers.
Placement = Callable[[nn.Module, Any, frozenset[str]], PlacedTeacher]

PLACEMENTS: Final[dict[str, Placement]] = {
    "replicated": replicated,
    "device_map": device_map,
    "fsdp2": fsdp2,
    "zero3": zero3,
}
