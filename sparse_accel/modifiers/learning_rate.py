"""The learning rate: set once, or following a function of time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal, Self, final

from pydantic import Field, model_validator

from sparse_accel import schedules
from sparse_accel.modifiers.base import Epoch, Modifier
from sparse_accel.modifiers.param_groups import ParamGroups, knobs, set_in_groups
from sparse_accel.session import Session
from sparse_accel.timeline import Clock

_PROGRESS_FUNCTIONS = {"linear": schedules.linear, "cosine": schedules.cosine}
_CONSTANT_LOGGING = "every logged line carries the learning rate"


@final
class SetLearningRateModifier(Modifier):
    """One learning rate from `start_epoch` on, until a learning-rate modifier that starts later takes over."""

    ignored_fields: ClassVar = {"constant_logging": _CONSTANT_LOGGING}

    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)]
    param_groups: ParamGroups = None

    @model_validator(mode="after")
    def _stays(self) -> Self:
        if self.end_epoch is not None:
            raise ValueError(f"end_epoch must be -1 (a learning rate that is set stays set); got {self.end_epoch}")
        return self

    def owns(self) -> frozenset[str]:
        return knobs("lr", self.param_groups)

    def problems(self, num_epochs: float) -> Iterator[str]:
        if self.interval.start >= num_epochs:
            yield f"starts at epoch {self.start_epoch}, but training ends at {num_epochs}"

    def learning_rate_at(self, clock: Clock) -> float | None:
        """The learning rate at this step; None before the start, where the optimizer keeps its own."""
        return self.learning_rate if clock.has_reached(self.interval.start) else None

    def on_step_start(self, session: Session, clock: Clock) -> None:
        rate = self.learning_rate_at(clock)
        if rate is not None:
            set_in_groups(session, "lr", self.param_groups, rate)


@final
class LearningRateFunctionModifier(Modifier):
    """A learning rate that goes from `init_lr` to `final_lr` between two epochs; `final_lr` stays afterwards.

    At optimizer step k it is the function's value at epoch k / steps_per_epoch, so a run that stops at `end_epoch`
    never takes a step at `final_lr` itself.
    """

    ignored_fields: ClassVar = {
        "update_frequency": "the learning rate is set at every step",
        "constant_logging": _CONSTANT_LOGGING,
    }

    lr_func: Literal["linear", "cosine", "cyclic_linear"]
    init_lr: Annotated[float, Field(ge=0.0, le=1.0)]
    final_lr: Annotated[float, Field(ge=0.0, le=1.0)]
    start_epoch: Epoch
    end_epoch: Epoch
    cycle_epochs: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1.0
    param_groups: ParamGroups = None

    @model_validator(mode="after")
    def _has_length(self) -> Self:
        if self.end_epoch is None:
            raise ValueError("end_epoch must be an epoch (the function needs to know where it ends); got -1")
        if self.end_epoch <= self.interval.start:
            raise ValueError(f"end_epoch must lie after start_epoch ({self.interval.start}); got {self.end_epoch}")
        return self

    def owns(self) -> frozenset[str]:
        return knobs("lr", self.param_groups)

    def problems(self, num_epochs: float) -> Iterator[str]:
        if self.interval.start >= num_epochs:
            yield f"starts at epoch {self.start_epoch}, but training ends at {num_epochs}"

    def learning_rate_at(self, clock: Clock) -> float | None:
        """The learning rate at this step; None before the start, where the optimizer keeps its own."""
        start, end = self.interval.start, self.interval.end
        if end is None or not clock.has_reached(start):
            return None
        if clock.has_reached(end):
            return self.final_lr
        if self.lr_func == "cyclic_linear":
            step, total, cycle = (
                epochs * clock.steps_per_epoch for epochs in (clock.epoch - start, end - start, self.cycle_epochs)
            )
            return schedules.cyclic_linear(step, total, cycle, self.init_lr, self.final_lr)
        return _PROGRESS_FUNCTIONS[self.lr_func](self.interval.progress(clock), self.init_lr, self.final_lr)

    def on_step_start(self, session: Session, clock: Clock) -> None:
        rate = self.learning_rate_at(clock)
        if rate is not None:
            set_in_groups(session, "lr", self.param_groups, rate)
