"""What our training is compared with: Hugging Face's fine-tuning as its script does it, and its strongest simple form.

B1 follows the scripts in transformers' examples/pytorch. Question answering (question-answering/run_qa_no_trainer.py) and text
classification (text-classification/run_glue_no_trainer.py, with --pad_to_max_length): windows padded to the maximum,
default_data_collator over a datasets.Dataset, AdamW as constructed by name, a scheduler, no clipping. Masked language modelling
(language-modeling/run_mlm_no_trainer.py): the same with chunks of the maximal length, DataCollatorForLanguageModeling, and scores
of all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sparse_accel.benchmarking.heads import HEADS, MASKED_LANGUAGE_MODELING, QUESTION_ANSWERING
from sparse_accel.benchmarking.hf_masked_language_modeling import chunk_dataset, masking_collator
from sparse_accel.benchmarking.models import (
    NO_LOAD,
    Load,
    encoder_matrices,
    random_model,
    random_teacher,
    vocabulary_of,
)
from sparse_accel.benchmarking.own import Bench
from sparse_accel.benchmarking.stopwatch import Stopwatch
from sparse_accel.compress.masks import nonzero_mask
from sparse_accel.tasks import resolve_task
from sparse_accel.tasks.features import Features

# Batches of a compiled model are padded on to a multiple of this: few shapes.
_COMPILED_MULTIPLE: Final = 64


class Trained(Protocol):
    """An arm in training. `load` is what the model computed with in the last watched turn."""

    @property
    def load(self) -> Load: ...
    @property
    def steps(self) -> int: ...
    def turn(self) -> None: ...
    def state_bytes(self) -> int: ...
    def violations(self) -> int: ...
    def watched(self) -> Any: ...


@dataclass
class Loop:
    """Hugging Face's loop over one epoch: what a baseline is made of.

    `loss` gives the loss of a batch on the device. `clip` is a norm, 0 for none; `asks_for_nan` is the check that HF Trainer
    makes of each micro-batch's loss on the host.
    """

    model: nn.Module
    module: nn.Module
    optimizer: Any
    scheduler: Any
    batches: Any
    loss: Callable[[dict[str, Tensor]], Tensor]
    backward: Callable[[Tensor], None]
    micro_batches: int
    device: torch.device
    stopwatch: Stopwatch
    clip: float = 0.0
    asks_for_nan: bool = False
    masks: dict[str, Tensor] | None = None
    load: Load = NO_LOAD

    @property
    def steps(self) -> int:
        """Optimizer steps in a turn."""
        return -(-len(self.batches) // self.micro_batches)

    def turn(self) -> None:
        """One epoch."""
        within = self.stopwatch.within
        self.model.train()
        source = iter(self.batches)
        for index in range(len(self.batches)):
            with within("data"):
                batch = {name: value.to(self.device, non_blocking=True) for name, value in next(source).items()}
            count, length = batch["input_ids"].shape
            self.load = self.load + Load(count * length, count * length * length)
            loss = self.loss(batch)
            if self.asks_for_nan and torch.isnan(loss):
                raise FloatingPointError("the loss of a baseline is not a number")
            with within("backward"):
                self.backward(loss / self.micro_batches)
            if (index + 1) % self.micro_batches == 0 or index + 1 == len(self.batches):
                with within("optimizer"):
                    if self.clip:
                        nn.utils.clip_grad_norm_(self.module.parameters(), self.clip)
                    self.optimizer.step()
                    self.scheduler.step()
                    self.optimizer.zero_grad()

    def state_bytes(self) -> int:
        """See `OwnTraining.state_bytes`; masks that are held beside the weights included."""
        held = sum(
            value.nbytes
            for state in self.optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        )
        masks = sum(mask.nbytes for mask in (self.masks or {}).values())
        return held + masks + sum(2 * parameter.nbytes for parameter in self.module.parameters())

    def violations(self) -> int:
        """Pruned weights that the optimizer moved off zero: SparseML's hooks put them back in the next forward."""
        if not self.masks:
            return 0
        weights = dict(self.module.named_parameters())
        return int(sum(((weights[name] * mask) != weights[name]).sum() for name, mask in self.masks.items()))

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within, `load` counts from nothing; the loop opens its phases itself."""
        self.load = NO_LOAD
        yield


def padded_dataset(features: Features, max_length: int) -> Any:
    """The features as a datasets.Dataset of lists, padded to the maximum, as the example script's preprocessing makes it."""
    from datasets import Dataset, Sequence, Value
    from datasets import Features as Columns

    count = len(features)
    padded = {name: np.zeros((count, max_length), np.int64) for name in (*features.tokens, "attention_mask")}
    for row in range(count):
        first, last = features.bounds[row], features.bounds[row + 1]
        for name, column in features.tokens.items():
            padded[name][row, : last - first] = column[first:last]
        padded["attention_mask"][row, : last - first] = 1
    kinds = {"input_ids": "int32", "token_type_ids": "int8", "attention_mask": "int8"}
    columns = Columns(
        {
            **{name: Sequence(Value(kind)) for name, kind in kinds.items()},
            **{name: Value("int64") for name in features.labels},
        }
    )
    rows = {name: list(padded[name]) for name in kinds} | {
        name: list(column) for name, column in features.labels.items()
    }
    return Dataset.from_dict(rows, features=columns)


def hugging_face_optimizer(module: nn.Module) -> torch.optim.Optimizer:
    """AdamW over the script's two groups."""
    no_decay = ("bias", "LayerNorm.weight")
    named = list(module.named_parameters())
    groups = [
        {"params": [p for n, p in named if not any(part in n for part in no_decay)], "weight_decay": 0.0},
        {"params": [p for n, p in named if any(part in n for part in no_decay)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=5e-5)


def constant_schedule(optimizer: Any) -> Any:
    """transformers' linear schedule over more steps than any benchmark takes."""
    from transformers import get_scheduler

    return get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=1_000_000)


def shuffled(bench: Bench, dataset: Any, collate: Callable[..., Any] | None = None) -> DataLoader[Any]:
    """The script's training batches; `collate` where that is not default_data_collator."""
    from transformers import default_data_collator

    return DataLoader(
        dataset,
        shuffle=True,
        collate_fn=collate or default_data_collator,
        batch_size=bench.settings.workload.micro_batch_size,
        generator=torch.Generator().manual_seed(bench.settings.seed),
    )


def build_b1(bench: Bench, *, dropout: float | None = None, with_teacher: bool = False, sparsity: float = 0.0) -> Loop:
    """The task's script: padded to the maximum, SDPA, AdamW, and with a teacher of the same size in every step if asked. Of each
    matrix of the encoder the share `sparsity` begins as zeros; nothing holds them."""
    workload = bench.settings.workload
    model = random_model(workload.shape, bench.settings.seed, workload.task, sparsity=sparsity, dropout=dropout)
    model.set_attn_implementation("sdpa")
    if workload.task == MASKED_LANGUAGE_MODELING:
        batches = shuffled(bench, chunk_dataset(bench.features), masking_collator(vocabulary_of(workload.shape)))
    else:
        batches = shuffled(bench, padded_dataset(bench.features, workload.max_length))
    return accelerated(bench, model, batches, teacher=_plain_teacher(bench) if with_teacher else None)


def build_b3(bench: Bench) -> Loop:
    """B1 with batches of similar length, padded to the longest, and a compiled model."""
    from transformers.trainer_pt_utils import LengthGroupedSampler

    settings = bench.settings
    workload, features = settings.workload, bench.features
    model = random_model(workload.shape, settings.seed)
    model.set_attn_implementation("sdpa")
    lengths = features.lengths.tolist()
    generator = torch.Generator().manual_seed(settings.seed)
    sampler = LengthGroupedSampler(workload.micro_batch_size, lengths=lengths, generator=generator)

    def collate(rows: list[dict[str, np.ndarray]]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        length = min(workload.max_length, -(-longest // _COMPILED_MULTIPLE) * _COMPILED_MULTIPLE)
        batch = {name: np.zeros((len(rows), length), np.int64) for name in (*features.tokens, "attention_mask")}
        for index, row in enumerate(rows):
            size = len(row["input_ids"])
            for name in features.tokens:
                batch[name][index, :size] = row[name]
            batch["attention_mask"][index, :size] = 1
        batch |= {name: np.array([row[name] for row in rows], np.int64) for name in features.labels}
        return {name: torch.from_numpy(column) for name, column in batch.items()}

    batches: DataLoader[Any] = DataLoader(
        features,  # type: ignore[arg-type]  # it has what a map-style dataset needs
        sampler=sampler,
        batch_size=workload.micro_batch_size,
        collate_fn=collate,
    )
    return accelerated(bench, model, batches, compiles=True)


def accelerated(bench: Bench, model: Any, batches: Any, *, teacher: Any = None, compiles: bool = False) -> Loop:
    """The loop of the script, prepared by accelerate as it does."""
    task = bench.settings.workload.task
    accelerator, within = bench.accelerator, bench.stopwatch.within
    optimizer = hugging_face_optimizer(model)
    scheduler = constant_schedule(optimizer)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    called = torch.compile(prepared) if compiles else prepared

    def loss(batch: dict[str, Tensor]) -> Tensor:
        with within("forward"):
            outputs = called(**batch)
        if teacher is None:
            found: Tensor = outputs.loss
            return found
        with within("teacher"):
            wanted = teacher(batch)
        return distillation_loss(outputs, wanted, temperature=HEADS[task].temperature, task=task)

    def backward(value: Tensor) -> None:
        accelerator.sync_gradients = True
        accelerator.backward(value)

    return Loop(
        prepared,
        accelerator.unwrap_model(prepared),
        optimizer,
        scheduler,
        batches,
        loss,
        backward,
        bench.settings.workload.micro_batches,
        bench.device,
        bench.stopwatch,
    )


def _plain_teacher(bench: Bench) -> Callable[[dict[str, Tensor]], Any]:
    """A teacher that is run on every batch, in the run's precision."""
    workload = bench.settings.workload
    teacher = random_teacher(workload.shape, bench.settings.seed + 1, workload.task).to(bench.device)
    teacher.set_attn_implementation("sdpa")
    kind, is_bf16 = bench.device.type, bench.settings.precision == "bf16"
    labels = resolve_task(workload.task).label_keys

    @torch.no_grad()
    def answer(batch: dict[str, Tensor]) -> Any:
        inputs = {name: value for name, value in batch.items() if name not in labels}
        with torch.autocast(kind, torch.bfloat16, enabled=is_bf16):
            return teacher(**inputs)

    return answer


def distillation_loss(student: Any, teacher: Any, temperature: float, task: str = QUESTION_ANSWERING) -> Tensor:
    """T^2 KL(teacher || student) of the task's outputs, whole, padding included, as SparseML's: a mean over the softmaxes."""
    losses = []
    for key in resolve_task(task).output_keys:
        log_student = torch.log_softmax(student[key].float() / temperature, dim=-1)
        log_teacher = torch.log_softmax(teacher[key].float() / temperature, dim=-1)
        summed = nn.functional.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
        losses.append(summed / log_student[..., 0].numel())
    return temperature**2 * torch.stack(losses).mean()


def pruned_masks(model: nn.Module) -> dict[str, Tensor]:
    """A mask of ones and zeros, fp32, for each matrix of the encoder, by parameter name."""
    return {name: nonzero_mask(weight).float() for name, weight in encoder_matrices(model).items()}
