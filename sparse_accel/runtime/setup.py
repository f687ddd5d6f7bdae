"""From options to a Session, one function a noun; everything that can be wrong is found here, before anything is written."""

from __future__ import annotations

import copy
import hashlib
import inspect
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)
from torch import Tensor, nn

from sparse_accel.compress.compact import CompactLinear
from sparse_accel.compress.layers import compressed_layers, effective_weight
from sparse_accel.compress.masks import nonzero_mask
from sparse_accel.compress.plan import CompressionPlan, install, needs_quantized_attention
from sparse_accel.compress.positions import pack_positions
from sparse_accel.compress.weight_storage import compact_where_it_pays, model_zeros
from sparse_accel.errors import LaunchError, ModelError, OptionError, RecipeError
from sparse_accel.folders.head_rows import ROWS, hook_head, let_head_choose
from sparse_accel.folders.loading import has_tokenizer, label_names, load_config, load_model, load_tokenizer
from sparse_accel.folders.new_models import new_config, new_model
from sparse_accel.folders.packed_pooling import pool_by_sequence, pools_by_sequence
from sparse_accel.folders.packing_support import first_position, obstacle_to_packing
from sparse_accel.folders.trained import use_own_attention
from sparse_accel.folders.whole_weights import whole_weights
from sparse_accel.modifiers.distillation import DistillationModifier
from sparse_accel.modifiers.learning_rate import LearningRateFunctionModifier, SetLearningRateModifier
from sparse_accel.modifiers.quantization import QuantizationModifier
from sparse_accel.modifiers.weight_decay import SetWeightDecayModifier
from sparse_accel.recipe.schema import Recipe
from sparse_accel.runtime.backends import Backend, backend_of, recompute_activations, run_in_bf16
from sparse_accel.runtime.batches import StepLoader, StepSampler
from sparse_accel.runtime.deepspeed_launch import check_deepspeed, deepspeed_file, launch_environment
from sparse_accel.runtime.launch import (
    check_accumulation,
    check_environment,
    check_launch,
    gradient_clipping,
    mixed_precision,
    process_group_error,
)
from sparse_accel.runtime.option_checks import without_effect
from sparse_accel.runtime.options import TEXT, TOKEN, TrainOptions
from sparse_accel.runtime.streaming import StreamLoader
from sparse_accel.runtime.teachers.caching import LoadedTeacher
from sparse_accel.runtime.teachers.checking import check_teacher, frozen_copy, label_order
from sparse_accel.runtime.together import on_main
from sparse_accel.runtime.tracking import TRACKERS_FOLDER
from sparse_accel.tasks.base import Stream, TaskData
from sparse_accel.tasks.collating import Collate, Collator, PackedCollator

# Strategies of accelerate that this version knows.
_OFFERED = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.FSDP,
    DistributedType.DEEPSPEED,
)


def start_accelerator(options: TrainOptions) -> tuple[Accelerator, Backend]:
    """Join the process group and see that the processes are those that the launch asked for. Raises LaunchError."""
    environ = dict(os.environ)  # as the launcher left it: accelerate adds to it
    check_environment(environ)
    file = deepspeed_file(environ)
    environ = launch_environment(environ, file)
    check_accumulation(environ, options.gradient_accumulation_steps)
    has_accelerator = torch.accelerator.is_available()
    asks_for_deepspeed = environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("1", "true")
    asks_for_more = asks_for_deepspeed or environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")
    # Without a GPU accelerate would let every process of torchrun train alone; FSDP and DeepSpeed keep their own way.
    on_cpu = options.use_cpu or (not has_accelerator and not asks_for_more)
    precision = mixed_precision(
        environ, fp16=options.fp16, bf16=options.bf16, device_type="cpu" if on_cpu or not has_accelerator else "cuda"
    )
    if asks_for_deepspeed:
        check_deepspeed(environ, file, precision)
    trackers = [name for name in options.report_to if name != "none"]
    settings: dict[str, Any] = {
        "cpu": on_cpu,
        # DeepSpeed would keep its parameters in half precision; its backend lets autocast do what it does elsewhere.
        "mixed_precision": "no" if asks_for_deepspeed else precision,
        # As a plugin: a number would be looked up in the launcher's variable, which may say `auto`.
        "gradient_accumulation_plugin": GradientAccumulationPlugin(num_steps=1),
        "log_with": trackers or None,
        "project_dir": options.logging_dir or os.path.join(options.output_dir, TRACKERS_FOLDER) if trackers else None,
        "kwargs_handlers": [
            # Masks are equal on all ranks by construction, and ranges are synchronised by us, once a step.
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=timedelta(seconds=options.ddp_timeout)),
        ],
    }
    try:
        accelerator = Accelerator(**settings)
    except (RuntimeError, OSError) as error:
        known = process_group_error(error, environ)
        if known is None:
            raise
        raise known from error
    # The launcher's accumulation would divide the loss a second time: a step's loss is normalised by its features.
    accelerator.gradient_accumulation_steps = 1
    check_launch(
        environ,
        num_processes=accelerator.num_processes,
        distributed_type=accelerator.distributed_type,
        backend=accelerator.state.backend,
        device_type=accelerator.device.type,
        use_cpu=options.use_cpu,
    )
    if accelerator.distributed_type not in _OFFERED:
        raise LaunchError(
            f"training under {accelerator.distributed_type.value} is not offered; DDP, FSDP2 and DeepSpeed ZeRO-1, 2 and 3 "
            "are (launch_configs/)"
        )
    return accelerator, backend_of(accelerator, precision)


def as_launched(options: TrainOptions) -> TrainOptions:
    """The options, with gradients clipped as the launch says where it says a number. Raises OptionError where a flag that
    was given says another."""
    environ = dict(os.environ)
    norm = gradient_clipping(
        launch_environment(environ, deepspeed_file(environ)),
        options.max_grad_norm,
        is_explicit="max_grad_norm" in options.explicit,
    )
    return replace(options, max_grad_norm=norm)


def named_files(options: TrainOptions) -> dict[str, str]:
    """A fingerprint of each file that a command names and that a node may have in another version: size and beginning of
    data and weights."""
    found = {}
    for name in ("validation_file", "test_file", "model_name_or_path", "distill_teacher"):
        value = getattr(options, name)
        path = Path(value) if isinstance(value, str) and value else None
        if path is None or not path.exists():
            continue
        for file in [path] if path.is_file() else sorted([*path.glob("*.safetensors"), *path.glob("config.json")]):
            with open(file, "rb") as opened:
                beginning = hashlib.sha256(opened.read(1 << 20)).hexdigest()[:16]
            found[f"content of {name}" + ("" if file == path else f"/{file.name}")] = (
                f"{file.stat().st_size} {beginning}"
            )
    return found


def require_same_command(accelerator: Accelerator, command: Mapping[str, Any], files: Mapping[str, str]) -> None:
    """Raise LaunchError, on every rank, when nodes were given another command, recipe or data."""
    if accelerator.num_processes == 1:
        return
    gathered: list[Any] = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(gathered, {**command, **files})
    first = gathered[0]
    for rank, other in enumerate(gathered):
        differing = [name for name in sorted({*first, *other}) if first.get(name) != other.get(name)]
        if differing:
            shown = "; ".join(
                f"{name}: {first.get(name)} on rank 0, {other.get(name)} on rank {rank}" for name in differing[:5]
            )
            raise LaunchError(
                f"the processes were not given the same ({shown}); start all nodes with one command and one data"
            )


def load_recipe(options: TrainOptions) -> Recipe:
    """The recipe of the command, or one without modifiers."""
    return Recipe.load(options.recipe, options.recipe_args) if options.recipe else Recipe.empty()


def num_epochs(options: TrainOptions, recipe: Recipe) -> float:
    """How many epochs the run has: the recipe's where it names any, else the flag's."""
    return recipe.num_epochs if recipe.num_epochs else options.num_train_epochs


def calibration_steps(options: TrainOptions, recipe: Recipe) -> int | None:
    """Batches that one-shot quantization takes its ranges from: the flag's, else the recipe's number."""
    in_recipe = [modifier.num_calibration_steps for modifier in recipe.of(QuantizationModifier)]
    return options.num_calibration_steps or next((number for number in in_recipe if number), None)


def overruled_flags(options: TrainOptions, recipe: Recipe, total_steps: int) -> list[str]:
    """One warning for each flag that was given and that the recipe, or the run's length, overrules."""
    warnings = []
    if options.max_steps > total_steps > 0:
        warnings.append(f"--max_steps {options.max_steps} is not reached: the run has {total_steps} steps")
    if "num_train_epochs" in options.explicit and recipe.num_epochs and recipe.num_epochs != options.num_train_epochs:
        warnings.append(
            f"the recipe's {recipe.num_epochs:g} epochs take the place of --num_train_epochs {options.num_train_epochs:g}"
        )
    rates = [*recipe.of(LearningRateFunctionModifier), *recipe.of(SetLearningRateModifier)]
    if rates:
        names = " and ".join(sorted({type(rate).__name__ for rate in rates}))
        given = [
            f"--{name} {getattr(options, name)}"
            for name in ("learning_rate", "lr_scheduler_type", "warmup_ratio", "warmup_steps")
            if name in options.explicit
        ]
        if given:
            warnings.append(f"the recipe's {names} takes the place of {', '.join(given)}")
    if not options.one_shot and any(modifier.num_calibration_steps for modifier in recipe.of(QuantizationModifier)):
        warnings.append(
            "the recipe's num_calibration_steps counts with --one_shot only: in training, ranges follow the training batches"
        )
    if recipe.of(SetWeightDecayModifier) and "weight_decay" in options.explicit:
        warnings.append(
            f"the recipe's SetWeightDecayModifier takes the place of --weight_decay {options.weight_decay:g}"
        )
    return warnings


def idle_options(options: TrainOptions, recipe: Recipe) -> list[str]:
    """One warning for each option that was given and that nothing in the recipe makes use of."""
    idle = without_effect(options)
    if options.distill_include_padding and not recipe.has(DistillationModifier):
        idle.append("--distill_include_padding has no effect: the recipe has no DistillationModifier")
    if options.observe_padding and not recipe.has(QuantizationModifier):
        idle.append("--observe_padding has no effect: the recipe has no QuantizationModifier")
    return idle


def read_data(options: TrainOptions, task: Any, tokenizer: Any) -> TaskData:
    """The data, as it suits the student, of which the config alone is read: the head depends on the data."""
    with torch.device("meta"):
        if options.model_type is not None:
            config = new_config(options.model_type, options.config_overrides, task, tokenizer)
            outline = new_model(config, task)
        else:
            config = load_config(options.config_name or options.model_name_or_path, options, "--model_name_or_path")
            outline = task.model_class.from_config(config)
    data: TaskData = task.load(
        options,
        tokenizer,
        max_positions=max_positions(outline),
        model_labels=label_names(config),
        model_problem_type=getattr(config, "problem_type", None),
    )
    return data


def load_student(
    options: TrainOptions, task: Any, tokenizer: Any, head: Mapping[str, Any]
) -> tuple[nn.Module, list[str]]:
    """The student in fp32, with a head as the data wants it, and messages about it."""
    if options.model_type is not None:
        config = new_config(options.model_type, options.config_overrides, task, tokenizer)
        model = new_model(config, task)
        if options.gradient_checkpointing:
            recompute_activations(model, "--gradient_checkpointing")
        count = sum(parameter.numel() for parameter in model.parameters())
        return model, [f"a new {options.model_type} model with {count:,} parameters, which start at random"]
    model, missing = load_model(
        options.model_name_or_path,
        task,
        options,
        "--model_name_or_path",
        config_name=options.config_name,
        head=head,
    )
    if missing and not options.do_train:
        raise ModelError(
            f"--model_name_or_path {options.model_name_or_path} has no trained head for this task ({', '.join(missing)} are "
            "missing), so that its scores would mean nothing; train it first (--do_train)"
        )
    if missing and loads_on_first_rank():
        give_memory(model)
    notes = [f"the head ({', '.join(missing)}) is new and starts at random"] if missing else []
    if options.gradient_checkpointing:
        recompute_activations(model, "--gradient_checkpointing")
    return model, notes


def load_student_tokenizer(options: TrainOptions) -> Any:
    """The tokenizer: `--tokenizer_name`, else the model's, else (where the model brings none) the teacher's."""
    if options.tokenizer_name:
        return load_tokenizer(options.tokenizer_name, options, "--tokenizer_name")
    teacher = teacher_source(options)
    if not has_tokenizer(options.model_name_or_path) and teacher and has_tokenizer(teacher):
        return load_tokenizer(teacher, options, "--distill_teacher")
    return load_tokenizer(options.model_name_or_path, options, "--model_name_or_path")


def idle_cores(accelerator: Accelerator) -> list[str]:
    """A warning where a run on the CPU leaves most of it unused: `accelerate launch` gives a process one thread unless told
    otherwise."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    fair = cores // accelerator.num_processes
    if accelerator.device.type != "cpu" or threads >= fair or "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return []
    return [
        f"{threads} of {fair} threads for this process: OMP_NUM_THREADS is {os.environ.get('OMP_NUM_THREADS', 'not set')}; "
        f"`accelerate launch --num_cpu_threads_per_process {fair}` uses them all"
    ]


def tokenizer_notes(options: TrainOptions) -> list[str]:
    """What was done where a folder brings no tokenizer."""
    teacher = teacher_source(options)
    notes = []
    if not options.tokenizer_name and not has_tokenizer(options.model_name_or_path):
        notes.append(f"{options.model_name_or_path} has no tokenizer: the teacher's is used")
    if teacher and not has_tokenizer(teacher):
        notes.append(f"{teacher} has no tokenizer: that it reads the student's tokens is taken on trust")
    return notes


def teacher_source(options: TrainOptions) -> str | None:
    """The folder or hub id of the teacher, if it is one."""
    return None if options.distill_teacher in (None, "disable", "self") else options.distill_teacher


def max_positions(model: Any) -> int | None:
    """The longest sequence that the model can read, None for no limit."""
    positions: int | None = getattr(model.config, "max_position_embeddings", None)
    embeddings = [
        m for n, m in model.named_modules() if n.endswith("position_embeddings") and isinstance(m, nn.Embedding)
    ]
    if positions is not None and embeddings and embeddings[0].padding_idx is not None:
        # RoBERTa's kind starts counting positions behind its padding index.
        positions -= embeddings[0].padding_idx + 1
    return positions


def accepted_inputs(model: Any) -> frozenset[str]:
    """What the model's forward can be given. Segment ids are none of it for a model that knows one segment only: a
    tokenizer of another family may give them, and RoBERTa's kind then looks up a row that is not there."""
    names = set(inspect.signature(model.forward).parameters)
    if getattr(model.config, "type_vocab_size", 2) < 2:
        names.discard("token_type_ids")
    return frozenset(names)


def load_teacher(
    options: TrainOptions,
    recipe: Recipe,
    task: Any,
    student: Any,
    tokenizer: Any,
    *,
    is_packed: bool,
    max_length: int,
) -> tuple[LoadedTeacher | None, str | None]:
    """The teacher, whole on the CPU, or None where none is wanted, and what to tell the user. `is_packed` says what batches
    it will see, of features of at most `max_length` tokens.

    Raises OptionError for a recipe that distils without a word about the teacher, ModelError for one that does not fit.
    """
    distils = bool(recipe.of(DistillationModifier))
    wish = options.distill_teacher
    labels = frozenset(task.label_keys)
    if not distils:
        if wish not in (None, "disable"):
            raise OptionError(f"--distill_teacher {wish}: the recipe has no DistillationModifier")
        return None, None
    if wish is None:
        raise OptionError(
            f"{recipe.where(recipe.of(DistillationModifier)[0])}: the recipe distils, so name its teacher: --distill_teacher PATH or "
            "hub id, 'self' (a frozen copy of the model as loaded), or 'disable' to train without"
        )
    if wish == "disable":
        return (
            None,
            "--distill_teacher disable: the recipe's DistillationModifier does nothing, the task's own loss is used",
        )
    if wish == "self":
        copied = copy_of_student(options, task, student)
        return LoadedTeacher(copied, accepted_inputs(student) - labels, "a frozen copy of the model as loaded"), None
    teacher_options = replace(options, model_revision="main")  # --model_revision speaks of the student
    with whole_weights():
        teacher, missing = load_model(wish, task, teacher_options, "--distill_teacher")
    if missing:
        raise ModelError(
            f"--distill_teacher {wish} has no trained head for this task ({', '.join(missing)} are missing); a teacher must be "
            "fine-tuned first"
        )
    teacher_tokenizer = load_tokenizer(wish, teacher_options, "--distill_teacher") if has_tokenizer(wish) else None
    note = let_teacher_pack(teacher, student, task.output_keys) if is_packed else None
    check_teacher(
        teacher, student, teacher_tokenizer, tokenizer, wish, max_length=max_length, positions=max_positions(teacher)
    )
    order = label_order(teacher, student, wish) if task.name in (TEXT, TOKEN) else None
    reordered = dict.fromkeys(task.output_keys, order) if order is not None else {}
    return LoadedTeacher(teacher, accepted_inputs(teacher) - labels, wish, reordered), note


def copy_of_student(options: TrainOptions, task: Any, student: Any) -> Any:
    """The teacher of `--distill_teacher self`; read anew where the student's own weights are on the first rank alone."""
    if not loads_on_first_rank():
        return frozen_copy(student)
    with whole_weights():
        head = {"id2label": student.config.id2label, "label2id": student.config.label2id}
        return load_model(options.model_name_or_path, task, options, "--model_name_or_path", head=head)[0]


def loads_on_first_rank() -> bool:
    """Whether the launch asks for models whose weights only the first rank of a node reads."""
    return all(
        os.environ.get(name, "").lower() in ("1", "true")
        for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
    )


def give_memory(model: Any) -> None:
    """Zeros for parameters that have no memory: transformers leaves a new head so where only the first rank of a node reads
    weights. It draws the head's numbers, and sends them when the model is sharded."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                module.register_parameter(name, nn.Parameter(torch.zeros_like(parameter, device="cpu")))
    # What was one parameter under two names, as the bias of a head for masked words, is so again.
    model.tie_weights()


def plan_compression(recipe: Recipe, model: Any) -> CompressionPlan:
    """Ask every modifier what it needs in the model. Raises RecipeError for a target that is not there."""
    plan = CompressionPlan()
    recipe.plan(plan, model)
    return plan


def share_pruning(plan: CompressionPlan, accelerator: Accelerator) -> None:
    """Where pruning begins at a weight's own sparsity, only a process that has the weight knows it: tell the others."""
    if loads_on_first_rank() and accelerator.num_processes > 1:
        plan.pruned_from_to = on_main(accelerator, lambda: plan.pruned_from_to)


def choose_storage(
    options: TrainOptions, model: nn.Module, plan: CompressionPlan, accelerator: Accelerator
) -> tuple[dict[str, Tensor] | None, list[str]]:
    """Plan which weights are stored compact. Gives what is kept of them, where only the first rank has the weights to see
    it, and notes for the user."""
    if not options.do_train or options.one_shot:
        return None, []
    shares = loads_on_first_rank() and accelerator.num_processes > 1
    zeros = on_main(accelerator, lambda: model_zeros(model)) if shares else model_zeros(model)
    notes = compact_where_it_pays(plan, zeros, options.sparse_storage)
    if not shares:
        return None, notes
    chosen = [name for name, compression in plan.modules.items() if compression.compact]

    def kept() -> dict[str, Tensor]:
        weights = {name: effective_weight(model.get_submodule(name)) for name in chosen}
        return {name: pack_positions(nonzero_mask(weight.detach())) for name, weight in weights.items()}

    return on_main(accelerator, kept), notes


def choose_attention(model: Any, plan: CompressionPlan, device: torch.device) -> None:
    """Our attention where the plan quantizes its products, and on a GPU. Raises RecipeError for a model that cannot have its
    attention quantized."""
    is_needed = needs_quantized_attention(plan)
    if (is_needed or device.type == "cuda") and not use_own_attention(model) and is_needed:
        raise RecipeError(
            f"{type(model).__name__} does not go through transformers' attention interface, so that its attention matmuls "
            "cannot be quantized"
        )


def choose_batching(
    options: TrainOptions, task: Any, model: Any, collate: Collator, accelerator: Accelerator
) -> tuple[Collate, str, list[str]]:
    """How batches are laid out and which features go together (a grouping of the sampler), and what to tell the user where
    that is not what `--batching` says."""
    if options.batching == "padded":
        return collate, "random", []
    if options.batching == "grouped":
        return collate, "length", []
    if loads_on_first_rank() and accelerator.num_processes > 1:
        obstacle, pools = on_main(
            accelerator, lambda: (obstacle_to_packing(model, task.output_keys), pools_by_sequence(model))
        )
        if obstacle is None and not accelerator.is_main_process:
            # The others have no numbers to try it with.
            use_own_attention(model)
            if pools:
                pool_by_sequence(model)
    else:
        obstacle = obstacle_to_packing(model, task.output_keys)
    if obstacle is None:
        packed = PackedCollator(collate.pad_values, first_position(model), collate.token_labels, collate.prepare)
        return packed, "tokens", []
    return (
        collate,
        "length",
        [f"{obstacle}: batches are padded, each of windows of similar length (--batching grouped)"],
    )


def choose_head_rows(
    task: Any,
    model: nn.Module,
    collate: Collate,
    plan: CompressionPlan,
    accelerator: Accelerator,
    *,
    is_distilled: bool,
) -> tuple[Collate, frozenset[str]]:
    """Batches for a head that computes the rows alone that the task reads, and the inputs that the model then takes beside its
    own; the batches as they are where the task reads all rows, or a teacher or a quantizer's range has to see them."""
    masked_only = getattr(task, "masked_only", None)
    if masked_only is None or is_distilled or plan.num_quantizers:
        return collate, frozenset()
    if loads_on_first_rank() and accelerator.num_processes > 1:
        # The others have no numbers to try it with.
        is_able = on_main(accelerator, lambda: let_head_choose(model))
        if is_able and not accelerator.is_main_process:
            hook_head(model)
    else:
        is_able = let_head_choose(model)
    return (masked_only(collate, ROWS), frozenset({ROWS})) if is_able else (collate, frozenset())


def let_teacher_pack(teacher: Any, student: Any, output_keys: tuple[str, ...]) -> str | None:
    """Let a teacher take packed batches as they are, where it is able to and counts positions as the student does; else why
    its batches are padded, for the user."""
    if first_position(teacher) != first_position(student):
        obstacle = "it counts positions from another number than the student"
    else:
        obstacle = obstacle_to_packing(teacher, output_keys) or ""
    return f"the teacher is given padded batches: {obstacle}" if obstacle else None


def build_loader(
    options: TrainOptions, features: Any, collate: Collate, grouping: str, task: Any, accelerator: Accelerator
) -> StepLoader:
    """The training batches of this rank."""
    sampler = StepSampler(
        num_features=len(features),
        micro_batch_size=options.per_device_train_batch_size,
        accumulation=options.gradient_accumulation_steps,
        seed=options.seed if options.data_seed is None else options.data_seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        drop_last=options.dataloader_drop_last,
        grouping=grouping,
        lengths=features.lengths,
    )
    if sampler.num_batches == 0:
        raise OptionError(
            f"--dataloader_drop_last leaves no batch: {len(features)} features, "
            f"{options.per_device_train_batch_size * accelerator.num_processes} a micro-batch"
        )
    return StepLoader(
        sampler,
        features,
        collate,
        task,
        device=accelerator.device,
        num_workers=options.dataloader_num_workers,
        pin_memory=options.dataloader_pin_memory,
    )


def build_stream_loader(
    options: TrainOptions, stream: Stream, collate: Collate, task: Any, epochs: float, accelerator: Accelerator
) -> StreamLoader:
    """The training batches of this rank from a stream, whose `--max_steps` are all epochs. Raises OptionError where they are
    no whole number of steps an epoch."""
    steps_per_epoch = _whole_steps(options.max_steps, epochs)
    if steps_per_epoch is None:
        near = (range(options.max_steps - 1, 0, -1), range(options.max_steps + 1, 2 * options.max_steps + 1))
        fitting = [next((steps for steps in some if _whole_steps(steps, epochs)), None) for some in near]
        would_do = " or ".join(str(steps) for steps in fitting if steps is not None)
        raise OptionError(
            f"--max_steps {options.max_steps}: with --streaming these are the run's {epochs:g} epochs, all of the same length"
            + (f"; {would_do} steps would be" if would_do else "")
        )
    size = options.per_device_train_batch_size
    lanes = StepSampler(
        num_features=size * accelerator.num_processes * options.gradient_accumulation_steps,
        micro_batch_size=size,
        accumulation=options.gradient_accumulation_steps,
        seed=0,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    return StreamLoader(
        stream,
        collate,
        task,
        lanes=lanes,
        steps_per_epoch=steps_per_epoch,
        device=accelerator.device,
        reads_ahead=options.dataloader_num_workers > 0,
        pin_memory=options.dataloader_pin_memory,
    )


def _whole_steps(steps: int, epochs: float) -> int | None:
    """Steps in each of so many epochs; None where they are no whole number. 21 / 0.7 is 30, whatever floats make of it."""
    each = round(steps / epochs)
    return each if each and math.isclose(each * epochs, steps, rel_tol=1e-9) else None


def build_optimizer(options: TrainOptions, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer over two groups: with weight decay, and (biases and norms) without, as HF Trainer forms them."""
    norms = {
        f"{name}.{key}"
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for key in ("weight", "bias")
    }
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trainable:
        raise RecipeError("the recipe leaves no parameter to train")
    decayed = [parameter for name, parameter in trainable if name not in norms and not name.endswith("bias")]
    others = [parameter for name, parameter in trainable if name in norms or name.endswith("bias")]
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if options.optim == "sgd":
        return torch.optim.SGD(groups, lr=options.learning_rate)
    return torch.optim.AdamW(
        groups,
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_epsilon,
        fused=True if options.optim == "adamw_torch_fused" else None,
    )


def flag_learning_rate(options: TrainOptions, recipe: Recipe, total_steps: int) -> Callable[[int], float]:
    """Learning rate by step as the flags say: the scheduler's curve, or constant where the recipe has its own (as
    SparseML). The curve is transformers' own, evaluated as a function of the step."""
    if recipe.has(LearningRateFunctionModifier) or recipe.has(SetLearningRateModifier):
        return lambda step: options.learning_rate
    from transformers import get_scheduler

    warmup = options.warmup_steps or math.ceil(total_steps * options.warmup_ratio)
    probe = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(options.lr_scheduler_type, probe, num_warmup_steps=warmup, num_training_steps=total_steps)
    curve = scheduler.lr_lambdas[0]
    return lambda step: options.learning_rate * curve(step)


def shard(backend: Backend, model: Any, optimizer: Any, options: TrainOptions) -> tuple[Any, Any]:
    """Hand the model to the backend: the last moment at which its structure may change."""
    return backend.prepare(
        model,
        optimizer,
        micro_batch_size=options.per_device_train_batch_size,
        max_grad_norm=options.max_grad_norm,
    )


def place_whole(model: Any, accelerator: Accelerator, backend: Backend) -> Any:
    """The model on this rank's device, whole, for evaluation alone."""
    placed = accelerator.prepare_model(model, evaluation_mode=True).to(accelerator.device)
    if backend.precision == "bf16" and not accelerator.native_amp:
        run_in_bf16(placed, accelerator.device)
    return placed


def whole_model_builder(model: Any, plan: CompressionPlan) -> Callable[[], nn.Module]:
    """What makes a model like `model`, which carries `plan`, with numbers that mean nothing yet."""
    model_class, config = type(model), copy.deepcopy(model.config)
    positions = {
        name: layer.positions for name, layer in compressed_layers(model).items() if isinstance(layer, CompactLinear)
    }

    def build() -> nn.Module:
        whole = model_class(config)
        if needs_quantized_attention(plan):
            use_own_attention(whole)
        install(whole, plan, positions=positions)
        return whole.eval()

    return build


def reductions(accelerator: Accelerator) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Maximum and sum over ranks."""
    if accelerator.num_processes == 1:
        return (lambda tensor: tensor), (lambda tensor: tensor)

    def reduce(operation: Any) -> Callable[[Tensor], Tensor]:
        def over_ranks(tensor: Tensor) -> Tensor:
            result = tensor.clone()
            torch.distributed.all_reduce(result, operation)
            return result

        return over_ranks

    return reduce(torch.distributed.ReduceOp.MAX), reduce(torch.distributed.ReduceOp.SUM)
