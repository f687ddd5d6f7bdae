"""Where a teacher goes: as `--teacher_placement` says, or where it fits."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import psutil
import torch
from accelerate.utils import DistributedType
from torch import nn

from sparse_accel.errors import ModelError, OptionError
from sparse_accel.runtime.options import TrainOptions
from sparse_accel.runtime.teachers import PLACEMENTS, fitting
from sparse_accel.runtime.teachers.placed import PlacedTeacher, Rank
from sparse_accel.runtime.teachers.units import largest_gather, num_bytes


def place(
    model: nn.Module,
    student: nn.Module,
    options: TrainOptions,
    accelerator: Any,
    precision: str,
    accepted: frozenset[str],
    *,
    label_order: Mapping[str, Sequence[int]] | None = None,
    is_alone: bool = False,
) -> tuple[PlacedTeacher, str]:
    """The teacher, and one line on where it is; `is_alone` says that it goes before the student takes its place, and
    `label_order` where the student's labels stand among the teacher's. All ranks decide alike.

    Raises OptionError for a placement that the launch cannot have, ModelError for a teacher that fits nowhere.
    """
    sizes, machine = measure(model, student, options, accelerator), look_around(model, student, accelerator)
    if is_alone:
        sizes = replace(sizes, student=0)
    needs = fitting.estimate(sizes, machine)
    placement = decide(options.teacher_placement, needs, sizes, machine)
    together = "alone" if is_alone else "with the student"
    line = f"teacher: {fitting.gigabytes(sizes.teacher)}, {placement}; {together} about {fitting.gigabytes(needs[placement])} "
    line += f"a process, {fitting.gigabytes(machine.free)} free"
    if not fitting.fits(needs[placement], machine):
        line += ", which may be too little"
    rank = Rank(accelerator.device, accelerator.num_processes, precision)
    placed = PLACEMENTS[placement](model, rank, accepted)
    placed.reorder(label_order or {}, accelerator.device)
    return placed, line


def decide(wish: str, needs: dict[str, int], sizes: fitting.Sizes, machine: fitting.Machine) -> str:
    """The placement that was asked for, which the estimate does not overrule; for `auto` the quickest one that fits."""
    if wish == "auto":
        found = fitting.choose(needs, machine)
        if found is None:
            raise ModelError(
                "the teacher does not fit into memory under any placement that this launch can have:\n"
                f"{fitting.table(needs, sizes, machine)}\n"
                "take a smaller teacher or micro-batch, or more processes; --teacher_placement names one to try all the same"
            )
        return found
    problem = fitting.obstacle(wish, machine)
    if problem is not None:
        raise OptionError(f"--teacher_placement {wish}: {problem}")
    return wish


def measure(model: Any, student: Any, options: TrainOptions, accelerator: Any) -> fitting.Sizes:
    """The sizes of a teacher and a student that are loaded and not yet placed."""
    kept = 0  # by the student for its backward; with checkpointing that of one layer at a time
    if options.do_train:
        kept = _layer(student, options) * (1 if options.gradient_checkpointing else student.config.num_hidden_layers)
    trainable = sum(p.numel() * p.element_size() for p in student.parameters() if p.requires_grad)
    share = fitting.student_bytes(
        num_bytes(student),
        trainable if options.do_train else 0,
        num_moments=0 if options.optim == "sgd" else 2,
        spread=fitting.SPREAD_BY[_way_of_training(accelerator)],
        num_processes=accelerator.num_processes,
    )
    return fitting.Sizes(num_bytes(model), largest_gather(model), _layer(model, options), share + kept)


def _layer(model: Any, options: TrainOptions) -> int:
    assert options.max_seq_length is not None, "a run knows the length of its features by now"
    return fitting.layer_activations(
        hidden=model.config.hidden_size,
        heads=model.config.num_attention_heads,
        batch=options.per_device_train_batch_size,
        length=options.max_seq_length,
    )


def _way_of_training(accelerator: Any) -> str:
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return {1: "zero1", 2: "zero2", 3: "zero3"}.get(accelerator.state.deepspeed_plugin.zero_stage, "ddp")
    return "fsdp" if accelerator.distributed_type == DistributedType.FSDP else "ddp"


def look_around(model: nn.Module, student: nn.Module, accelerator: Any) -> fitting.Machine:
    """The launch and its memory; what the least rank has free counts for all, so that all choose alike."""
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    if accelerator.device.type == "cuda":
        free, num_devices = torch.cuda.mem_get_info(accelerator.device)[0], torch.cuda.device_count()
    else:
        # Both models are in this memory already: what they take is theirs to take.
        free = psutil.virtual_memory().available // per_node + num_bytes(model) + num_bytes(student)
        num_devices = 1
    if accelerator.num_processes > 1:
        least = torch.tensor(free, device=accelerator.device)
        torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
        free = int(least.item())
    return fitting.Machine(accelerator.num_processes, per_node, num_devices, free)
