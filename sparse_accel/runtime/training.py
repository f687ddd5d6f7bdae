"""The training loop.

One optimizer step, top to bottom: state what should hold now, run the micro-batches, step, update the ranges, then log,
evaluate and save where their intervals say so. The loop names no modifier, no task and no backend.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparse_accel.compress.ranges import (
    begin_step,
    calibrating,
    end_calibration,
    end_step,
    needs_first_range,
    observe_tokens,
)
from sparse_accel.errors import InvariantError
from sparse_accel.runtime.batches import MicroBatch
from sparse_accel.runtime.host_copies import copies_started, start_copy
from sparse_accel.session import LossTerms, Session
from sparse_accel.timeline import Clock

NOT_FINITE = (
    "the loss is not finite at step {step} (epoch {epoch:.2f}); lower the learning rate, clip gradients (--max_grad_norm) or "
    "train in bf16 rather than fp16"
)


@dataclass
class TrainState:
    """Where a run stands: everything beside weights, optimizer and random numbers that a checkpoint must carry."""

    clock: Clock
    last_step: int
    # Sums since the start and since the last logged line, float64 on the device, read only when a line is due.
    total_loss: Tensor | None = None
    window: dict[str, Tensor] = field(default_factory=dict)
    window_steps: int = 0
    best_metric: float | None = None
    best_checkpoint: str | None = None
    log_history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0


# Called after each optimizer step with the clock already advanced: logging, evaluation, saving.
AfterStep = Callable[[Session, TrainState], None]


def train(session: Session, state: TrainState, after_step: AfterStep) -> None:
    """Run optimizer steps from `state.clock` to `state.last_step`.

    The loss of a step is the mean over all its units (its tokens, for a part that is a mean over tokens), on all ranks and in
    all micro-batches: however a step is split, the gradient is the same. Raises InvariantError when the loss is found not to
    be finite (looked at by `after_step`).
    """
    session.model.train()
    for micro_batches in session.loader.steps(state.clock, state.last_step):
        take_step(session, state, micro_batches)
        after_step(session, state)


def take_step(session: Session, state: TrainState, micro_batches: list[MicroBatch]) -> None:
    """One optimizer step at `state.clock`, which then stands one further. The model is in training mode."""
    accelerator, recipe, clock = session.accelerator, session.recipe, state.clock
    set_flag_values(session, clock)
    open_step(session, clock, micro_batches)

    own_units = float(sum(micro_batch.num_units for micro_batch in micro_batches))
    own_tokens = float(sum(micro_batch.num_tokens for micro_batch in micro_batches))
    # full, not tensor: the latter copies from the host and waits for the device.
    own = torch.stack([torch.full((), count, device=accelerator.device) for count in (own_units, own_tokens)])
    # 1 where there is none at all: a step without a unit has no gradient.
    step_units, step_tokens = session.reduce_sum(own).clamp(min=1.0)
    for index, micro_batch in enumerate(micro_batches):
        show_tokens(session, micro_batch)
        with micro_step(session, is_last=index == len(micro_batches) - 1):
            outputs = session.outputs(micro_batch.inputs)
            terms = LossTerms.task(task_loss(session, outputs, micro_batch))
            terms = recipe.on_loss(terms, micro_batch.inputs, outputs, session, clock)
            # DDP averages over ranks, so each rank's part is weighted by world_size over all units of the step.
            world_size = accelerator.num_processes
            unit_share = micro_batch.num_units * world_size / step_units
            token_share = micro_batch.num_tokens * world_size / step_tokens
            accelerator.backward(terms.of_step(unit_share, token_share, torch.float32))
            accumulate(state, terms, micro_batch.num_units / step_units, micro_batch.num_tokens / step_tokens)
    if session.options.max_grad_norm > 0:
        parameters = [parameter for parameter in session.model.parameters() if parameter.requires_grad]
        accelerator.clip_grad_norm_(parameters, session.options.max_grad_norm)
    session.optimizer.step()
    session.optimizer.zero_grad()

    close_step(session, clock)
    state.clock = clock.next()
    state.window_steps += 1


def open_step(session: Session, clock: Clock, micro_batches: list[MicroBatch]) -> None:
    """What comes before the first forward of a step: what the recipe wants holds, and quantizers have a scale."""
    session.recipe.on_step_start(session, clock)
    begin_step(session.module, clock.step)
    if needs_first_range(session.module):
        first_ranges(session, micro_batches)


def close_step(session: Session, clock: Clock) -> None:
    """What comes after the optimizer's step: ranges move, and the recipe has its last word."""
    end_step(session.module, session.reduce_max)
    session.recipe.on_step_end(session, clock)


def show_tokens(session: Session, micro_batch: MicroBatch) -> None:
    """Tell the quantizers whether the tokens of the micro-batch that follows count. Those of one without features do not, but
    the other ranks may need this one's part of the weights."""
    observe_tokens(session.module, micro_batch.num_tokens > 0)


def task_loss(session: Session, outputs: Mapping[str, Tensor], micro_batch: MicroBatch) -> Tensor:
    """The task's own loss of a micro-batch."""
    loss: Tensor = session.task.loss(
        outputs, micro_batch.inputs, include_padding=session.options.distill_include_padding
    )
    return loss


def set_flag_values(session: Session, clock: Clock) -> None:
    """Learning rate and weight decay as the flags say; modifiers overrule them where they speak."""
    for group, weight_decay in zip(session.optimizer.param_groups, session.base_weight_decay, strict=True):
        group["lr"] = session.base_lr(clock.step)
        group["weight_decay"] = weight_decay


@contextlib.contextmanager
def micro_step(session: Session, *, is_last: bool) -> Iterator[None]:
    """Gradients are exchanged between ranks in the last micro-batch of a step only."""
    session.accelerator.sync_gradients = is_last
    with contextlib.nullcontext() if is_last else session.accelerator.no_sync(session.model):
        yield


@torch.no_grad()
def first_ranges(session: Session, micro_batches: list[MicroBatch]) -> None:
    """Look once at the whole step before its first quantized forward, so that the first scales do not depend on how the
    step is split. Dropout is off and draws no random number."""
    modes = [(module, module.training) for module in session.model.modules()]
    session.model.eval()
    with calibrating(session.module):
        for micro_batch in micro_batches:
            show_tokens(session, micro_batch)
            session.outputs(micro_batch.inputs, session.forward_model)
    end_calibration(session.module, session.reduce_max)
    for module, is_training in modes:  # one by one: a modifier or the loop's owner may hold some in eval mode
        module.training = is_training


@torch.no_grad()
def accumulate(state: TrainState, terms: LossTerms, unit_share: Tensor | float, token_share: Tensor | float) -> None:
    """Add this rank's part of the step's loss to the running sums, without a device sync."""
    values = {
        name: term.value.detach().double() * (token_share if term.per_token else unit_share)
        for name, term in terms.terms.items()
    }
    loss = terms.of_step(unit_share, token_share, torch.float64)
    for name, value in {"loss": loss, **{f"{name}_loss": value for name, value in values.items()}}.items():
        state.window[name] = state.window[name] + value if name in state.window else value
    # A sum of its own from the start: a checkpoint file takes no two names for one memory.
    state.total_loss = loss.clone() if state.total_loss is None else state.total_loss + loss


@dataclass(frozen=True)
class Reading:
    """The mean loss terms of a window on their way to the host: float64 [names], which `wait` makes readable."""

    clock: Clock
    names: list[str]
    means: Tensor
    wait: Callable[[], None]

    def values(self) -> dict[str, float]:
        """The means by name; waits for what the device did up to the window's end. Raises InvariantError for a loss that is
        not finite."""
        self.wait()
        values = dict(zip(self.names, self.means.tolist(), strict=True))
        if not all(map(math.isfinite, values.values())):
            raise InvariantError(NOT_FINITE.format(step=self.clock.step, epoch=self.clock.epoch))
        return values


def read_window(session: Session, state: TrainState) -> Reading | None:
    """Begin to read the mean loss terms since the last call, over all ranks, without waiting for the device; None where there
    are none."""
    if not state.window:
        return None
    names = sorted(state.window)
    sums = session.reduce_sum(torch.stack([state.window[name] for name in names]))
    means = start_copy(sums / state.window_steps)
    state.window, state.window_steps = {}, 0
    return Reading(state.clock, names, means, copies_started(session.accelerator.device))
