"""The same work on many chunks, in processes of their own where there are to be some."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from sparse_accel.errors import DataError

Spec = TypeVar("Spec")
Chunk = TypeVar("Chunk")
Result = TypeVar("Result")


def map_chunks(
    make: Callable[[Spec], Callable[[Chunk], Result]], spec: Spec, chunks: Sequence[Chunk], num_workers: int | None
) -> Iterator[Result]:
    """What `make(spec)` makes of each chunk, in order; the results do not depend on `num_workers` (None or 1: this process).

    `make` and all that goes in and out must be picklable. Raises DataError where a process dies.
    """
    work = make(spec)  # in every case: a spec that cannot work is an error of this process
    num_workers = min(num_workers or 1, len(chunks))
    if num_workers <= 1:
        yield from map(work, chunks)
        return
    # Spawned, not forked: a fork of a process with threads (torch, tokenizers) may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context, _start_worker, (make, spec)) as pool:
        try:
            yield from pool.map(_in_worker, chunks)
        except BrokenProcessPool as error:
            raise DataError(f"one of {num_workers} preprocessing processes died (out of memory?); try fewer") from error


_work: Callable[[Any], Any]


def _start_worker(make: Callable[[Any], Callable[[Any], Any]], spec: Any) -> None:
    global _work
    _work = make(spec)


def _in_worker(chunk: Any) -> Any:
    return _work(chunk)
