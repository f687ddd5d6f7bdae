"""The optimizer's weight decay."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Self, final

from pydantic import Field, model_validator

from sparse_accel.modifiers.base import Modifier
from sparse_accel.modifiers.param_groups import ParamGroups, knobs, set_in_groups
from sparse_accel.session import Session
from sparse_accel.timeline import Clock


@final
class SetWeightDecayModifier(Modifier):
    """One weight decay from `start_epoch` on, in every param_group: also in the one of biases and norms."""

    ignored_fields: ClassVar = {"constant_logging": "the weight decay does not change between modifiers"}

    weight_decay: Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
    param_groups: ParamGroups = None

    @model_validator(mode="after")
    def _stays(self) -> Self:
        if self.end_epoch is not None:
            raise ValueError(f"end_epoch must be -1 (a weight decay that is set stays set); got {self.end_epoch}")
        return self

    def owns(self) -> frozenset[str]:
        return knobs("weight_decay", self.param_groups)

    def problems(self, num_epochs: float) -> Iterator[str]:
        if self.interval.start >= num_epochs:
            yield f"starts at epoch {self.start_epoch}, but training ends at {num_epochs}"

    def on_step_start(self, session: Session, clock: Clock) -> None:
        if self.interval.contains(clock):
            set_in_groups(session, "weight_decay", self.param_groups, self.weight_decay)
