"""A whole teacher on every rank: the quickest, where there is room."""

from __future__ import annotations

from typing import Any

from torch import nn

from sparse_accel.runtime.teachers.placed import PlacedTeacher, freeze


def replicated(model: nn.Module, accelerator: Any, accepted: frozenset[str]) -> PlacedTeacher:
    """Each rank has all weights on its device; a call exchanges nothing."""
    freeze(model)
    return PlacedTeacher(model.to(accelerator.device), accelerator, accepted)
