"""Evaluation: run the model over features on all ranks, gather the logits, let the task score them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sparse_accel.runtime.batches import Batches, batch_loader
from sparse_accel.session import Session
from sparse_accel.tasks.base import Scored, Split
from sparse_accel.tasks.features import length_sorted_batches

# Called with (done, total) batches of this rank.
OnBatch = Callable[[int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """Metrics under `{prefix}_...` keys, and the task's files of predictions: name -> JSON content."""

    metrics: dict[str, float]
    scored: Scored


@torch.no_grad()
def predict(
    session: Session, split: Split, collate: Any, *, on_batch: OnBatch | None = None
) -> dict[str, list[np.ndarray]]:
    """What the task wants to score of the model's outputs (`Task.for_scoring`), for every feature of `split` in its order; on
    every rank.

    Ranks may have unequal numbers of batches. Where a forward needs all of them, those that are done go on with a batch
    that counts for nothing.
    """
    accelerator, model, options = session.accelerator, session.forward_model, session.options
    was_training = model.training
    model.eval()
    batches = length_sorted_batches(
        np.asarray(split.features.lengths),
        options.per_device_eval_batch_size,
        accelerator.process_index,
        accelerator.num_processes,
    )
    rounds = len(batches)
    if session.backend.shards_weights:
        rounds = int(session.reduce_max(torch.tensor(float(rounds), device=accelerator.device)).item())
    loader = batch_loader(
        Batches(split.features, collate),
        [*batches, *[np.zeros(1, np.int64)] * (rounds - len(batches))],
        options.dataloader_num_workers,
    )
    own: list[tuple[np.ndarray, dict[str, list[np.ndarray]]]] = []
    for done, batch in enumerate(loader, start=1):
        inputs = {name: value.to(accelerator.device, non_blocking=True) for name, value in batch.items()}
        with evaluation_precision(options, accelerator.device):
            outputs = session.outputs(inputs, model)
        if done > len(batches):
            continue
        kept = {key: outputs[key] for key in session.task.output_keys}
        own.append((batches[done - 1], session.task.for_scoring(kept, inputs)))
        if on_batch is not None:
            on_batch(done, len(batches))
    model.train(was_training)

    result: dict[str, list[np.ndarray]] = {}
    for indices, arrays in _gather(own, accelerator):
        for key, rows in arrays.items():
            column = result.setdefault(key, [np.empty(0, np.float32)] * len(split.features))
            for index, row in zip(indices, rows, strict=True):
                column[index] = row
    return result


def evaluation_precision(options: Any, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """`--bf16_full_eval` and `--fp16_full_eval`; the precision of training otherwise, which the model brings itself."""
    if options.bf16_full_eval or options.fp16_full_eval:
        return torch.autocast(device.type, dtype=torch.bfloat16 if options.bf16_full_eval else torch.float16)
    return contextlib.nullcontext()


def evaluate(
    session: Session, split: Split, collate: Any, *, prefix: str, on_batch: OnBatch | None = None
) -> Evaluation:
    """Score the model as it is on `split`; computed on the main process, which alone has the files; all get the metrics."""
    started = time.perf_counter()
    outputs = predict(session, split, collate, on_batch=on_batch)
    scored = Scored({}, {})
    if session.accelerator.is_main_process:
        scored = session.task.score(split, outputs, session.options)
    if session.accelerator.num_processes > 1:
        # Not the files: to send them would make them, and most evaluations' are never read.
        shared = [scored.metrics]
        torch.distributed.broadcast_object_list(shared, src=0)
        scored = Scored(shared[0], scored.files)
    seconds = time.perf_counter() - started
    metrics = {f"{prefix}_{name}": value for name, value in scored.metrics.items()}
    metrics[f"{prefix}_samples"] = len(split.features)
    metrics[f"{prefix}_runtime"] = round(seconds, 4)
    metrics[f"{prefix}_samples_per_second"] = round(len(split.features) / seconds, 3)
    return Evaluation(metrics, scored)


def _gather(own: list[Any], accelerator: Any) -> list[Any]:
    if accelerator.num_processes == 1:
        return own
    gathered: list[Any] = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(gathered, own)
    return [part for rank in gathered for part in rank]
