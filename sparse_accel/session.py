"""What a run holds, passed explicitly and never global."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch
from torch import Tensor, nn

from sparse_accel.packing import by_feature, model_inputs

if TYPE_CHECKING:
    from sparse_accel.compress.plan import CompressionPlan

# A batch's column of cached outputs is called this and the output's name.
CACHED_PREFIX: Final = "teacher."


class Teacher(Protocol):
    """Gives the teacher's outputs for a micro-batch: eval mode, no gradient, on the student's device."""

    def __call__(self, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True)
class LossTerm:
    """One named part of the loss: a scalar and its weight. The scalar is a mean over the micro-batch's units, as the task
    counts them, or over its tokens."""

    weight: float
    value: Tensor
    per_token: bool = False


@dataclass(frozen=True)
class LossTerms:
    """The loss of one micro-batch as a weighted sum of named scalars."""

    terms: Mapping[str, LossTerm]

    @classmethod
    def task(cls, value: Tensor) -> LossTerms:
        """The task's own loss, alone and at full weight."""
        return cls({"task": LossTerm(1.0, value)})

    def scaled(self, factor: float) -> LossTerms:
        """Every weight multiplied by `factor`."""
        return LossTerms({name: replace(term, weight=term.weight * factor) for name, term in self.terms.items()})

    def plus(self, name: str, value: Tensor, weight: float = 1.0, *, per_token: bool = False) -> LossTerms:
        """One more term."""
        if name in self.terms:
            raise ValueError(f"the loss has a term named {name!r} already")
        return LossTerms({**self.terms, name: LossTerm(weight, value, per_token)})

    def total(self) -> Tensor:
        """The weighted sum; a term of weight 0 takes no part in it, nor in the gradient."""
        weighted = [term.weight * term.value for term in self.terms.values() if term.weight != 0.0]
        if not weighted:
            raise ValueError("every term of the loss has weight 0")
        return torch.stack(weighted).sum() if len(weighted) > 1 else weighted[0]

    def of_step(self, unit_share: Tensor | float, token_share: Tensor | float, dtype: torch.dtype) -> Tensor:
        """What this micro-batch adds to the loss of a step, of whose units and tokens it has these shares."""
        parts = []
        for share, per_token in ((unit_share, False), (token_share, True)):
            terms = {name: term for name, term in self.terms.items() if term.per_token == per_token}
            if any(term.weight != 0.0 for term in terms.values()):
                parts.append(LossTerms(terms).total().to(dtype) * share)
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum()


@dataclass
class Session:
    """The nouns of a run. `model` is the prepared model, `module` the same model unwrapped: its module names are the
    recipe's. `reduce_max` and `reduce_sum` combine a tensor over all ranks in place of each rank's own (identity for one)."""

    accelerator: Any
    model: nn.Module
    module: nn.Module
    optimizer: torch.optim.Optimizer
    recipe: Any
    plan: CompressionPlan
    task: Any
    options: Any
    loader: Any
    teacher: Teacher | None = None
    trackers: list[Any] = field(default_factory=list)
    reduce_max: Callable[[Tensor], Tensor] = lambda tensor: tensor
    reduce_sum: Callable[[Tensor], Tensor] = lambda tensor: tensor
    # How the model is spread over ranks (`runtime.backends`), and a model like `module` before it was spread: on the CPU,
    # whole, with masks and quantizers, its numbers not yet loaded.
    backend: Any = None
    build_whole: Callable[[], nn.Module] | None = None
    # The inputs that the student's forward takes, labels left out; a batch may hold more, for the teacher.
    accepts: frozenset[str] = frozenset()
    # Learning rate and weight decay of each param_group where no modifier speaks: what the flags say.
    base_lr: Callable[[int], float] = lambda step: 0.0
    base_weight_decay: list[float] = field(default_factory=list)

    @property
    def forward_model(self) -> nn.Module:
        """What to call outside training: the module itself, or, where its parameters are whole in parts only, the prepared
        model, which every rank must then call equally often."""
        return self.model if self.backend is not None and self.backend.shards_weights else self.module

    def outputs(self, batch: Mapping[str, Tensor], model: nn.Module | None = None) -> dict[str, Tensor]:
        """The student's outputs for a batch, laid out by feature; of `model`, the prepared one by default."""
        called = (self.model if model is None else model)(**self.student_inputs(batch))
        return by_feature(called, batch)

    def student_inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """The part of a batch that the student's forward takes; never its labels: the task has the loss."""
        return model_inputs(batch, self.accepts)
