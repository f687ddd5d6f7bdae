"""Training batches of data that is read while training."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any, Final, TypeVar

import numpy as np
import torch
from torch import Tensor

from sparse_accel.runtime.batches import ExtraColumns, MicroBatch, StepSampler
from sparse_accel.tasks.base import Stream
from sparse_accel.tasks.collating import Collate
from sparse_accel.tasks.mlm_masking import NAMES
from sparse_accel.timeline import Clock

# Steps that are made ahead of the one that is trained.
_AHEAD: Final = 4

T = TypeVar("T")


class StreamLoader:
    """Yields what a StepLoader yields, from a stream: lane n of a step gives its n-th feature.

    An epoch is a number of steps here: nobody knows how much data there is. A step's features depend on the step and on how
    many they are alone. To begin in the middle, all before it is read again, though not trained. With `reads_ahead`, steps are
    made in a thread of their own; tokenizers work without Python's lock.
    """

    def __init__(
        self,
        stream: Stream,
        collate: Collate,
        task: Any,
        *,
        lanes: StepSampler,
        steps_per_epoch: int,
        device: torch.device,
        reads_ahead: bool = False,
        pin_memory: bool = False,
    ) -> None:
        self.stream = stream
        self.collate = collate
        self.task = task
        self.lanes = lanes
        self.steps_per_epoch = steps_per_epoch
        self.device = device
        self.reads_ahead = reads_ahead
        self.pin_memory = pin_memory and device.type == "cuda"

    @property
    def features_per_step(self) -> int:
        """Features that all ranks train on in one optimizer step."""
        return self.lanes.features_per_step

    def add_columns(self, extra: ExtraColumns) -> None:
        """Never asked for: features that nobody has counted have no columns kept for them."""
        raise AssertionError("a stream's features are not in a cache")

    def steps(self, clock: Clock, last_step: int) -> Iterator[list[MicroBatch]]:
        """The steps from `clock` up to, not including, `last_step`."""
        made = self._made(clock.step, last_step)
        for batches in _ahead(made, _AHEAD) if self.reads_ahead else made:
            yield [self._place(batch) for batch in batches]

    def _made(self, first_step: int, last_step: int) -> Iterator[list[dict[str, Tensor]]]:
        parts = self.lanes.micro_batches(np.arange(self.features_per_step), 0)
        own = np.concatenate(parts)
        lanes = self.stream.lanes(own, self.features_per_step)
        lanes.skip(first_step)
        bounds = np.cumsum([0, *map(len, parts)])
        for step in range(first_step, last_step):
            features = lanes.take()
            # Where masks are drawn, features go by a number that no other feature of the run has.
            features = replace(features, facts={**features.facts, NAMES: step * self.features_per_step + own})
            yield [self.collate(features, np.arange(begin, end), 0) for begin, end in pairwise(bounds)]

    def _place(self, batch: dict[str, Tensor]) -> MicroBatch:
        if self.pin_memory:
            batch = {name: value.pin_memory() for name, value in batch.items()}
        return MicroBatch.place(batch, self.task, self.device)


def _ahead(items: Iterator[T], count: int) -> Iterator[T]:
    """The same items, up to `count` of them made before they are asked for. What goes wrong is raised where it is due."""
    made: queue.Queue[tuple[list[T], BaseException | None]] = queue.Queue(count)
    is_over = threading.Event()

    def put(some: list[T], error: BaseException | None = None) -> None:
        while not is_over.is_set():
            try:
                return made.put((some, error), timeout=0.2)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put([item])
                if is_over.is_set():
                    return
            put([])
        except BaseException as error:  # raised again by the reader
            put([], error)

    thread = threading.Thread(target=work, name="sparse_accel_stream", daemon=True)
    thread.start()
    try:
        while True:
            some, error = made.get()
            if error is not None:
                raise error
            if not some:
                return
            yield from some
    finally:
        is_over.set()
        thread.join()
