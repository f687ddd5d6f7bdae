"""Which features form which optimizer step, and their micro-batches on the device.

One seeded permutation per epoch is cut into steps of `micro_batch_size x world_size x accumulation` features, and each
step into micro-batches. The features of a step depend on that product alone, so a step means the same however it is
split over micro-batches and ranks; nothing is repeated to fill a last batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from sparse_accel.timeline import Clock, steps_per_epoch

# Length grouping sorts within windows of this many steps, as Hugging Face's sampler does: batches stay mixed.
_GROUPING_WINDOW = 50


@dataclass(frozen=True)
class StepSampler:
    """Cuts epochs into steps and steps into this rank's micro-batches, from the seed and the clock alone."""

    num_features: int
    micro_batch_size: int
    accumulation: int
    seed: int
    rank: int = 0
    world_size: int = 1
    drop_last: bool = False
    lengths: np.ndarray | None = None

    @property
    def features_per_step(self) -> int:
        """Features that all ranks train on in one optimizer step."""
        return self.micro_batch_size * self.world_size * self.accumulation

    @property
    def num_batches(self) -> int:
        """Micro-batches of this rank in one epoch."""
        per_round = self.micro_batch_size * self.world_size
        return self.num_features // per_round if self.drop_last else math.ceil(self.num_features / per_round)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch."""
        return steps_per_epoch(self.num_batches, self.accumulation)

    def order(self, epoch: int) -> np.ndarray:
        """The features of one epoch in the order of training, int64 `[num_features]`."""
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(self.num_features)
        if self.drop_last:
            order = order[: self.num_batches * self.micro_batch_size * self.world_size]
        if self.lengths is None:
            return order
        step_size = self.micro_batch_size * self.world_size * self.accumulation
        window = step_size * _GROUPING_WINDOW
        steps: list[np.ndarray] = []
        for start in range(0, len(order), window):
            part = order[start : start + window]
            part = part[np.argsort(-self.lengths[part], kind="stable")]
            steps.extend(part[at : at + step_size] for at in range(0, len(part), step_size))
        # The short step, where there is one, stays last: every other step is whole.
        whole = steps if len(steps[-1]) == step_size else steps[:-1]
        shuffled = [whole[at] for at in generator.permutation(len(whole))]
        return np.concatenate(shuffled + steps[len(whole) :])

    def micro_batches(self, order: np.ndarray, index: int) -> list[np.ndarray]:
        """This rank's micro-batches of step `index` in an epoch's `order`; every rank has equally many, some may be empty."""
        per_round = self.micro_batch_size * self.world_size
        step_size = per_round * self.accumulation
        features = order[index * step_size : (index + 1) * step_size]
        rounds = [features[at : at + per_round] for at in range(0, len(features), per_round)]
        return [np.array_split(part, self.world_size)[self.rank] for part in rounds]


@dataclass(frozen=True)
class MicroBatch:
    """One forward's inputs on the device, and how many loss units it holds (0 where this rank had nothing to do)."""

    inputs: dict[str, Tensor]
    num_units: int


class FeatureSet(torch.utils.data.Dataset[Any]):
    """Feature lookup for the worker processes."""

    def __init__(self, features: Any) -> None:
        self.features = features

    def __getitem__(self, index: int) -> Any:
        return self.features[index]

    def __len__(self) -> int:
        return len(self.features)


class StepLoader:
    """Yields, step after step, the micro-batches of each optimizer step, starting anywhere without reading what was done."""

    def __init__(
        self,
        sampler: StepSampler,
        features: Any,
        collate: Any,
        task: Any,
        *,
        device: torch.device,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.sampler = sampler
        self.features = features
        self.collate = collate
        self.task = task
        self.device = device
        self.num_workers = num_workers
        self.pin_memory = pin_memory and device.type == "cuda"

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch."""
        return self.sampler.steps_per_epoch

    def steps(self, clock: Clock, last_step: int) -> Iterator[list[MicroBatch]]:
        """The steps from `clock` up to, not including, `last_step`."""
        step = clock.step
        while step < last_step:
            epoch, first = divmod(step, self.steps_per_epoch)
            count = min(self.steps_per_epoch - first, last_step - step)
            yield from self._part_of_epoch(epoch, first, count)
            step += count

    def _part_of_epoch(self, epoch: int, first: int, count: int) -> Iterator[list[MicroBatch]]:
        order = self.sampler.order(epoch)
        plan = [self.sampler.micro_batches(order, index) for index in range(first, first + count)]
        # A rank without features of its own in a round takes part with one feature that counts for nothing.
        index_lists = [(part if len(part) else np.zeros(1, np.int64)).tolist() for step in plan for part in step]
        batches = iter(self._loader(index_lists))
        for step in plan:
            yield [self._place(next(batches), is_empty=len(part) == 0) for part in step]

    def _loader(self, index_lists: Sequence[list[int]]) -> DataLoader[Any]:
        # The explicit generator keeps the loader from drawing a seed from the global one, whose state dropout needs.
        return DataLoader(
            FeatureSet(self.features),
            batch_sampler=index_lists,
            collate_fn=self.collate,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            generator=torch.Generator(),
        )

    def _place(self, batch: dict[str, Tensor], *, is_empty: bool) -> MicroBatch:
        inputs = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
        return MicroBatch(inputs, 0 if is_empty else self.task.num_units(batch))
