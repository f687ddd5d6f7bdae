"""A training command from its options to its output folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from sparse_accel.compress.ranges import calibrating, end_step
from sparse_accel.folders.libraries import quiet_libraries
from sparse_accel.runtime import finishing, setup, tracking
from sparse_accel.runtime.allocation import keep_freed_memory
from sparse_accel.runtime.batches import MicroBatch
from sparse_accel.runtime.checkpoint import checkpoints
from sparse_accel.runtime.compiling import sheltered_compilers
from sparse_accel.runtime.invariants import require_zeros
from sparse_accel.runtime.options import TrainOptions
from sparse_accel.runtime.pauses import Run
from sparse_accel.runtime.preemption import StopRequest
from sparse_accel.runtime.preparing import prepare
from sparse_accel.runtime.training import show_tokens
from sparse_accel.runtime.training import train as run_steps
from sparse_accel.timeline import Clock


@dataclass(frozen=True)
class TrainResult:
    """What a run came to: the same on every rank, but for the times it took.

    `metrics` are those of `all_results.json`: `eval_f1`, `train_loss`, ...; `steps` and `epoch` are how far the model was
    trained, runs that this one continued included; `best_checkpoint` is the best one's folder where a score chose it.
    """

    output_dir: Path
    metrics: Mapping[str, Any]
    steps: int
    epoch: float
    best_checkpoint: Path | None


def train(options: TrainOptions) -> TrainResult:
    """Carry out a `train` command; the process group, if there is one, lives on. Raises SparseAccelError for everything
    that the user can put right."""
    quiet_libraries()
    options = setup.as_launched(options)
    accelerator, backend = setup.start_accelerator(options)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    screen = tracking.Screen(Console(), is_shown=accelerator.is_main_process, use_bar=not options.disable_tqdm)
    run = prepare(options, accelerator, backend, screen)
    try:
        if options.one_shot:
            apply_once(run)
        elif options.do_train:
            run.stop = StopRequest(accelerator.num_processes, accelerator.state.backend)
            with run.stop.listening(), sheltered_compilers() if options.compile else nullcontext():
                run_steps(run.session, run.state, run.after_step)
            run.finish_training()
        metrics = finishing.finish(run)
    except KeyboardInterrupt:
        run.background.finish()
        saved = checkpoints(run.output_dir)
        screen.say(
            "stopped; the same command goes on from "
            + (saved[-1].path.name if saved else "the beginning: there is no checkpoint yet")
        )
        raise
    finally:
        run.close()
    if accelerator.num_processes > 1:
        accelerator.wait_for_everyone()
    state, best = run.state, run.state.best_checkpoint
    return TrainResult(
        output_dir=run.output_dir,
        metrics=metrics,
        steps=state.clock.step,
        epoch=state.clock.epoch,
        best_checkpoint=run.output_dir / best if best else None,
    )


def leave_processes() -> None:
    """Take the process group apart, where there is one: nothing is trained in this process any more."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@torch.no_grad()
def apply_once(run: Run) -> None:
    """`--one_shot`: let the recipe's end state hold at once, with ranges from calibration batches instead of training."""
    session, options = run.session, run.options
    session.model.eval()
    end = Clock(max(1, round((session.recipe.num_epochs or 0) + 1)), 1)
    session.recipe.on_step_start(session, end)
    batches = _calibration_batches(run, setup.calibration_steps(options, session.recipe) or 1)
    with calibrating(session.module):
        for done, micro_batch in enumerate(batches, start=1):
            show_tokens(session, micro_batch)
            session.outputs(micro_batch.inputs, session.forward_model)
            end_step(session.module, session.reduce_max)
            run.screen.step(done, "calibrating")
    require_zeros(session)


def _calibration_batches(run: Run, count: int) -> Iterator[MicroBatch]:
    loader = run.session.loader
    steps = loader.steps(run.state.clock, loader.steps_per_epoch)
    # As many on every rank: their ranges are put together after each.
    return islice((batch for step in steps for batch in step), count)
