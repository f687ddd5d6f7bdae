"""One rank of a launch that asks a sharded teacher: `torchrun teacher_worker.py PLACEMENT FOLDER`. Rank 0 writes what all
of them measured to FOLDER/report.json."""

from __future__ import annotations

import json
import os
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForQuestionAnswering

from sparse_accel.folders.whole_weights import whole_weights
from sparse_accel.runtime.teachers import PLACEMENTS
from sparse_accel.runtime.teachers.caching import free_memory
from sparse_accel.runtime.teachers.replicated import replicated
from sparse_accel.runtime.teachers.units import blocks, num_bytes
from sparse_accel.session import Teacher

ACCEPTED = frozenset({"input_ids", "attention_mask", "token_type_ids"})
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Rank:
    """What a placement asks of an accelerator."""

    mixed_precision: str = "no"
    num_processes: int = 2
    device: torch.device = CPU


def load(folder: Path) -> Any:
    """Whole, whatever the launch has switched on."""
    with whole_weights():
        model = AutoModelForQuestionAnswering.from_pretrained(folder, dtype=torch.float32)
    assert all(not parameter.is_meta and parameter.numel() for parameter in model.parameters())
    return model


def batch(seed: int) -> dict[str, Tensor]:
    """Another shape on each rank, and a label, which no teacher is given."""
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(10 * seed + rank)
    ids = torch.randint(5, 90, (2 + rank, 16 + 24 * rank), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 12:] = 0
    return {"input_ids": ids, "attention_mask": mask, "start_positions": torch.zeros(2 + rank, dtype=torch.long)}


def resident(parameters: list[nn.Parameter], idle: int) -> int:
    """Bytes of weights on this rank: its slices (`idle`) and whatever is whole at the moment."""
    whole = 0
    for parameter in parameters:
        if hasattr(parameter, "ds_tensor"):  # DeepSpeed: empty unless gathered
            whole += parameter.data.numel() * parameter.element_size()
        elif not hasattr(parameter, "to_local"):  # FSDP2: a plain parameter while it is gathered
            whole += parameter.numel() * parameter.element_size()
    return idle + whole


def slices(model: nn.Module) -> int:
    """Bytes that this rank keeps between two calls, whatever stays whole included."""
    kept = 0
    for parameter in model.parameters():
        part = getattr(parameter, "ds_tensor", None)
        if part is None:
            part = parameter.to_local() if hasattr(parameter, "to_local") else parameter.data
        else:
            kept += parameter.data.numel() * parameter.element_size()
        kept += part.numel() * part.element_size()
    return kept


@contextmanager
def watched(model: nn.Module) -> Iterator[list[int]]:
    """The most that was resident at the start of any module's forward, as the only item of the list."""
    own = sum(
        getattr(p, "ds_tensor", p.to_local() if hasattr(p, "to_local") else p).numel() * 4 for p in model.parameters()
    )
    most = [0]

    def look(module: nn.Module, arguments: Any) -> None:
        most[0] = max(most[0], resident(list(model.parameters()), own))

    handles = [module.register_forward_pre_hook(look) for module in model.modules() if not list(module.children())]
    try:
        yield most
    finally:
        for handle in handles:
            handle.remove()


def difference(one: Any, other: Any) -> float:
    """Between two answers, in absolute value."""
    assert set(one) == set(other) == {"start_logits", "end_logits"}
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in one.values())
    return max(float((one[key] - other[key]).abs().max()) for key in one)


def students(placement: str, folder: Path) -> Iterator[tuple[str, nn.Module, Any]]:
    """Each way of training that a teacher must bear beside it: name, prepared model, and what takes a step."""
    ddp = DistributedDataParallel(load(folder))
    yield "ddp", ddp, torch.optim.SGD(ddp.parameters(), lr=1e-3)
    sharded = load(folder)
    for block in blocks(sharded):
        fully_shard(block)
    fully_shard(sharded)
    yield "fsdp2", sharded, torch.optim.SGD(sharded.parameters(), lr=1e-3)
    if placement == "zero3":
        import deepspeed

        for stage in (1, 2, 3):
            model = load(folder)
            config = {
                "train_micro_batch_size_per_gpu": 1,
                "zero_optimization": {"stage": stage},
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
            }
            engine, *_ = deepspeed.initialize(
                model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1e-3), config=config
            )
            yield f"zero{stage}", engine, engine


def train_beside(teacher: Teacher, student: Any, optimizer: Any, seed: int) -> float:
    """One step towards the teacher's answers; its loss."""
    inputs = batch(seed)
    outputs = student(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    answers = teacher(inputs)
    loss = sum((outputs[key].float() - answers[key]).square().mean() for key in answers)
    if student is optimizer:
        student.backward(loss)
    else:
        loss.backward()
    optimizer.step()
    if student is not optimizer:
        optimizer.zero_grad()
    return float(loss.detach())


def skip_the_compiler() -> None:
    """DeepSpeed's shared-memory op takes minutes to compile and only makes CPU collectives quicker."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    deepspeed.ops.__compatible_ops__[get_accelerator().create_op_builder("ShareMemCommBuilder").NAME] = False


def measure(placement: str, folder: Path) -> dict[str, Any]:
    alive = None
    if placement == "zero3":
        skip_the_compiler()
        from transformers.integrations import HfDeepSpeedConfig

        alive = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    else:
        os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_CPU_RAM_EFFICIENT_LOADING="true")
    report: dict[str, Any] = {}
    teachers = {}
    for precision in ("no", "bf16"):
        expected = replicated(load(folder / "teacher"), Rank(precision), ACCEPTED)
        model = load(folder / "teacher")
        size = num_bytes(model)
        teacher = teachers[precision] = PLACEMENTS[placement](model, Rank(precision), ACCEPTED)
        with watched(teacher.model) as most:
            report[precision] = max(difference(teacher(batch(seed)), expected(batch(seed))) for seed in range(5))
        report["idle"] = max(report.get("idle", 0), slices(teacher.model) / size)
        report["peak"] = max(report.get("peak", 0), most[0] / size)
        report["trainable"] = sum(parameter.requires_grad for parameter in teacher.model.parameters())
        report["training"] = any(module.training for module in teacher.model.modules())
    beside = report["beside"] = {}
    for name, student, optimizer in students(placement, folder / "student"):
        losses = [train_beside(teachers["no"], student, optimizer, seed=1) for _ in range(4)]
        apart = difference(teachers["no"](batch(9)), replicated(load(folder / "teacher"), Rank(), ACCEPTED)(batch(9)))
        beside[name] = {"losses": losses, "difference": apart}
    held = weakref.ref(teachers["no"].model)
    teachers["no"].release()
    free_memory()
    report["freed"] = held() is None
    del alive
    return report


if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    torch.manual_seed(0)
    reports: list[Any] = [None, None]
    dist.all_gather_object(reports, measure(sys.argv[1], Path(sys.argv[2])))
    if dist.get_rank() == 0:
        Path(sys.argv[2], "report.json").write_text(json.dumps(reports))
    dist.destroy_process_group()
