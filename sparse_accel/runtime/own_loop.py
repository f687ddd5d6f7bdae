"""A recipe in one's own training loop: five calls do to a model what the command `train` does.

sparse = attach(model, "recipe.yaml")                                             # 1. masks and quantizers
optimizer = torch.optim.AdamW(model.parameters())
model, optimizer, loader = sparse.prepare(accelerator, model, optimizer, loader)  # 2. instead of accelerator.prepare
for batch in loader:
    with accelerator.accumulate(model):
        sparse.begin(batch)                                                       # 3. before the forward
        outputs = model(**batch)
        loss = sparse.loss(outputs.loss, batch, outputs)                          # 4. with the teacher's part
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        sparse.end()                                                              # 5. after the optimizer's step
sparse.save("out", tokenizer)
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sparse_accel.compress.census import Census
from sparse_accel.compress.layers import compressed_layers
from sparse_accel.compress.plan import CompressionPlan, install
from sparse_accel.compress.ranges import keep_weights, quantizers
from sparse_accel.compress.weight_storage import STORAGES, compact_where_it_pays, model_zeros
from sparse_accel.errors import LoopError, suggestion
from sparse_accel.folders.publishing import published_model
from sparse_accel.modifiers.constant_pruning import ConstantPruningModifier
from sparse_accel.modifiers.distillation import DistillationModifier
from sparse_accel.packing import by_feature
from sparse_accel.recipe.schema import Recipe
from sparse_accel.runtime import setup
from sparse_accel.runtime.backends import backend_of
from sparse_accel.runtime.batches import MicroBatch
from sparse_accel.runtime.finishing import RECIPE_FILE, check_saved, fold_to_publish, write_compression
from sparse_accel.runtime.gathering import whole_copy
from sparse_accel.runtime.invariants import require_zeros
from sparse_accel.runtime.preparing import refuse_late_quantization
from sparse_accel.runtime.teachers.replicated import replicated
from sparse_accel.runtime.together import on_main
from sparse_accel.runtime.training import close_step, open_step
from sparse_accel.session import LossTerms, Session, Teacher
from sparse_accel.tasks import TASKS, resolve_task
from sparse_accel.timeline import Clock, steps_per_epoch

# How accelerate may spread the model. DeepSpeed steps inside backward, where a loop of one's own has no word.
_OFFERED: Final = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.FSDP,
)
_ATTENTIONS: Final = ("products", "fused")
# A model whose prunable weights have fewer zeros than this was not pruned.
_DENSE: Final = 0.05


@dataclass(frozen=True)
class LoopOptions:
    """What modifiers ask of a run's options."""

    distill_include_padding: bool
    distill_top_k: int


@dataclass(frozen=True)
class AnyTask:
    """Stands for the task of a model whose head is none of TASKS': its logits are compared, by token where they are."""

    output_keys: tuple[str, ...] = ("logits",)
    label_keys: tuple[str, ...] = ("labels", "label", "start_positions", "end_positions")

    def distillation_keep(self, key: str, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor | None:
        """bool [B, S], True on tokens, for logits [B, S, classes]; None for any others."""
        mask = batch.get("attention_mask")
        return mask.bool() if mask is not None and logits.dim() == 3 and logits.shape[:2] == mask.shape else None


def attach(
    model: nn.Module,
    recipe: str | Path | Recipe,
    recipe_args: str | Mapping[str, Any] | None = None,
    *,
    sparse_storage: str = "masked",
    quantized_attention: str = "products",
    observe_padding: bool = False,
    distill_include_padding: bool = False,
    distill_top_k: int = 0,
) -> AttachedRecipe:
    """Give a transformers model the masks and quantizers that a recipe needs, before its optimizer is made.

    The model computes what it did until the recipe's first step. The keywords are the flags of `sparse_accel train`;
    `sparse_storage` other than "masked" makes parameters smaller, and calls them `values` instead of `weight`. Raises
    RecipeError, ModelError, and LoopError for a model that cannot be taken; the model is then as it was.
    """
    for name, value, choices in (
        ("sparse_storage", sparse_storage, STORAGES),
        ("quantized_attention", quantized_attention, _ATTENTIONS),
    ):
        if value not in choices:
            raise LoopError(f"{name}: {value!r} is not offered{suggestion(value, choices)}")
    if distill_top_k < 0:
        raise LoopError(f"distill_top_k: must be at least 0, got {distill_top_k}")
    if not hasattr(model, "config") or not hasattr(model, "save_pretrained"):
        raise LoopError(
            f"attach takes a model of transformers, such as AutoModelFor... gives, not {type(model).__name__}"
        )
    if compressed_layers(model) or quantizers(model):
        raise LoopError("this model has a recipe already; load it anew to attach another")
    if sparse_storage != "masked" and setup.loads_on_first_rank():
        raise LoopError(
            f"sparse_storage {sparse_storage!r} looks at all weights, but with fsdp_cpu_ram_efficient_loading only the first "
            "process of a node has them; switch that off in the launch, or leave sparse_storage out"
        )
    if not isinstance(recipe, Recipe):
        recipe = Recipe.load(recipe, recipe_args)
    elif recipe_args is not None:
        raise LoopError("recipe_args: the recipe is read already; give them to Recipe.load(source, recipe_args)")
    for warning in recipe.warnings:
        warnings.warn(warning, stacklevel=2)
    plan = setup.plan_compression(recipe, model)
    if quantized_attention == "fused" and not plan.fuse_attention():
        warnings.warn("quantized_attention has no effect: the recipe quantizes no attention products", stacklevel=2)
    sparsity = Census.of(model).sparsity
    if recipe.has(ConstantPruningModifier) and sparsity <= _DENSE and not setup.loads_on_first_rank():
        warnings.warn(
            f"the recipe holds the model's zeros, but the model is dense ({sparsity:.1%} of its prunable weights are zero)",
            stacklevel=2,
        )
    before = {id(parameter): parameter for parameter in model.parameters()}
    compact_where_it_pays(plan, model_zeros(model), sparse_storage)
    setup.choose_attention(model, plan, torch.device("cpu"))
    install(model, plan, observe_padding=observe_padding)
    kept = {id(parameter) for parameter in model.parameters()}
    replaced = [parameter for key, parameter in before.items() if key not in kept]
    return AttachedRecipe(recipe, model, plan, LoopOptions(distill_include_padding, distill_top_k), replaced)


@final
class AttachedRecipe:
    """A recipe at work on a model in somebody's loop: made by `attach`; see this module's beginning for the loop.

    `recipe` and `plan` say what it does to the model. It counts optimizer steps; `accelerator.save_state` and
    `load_state` save and restore that count along with the model and its optimizer.
    """

    def __init__(
        self,
        recipe: Recipe,
        module: nn.Module,
        plan: CompressionPlan,
        options: LoopOptions,
        replaced: list[nn.Parameter],
    ) -> None:
        self.recipe = recipe
        self.plan = plan
        self._module = module
        self._options = options
        # Parameters that compact ones took the place of: an optimizer that has them was made too early.
        self._replaced = replaced
        self._prepared: Session | None = None
        self._clock = Clock(0, 1)
        self._is_open = False
        self._is_due = False
        # Learning rate and weight decay of the groups that the recipe sets, for the time before its modifiers speak.
        self._before: list[dict[str, float]] = []

    # ---- where it stands

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self._clock.step

    @property
    def epoch(self) -> float:
        """Epochs done: steps / steps per epoch."""
        return self._clock.epoch

    @property
    def num_epochs(self) -> float | None:
        """Epochs that the recipe asks for; None where it names none."""
        return self.recipe.num_epochs

    @property
    def num_steps(self) -> int | None:
        """Optimizer steps that the recipe asks for, once `prepare` knows how many make an epoch."""
        return None if self._prepared is None or self.num_epochs is None else self._clock.step_of(self.num_epochs)

    # ---- the calls of a loop

    def prepare(
        self,
        accelerator: Any,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *others: Any,
        steps_per_epoch: int | None = None,
        num_epochs: float | None = None,
        teacher: nn.Module | Teacher | str | None = None,
    ) -> tuple[Any, ...]:
        """`accelerator.prepare(model, optimizer, *others)`, and what the recipe needs to know of the loop.

        `steps_per_epoch` are optimizer steps; left out, they follow from the one loader among `others` and the
        accelerator's accumulation. `num_epochs` is how long the loop runs, where that is not what the recipe says.
        `teacher` answers for a recipe that distils: a model, a function from a batch to outputs by name, or "disable".

        Works in one process, under DDP and under FSDP2. Raises LoopError, LaunchError, and RecipeError for a recipe that
        cannot be carried out in that time.
        """
        if self._prepared is not None:
            raise LoopError("prepare: this model is prepared already")
        if model is not self._module:
            raise LoopError("prepare: give the model that the recipe was attached to")
        if accelerator.distributed_type not in _OFFERED:
            raise LoopError(
                f"{accelerator.distributed_type.value} is not offered in a loop of one's own; DDP and FSDP2 are, and "
                "`sparse_accel train` knows DeepSpeed"
            )
        if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
            raise LoopError("the launch asks for FSDP 1, which is not offered; set fsdp_version: 2")
        if accelerator.mixed_precision not in ("no", "bf16", "fp16"):
            raise LoopError(f"mixed precision {accelerator.mixed_precision} is not offered; use bf16 or fp16")
        in_optimizer = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if any(id(parameter) in in_optimizer for parameter in self._replaced):
            raise LoopError(
                "prepare: the optimizer was made before attach, which replaced parameters; make it afterwards"
            )
        self._check_teacher(teacher)

        backend = backend_of(accelerator, accelerator.mixed_precision)
        if accelerator.ddp_handler is None:
            # Masks and ranges are the same on all ranks as it is.
            accelerator.ddp_handler = DistributedDataParallelKwargs(broadcast_buffers=False)
        task = task_of(model)
        build_whole = setup.whole_model_builder(model, self.plan)
        accepts = setup.accepted_inputs(model) - set(task.label_keys)
        # Loaders first: what is wrong with the length is found before the model changes.
        loaders = {at: accelerator.prepare(one) for at, one in enumerate(others) if isinstance(one, DataLoader)}
        length = steps_per_epoch or _steps_of(list(loaders.values()), accelerator.gradient_accumulation_steps)
        clock = Clock(0, length)
        _check_length(self.recipe, clock, num_epochs)
        self._before = _values_of_owned_groups(self.recipe, optimizer)
        prepared, prepared_optimizer = backend.prepare(model, optimizer, micro_batch_size=1, max_grad_norm=0.0)
        # Schedulers last: accelerate looks for the optimizer that they belong to.
        rest = [loaders[at] if at in loaders else accelerator.prepare(one) for at, one in enumerate(others)]
        module = accelerator.unwrap_model(prepared, keep_fp32_wrapper=True)
        keep_weights(module, not backend.shards_weights)
        reduce_max, reduce_sum = setup.reductions(accelerator)
        self._clock = clock
        self._prepared = Session(
            accelerator=accelerator,
            model=prepared,
            module=module,
            optimizer=prepared_optimizer,
            recipe=self.recipe,
            plan=self.plan,
            task=task,
            options=self._options,
            loader=None,
            teacher=_teacher(teacher, accelerator, task.label_keys),
            reduce_max=reduce_max,
            reduce_sum=reduce_sum,
            backend=backend,
            build_whole=build_whole,
            accepts=accepts,
        )
        accelerator.register_for_checkpointing(self)
        return prepared, prepared_optimizer, *rest

    def begin(self, *batches: Mapping[str, Tensor]) -> None:
        """Before a forward: what the recipe says of this optimizer step holds from here on, learning rate included.

        `batches` is the micro-batch that comes, or all of the step's; in a step's later micro-batches nothing happens. The
        first quantized step looks at them for its scales: given all, these do not depend on how the step was split.
        """
        session = self._session("begin")
        if self._is_due:
            raise LoopError("begin: the last step did not end; call end() after optimizer.step()")
        if not batches or not all(isinstance(batch, Mapping) for batch in batches):
            raise LoopError("begin: give the batch whose forward comes, a mapping as transformers' collators make it")
        if self._is_open:
            return
        for group, values in zip(session.optimizer.param_groups, self._before, strict=True):
            group.update(values)
        open_step(session, self._clock, [MicroBatch(dict(batch), 1, 1) for batch in batches])
        self._is_open = True

    def loss(self, loss: Tensor | None, batch: Mapping[str, Tensor], outputs: Mapping[str, Any]) -> Tensor:
        """The loss to go backward from: the task's own, a scalar, weighed against the teacher's where the recipe distils."""
        session = self._session("loss")
        if not self._is_open:
            raise LoopError("loss: call begin(batch) before the forward")
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            got = (
                "None: a model computes its loss where the batch has labels"
                if loss is None
                else f"{type(loss).__name__}"
            )
            raise LoopError(f"loss: the task's loss is a scalar tensor; got {got}")
        if not isinstance(batch, Mapping) or not isinstance(outputs, Mapping):
            raise LoopError("loss: batch and outputs are mappings, as transformers' collators and models give them")
        terms = self.recipe.on_loss(LossTerms.task(loss), batch, by_feature(outputs, batch), session, self._clock)
        self._is_due = bool(session.accelerator.sync_gradients)
        return terms.total()

    def end(self) -> None:
        """After the optimizer's step: ranges move, and the recipe's clock. While accelerate still gathers micro-batches
        (`accelerator.sync_gradients` is False) nothing happens."""
        session = self._session("end")
        if not self._is_open:
            raise LoopError("end: no step is under way; begin(batch) comes before the forward")
        if not session.accelerator.sync_gradients:
            return
        close_step(session, self._clock)
        self._clock = self._clock.next()
        self._is_open = self._is_due = False

    def save(self, folder: str | Path, tokenizer: Any = None) -> None:
        """Write the model as it is now: a plain Hugging Face folder, its pruned weights exactly zero, with the plan and the
        ranges that `sparse_accel export` wants. Training may go on. Every rank calls this. In a folder that was there, what
        an earlier model or run left about itself goes: its recipe, report and scores are not this model's.

        Raises OutputError, and InvariantError where what was written is not what was trained.
        """
        session = self._session("save")
        require_zeros(session)
        module: Any = whole_copy(session)
        on_main(session.accelerator, lambda: self._write(module, Path(folder), tokenizer))

    # ---- what accelerate saves and restores

    def state_dict(self) -> dict[str, int]:
        """How far the loop has come; all else that must survive is in the model and its optimizer."""
        return {"step": self._clock.step, "steps_per_epoch": self._clock.steps_per_epoch}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from where `state_dict` was taken. Raises LoopError where an epoch has another number of steps by now."""
        session = self._session("load_state_dict")
        if state["steps_per_epoch"] != self._clock.steps_per_epoch:
            raise LoopError(
                f"the saved state counts {state['steps_per_epoch']} steps an epoch, this loop {self._clock.steps_per_epoch}: "
                "the recipe's schedules would jump; use the same batch size and accumulation, or give prepare "
                f"steps_per_epoch={state['steps_per_epoch']}"
            )
        self._clock = Clock(state["step"], state["steps_per_epoch"])
        self._is_open = self._is_due = False
        if self._clock.step:
            # What held in the last step holds until the next: an evaluation may come first.
            self.recipe.on_step_start(session, Clock(self._clock.step - 1, self._clock.steps_per_epoch))

    # ---- parts

    def _session(self, call: str) -> Session:
        if self._prepared is None:
            raise LoopError(f"{call}: call prepare(accelerator, model, optimizer, ...) first")
        return self._prepared

    def _check_teacher(self, teacher: Any) -> None:
        distils = self.recipe.of(DistillationModifier)
        if distils and teacher is None:
            raise LoopError(
                f"{self.recipe.where(distils[0])}: the recipe distils, so give prepare its teacher: a model, a function from a "
                'batch to outputs, or "disable" to train without'
            )
        if isinstance(teacher, str) and teacher != "disable":
            raise LoopError(f'teacher: a model, a function or "disable"; got {teacher!r}: load that model first')
        if teacher is not None and teacher != "disable" and not distils:
            raise LoopError("teacher: the recipe has no DistillationModifier")

    def _write(self, module: Any, folder: Path, tokenizer: Any) -> None:
        folded = fold_to_publish(module, self.plan)
        with published_model(folder, replaced=(RECIPE_FILE,)) as partial:
            module.save_pretrained(partial)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
            text = self.recipe.to_yaml() if self.recipe.modifiers else ""
            write_compression(partial, folded.plan, folded.ranges, text)
        check_saved(folder, folded.masks)


def task_of(model: nn.Module) -> Any:
    """The task whose head a model has, by the name of its class."""
    for name in TASKS:
        task = resolve_task(name)
        if type(model).__name__.endswith(task.model_class.__name__.removeprefix("AutoModel")):
            return task
    return AnyTask()


def _check_length(recipe: Recipe, clock: Clock, num_epochs: float | None) -> None:
    """Raise RecipeError for what cannot be carried out in that time; a loop of unknown length is taken at its word."""
    epochs = num_epochs or recipe.num_epochs
    if epochs is not None:
        recipe.check(epochs)
        refuse_late_quantization(recipe, clock, clock.step_of(epochs))


def _values_of_owned_groups(recipe: Recipe, optimizer: torch.optim.Optimizer) -> list[dict[str, float]]:
    """For each param_group, what it has by now of the values that modifiers set there. Those of no modifier are the
    loop's own: a scheduler may change them."""
    knobs = {knob for modifier in recipe.modifiers for knob in modifier.owns()}
    return [
        {name: group[name] for name in ("lr", "weight_decay") if knobs & {name, f"{name}:{index}"}}
        for index, group in enumerate(optimizer.param_groups)
    ]


def _steps_of(loaders: list[Any], accumulation: int) -> int:
    """Optimizer steps an epoch, by the one loader that was prepared."""
    if len(loaders) != 1:
        found = f"{len(loaders)} loaders were given, not one" if loaders else "no loader was given"
        raise LoopError(f"prepare: {found}; say how many optimizer steps make an epoch: steps_per_epoch=N")
    try:
        num_batches = len(loaders[0])
    except TypeError:
        raise LoopError(
            "prepare: the loader does not know its length; say how many optimizer steps make an epoch: steps_per_epoch=N"
        ) from None
    if not num_batches:
        raise LoopError("prepare: the loader has no batch")
    return steps_per_epoch(num_batches, accumulation)


def _teacher(teacher: Any, accelerator: Any, label_keys: tuple[str, ...]) -> Teacher | None:
    """A teacher as modifiers call it."""
    if teacher is None or teacher == "disable":
        return None
    if isinstance(teacher, nn.Module):
        return replicated(teacher, accelerator, setup.accepted_inputs(teacher) - set(label_keys))

    def answer(batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        with torch.no_grad():
            outputs: Mapping[str, Tensor] = teacher(batch)
        return outputs

    return answer
