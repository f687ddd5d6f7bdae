"""Whether a teacher is asked in every step or once: `--teacher_cache`."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, final

import torch
import transformers
from torch import Tensor, nn

from sparse_accel.errors import ModelError, OptionError
from sparse_accel.modifiers.distillation import DistillationModifier
from sparse_accel.recipe.schema import Recipe
from sparse_accel.runtime.batches import StepLoader
from sparse_accel.runtime.options import TrainOptions
from sparse_accel.runtime.streaming import StreamLoader
from sparse_accel.runtime.teachers.cache_fill import CacheJob, CacheNotFilledError, fill, look
from sparse_accel.runtime.teachers.cache_key import describe_model, features_digest, fingerprint
from sparse_accel.runtime.teachers.cache_store import FORMAT, CachedOutputs, is_same_disk
from sparse_accel.runtime.teachers.fitting import layer_activations
from sparse_accel.runtime.teachers.placed import PlacedTeacher
from sparse_accel.runtime.teachers.placing import place
from sparse_accel.runtime.together import on_main
from sparse_accel.runtime.tracking import Screen
from sparse_accel.session import CACHED_PREFIX, Teacher
from sparse_accel.tasks.base import Task
from sparse_accel.tasks.collating import Collate, Collator
from sparse_accel.tasks.features import Features
from sparse_accel.tasks.files import cache_folder
from sparse_accel.timeline import Clock

_LARGEST_BATCH: Final = 32
_BATCH_BYTES: Final = 5e8


@dataclass
class LoadedTeacher:
    """A teacher that is whole on the CPU and fits the student. `accepted` are the inputs that it is given; `note` says whose it
    is; `label_order` where each of the student's labels stands among the teacher's, of each output where that differs."""

    model: Any
    accepted: frozenset[str]
    note: str
    label_order: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def let_go(self) -> None:
        """Refer to the model no more."""
        self.model = None


@final
class CachedTeacher:
    """Answers with what a batch brings along, `CACHED_PREFIX` and the output's name."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        self.keys = keys

    def __call__(self, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """See `Teacher`; 0 on padding."""
        return {key: batch[CACHED_PREFIX + key].float() for key in self.keys}


@dataclass(frozen=True)
class Asking:
    """The run that asks. `reserved` are the bytes that it needs for itself on the disk of its output folder."""

    options: TrainOptions
    recipe: Recipe
    task: Task
    student: nn.Module
    accelerator: Any
    precision: str
    reserved: int
    screen: Screen


def settle(loaded: LoadedTeacher, run: Asking, loader: StepLoader | StreamLoader, last_step: int) -> Teacher:
    """The teacher of a run up to `last_step`: placed, or a cache, which is filled if need be and whose columns `loader` then
    adds to its batches. All ranks call this.

    Raises OptionError for a `--teacher_cache DIR` that cannot be filled, and what `place` raises.
    """
    wish = "off" if run.options.one_shot else run.options.teacher_cache
    if wish == "off":
        return _place(loaded, run)
    obstacle = obstacle_to_cache(run.options, run.recipe, run.task)
    if obstacle is not None:
        run.screen.say(f"teacher cache: none, for {obstacle}")
        return _place(loaded, run)
    assert isinstance(loader, StepLoader), "no feature of a stream is read twice"
    job = cache_job(loaded, run, loader)
    found, problems = look(job, run.accelerator)
    for problem in problems:
        run.screen.warn(f"teacher cache: {job.folder} is not used: {problem}; it is made again")
    if found is not None:
        run.screen.say(f"teacher cache: {loaded.note} is read from {job.folder} and takes no memory")
        loaded.let_go()
    else:
        steps, epoch = distilled_steps(run.recipe, loader.steps_per_epoch, last_step), loader.steps_per_epoch
        if wish == "auto" and steps <= epoch:
            run.screen.say(
                f"teacher cache: none, for the run distils in {steps} steps and an epoch has {epoch}; --teacher_cache DIR "
                "caches all the same"
            )
            return _place(loaded, run)
        placed, stays = _place_to_fill(loaded, run)
        found = _filled(job, placed, run, is_needed=wish != "auto" or not stays)
        if found is None:
            return placed
        placed.release()
    free_memory()
    loader.add_columns(found)
    return CachedTeacher(job.keys)


def _filled(job: CacheJob, teacher: PlacedTeacher, run: Asking, *, is_needed: bool) -> CachedOutputs | None:
    """The cache after it was filled; where that is not possible, an OptionError if it is needed, None if not."""
    wish, screen = run.options.teacher_cache, run.screen
    advance = screen.batches("teacher cache")
    try:
        return fill(
            job,
            teacher,
            run.accelerator,
            reserved=run.reserved if is_same_disk(job.folder, Path(run.options.output_dir)) else 0,
            announce=lambda text: screen.say(f"teacher cache: {text}; the teacher is asked once for all"),
            on_batch=advance,
        )
    except CacheNotFilledError as error:
        if is_needed:
            raise OptionError(f"--teacher_cache {wish}: {error}") from error
        screen.warn(f"teacher cache: none, the teacher is asked in every step: {error}")
        return None
    finally:
        if advance is not None:
            advance(1, 1)


def free_memory() -> None:
    """Give back what models that nobody refers to had; their modules refer to each other in circles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def obstacle_to_cache(options: TrainOptions, recipe: Recipe, task: Task) -> str | None:
    """Why a run needs its teacher in every step; None if a cache would say the same."""
    if not task.features_are_fixed:
        return "the features of this task are others in every epoch"
    if options.distill_include_padding:
        return "--distill_include_padding asks what the teacher says on padding, which is another in every batch"
    distillers = recipe.of(DistillationModifier)
    for modifier in distillers:
        others = sorted(set(modifier.distill_output_keys or ()) - set(task.output_keys))
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


def cache_job(loaded: LoadedTeacher, run: Asking, loader: StepLoader) -> CacheJob:
    """What a cache for this run holds, and where it is. All ranks call this."""
    options, features, collate = run.options, loader.batches.features, loader.batches.collate
    distillers = run.recipe.of(DistillationModifier)
    wanted = {key for modifier in distillers for key in modifier.distill_output_keys or run.task.output_keys}
    keys = tuple(key for key in run.task.output_keys if key in wanted)
    made_of = on_main(run.accelerator, lambda: _made_of(loaded, run, keys, features, collate))
    key = fingerprint(made_of)
    root = (
        cache_folder(options.cache_dir) / "teachers" if options.teacher_cache == "auto" else Path(options.teacher_cache)
    )
    return CacheJob(
        folder=root / key,
        fingerprint=key,
        made_of=made_of,
        features=features,
        collate=collate,
        padding_side=collate.padding_side if isinstance(collate, Collator) else "right",
        keys=keys,
        select=distillers[0].teacher_inputs,
        batch_size=made_of["batches"]["features"],
        dtype=options.teacher_cache_dtype,
        # Of what stands at places a task always leaves the padding out.
        by_token=lambda key, logits, batch: run.task.distillation_keep(key, logits, batch) is not None,
        num_workers=options.dataloader_num_workers,
    )


def fill_batch_size(model: Any, max_length: int) -> int:
    """Features that the teacher is given at a time: as many as take half a GB in one of its layers, 32 at most. It follows from
    the teacher alone, so that runs with other batches share its cache."""
    config = model.config
    one = layer_activations(hidden=config.hidden_size, heads=config.num_attention_heads, batch=1, length=max_length)
    return max(1, min(_LARGEST_BATCH, int(_BATCH_BYTES // one)))


def _made_of(
    loaded: LoadedTeacher, run: Asking, keys: tuple[str, ...], features: Features, collate: Collate
) -> dict[str, Any]:
    """All that the bits of a cache depend on. How the teacher is spread, and over how many processes, is no part of it."""
    given = run.recipe.of(DistillationModifier)[0].teacher_input_keys
    assert run.options.max_seq_length is not None, "a run knows the length of its features by now"
    return {
        "format": FORMAT,
        "teacher": describe_model(loaded.model),
        "inputs": sorted(loaded.accepted if given is None else loaded.accepted & set(given)),
        "task": run.task.name,
        "outputs": list(keys),
        **(
            {"label_order": {key: list(order) for key, order in loaded.label_order.items()}}
            if loaded.label_order
            else {}
        ),
        "features": {"count": len(features), "content": features_digest(features)},
        "batches": {
            "made_by": type(collate).__name__,
            # Every collator is a dataclass of what its batches depend on.
            **asdict(collate),  # type: ignore[call-overload]
            "features": fill_batch_size(loaded.model, run.options.max_seq_length),
        },
        "precision": run.precision,
        "dtype": run.options.teacher_cache_dtype,
        "device": run.accelerator.device.type,
        "libraries": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def _place_to_fill(loaded: LoadedTeacher, run: Asking) -> tuple[PlacedTeacher, bool]:
    """The teacher beside the student, and True; or False where it fits only as long as the student is not there."""
    try:
        return _place(loaded, run), True
    except ModelError:
        return _place(loaded, run, is_alone=True), False


def _place(loaded: LoadedTeacher, run: Asking, *, is_alone: bool = False) -> PlacedTeacher:
    placed, line = place(
        loaded.model,
        run.student,
        run.options,
        run.accelerator,
        run.precision,
        loaded.accepted,
        label_order=loaded.label_order,
        is_alone=is_alone,
    )
    loaded.let_go()
    run.screen.say(f"{line}; it is {loaded.note}")
    return placed
