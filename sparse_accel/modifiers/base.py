"""A modifier: a frozen description of what should hold when, with five hooks that do nothing unless overridden."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer
from torch import Tensor, nn

from sparse_accel.session import LossTerms, Session
from sparse_accel.timeline import Clock, Interval

if TYPE_CHECKING:
    from sparse_accel.compress.plan import CompressionPlan


def _absent_when_negative(value: Any) -> Any:
    """SparseML writes -1 for "no such moment"; here that is None. Other negative epochs are left for the error."""
    return None if value == -1 and not isinstance(value, bool) else value


# An epoch as recipes write it: a number, or -1 for none. Strings that hold a number (YAML's `5e-1`) are numbers too.
Epoch = Annotated[
    float | None,
    BeforeValidator(_absent_when_negative),
    PlainSerializer(lambda value: -1.0 if value is None else value),
]


class Modifier(BaseModel):
    """Interface of all modifiers; the concrete ones are final.

    Level-triggered: `on_step_start` states what should hold now, from the clock alone, so that calling it twice equals
    calling it once and a resumed run needs no special case.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    # Fields of SparseML's that mean nothing here and are accepted with a warning: name -> why.
    ignored_fields: ClassVar[Mapping[str, str]] = {}
    # Fields that are read and checked, and change nothing whatever they say: name -> why.
    idle_fields: ClassVar[Mapping[str, str]] = {}

    start_epoch: Epoch = None
    end_epoch: Epoch = None

    @property
    def interval(self) -> Interval:
        """The epochs in which this modifier speaks."""
        return Interval(self.start_epoch or 0.0, self.end_epoch)

    @property
    def claims(self) -> Interval:
        """The epochs in which no other may turn the knobs that this modifier owns; by default those in which it speaks."""
        return self.interval

    @property
    def last_epoch(self) -> float:
        """The last moment that this modifier names: what a recipe's number of epochs is derived from."""
        return max(self.start_epoch or 0.0, self.end_epoch or 0.0)

    def owns(self) -> frozenset[str]:
        """The knobs that this modifier turns; two modifiers may not own one knob at the same time."""
        return frozenset()

    def problems(self, num_epochs: float) -> Iterator[str]:
        """What would make this modifier useless or wrong in a run of `num_epochs`; each one sentence."""
        return iter(())

    def plan(self, plan: CompressionPlan, model: nn.Module) -> None:
        """Before sharding: say which modules need masks and quantizers. The only structural moment."""

    def on_step_start(self, session: Session, clock: Clock) -> None:
        """State what should hold now."""

    def on_loss(
        self,
        terms: LossTerms,
        batch: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
        session: Session,
        clock: Clock,
    ) -> LossTerms:
        """Once per micro-batch: add to the loss or reweigh it."""
        return terms

    def on_step_end(self, session: Session, clock: Clock) -> None:
        """After the optimizer stepped."""

    def metrics(self, session: Session, clock: Clock) -> dict[str, float]:
        """Numbers worth logging; read only when a line is about to be written."""
        return {}
