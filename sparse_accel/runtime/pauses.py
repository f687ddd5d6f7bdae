"""The pauses of the loop: log, check, evaluate and save, each at its own interval."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from sparse_accel.compress.census import Census
from sparse_accel.compress.ranges import Phase, quantizers
from sparse_accel.errors import OptionError, OutputError, SparseAccelError
from sparse_accel.runtime import checkpoint, finishing, outputs, tracking
from sparse_accel.runtime.background import Background
from sparse_accel.runtime.evaluating import Evaluation, evaluate
from sparse_accel.runtime.host_copies import free_host_memory
from sparse_accel.runtime.invariants import require_promises
from sparse_accel.runtime.options import LOWER_IS_BETTER, METRICS, TrainOptions
from sparse_accel.runtime.preemption import Preempted, StopRequest
from sparse_accel.runtime.together import from_all, on_main
from sparse_accel.runtime.training import Reading, TrainState, read_window
from sparse_accel.session import Session
from sparse_accel.tasks.base import TaskData
from sparse_accel.tasks.collating import Collate
from sparse_accel.tasks.rows import MOST_COUNTED, counted_and_named
from sparse_accel.timeline import Clock


@dataclass(frozen=True)
class Line:
    """A line of the log but for its losses, which are being read: how things stood at its step, in words and as values."""

    reading: Reading
    status: str
    values: dict[str, Any]


# Score and name of the best checkpoint, or twice None.
Best = tuple[float | None, str | None]


@dataclass
class Run:
    """One command under way: the session, its data and what the loop's pauses need."""

    options: TrainOptions
    session: Session
    state: TrainState
    data: TaskData
    collate: Collate
    recipe_text: str
    tokenizer: Any
    screen: tracking.Screen
    output_dir: Path
    census_at_start: Census
    evaluation: Evaluation | None = None
    evaluated_step: int = -1
    loss_text: str = ""
    # A line of the log whose numbers are on their way from the device; one that reads late writes it a step later, so that
    # no step waits.
    line: Line | None = None
    reads_late: bool = False
    # The step of the best checkpoint, once its model has taken the last one's place.
    held_step: int | None = None
    started: float = 0.0
    # What must be free before a checkpoint is written: its own size, and the final model's.
    reserved_bytes: int = 0
    # What a copy of a checkpoint takes of the main process's memory.
    snapshot_bytes: int = 0
    # The checkpoint that is being written, and the best one from before it.
    background: Background = field(init=False)
    best_before: Best = (None, None)
    is_told_of_memory: bool = False
    # Whether the run was told to end; None where nobody listens.
    stop: StopRequest | None = None

    def __post_init__(self) -> None:
        self.background = Background(self.session.accelerator)
        self.reads_late = self.session.accelerator.device.type == "cuda"

    # ---- pauses of the loop

    def after_step(self, session: Session, state: TrainState) -> None:
        """Log, check, evaluate and save where their intervals say so; the clock stands after the step."""
        options, clock = self.options, state.clock
        self.write_line()  # of the step before, which the device has behind it
        self._tell_of_failed_save()
        if self.screen.has_bar:
            self.screen.step(clock.step, self._status(clock) + self.loss_text)
        first = options.logging_first_step and clock.step == 1
        if first or self._is_due(options.logging_strategy, options.logging_steps, clock):
            self.start_line()
            if not self.reads_late:
                self.write_line()
        if options.check_sparsity_every and clock.step % options.check_sparsity_every == 0:
            self.write_line()
            require_promises(session, state)
        best_so_far = self._best
        if self._evaluation_is_due(clock):
            evaluation = self.evaluate_now(clock.step)
            if options.metric_for_best_model is not None:
                self.settle_save()  # a checkpoint that was not written cannot be the best
                best_so_far = self._best
                self._remember_best(evaluation.metrics)
        is_saved = False
        saves = self._is_due(options.save_strategy, options.save_steps, clock)
        if saves or (options.save_strategy == "steps" and clock.step == state.last_step):
            is_saved = self.save_now(best_so_far)
        if self.stop is not None and self.stop.is_due() and clock.step < state.last_step:
            self._end_early(is_saved=is_saved)

    def _end_early(self, *, is_saved: bool) -> None:
        """Save, leave the marker, and raise Preempted; a run that cannot save raises OutputError."""
        step = self.state.clock.step
        is_saved = is_saved and self.settle_save()
        if not is_saved and not self.save_now(self._best, beside_training=False):
            raise OutputError(f"told to end at step {step}, and no checkpoint could be written")
        if self.session.accelerator.is_main_process:
            outputs.mark_preempted(self.output_dir, step)
        raise Preempted(f"told to end (SIGTERM): saved checkpoint-{step}; the same command goes on from there")

    def _is_due(self, strategy: str, every: int | None, clock: Clock) -> bool:
        if strategy == "steps":
            return clock.step % (every or 1) == 0
        return strategy == "epoch" and (clock.step % clock.steps_per_epoch == 0 or clock.step == self.state.last_step)

    def _evaluation_is_due(self, clock: Clock) -> bool:
        options = self.options
        delay = options.eval_delay if options.eval_strategy == "epoch" else options.eval_delay / clock.steps_per_epoch
        return self._is_due(options.eval_strategy, options.eval_steps, clock) and clock.has_reached(delay)

    def _status(self, clock: Clock) -> str:
        phase = PHASE_NAMES[current_phase(self.session.module)]
        rate = self.session.optimizer.param_groups[0]["lr"]
        return f"epoch {clock.epoch:.2f}  {phase}  lr {rate:.3g}"

    def start_line(self) -> None:
        """Begin a line of the log: the mean loss terms since the last one, the rate of the last step, the phase."""
        session, clock = self.session, self.state.clock
        reading = read_window(session, self.state)
        if reading is None:
            return
        last = Clock(clock.step - 1, clock.steps_per_epoch)
        values = {
            "learning_rate": session.optimizer.param_groups[0]["lr"],
            "phase": PHASE_NAMES[current_phase(session.module)],
            **session.recipe.metrics(session, last),
        }
        pruned = f"  sparsity {values['sparsity']:.1%}" if "sparsity" in values else ""
        self.line = Line(reading, self._status(clock) + pruned, values)

    def write_line(self) -> None:
        """Write the line that was begun, if there is one. Raises InvariantError for a loss that is not finite."""
        line, self.line = self.line, None
        if line is None:
            return
        clock, means = line.reading.clock, line.reading.values()
        values: dict[str, Any] = {"epoch": round(clock.epoch, 4), **means, **line.values}
        self.state.log_history.append({"step": clock.step, **values})
        terms = "  ".join(f"{name.removesuffix('_loss')} {means[name]:.4f}" for name in sorted(means) if name != "loss")
        self.loss_text = f"  loss {means['loss']:.4f}  ({terms})"
        self.screen.line(clock.step, line.status + self.loss_text)
        self._track(clock, values)

    def _track(self, clock: Clock, values: dict[str, Any]) -> None:
        for tracker in self.session.trackers:
            tracker.log(clock.step, values)

    def evaluate_now(self, step: int) -> Evaluation:
        """Score the model as it is, which is that of `step`, on the validation set."""
        assert self.data.validation is not None
        self.write_line()
        state = self.state
        self.evaluation = evaluate(
            self.session,
            self.data.validation,
            self.collate,
            prefix="eval",
            on_batch=self.screen.batches("evaluating"),
        )
        self.evaluated_step = state.clock.step
        line = finishing.headline(self.evaluation.metrics, self.options.task)
        if not self.options.do_train:
            self.screen.say(line)
            return self.evaluation
        epoch = step / state.clock.steps_per_epoch
        self.screen.say(f"step {step}  epoch {epoch:.2f}  {line}")
        if step == state.clock.step:  # an earlier one stands in the log already
            state.log_history.append({"step": step, "epoch": round(epoch, 4), **self.evaluation.metrics})
            self._track(state.clock, self.evaluation.metrics)
        return self.evaluation

    def _remember_best(self, metrics: dict[str, float]) -> None:
        options, state = self.options, self.state
        if options.best_model_after_epoch is not None and state.clock.epoch <= options.best_model_after_epoch:
            return
        name = "eval_" + str(options.metric_for_best_model).removeprefix("eval_")
        if name not in metrics and "metric_for_best_model" not in options.explicit:
            # The usual metric is none of these labels', such as the accuracy of a regression.
            usual = next(usual for usual in METRICS[options.task] if f"eval_{usual}" in metrics)
            better = usual not in LOWER_IS_BETTER
            self.options = options = replace(options, metric_for_best_model=usual, greater_is_better=better)
            name = f"eval_{usual}"
        if name not in metrics:
            known = ", ".join(key.removeprefix("eval_") for key in finishing.scores(metrics))
            raise OptionError(
                f"--metric_for_best_model {options.metric_for_best_model}: the evaluation reports {known}"
            )
        value = metrics[name]
        sign = 1 if options.greater_is_better else -1
        if state.best_metric is None or sign * value > sign * state.best_metric:
            state.best_metric, state.best_checkpoint = value, f"checkpoint-{state.clock.step}"

    @property
    def _best(self) -> Best:
        return self.state.best_metric, self.state.best_checkpoint

    def save_now(self, best_before: Best, *, beside_training: bool = True) -> bool:
        """Save a checkpoint; whether that worked, or, of one that is written beside training, whether it has begun. A disk
        that is full costs this checkpoint, not the run: the best one is then `best_before` again.

        Raises InvariantError rather than save a model that has broken a promise.
        """
        session, state, accelerator = self.session, self.state, self.session.accelerator
        self.write_line()
        self.settle_save()
        require_promises(session, state)
        # The same answers on every rank: only the main process writes, and it may stand before another disk.
        is_short = on_main(accelerator, lambda: outputs.missing_bytes(self.output_dir, self.reserved_bytes) > 0)
        if is_short:
            self.screen.warn(
                f"checkpoint-{state.clock.step} is not written: the disk would be too full for the final model; training goes "
                "on, earlier checkpoints are untouched"
            )
            state.best_metric, state.best_checkpoint = best_before
            return False
        beside_training = beside_training and state.clock.step < state.last_step and self._may_copy()
        state.seconds += time.perf_counter() - self.started
        self.started = time.perf_counter()
        taken = checkpoint.snapshot(session, state, copies=beside_training)
        keep = {state.best_checkpoint} if state.best_checkpoint else set()
        write = self._writing(taken, keep) if accelerator.is_main_process else _nothing
        if beside_training:
            self.best_before = best_before
            self.background.start(write)
            return True
        try:
            on_main(accelerator, write)
        except OutputError as error:
            self._warn_of(error)
            state.best_metric, state.best_checkpoint = best_before
            return False
        return True

    def settle_save(self) -> bool:
        """Wait for the checkpoint that is being written; False if it failed, and the best one is again that from before.
        Every rank calls this."""
        is_well = self.background.settle()
        self._tell_of_failed_save()
        if not is_well:
            self.state.best_metric, self.state.best_checkpoint = self.best_before
        return is_well

    def _may_copy(self) -> bool:
        """Whether a checkpoint can be copied now and written beside training; the same on every rank."""
        if not self.options.async_checkpoints:
            return False
        free = on_main(self.session.accelerator, free_host_memory)
        if free < self.snapshot_bytes and not self.is_told_of_memory:
            self.is_told_of_memory = True
            self.screen.say(
                f"checkpoints are written while training waits: a copy would take {self.snapshot_bytes / 1e9:.2f} GB of host "
                f"memory, and {free / 1e9:.2f} GB are free"
            )
        return free >= self.snapshot_bytes

    def _writing(self, taken: checkpoint.Snapshot, keep: set[str]) -> Callable[[], None]:
        """What writes a checkpoint and takes away old ones; knows all that it needs, whatever training does meanwhile."""
        ranges = finishing.present_ranges(self.session.module)

        def write() -> None:
            checkpoint.write(
                taken,
                self.output_dir,
                extra=lambda folder: finishing.write_companions(self, folder, self.session.plan, ranges),
            )
            checkpoint.prune_checkpoints(self.output_dir, self.options.save_total_limit, keep)

        return write

    def _tell_of_failed_save(self) -> None:
        error = self.background.failure()
        if error is not None:
            self._warn_of(error)

    def _warn_of(self, error: SparseAccelError) -> None:
        self.screen.warn(f"{error}; training goes on, earlier checkpoints are untouched")

    def close(self) -> None:
        """Let a checkpoint be written to its end, take the bar away and close the logs, however the run ended."""
        self.background.close()
        self._tell_of_failed_save()
        self.screen.stop_training()
        for tracker in self.session.trackers:
            tracker.close()

    # ---- after the loop

    def finish_training(self) -> None:
        """Leave the loop: last log line, invariants, the best checkpoint where it was asked for."""
        self.write_line()
        self.start_line()
        self.write_line()
        self.settle_save()
        self.screen.stop_training()
        self.state.seconds += time.perf_counter() - self.started
        self._tell_of_skipped_rows()
        require_promises(self.session, self.state)
        best = self.state.best_checkpoint
        if self.options.load_best_model_at_end and best is not None:
            self._return_to(best)
        elif self.options.load_best_model_at_end:
            after = self.options.best_model_after_epoch
            since = "" if after is None else f" after epoch {after:g}"
            self.screen.warn(f"no checkpoint was scored{since}: the last model is kept")

    def _tell_of_skipped_rows(self) -> None:
        """Count the rows that a stream left out, over all ranks; those that were never read cannot be known."""
        stream = self.data.stream
        if stream is None:
            return
        skipped: dict[int, str] = {}
        for part in from_all(self.session.accelerator, dict(stream.skipped)):
            skipped |= {place: problem for place, problem in part.items() if problem or place not in skipped}
        if skipped:
            named_first = sorted(skipped.values(), key=lambda problem: not problem)
            least = "at least " if len(skipped) >= MOST_COUNTED else ""
            self.screen.say(f"of the rows that were read, training left out {least}{counted_and_named(named_first)}")

    def _return_to(self, best: str) -> None:
        """Put the best checkpoint's model in place of the last, with masks and quantizers as they were then."""
        session, clock = self.session, self.state.clock
        checkpoint.load_model(session, self.output_dir / best)
        step = on_main(session.accelerator, lambda: checkpoint.read_document(self.output_dir / best))["global_step"]
        session.recipe.on_step_start(session, Clock(step - 1, clock.steps_per_epoch))
        self.screen.say(f"best checkpoint: {best} ({self.options.metric_for_best_model} {self.state.best_metric:.4f})")
        if step != clock.step:
            self.evaluated_step, self.held_step = -1, step


def _nothing() -> None:
    """The part of the other ranks in what the main process writes."""


# Of quantization alone: a float model may be sparse, and pruning may be under way.
PHASE_NAMES = {Phase.OFF: "float", Phase.OBSERVE: "observing", Phase.FROZEN: "frozen"}


def current_phase(model: torch.nn.Module) -> Phase:
    """What the quantizers do now; OFF for a model without any."""
    return next((quantizer.phase for quantizer in quantizers(model).values()), Phase.OFF)
