"""Whether a teacher is asked in every step or once: `--teacher_cache`."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import torch
import transformers
from torch import Tensor, nn

from sparse_accel.errors import OptionError
from sparse_accel.modifiers.distillation import DistillationModifier
from sparse_accel.recipe.schema import Recipe
from sparse_accel.runtime.options import TrainOptions
from sparse_accel.runtime.teachers.cache_fill import CacheJob, CacheNotFilledError, fill, look
from sparse_accel.runtime.teachers.cache_key import describe_model, features_digest, fingerprint
from sparse_accel.runtime.teachers.cache_store import FORMAT, CachedOutputs
from sparse_accel.runtime.teachers.placed import PlacedTeacher
from sparse_accel.runtime.teachers.placing import place
from sparse_accel.runtime.together import on_main
from sparse_accel.session import CACHED_PREFIX, Teacher
from sparse_accel.tasks.base import Task
from sparse_accel.tasks.collating import Collate, Collator
from sparse_accel.tasks.features import Features
from sparse_accel.tasks.files import cache_folder
from sparse_accel.timeline import Clock


@dataclass
class LoadedTeacher:
    """A teacher that is whole on the CPU and fits the student. `accepted` are the inputs that it is given; `note` is what the
    user should know of it. Without a model once `take` was called."""

    model: nn.Module | None
    accepted: frozenset[str]
    note: str = ""

    def take(self) -> nn.Module:
        """The model, which nothing here refers to any more."""
        assert self.model is not None
        model, self.model = self.model, None
        return model


@final
class CachedTeacher:
    """Answers with what a batch brings along, `CACHED_PREFIX` and the output's name."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        self.keys = keys

    def __call__(self, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """See `Teacher`; 0 on padding."""
        return {key: batch[CACHED_PREFIX + key].float() for key in self.keys}


@dataclass(frozen=True)
class Setting:
    """What a run has besides its teacher: the batches that it will look at, and how long."""

    options: TrainOptions
    recipe: Recipe
    task: Task
    student: nn.Module
    features: Features
    collate: Collate
    steps_per_epoch: int
    last_step: int
    accelerator: Any
    precision: str
    # Bytes of the disk of the output folder that the run will need for itself.
    reserved: int
    say: Callable[[str], None]
    warn: Callable[[str], None]
    progress: Callable[[str], Callable[[int, int], None] | None]


def settle(loaded: LoadedTeacher, run: Setting) -> tuple[Teacher, CachedOutputs | None]:
    """The teacher of a run, and the columns that its batches need for it. All ranks call this.

    Raises OptionError for a `--teacher_cache DIR` that cannot be filled, and what `place` raises.
    """
    wish = "off" if run.options.one_shot else run.options.teacher_cache
    obstacle = obstacle_to_cache(run)
    if wish == "off" or obstacle is not None:
        if obstacle is not None and wish != "off":
            run.say(f"teacher: not cached, for {obstacle}")
        return _place(loaded, run), None
    job = cache_job(loaded, run)
    found, problems = look(job, run.accelerator)
    for problem in problems:
        run.say(f"teacher cache: {job.folder} is not used: {problem}; it is made again")
    if found is not None:
        run.say(f"teacher cache: {job.folder} ({loaded.note or 'teacher'}); the teacher itself is not needed")
        loaded.take()
        free_memory()
        return CachedTeacher(job.keys), found
    steps = distilled_steps(run.recipe, run.steps_per_epoch, run.last_step)
    if wish == "auto" and steps <= run.steps_per_epoch:
        run.say(
            f"teacher: not cached, for the run distils in {steps} steps, no more than an epoch's {run.steps_per_epoch} "
            "(--teacher_cache DIR caches all the same)"
        )
        return _place(loaded, run), None
    placed = _place(loaded, run)
    try:
        found = fill(
            job,
            placed,
            run.accelerator,
            reserved=run.reserved,
            announce=lambda text: run.say(f"teacher cache: {text}; filled now, once for all"),
            on_batch=run.progress("teacher cache"),
        )
    except CacheNotFilledError as error:
        if wish != "auto":
            raise OptionError(f"--teacher_cache {wish}: {error}") from error
        run.warn(f"the teacher is not cached and will be asked in every step: {error}")
        return placed, None
    placed.release()
    free_memory()
    return CachedTeacher(job.keys), found


def free_memory() -> None:
    """Give back what models that nobody refers to had; their modules refer to each other in circles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def obstacle_to_cache(run: Setting) -> str | None:
    """Why a run needs its teacher in every step; None if a cache would say the same."""
    if not run.task.features_are_fixed:
        return "the features of this task are others in every epoch"
    if run.options.distill_include_padding:
        return "--distill_include_padding asks what it says on padding, which is another in every batch"
    distillers = run.recipe.of(DistillationModifier)
    for modifier in distillers:
        others = sorted(set(modifier.distill_output_keys or ()) - set(run.task.output_keys))
        if others:
            return f"distill_output_keys names {others[0]}, which is no output of the task and may be of any size"
        if modifier.teacher_input_keys is not None and "attention_mask" not in modifier.teacher_input_keys:
            return "teacher_input_keys leaves attention_mask out, so that its outputs depend on the batch"
    if len({modifier.teacher_input_keys for modifier in distillers}) > 1:
        return "the recipe's DistillationModifiers give it different teacher_input_keys"
    return None


def distilled_steps(recipe: Recipe, steps_per_epoch: int, last_step: int) -> int:
    """The steps before `last_step` in which a DistillationModifier speaks."""
    clock, count = Clock(0, steps_per_epoch), 0
    for modifier in recipe.of(DistillationModifier):
        first, end = clock.step_of(modifier.interval.start), modifier.interval.end
        count += max(0, min(last_step, last_step if end is None else clock.step_of(end)) - first)
    return count


def cache_job(loaded: LoadedTeacher, run: Setting) -> CacheJob:
    """What a cache for this run holds, and where it is. All ranks call this."""
    options = run.options
    distillers = run.recipe.of(DistillationModifier)
    wanted = {key for modifier in distillers for key in modifier.distill_output_keys or run.task.output_keys}
    keys = tuple(key for key in run.task.output_keys if key in wanted)
    made_of = on_main(run.accelerator, lambda: _made_of(loaded, run, keys))
    key = fingerprint(made_of)
    root = (
        cache_folder(options.cache_dir) / "teachers" if options.teacher_cache == "auto" else Path(options.teacher_cache)
    )
    return CacheJob(
        folder=root / key,
        fingerprint=key,
        made_of=made_of,
        features=run.features,
        collate=run.collate,
        padding_side=run.collate.padding_side if isinstance(run.collate, Collator) else "right",
        keys=keys,
        select=distillers[0].teacher_inputs,
        batch_size=options.per_device_train_batch_size,
        dtype=options.teacher_cache_dtype,
        num_workers=options.dataloader_num_workers,
    )


def _made_of(loaded: LoadedTeacher, run: Setting, keys: tuple[str, ...]) -> dict[str, Any]:
    """All that the bits of a cache depend on. How the teacher is spread, and over how many processes, is no part of it."""
    given = run.recipe.of(DistillationModifier)[0].teacher_input_keys
    return {
        "format": FORMAT,
        "teacher": describe_model(loaded.model),
        "inputs": sorted(loaded.accepted if given is None else loaded.accepted & set(given)),
        "task": run.task.name,
        "outputs": list(keys),
        "features": {"count": len(run.features), "content": features_digest(run.features)},
        "batches": {
            "made_by": type(run.collate).__name__,
            # Every collator is a dataclass of what its batches depend on.
            **asdict(run.collate),  # type: ignore[call-overload]
            "features": run.options.per_device_train_batch_size,
        },
        "precision": run.precision,
        "dtype": run.options.teacher_cache_dtype,
        "device": run.accelerator.device.type,
        "libraries": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def _place(loaded: LoadedTeacher, run: Setting) -> PlacedTeacher:
    placed, line = place(loaded.take(), run.student, run.options, run.accelerator, run.precision, loaded.accepted)
    run.say(line + (f"; {loaded.note}" if loaded.note else ""))
    return placed
