"""Our own arms: the program's loop, sampler, collator, optimizer, masks, quantizers and teachers on random models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from sparse_accel.benchmarking.heads import HEADS, MASKED_LANGUAGE_MODELING, QUESTION_ANSWERING
from sparse_accel.benchmarking.lengths import MASK_ID
from sparse_accel.benchmarking.models import NO_LOAD, Load, random_model, random_teacher, vocabulary_of
from sparse_accel.benchmarking.stopwatch import Stopwatch
from sparse_accel.benchmarking.workloads import Settings
from sparse_accel.compress.census import Census
from sparse_accel.compress.compact import CompactLinear
from sparse_accel.compress.layers import CompressedEmbedding, CompressedLinear
from sparse_accel.compress.plan import CompressionPlan, check_masks, install
from sparse_accel.compress.ranges import WeightQuantizer, quantizers
from sparse_accel.packing import BOUNDS, is_packed
from sparse_accel.recipe.schema import Recipe
from sparse_accel.runtime import preparing, setup, training
from sparse_accel.runtime.compiling import require_compiler
from sparse_accel.runtime.options import TrainOptions
from sparse_accel.runtime.teachers.caching import Asking, LoadedTeacher, settle
from sparse_accel.runtime.teachers.replicated import replicated
from sparse_accel.runtime.tracking import Screen
from sparse_accel.runtime.training import TrainState
from sparse_accel.session import Session, Teacher
from sparse_accel.tasks import resolve_task
from sparse_accel.tasks.base import TaskData
from sparse_accel.tasks.collating import Collator
from sparse_accel.tasks.features import Features
from sparse_accel.tasks.mlm_masking import NOT_MASKED, Masking
from sparse_accel.timeline import Clock

# Longer than any benchmark: an epoch is a turn.
_EPOCHS = 1000
_HEAD = f"modifiers:\n  - !EpochRangeModifier\n    start_epoch: 0.0\n    end_epoch: {_EPOCHS}\n"
_HOLD_ZEROS = "  - !ConstantPruningModifier\n    start_epoch: 0.0\n    params: __ALL_PRUNABLE__\n"
_DISTIL = """\
  - !DistillationModifier
    hardness: 1.0
    temperature: {temperature}
    distill_output_keys: [{outputs}]
"""
# As the pruned_quant.yaml of each task in recipes/.
_QUANTIZE = """\
  - !QuantizationModifier
    start_epoch: 0.0
    quantize_linear_activations: 0
{quantized}"""
# The first turn, which only warms up, shows the quantizers their ranges.
_FROZEN = "    disable_quantization_observer_epoch: 1.0\n"


@dataclass(frozen=True)
class OwnArm:
    """How an arm is trained: parts of a recipe (see `recipe_text`), a teacher ("live", "cached" or None), storage of masked
    weights, a batching where it is not the run's, whether ranks exchange gradients, without which they train apart, whether its
    layers are compiled, and how attention is computed while it is quantized."""

    what: str
    modifiers: str = ""
    teacher: str | None = None
    storage: str = "auto"
    batching: str | None = None
    exchanges: bool = True
    compiles: bool = False
    attention: str = "products"

    @property
    def is_sparse(self) -> bool:
        """Whether it starts from a pruned model."""
        return _HOLD_ZEROS in self.modifiers


OWN_ARMS: Final[Mapping[str, OwnArm]] = {
    "dense": OwnArm("plain fine-tuning"),
    "dense_again": OwnArm("the same once more: what differs is noise"),
    "dense_padded": OwnArm("plain fine-tuning, every batch padded to the longest length", batching="padded"),
    "dense_grouped": OwnArm("plain fine-tuning, batches of similar length", batching="grouped"),
    "dense_compiled": OwnArm("plain fine-tuning, layers compiled", compiles=True),
    "mask": OwnArm("zeros held, kept weights alone stored", _HOLD_ZEROS),
    "mask_compiled": OwnArm("zeros held, layers compiled", _HOLD_ZEROS, compiles=True),
    "mask_whole": OwnArm("zeros held, weights stored whole", _HOLD_ZEROS, storage="masked"),
    "kd_live": OwnArm("a teacher of the same size in every step", _DISTIL, teacher="live"),
    "kd_cached": OwnArm("the same teacher, asked once before", _DISTIL, teacher="cached"),
    "qat_observing": OwnArm("quantization-aware, ranges followed", _QUANTIZE),
    "qat_frozen": OwnArm("quantization-aware, ranges fixed", _QUANTIZE + _FROZEN),
    "dense_alone": OwnArm("plain fine-tuning, gradients not exchanged between processes", exchanges=False),
    "mask_alone": OwnArm("zeros held, gradients not exchanged between processes", _HOLD_ZEROS, exchanges=False),
    "qat_fused": OwnArm("quantization-aware, ranges followed, attention fused", _QUANTIZE, attention="fused"),
    "sparse_kd": OwnArm(
        "zeros and cached teacher: the recipe before quantization begins", _HOLD_ZEROS + _DISTIL, "cached"
    ),
    "recipe": OwnArm(
        "the whole recipe: zeros, cached teacher, quantization with ranges followed",
        _HOLD_ZEROS + _DISTIL + _QUANTIZE,
        "cached",
    ),
    "recipe_frozen": OwnArm("the whole recipe, ranges fixed", _HOLD_ZEROS + _DISTIL + _QUANTIZE + _FROZEN, "cached"),
    "recipe_fused": OwnArm(
        "the whole recipe, ranges followed, attention fused",
        _HOLD_ZEROS + _DISTIL + _QUANTIZE,
        "cached",
        attention="fused",
    ),
    "recipe_live": OwnArm(
        "zeros, live teacher, quantization with ranges followed", _HOLD_ZEROS + _DISTIL + _QUANTIZE, "live"
    ),
}


@dataclass(frozen=True)
class Bench:
    """What all arms of a run share: the settings, the features, the launch, a teacher's model, the stopwatch, and a folder for
    what is cached."""

    settings: Settings
    features: Features
    accelerator: Any
    backend: Any
    stopwatch: Stopwatch
    teacher_model: Any
    scratch: Path

    @property
    def device(self) -> torch.device:
        """Where everything is trained."""
        found: torch.device = self.accelerator.device
        return found


class OwnTraining:
    """A session of the program's, whose turn is one epoch of its loop."""

    def __init__(self, session: Session, state: TrainState, stopwatch: Stopwatch, *, exchanges: bool = True) -> None:
        self.session = session
        self.state = state
        self.stopwatch = stopwatch
        self.exchanges = exchanges
        self.seen: list[Tensor | tuple[int, int]] = []

    @property
    def load(self) -> Load:
        """What the model computed with in the last watched turn; waits for the device."""
        return sum(map(load_of, self.seen), NO_LOAD)

    @property
    def steps(self) -> int:
        """Optimizer steps in a turn."""
        found: int = self.session.loader.steps_per_epoch
        return found

    def turn(self) -> None:
        """One epoch."""
        self.state.last_step = self.state.clock.step + self.steps
        with nullcontext() if self.exchanges else replaced(training, "micro_step", _apart):
            training.train(self.session, self.state, _nothing_after_a_step)
        # The loop leaves reading its sums to whoever logs; they would go on growing.
        self.state.window, self.state.window_steps = {}, 0

    def state_bytes(self) -> int:
        """Bytes of parameters, gradients as large as they are, and the optimizer's state."""
        parameters = [parameter for parameter in self.session.module.parameters() if parameter.requires_grad]
        optimizer = self.session.optimizer
        held = sum(
            value.nbytes for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
        )
        return held + sum(2 * parameter.nbytes for parameter in parameters)

    def violations(self) -> int:
        """Pruned weights that are no longer zero."""
        return sum(check_masks(self.session.module).values())

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within, the parts of a step open phases of the stopwatch, and what the model is given is kept for `load`."""
        session, stopwatch = self.session, self.stopwatch
        self.seen = []

        def during(function: Callable[..., Any], phase: str) -> Callable[..., Any]:
            def called(*args: Any, **kwargs: Any) -> Any:
                with stopwatch.within(phase):
                    return function(*args, **kwargs)

            return called

        def steps(clock: Clock, last_step: int) -> Iterator[Any]:
            source = iter(loader.steps(clock, last_step))
            while True:
                with stopwatch.within("data"):
                    micro_batches = next(source, None)
                if micro_batches is None:
                    return
                self.seen += [layout(micro_batch.inputs) for micro_batch in micro_batches]
                yield micro_batches

        loader, teacher = session.loader, session.teacher
        with ExitStack() as stack:

            def replace(owner: Any, name: str, value: Any) -> None:
                stack.enter_context(replaced(owner, name, value))

            replace(session, "loader", _Loader(loader.steps_per_epoch, steps))
            if teacher is not None:
                replace(session, "teacher", during(teacher, "teacher"))
            replace(session.model, "forward", during(session.model.forward, "forward"))
            replace(session.accelerator, "backward", during(session.accelerator.backward, "backward"))
            replace(session.accelerator, "clip_grad_norm_", during(session.accelerator.clip_grad_norm_, "optimizer"))
            replace(session.optimizer, "step", during(session.optimizer.step, "optimizer"))
            replace(session.optimizer, "zero_grad", during(session.optimizer.zero_grad, "optimizer"))
            for name in ("begin_step", "end_step"):
                replace(training, name, during(getattr(training, name), "quant"))
            for quantizer in quantizers(session.module).values():
                replace(quantizer, "forward", during(quantizer.forward, "quant"))
            replace(WeightQuantizer, "observe", during(WeightQuantizer.observe, "quant"))
            replace(WeightQuantizer, "rounded", during(WeightQuantizer.rounded, "quant"))
            holds = "mask" if any(compression.mask for compression in session.plan.modules.values()) else "quant"
            for owner in (CompressedLinear, CompressedEmbedding, CompactLinear):
                for name in ("made_weight", "stored_gradient"):
                    replace(owner, name, during(getattr(owner, name), holds))
            yield


@dataclass(frozen=True)
class _Loader:
    """Stands for a session's loader while it is watched."""

    steps_per_epoch: int
    steps: Callable[[Clock, int], Iterator[Any]]


def recipe_text(modifiers: str, task: Any) -> str:
    """A recipe of these parts, with what differs by task filled in."""
    head = HEADS[task.name]
    filled = {
        "temperature": head.temperature,
        "outputs": ", ".join(task.output_keys),
        "quantized": head.quantized,
    }
    return (_HEAD + modifiers).format(**filled)


def padding_collator(settings: Settings, task: Any, *, pads_to_max_length: bool) -> Collator:
    """The task's padded batches, as its data's reader makes them."""
    workload = settings.workload
    fillers, length = {"input_ids": 0, "token_type_ids": 0}, workload.max_length
    if task.name == MASKED_LANGUAGE_MODELING:
        masking = Masking(MASK_ID, vocabulary_of(workload.shape), seed=settings.seed)
        labels = {"labels": NOT_MASKED}
        return Collator(fillers, length, pads_to_max_length, token_labels=labels, prepare=masking.prepare)
    positions = task.label_keys if task.name == QUESTION_ANSWERING else ()
    return Collator(fillers, length, pads_to_max_length, position_labels=positions)


def build_own(arm: OwnArm, bench: Bench, *, dropout: float | None = None, max_grad_norm: float = 1.0) -> OwnTraining:
    """An arm of ours before its first step. Two arms of equal sparsity start from equal weights."""
    settings, accelerator = bench.settings, bench.accelerator
    workload = settings.workload
    batching = arm.batching or settings.batching
    options = train_options(
        settings,
        batching=batching,
        storage=arm.storage,
        max_grad_norm=max_grad_norm,
        teacher_cache=str(bench.scratch) if arm.teacher == "cached" else "off",
        compiles=arm.compiles,
        quantized_attention=arm.attention,
        distill_top_k=HEADS[workload.task].distill_top_k if arm.teacher else 0,
    )
    if options.compile:
        require_compiler(accelerator.device)
    task = resolve_task(options.task)
    recipe = Recipe.load(recipe_text(arm.modifiers, task)) if arm.modifiers else Recipe.empty()
    sparsity = workload.sparsity if arm.is_sparse else 0.0
    model = random_model(workload.shape, settings.seed, workload.task, sparsity=sparsity, dropout=dropout)
    padded = padding_collator(settings, task, pads_to_max_length=batching == "padded")
    collate, grouping, notes = setup.choose_batching(options, task, model, padded, accelerator)
    plan = setup.plan_compression(recipe, model)
    if options.quantized_attention == "fused":
        plan.fuse_attention()
    positions, storage_notes = setup.choose_storage(options, model, plan, accelerator)
    setup.choose_attention(model, plan, accelerator.device)
    census = Census.of(model)
    install(model, plan, positions=positions)
    collate, more_inputs = setup.choose_head_rows(
        task, model, collate, plan, accelerator, is_distilled=arm.teacher is not None
    )
    data = TaskData(collate=padded, train=bench.features)
    notes = [*notes, *storage_notes]
    parts = preparing.Parts(task, None, model, data, collate, None, plan, census, grouping, notes, more_inputs)
    loader = preparing.build_loader(options, parts, options.num_train_epochs, accelerator)
    assert loader is not None
    total_steps = _EPOCHS * loader.steps_per_epoch
    teacher: Teacher | None = None
    if arm.teacher == "live":
        teacher = live_teacher(bench, model, task)
    elif arm.teacher == "cached":
        screen = Screen(Console(), is_shown=False, use_bar=False)
        asking = Asking(options, recipe, task, model, accelerator, bench.backend.precision, 0, screen)
        teacher = settle(own_teacher(bench, model, task), asking, loader, total_steps)
    session = preparing.build_session(options, recipe, parts, loader, teacher, total_steps, accelerator, bench.backend)
    state = TrainState(clock=Clock(0, loader.steps_per_epoch), last_step=0)
    return OwnTraining(session, state, bench.stopwatch, exchanges=arm.exchanges)


def live_teacher(bench: Bench, student: Any, task: Any) -> Teacher:
    """The run's teacher, whole on every rank; all arms with a live one share its weights."""
    setup.let_teacher_pack(bench.teacher_model, student, task.output_keys)
    accepted = setup.accepted_inputs(bench.teacher_model) - frozenset(task.label_keys)
    return replicated(bench.teacher_model, bench.accelerator, accepted)


def own_teacher(bench: Bench, student: Any, task: Any) -> LoadedTeacher:
    """The run's teacher once more, for a cache that lets it go when it was asked."""
    workload = bench.settings.workload
    model = random_teacher(workload.shape, bench.settings.seed + 1, workload.task)
    setup.let_teacher_pack(model, student, task.output_keys)
    return LoadedTeacher(model, setup.accepted_inputs(model) - frozenset(task.label_keys), "the teacher")


def train_options(
    settings: Settings,
    *,
    batching: str = "packed",
    storage: str = "auto",
    max_grad_norm: float = 1.0,
    teacher_cache: str = "off",
    compiles: bool = False,
    quantized_attention: str = "products",
    distill_top_k: int = 0,
) -> TrainOptions:
    """The options of the command that an arm stands for; nothing that they name is read."""
    return TrainOptions(
        task=settings.workload.task,
        model_name_or_path="",
        output_dir="",
        do_train=True,
        seed=settings.seed,
        max_seq_length=settings.workload.max_length,
        per_device_train_batch_size=settings.workload.micro_batch_size,
        gradient_accumulation_steps=settings.workload.micro_batches,
        batching=batching,
        sparse_storage=storage,
        max_grad_norm=max_grad_norm,
        teacher_cache=teacher_cache,
        compile=compiles,
        quantized_attention=quantized_attention,
        distill_top_k=distill_top_k,
        bf16=settings.precision == "bf16",
    )


def quantized_plan(model: Any, task: str = QUESTION_ANSWERING) -> CompressionPlan:
    """Which tensors of a model the recipe of these arms quantizes, and how."""
    return setup.plan_compression(Recipe.load(recipe_text(_QUANTIZE, resolve_task(task))), model)


def layout(inputs: Mapping[str, Tensor]) -> Tensor | tuple[int, int]:
    """How a batch is laid out: a packed one's bounds, a padded one's rows and their length."""
    if is_packed(inputs):
        return inputs[BOUNDS]
    count, length = inputs["input_ids"].shape
    return count, length


def load_of(seen: Tensor | tuple[int, int]) -> Load:
    """What a model computes with of a batch of this layout: a packed one's tokens and sequences, a padded one's places."""
    if isinstance(seen, Tensor):
        return Load.of(np.diff(seen.cpu().numpy()))
    count, length = seen
    return Load(count * length, count * length * length)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Within, the attribute has another value."""
    is_own, before = name in vars(owner), getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if is_own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def _nothing_after_a_step(session: Session, state: TrainState) -> None:
    """A benchmark neither logs nor saves in a turn."""


def _apart(session: Session, *, is_last: bool) -> AbstractContextManager[None]:
    """In the place of the loop's `micro_step`: no gradient is exchanged in any micro-batch."""
    session.accelerator.sync_gradients = is_last
    found: AbstractContextManager[None] = session.accelerator.no_sync(session.model)
    return found
