"""Optimizer param_groups as modifiers address them: all of them, or some by index."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from sparse_accel.errors import RecipeError
from sparse_accel.session import Session


def _all_when_empty(value: Any) -> Any:
    """SparseML reads an empty list as all groups."""
    return None if value == [] or value == () else value


# None stands for all groups.
ParamGroups = Annotated[tuple[Annotated[int, Field(ge=0)], ...] | None, BeforeValidator(_all_when_empty)]


def knobs(name: str, groups: tuple[int, ...] | None) -> frozenset[str]:
    """What a modifier owns that sets `name` in `groups`: `lr`, or `lr:0` and `lr:2`."""
    return frozenset({name}) if groups is None else frozenset(f"{name}:{index}" for index in groups)


def set_in_groups(session: Session, name: str, groups: tuple[int, ...] | None, value: float) -> None:
    """Set `name` ("lr", "weight_decay") in the optimizer's groups. Raises RecipeError for a group that is not there."""
    available = session.optimizer.param_groups
    for index in range(len(available)) if groups is None else groups:
        if index >= len(available):
            raise RecipeError(f"param_groups: there is no group {index}; the optimizer has 0 to {len(available) - 1}")
        available[index][name] = value
