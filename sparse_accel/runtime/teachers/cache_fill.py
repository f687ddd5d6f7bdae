"""Fill a teacher cache: every rank asks the placed teacher for its share, and one process of each node writes all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import torch
from torch import Tensor

from sparse_accel.runtime.batches import Batches, batch_loader
from sparse_accel.runtime.teachers.cache_store import (
    DTYPES,
    CachedOutputs,
    CacheWriter,
    Column,
    DamagedCacheError,
    Layout,
    bits,
    free_bytes,
    open_cache,
)
from sparse_accel.runtime.teachers.fitting import gigabytes
from sparse_accel.runtime.teachers.placed import PlacedTeacher
from sparse_accel.runtime.together import from_all
from sparse_accel.tasks.collating import Collate
from sparse_accel.tasks.features import Features

T = TypeVar("T")

# What all ranks together may hold before it is written, in bytes.
_GATHERED: Final = 64e6


class CacheNotFilledError(Exception):
    """There is no cache, on any node; the message says why."""


@dataclass(frozen=True)
class Part:
    """One batch's outputs: its features, and each output's values end to end; what is wrong with them, if anything is."""

    indices: np.ndarray
    values: dict[str, np.ndarray]
    problem: str | None = None


@dataclass(frozen=True)
class CacheJob:
    """What is to be cached, and where: the outputs `keys` for all `features`, as the teacher gives them for what `select` takes
    of batches of `batch_size`, stored in `dtype` (one of DTYPES, or "auto" for that of the outputs). `by_token` says of which
    outputs a batch has one for each place, [N, S, ...], and not one for each feature: shapes alone may be both."""

    folder: Path
    fingerprint: str
    made_of: Mapping[str, Any]
    features: Features
    collate: Collate
    padding_side: str
    keys: tuple[str, ...]
    select: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
    batch_size: int
    dtype: str
    by_token: Callable[[str, Tensor, Mapping[str, Tensor]], bool]
    num_workers: int = 0


def look(job: CacheJob, accelerator: Any) -> tuple[CachedOutputs | None, list[str]]:
    """The cache if it is there for every rank, and what is wrong with those that cannot be used. All ranks call this."""
    found, problem = None, None
    try:
        # One process of a node reads it all.
        found = open_cache(
            job.folder,
            job.fingerprint,
            job.features.bounds,
            padding_side=job.padding_side,
            verifies=accelerator.is_local_main_process,
        )
    except DamagedCacheError as error:
        problem = str(error)
    answers = from_all(accelerator, (found is not None, problem))
    problems = sorted({problem for _, problem in answers if problem is not None})
    return (found if all(is_there for is_there, _ in answers) else None), problems


def fill(
    job: CacheJob,
    teacher: PlacedTeacher,
    accelerator: Any,
    *,
    reserved: int = 0,
    announce: Callable[[str], None],
    on_batch: Callable[[int, int], None] | None = None,
) -> CachedOutputs:
    """Ask for everything once and write it; the cache. All ranks call this, and ask the teacher equally often.

    `announce` is told what will be written before it is; `reserved` bytes of the disk are left free. Raises
    CacheNotFilledError on all ranks where a disk is too small or refuses.
    """
    batches = length_sorted(job.features.lengths, job.batch_size)
    answers = _answers(job, teacher, accelerator, batches)
    first, columns = next(answers)
    layout = Layout(columns, len(job.features), int(job.features.bounds[-1]))
    writer = _open_writers(job, layout, accelerator, reserved, announce)
    rounds = -(-len(batches) // accelerator.num_processes)
    bytes_per_round = max(1, layout.num_bytes // rounds)
    rounds_at_once = max(1, int(_GATHERED // bytes_per_round))
    own = [first]
    try:
        for done in range(1, rounds + 1):
            if done % rounds_at_once == 0 or done == rounds:
                _write(writer, [part for parts in from_all(accelerator, own) for part in parts])
                own = []
            if done < rounds:
                own.append(next(answers)[0])
            if on_batch is not None and done < rounds:
                on_batch(done, rounds)
        _agree(accelerator, lambda: writer.commit(job.fingerprint, job.made_of) if writer is not None else None)
    finally:
        if writer is not None:
            writer.discard()
    found, problems = look(job, accelerator)
    if found is None:
        raise CacheNotFilledError("; ".join(problems) or f"{job.folder} went away")
    return found


def length_sorted(lengths: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Batches of feature indices, longest first; they do not depend on who will compute them."""
    order = np.argsort(-lengths, kind="stable")
    return [order[at : at + batch_size] for at in range(0, len(order), batch_size)]


def _answers(
    job: CacheJob, teacher: PlacedTeacher, accelerator: Any, batches: Sequence[np.ndarray]
) -> Iterator[tuple[Part, dict[str, Column]]]:
    """This rank's batches, one each round, and what their outputs look like. A rank that has none left asks once more for
    what counts for nothing, since the others may need its part of the teacher."""
    rank, count = accelerator.process_index, accelerator.num_processes
    own = batches[rank::count]
    idle = [batches[-1][:1]] * (-(-len(batches) // count) - len(own))
    loader = batch_loader(Batches(job.features, job.collate), [*own, *idle], job.num_workers)
    for turn, batch in enumerate(loader):
        on_device = {name: value.to(accelerator.device, non_blocking=True) for name, value in batch.items()}
        outputs = teacher.answers(job.select(on_device))
        is_token = batch["attention_mask"].bool()
        columns = {
            key: _column(outputs[key], job.dtype, by_token=job.by_token(key, outputs[key], on_device))
            for key in job.keys
        }
        if turn < len(own):
            yield _part(own[turn], {key: outputs[key].cpu() for key in job.keys}, is_token, columns), columns
        else:
            yield Part(np.empty(0, np.int64), {}), columns


def _column(values: Tensor, dtype: str, *, by_token: bool) -> Column:
    own = str(values.dtype).removeprefix("torch.")
    return Column(by_token, tuple(values.shape[2 if by_token else 1 :]), own if dtype == "auto" else dtype)


def _part(indices: np.ndarray, outputs: Mapping[str, Tensor], is_token: Tensor, columns: Mapping[str, Column]) -> Part:
    """What is kept of a batch's outputs, each [N, S, ...] or [N, ...] on the CPU; `is_token` is bool [N, S]."""
    values, problem = {}, None
    for key, column in columns.items():
        kept = outputs[key][is_token] if column.by_token else outputs[key]
        stored = kept.to(getattr(torch, column.dtype))
        if not torch.equal(stored.isfinite(), kept.isfinite()):
            most = kept[kept.isfinite()].abs().max()
            problem = f"{column.dtype} cannot hold the teacher's {key}, which reach {most:.3g}"
        values[key] = bits(stored.contiguous())
    return Part(indices, values, problem)


def _write(writer: CacheWriter | None, parts: Sequence[Part]) -> None:
    """Write what all ranks found, on the ranks that write. Raises CacheNotFilledError on all of them for a problem of one."""
    for part in parts:
        if part.problem is not None:
            raise CacheNotFilledError(part.problem)
    if writer is not None:
        for part in parts:
            if len(part.indices):
                writer.put(part.indices, part.values)


def _open_writers(
    job: CacheJob, layout: Layout, accelerator: Any, reserved: int, announce: Callable[[str], None]
) -> CacheWriter | None:
    """The writer of this node on its first process, None on the others."""
    unknown = sorted({column.dtype for column in layout.columns.values()} - set(DTYPES))
    if unknown:
        raise CacheNotFilledError(f"the teacher's outputs are {unknown[0]}")
    free = free_bytes(job.folder)
    line = f"{gigabytes(layout.num_bytes)} for {layout.num_features:,} features in {job.folder} ({gigabytes(free)} free there)"
    announce(line)

    def open_writer() -> CacheWriter | None:
        if not accelerator.is_local_main_process:
            return None
        if free < layout.num_bytes + reserved:
            kept = f", and {gigabytes(reserved)} are kept for the run" if reserved else ""
            raise OSError(
                f"{gigabytes(free)} are free on the disk of {job.folder}, the cache takes {gigabytes(layout.num_bytes)}{kept}"
            )
        return CacheWriter(job.folder, layout, job.features.bounds)

    return _agree(accelerator, open_writer)


def _agree(accelerator: Any, action: Callable[[], T]) -> T:
    """What `action` gives on each rank. Raises CacheNotFilledError on all of them where the disk of one refuses."""
    result: T | None = None
    problem: str | None = None
    try:
        result = action()
    except OSError as error:
        problem = error.strerror or str(error)
    problems = [found for found in from_all(accelerator, problem) if found is not None]
    if problems:
        raise CacheNotFilledError(problems[0])
    return result  # type: ignore[return-value]  # what the action gave
