"""Which parameters learn."""

from __future__ import annotations

from typing import ClassVar, Self, final

from pydantic import model_validator
from torch import nn

from sparse_accel.compress.plan import CompressionPlan
from sparse_accel.modifiers.base import Modifier
from sparse_accel.modifiers.parameter_targets import ParameterTargets, resolve


@final
class TrainableParamsModifier(Modifier):
    """Freezes parameters, or lets them learn after all, for the whole run.

    It holds for the whole run only: DDP's reducer, FSDP's flattening and ZeRO's partitions are built around what
    requires a gradient, and a parameter with Adam's momentum goes on moving when its gradient stops.
    """

    ignored_fields: ClassVar = {"params_strict": "a target that matches nothing is always an error"}

    params: ParameterTargets
    trainable: bool = True

    @model_validator(mode="after")
    def _whole_run(self) -> Self:
        if self.interval.start > 0.0 or self.end_epoch is not None:
            raise ValueError(
                "parameters are frozen or trained for the whole run: leave out start_epoch and end_epoch, or write -1; "
                "for a part of it, train twice with a recipe each"
            )
        return self

    def owns(self) -> frozenset[str]:
        targets = (self.params,) if isinstance(self.params, str) else self.params
        return frozenset(f"requires_grad:{target}" for target in targets)

    def plan(self, plan: CompressionPlan, model: nn.Module) -> None:
        parameters = dict(model.named_parameters())
        for name in resolve(self.params, model):
            parameters[name].requires_grad_(self.trainable)
