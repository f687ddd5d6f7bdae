"""Everything before the first step: read, check, and only then write and shard."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from sparse_accel.compress.census import Census
from sparse_accel.compress.plan import CompressionPlan, install
from sparse_accel.compress.ranges import keep_weights
from sparse_accel.errors import OptionError, RecipeError
from sparse_accel.folders.trained import load_ranges, trained_plan
from sparse_accel.modifiers.constant_pruning import ConstantPruningModifier
from sparse_accel.modifiers.gradual_pruning import FROM_PARAM, GradualPruning
from sparse_accel.modifiers.quantization import QuantizationModifier
from sparse_accel.recipe.schema import Recipe
from sparse_accel.runtime import checkpoint, outputs, setup, tracking
from sparse_accel.runtime.backends import Backend, PlainBackend
from sparse_accel.runtime.batches import StepLoader
from sparse_accel.runtime.compiling import check_compile, compile_blocks, compiled_part, require_compiler
from sparse_accel.runtime.options import TrainOptions
from sparse_accel.runtime.pauses import Run
from sparse_accel.runtime.streaming import StreamLoader
from sparse_accel.runtime.teachers.caching import Asking, LoadedTeacher, settle
from sparse_accel.runtime.together import on_main
from sparse_accel.runtime.training import TrainState
from sparse_accel.session import Session, Teacher
from sparse_accel.tasks import resolve_task
from sparse_accel.tasks.base import Task, TaskData
from sparse_accel.tasks.collating import Collate, PackedCollator
from sparse_accel.timeline import Clock


@dataclass(frozen=True)
class Parts:
    """What a command names, read and found to fit together; `model` carries its masks and quantizers. `collate` lays batches
    out as the run wants them, `data.collate` pads them."""

    task: Task
    tokenizer: Any
    model: Any
    data: TaskData
    collate: Collate
    teacher: LoadedTeacher | None
    plan: CompressionPlan
    census: Census
    grouping: str
    notes: list[str]
    # What the model takes beside the inputs of its forward.
    more_inputs: frozenset[str] = frozenset()


def prepare(options: TrainOptions, accelerator: Accelerator, backend: Backend, screen: tracking.Screen) -> Run:
    """From options to a run at its first step, or at a checkpoint's. Raises SparseAccelError for all that can be wrong,
    before anything is written."""
    torch.manual_seed(options.seed)
    recipe = setup.load_recipe(options)
    epochs = setup.num_epochs(options, recipe)
    recipe.check(epochs)
    refuse_hopeless_quantization(options, recipe)
    refuse_released_masks(options, recipe)
    output_dir, recipe_text = Path(options.output_dir), recipe.to_yaml() if recipe.modifiers else ""
    command = outputs.fingerprint(options.identity(), recipe_text, options.train_file if options.do_train else None)
    command["precision"] = backend.precision  # the launcher may have chosen it
    setup.require_same_command(accelerator, command, setup.named_files(options))
    if options.compile:
        require_compiler(accelerator.device)
        check_compile(backend)
    start = on_main(
        accelerator,
        lambda: outputs.decide_start(
            output_dir,
            command,
            overwrite=options.overwrite_output_dir,
            resume=options.resume_from_checkpoint,
            trains=options.do_train,
        ),
    )
    regrouped: list[str] = []
    if start.checkpoint is not None:
        options, regrouped = keep_step_size(options, start.checkpoint, accelerator)
    parts = read_parts(options, recipe, accelerator)
    loader = build_loader(options, parts, epochs, accelerator)
    total_steps = Clock(0, loader.steps_per_epoch).step_of(epochs) if loader else 0
    last_step = min(total_steps, options.max_steps) if options.max_steps > 0 else total_steps
    if loader is not None:
        refuse_late_quantization(recipe, Clock(0, loader.steps_per_epoch), total_steps)
        if start.checkpoint is not None:
            saved, steps_per_epoch = start.checkpoint, loader.steps_per_epoch
            on_main(accelerator, lambda: checkpoint.check(saved, steps_per_epoch))
    warnings = [*recipe.warnings, *setup.overruled_flags(options, recipe, total_steps)]
    warnings += setup.idle_options(options, recipe)
    warnings += setup.idle_cores(accelerator)
    if options.reset_optimizer and start.checkpoint is None:
        warnings.append("--reset_optimizer has no effect: there is no checkpoint to continue from")
    warnings += lost_sparsity(options, recipe, parts.census)
    disk_needs = checkpoint_and_final_bytes(options, parts)
    warnings += on_main(accelerator, lambda: check_disk(options, parts, loader, last_step))

    teacher = None
    if parts.teacher is not None and loader is not None:
        asking = Asking(
            replace(options, max_seq_length=parts.data.collate.max_length),
            recipe,
            parts.task,
            parts.model,
            accelerator,
            backend.precision,
            sum(disk_needs),
            screen,
        )
        teacher = settle(parts.teacher, asking, loader, last_step)

    if not start.joins:
        open_folder(accelerator, output_dir, command, clears=start.clears)
    session = build_session(options, recipe, parts, loader, teacher, total_steps, accelerator, backend)
    # From here on each rank draws its own random numbers: dropout must not be the same everywhere.
    torch.manual_seed(options.seed + accelerator.process_index)
    state = TrainState(clock=Clock(0, loader.steps_per_epoch if loader else 1), last_step=last_step)
    if start.checkpoint is not None:
        state = checkpoint.load(session, start.checkpoint, last_step, reset_optimizer=options.reset_optimizer)
        if state.clock.step > last_step:
            warnings.append(
                f"the checkpoint stands at step {state.clock.step}, past --max_steps {options.max_steps}: nothing is trained"
            )
        if state.clock.step:
            # What held in the last step holds until the next one: there may be none before the evaluation.
            recipe.on_step_start(session, Clock(state.clock.step - 1, state.clock.steps_per_epoch))
    if accelerator.is_main_process and options.do_train:
        session.trackers = open_trackers(options, accelerator, output_dir, state, screen)

    stubs = [f"--{name}: {resolution.note}" for name, resolution in options.stubs.items()]
    for note in [*([start.message] if start.message else []), *stubs, *regrouped, *parts.notes]:
        screen.say(note)
    if options.compile and (part := compiled_part(recipe, state.clock)) is not None:
        screen.say(part)
    for warning in warnings:
        screen.warn(warning)
    if options.do_train and not options.one_shot:
        screen.say(_announcement(parts, state, epochs, accelerator, backend))
        screen.start_training(last_step, state.clock.step)
    return Run(
        options=options,
        session=session,
        state=state,
        data=parts.data,
        collate=parts.collate,
        recipe_text=recipe_text,
        tokenizer=parts.tokenizer,
        screen=screen,
        output_dir=output_dir,
        census_at_start=parts.census,
        reserved_bytes=sum(disk_needs),
        snapshot_bytes=disk_needs[0],
        started=time.perf_counter(),
    )


def keep_step_size(options: TrainOptions, saved: Path, accelerator: Accelerator) -> tuple[TrainOptions, list[str]]:
    """Options with which a step has as many features as where the checkpoint comes from, and what to tell the user."""
    wanted, num_processes = options.gradient_accumulation_steps, accelerator.num_processes
    micro_batch_size = options.per_device_train_batch_size
    fitting = on_main(accelerator, lambda: checkpoint.accumulation(saved, micro_batch_size, wanted, num_processes))
    if fitting == wanted:
        return options, []
    note = (
        f"another number of processes: {fitting} micro-batches a step instead of {wanted}, so that a step keeps its "
        f"{fitting * micro_batch_size * num_processes} features"
    )
    return replace(options, gradient_accumulation_steps=fitting), [note]


def read_parts(options: TrainOptions, recipe: Recipe, accelerator: Accelerator) -> Parts:
    """Load tokenizer, model, data and teacher, and give the model its masks and quantizers."""
    task = resolve_task(options.task)
    tokenizer = setup.load_student_tokenizer(options)
    with accelerator.local_main_process_first():  # the others find the features in the cache
        data = setup.read_data(options, task, tokenizer)
    model, notes = setup.load_student(options, task, tokenizer, data.head)
    collate, grouping, batching_notes = setup.choose_batching(options, task, model, data.collate, accelerator)
    teacher, teacher_note = setup.load_teacher(
        options,
        recipe,
        task,
        model,
        tokenizer,
        is_packed=isinstance(collate, PackedCollator),
        max_length=data.collate.max_length,
    )
    census = Census.of(model)
    plan = setup.plan_compression(recipe, model)
    setup.share_pruning(plan, accelerator)
    if options.quantized_attention == "fused" and not plan.fuse_attention():
        notes.append("--quantized_attention fused has no effect: the recipe quantizes no attention products")
    trained = None if options.do_train else trained_plan(options.model_name_or_path)
    plan = trained or plan
    positions, storage_notes = setup.choose_storage(options, model, plan, accelerator)
    setup.choose_attention(model, plan, accelerator.device)
    install(model, plan, observe_padding=options.observe_padding, positions=positions)
    if trained is not None:
        load_ranges(options.model_name_or_path, model)
    collate, more_inputs = setup.choose_head_rows(
        task, model, collate, plan, accelerator, is_distilled=teacher is not None
    )
    notes = [*notes, *data.notes, *([teacher_note] if teacher_note else []), *setup.tokenizer_notes(options)]
    notes += [*storage_notes, *batching_notes]
    return Parts(task, tokenizer, model, data, collate, teacher, plan, census, grouping, notes, more_inputs)


def build_loader(
    options: TrainOptions, parts: Parts, epochs: float, accelerator: Accelerator
) -> StepLoader | StreamLoader | None:
    """The training batches of this rank; None where nothing is trained."""
    if not options.do_train:
        return None
    if parts.data.stream is not None:
        return setup.build_stream_loader(options, parts.data.stream, parts.collate, parts.task, epochs, accelerator)
    return setup.build_loader(options, parts.data.train, parts.collate, parts.grouping, parts.task, accelerator)


def build_session(
    options: TrainOptions,
    recipe: Recipe,
    parts: Parts,
    loader: StepLoader | StreamLoader | None,
    teacher: Teacher | None,
    total_steps: int,
    accelerator: Accelerator,
    backend: Backend,
) -> Session:
    """Shard the model and put all that the loop needs into one place."""
    accepts = setup.accepted_inputs(parts.model) - set(parts.task.label_keys) | parts.more_inputs
    build_whole = setup.whole_model_builder(parts.model, parts.plan)
    optimizer = setup.build_optimizer(options, parts.model)
    base_weight_decay = [group["weight_decay"] for group in optimizer.param_groups]
    if options.compile:
        compile_blocks(parts.model)
    if options.do_train:
        model, optimizer = setup.shard(backend, parts.model, optimizer, options)
    else:
        # What is only evaluated is small enough to be whole on every rank: it was trained there.
        backend, model = (
            PlainBackend(accelerator, backend.precision),
            setup.place_whole(parts.model, accelerator, backend),
        )
    module = accelerator.unwrap_model(model, keep_fp32_wrapper=True)
    keep_weights(module, options.do_train and not backend.shards_weights)
    reduce_max, reduce_sum = setup.reductions(accelerator)
    return Session(
        accelerator=accelerator,
        model=model,
        module=module,
        optimizer=optimizer,
        recipe=recipe,
        plan=parts.plan,
        task=parts.task,
        options=options,
        loader=loader,
        teacher=teacher,
        reduce_max=reduce_max,
        reduce_sum=reduce_sum,
        backend=backend,
        build_whole=build_whole,
        accepts=accepts,
        base_lr=setup.flag_learning_rate(options, recipe, total_steps),
        base_weight_decay=base_weight_decay,
    )


def check_disk(
    options: TrainOptions, parts: Parts, loader: StepLoader | StreamLoader | None, last_step: int
) -> list[str]:
    """Raise OutputError when the disk cannot even hold the final model and a checkpoint; a warning when it is tight."""
    checkpoint_bytes, final_bytes = checkpoint_and_final_bytes(options, parts)
    warning = outputs.check_disk(
        Path(options.output_dir),
        checkpoint_bytes=checkpoint_bytes,
        final_bytes=final_bytes,
        num_checkpoints=num_checkpoints(options, loader, last_step),
    )
    return [warning] if warning else []


def checkpoint_and_final_bytes(options: TrainOptions, parts: Parts) -> tuple[int, int]:
    """Estimated sizes on disk; the final model is whole, however its weights are stored in training."""
    num_moments = 0 if options.optim == "sgd" else 2
    return checkpoint.checkpoint_bytes(parts.model, num_moments=num_moments), 4 * parts.census.num_parameters


# A model with a larger share of zeros than this was pruned on purpose: SparseML's own line.
_SPARSE = 0.05


def lost_sparsity(options: TrainOptions, recipe: Recipe, census: Census) -> list[str]:
    """A warning where a run is not the sparse transfer that it looks like."""
    holds = recipe.has(ConstantPruningModifier)
    gradual = recipe.of(GradualPruning)
    if options.do_train and census.sparsity > _SPARSE and gradual:
        low = [m for m in gradual if isinstance(m.init_sparsity, float) and m.init_sparsity < census.sparsity]
        return [
            f"{recipe.where(modifier)}: {type(modifier).__name__}: begins at {modifier.init_sparsity:.1%}, but the model is sparse "
            f"already ({census.sparsity:.1%} of its prunable weights are zero): training will revive the other zeros; "
            f"init_sparsity: {FROM_PARAM} begins with all of them"
            for modifier in low
        ]
    if options.do_train and not options.one_shot and census.sparsity > _SPARSE and not holds:
        return [
            f"the model is sparse ({census.sparsity:.1%} of its prunable weights are zero) and nothing holds its zeros: training "
            "will revive them; a recipe with a ConstantPruningModifier keeps them"
        ]
    if holds and census.sparsity <= _SPARSE:
        return [
            f"the recipe holds the model's zeros, but the model is dense ({census.sparsity:.1%} of its prunable weights are "
            f"zero): is --model_name_or_path {options.model_name_or_path} the pruned model?"
        ]
    return []


def num_checkpoints(options: TrainOptions, loader: StepLoader | StreamLoader | None, last_step: int) -> int:
    """How many checkpoints will lie in the folder at the end."""
    if loader is None or options.one_shot or options.save_strategy == "no" or not last_step:
        return 0
    every = options.save_steps if options.save_strategy == "steps" else loader.steps_per_epoch
    count = -(-last_step // every)
    return min(count, options.save_total_limit) if options.save_total_limit else count


def open_folder(accelerator: Accelerator, output_dir: Path, command: Mapping[str, Any], *, clears: bool) -> None:
    """The main process takes possession of the output folder; the others wait for it."""
    if accelerator.is_main_process:
        outputs.open_folder(output_dir, command, sys.argv, clears=clears)
    accelerator.wait_for_everyone()


def open_trackers(
    options: TrainOptions, accelerator: Accelerator, output_dir: Path, state: TrainState, screen: tracking.Screen
) -> list[Any]:
    """The log in JSON lines, and what `--report_to` names."""
    trackers: list[Any] = [tracking.JsonLines(output_dir, state.log_history, screen.warn)]
    if accelerator.log_with:
        name = options.run_name or output_dir.name
        trackers.append(tracking.AccelerateTrackers(accelerator, name, options.to_json()))
    return trackers


def _announcement(parts: Parts, state: TrainState, epochs: float, accelerator: Accelerator, backend: Backend) -> str:
    data = f"{len(parts.data.train):,} features" if parts.data.train is not None else "streamed text"
    precision = backend.precision if backend.precision != "no" else "fp32"
    count = accelerator.num_processes
    processes = "1 process" if count == 1 else f"{count} processes ({backend.name})"
    return (
        f"{data}, {state.clock.steps_per_epoch:,} steps an epoch, {epochs:g} epochs, {state.last_step:,} "
        f"steps; {processes} on {accelerator.device.type}, {precision}"
    )


def refuse_late_quantization(recipe: Recipe, clock: Clock, total_steps: int) -> None:
    """Raise RecipeError for quantization whose first step would come after the last."""
    for modifier in recipe.of(QuantizationModifier):
        if clock.step_of(modifier.start_epoch or 0.0) >= total_steps:
            raise RecipeError(
                f"QuantizationModifier: start_epoch {modifier.start_epoch} lies after the start of the run's last step "
                f"(epoch {(total_steps - 1) / clock.steps_per_epoch:.4g}), so that nothing would be quantized",
                recipe.where(modifier),
            )


def refuse_released_masks(options: TrainOptions, recipe: Recipe) -> None:
    """Raise RecipeError for a recipe that, in one shot, would let go of the zeros that it makes."""
    for modifier in recipe.of(GradualPruning):
        if options.one_shot and not modifier.leave_enabled:
            raise RecipeError(
                f"{type(modifier).__name__}: leave_enabled must be true with --one_shot: nothing would be pruned at its end",
                recipe.where(modifier),
            )


def refuse_hopeless_quantization(options: TrainOptions, recipe: Recipe) -> None:
    """Quantization needs ranges: from training, or in one shot from calibration batches. Raises OptionError."""
    if recipe.modifiers and not options.do_train:
        raise OptionError(
            "--recipe: without --do_train there is nothing to apply it to; a trained folder brings its own compression, so "
            "leave the recipe out to evaluate one"
        )
    quantization = recipe.of(QuantizationModifier)
    if not quantization:
        return
    where = recipe.where(quantization[0])
    if options.one_shot and not setup.calibration_steps(options, recipe):
        raise OptionError(
            f"{where}: --one_shot with quantization needs batches to take the ranges from: give --num_calibration_steps"
        )
