"""Sparse transfer: what is zero stays zero."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Self, final

from pydantic import model_validator
from torch import nn

from sparse_accel.compress.plan import CompressionPlan, request_masks
from sparse_accel.modifiers.base import Modifier
from sparse_accel.modifiers.parameter_targets import ParameterTargets, mask_knobs, maskable
from sparse_accel.session import Session
from sparse_accel.timeline import Clock


@final
class ConstantPruningModifier(Modifier):
    """Holds the zeros that the weights have at `start_epoch`, from the forward at that moment to `end_epoch`.

    Weights of linear layers and embeddings can be held. A pattern may hit biases and norms as well; they are left as
    they are, since their zeros mean nothing. Naming one of them outright is an error.
    """

    ignored_fields: ClassVar = {"update_frequency": "the mask is captured once"}

    params: ParameterTargets

    @model_validator(mode="after")
    def _has_length(self) -> Self:
        if self.end_epoch is not None and self.end_epoch <= self.interval.start:
            raise ValueError(f"end_epoch must lie after start_epoch ({self.interval.start}); got {self.end_epoch}")
        return self

    def owns(self) -> frozenset[str]:
        return mask_knobs((self.params,) if isinstance(self.params, str) else self.params)

    def problems(self, num_epochs: float) -> Iterator[str]:
        if self.interval.start >= num_epochs:
            yield f"starts at epoch {self.start_epoch}, but training ends at {num_epochs}"

    def plan(self, plan: CompressionPlan, model: nn.Module) -> None:
        lasting = self.interval.start <= 0.0 and self.end_epoch is None
        for name in maskable(self.params, model):
            plan.add_mask(name.removesuffix(".weight"), owner=self, lasting=lasting)

    def on_step_start(self, session: Session, clock: Clock) -> None:
        if not clock.has_reached(self.interval.start):
            return  # an earlier modifier may hold the same weights; nothing has been asked for yet
        holds = self.interval.contains(clock)
        request_masks(session.module, session.plan.masked_by(self), "nonzero" if holds else None)
