"""Which features form which optimizer step, and their micro-batches on the device.

One seeded order per epoch is cut into steps of `micro_batch_size x world_size x accumulation` features, and each step into
micro-batches. The features of a step depend on that product alone, so a step means the same however it is split over
micro-batches and ranks; nothing is repeated to fill a last batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from sparse_accel.runtime.balancing import balanced_steps, split_evenly
from sparse_accel.tasks.collating import Collate
from sparse_accel.tasks.features import Features
from sparse_accel.timeline import Clock, steps_per_epoch

# Length grouping sorts within windows of this many steps, as Hugging Face's sampler does: batches stay mixed.
_GROUPING_WINDOW = 50

# Why features are next to each other: chance alone; equal lengths; equal numbers of tokens in all batches.
GROUPINGS: Final = ("random", "length", "tokens")


@dataclass(frozen=True)
class StepSampler:
    """Cuts epochs into steps and steps into this rank's micro-batches, from the seed and the clock alone.

    `grouping` is one of GROUPINGS; all but "random" look at `lengths`, the tokens of each feature.
    """

    num_features: int
    micro_batch_size: int
    accumulation: int
    seed: int
    rank: int = 0
    world_size: int = 1
    drop_last: bool = False
    grouping: str = "random"
    lengths: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.grouping not in GROUPINGS or (self.grouping != "random" and self.lengths is None):
            raise ValueError(f"a grouping is one of {', '.join(GROUPINGS)}, and needs lengths; got {self.grouping!r}")

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
        if self.grouping == "random" or not len(order):
            return order
        assert self.lengths is not None
        whole = len(order) // self.features_per_step * self.features_per_step
        # The short step, where there is one, stays last: every other step is whole.
        kept, rest = order[:whole], order[whole:]
        if self.grouping == "length":
            return np.concatenate([*self._steps_of_equal_length(kept, generator), self._by_length(rest)])
        steps = balanced_steps(self.lengths, kept, self.features_per_step, generator)
        parts = split_evenly(self.lengths, steps, self.world_size * self.accumulation)
        return np.concatenate([parts.reshape(-1), rest])

    def _steps_of_equal_length(self, order: np.ndarray, generator: np.random.Generator) -> list[np.ndarray]:
        window = self.features_per_step * _GROUPING_WINDOW
        steps: list[np.ndarray] = []
        for start in range(0, len(order), window):
            part = self._by_length(order[start : start + window])
            steps.extend(part[at : at + self.features_per_step] for at in range(0, len(part), self.features_per_step))
        return [steps[at] for at in generator.permutation(len(steps))]

    def _by_length(self, features: np.ndarray) -> np.ndarray:
        assert self.lengths is not None
        return features[np.argsort(-self.lengths[features], kind="stable")]

    def micro_batches(self, order: np.ndarray, index: int) -> list[np.ndarray]:
        """This rank's micro-batches of step `index` in an epoch's `order`; every rank has equally many, some may be empty."""
        per_round = self.micro_batch_size * self.world_size
        step_size = per_round * self.accumulation
        features = order[index * step_size : (index + 1) * step_size]
        rounds = [features[at : at + per_round] for at in range(0, len(features), per_round)]
        return [np.array_split(part, self.world_size)[self.rank] for part in rounds]


@dataclass(frozen=True)
class MicroBatch:
    """One forward's inputs on the device, and how many loss units and tokens it holds (0 where this rank had nothing to
    do)."""

    inputs: dict[str, Tensor]
    num_units: int
    num_tokens: int

    @classmethod
    def place(
        cls, batch: Mapping[str, Tensor], task: Any, device: torch.device, *, is_empty: bool = False
    ) -> MicroBatch:
        """A batch on its way to the device, counted where it comes from: nothing waits for it there."""
        inputs = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        if is_empty:
            return cls(inputs, 0, 0)
        return cls(inputs, task.num_units(batch), int(batch["attention_mask"].sum()))


# More columns for a batch: given the indices of its features and S of its `attention_mask`.
ExtraColumns = Callable[[np.ndarray, int], dict[str, Tensor]]


class Batches(torch.utils.data.Dataset[Any]):
    """Batches by the indices of their features, made where they are asked for: in worker processes, if there are any.

    `epoch` is set before a loader starts: what is drawn anew in each epoch depends on it; -1 outside training.
    """

    def __init__(self, features: Features, collate: Collate, extra: ExtraColumns | None = None) -> None:
        self.features = features
        self.collate = collate
        self.extra = extra
        self.epoch = -1

    def __getitem__(self, indices: np.ndarray) -> dict[str, Tensor]:
        batch = self.collate(self.features, indices, self.epoch)
        return batch if self.extra is None else {**batch, **self.extra(indices, batch["attention_mask"].shape[1])}


def batch_loader(
    batches: Batches, index_lists: Iterable[np.ndarray], num_workers: int, **settings: Any
) -> DataLoader[Any]:
    """One batch for each list of indices, in their order, made `num_workers` processes ahead."""
    return DataLoader(
        batches,
        sampler=index_lists,  # any iterable will do: what it gives is the dataset's key
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        # Else the loader draws a seed from the global generator, whose state dropout needs.
        generator=torch.Generator(),
        **settings,
    )


def _as_it_is(batch: Any) -> Any:
    return batch


class StepLoader:
    """Yields, step after step, the micro-batches of each optimizer step, starting anywhere without reading what was done."""

    def __init__(
        self,
        sampler: StepSampler,
        features: Features,
        collate: Collate,
        task: Any,
        *,
        device: torch.device,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.sampler = sampler
        self.batches = Batches(features, collate)
        self.task = task
        self.device = device
        self.num_workers = num_workers
        self.pin_memory = pin_memory and device.type == "cuda"

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch."""
        return self.sampler.steps_per_epoch

    @property
    def features_per_step(self) -> int:
        """Features that all ranks train on in one optimizer step."""
        return self.sampler.features_per_step

    def add_columns(self, extra: ExtraColumns) -> None:
        """Let every batch bring more along."""
        self.batches.extra = extra

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
        steps = range(first, first + count)
        parts = (part for index in steps for part in self.sampler.micro_batches(order, index))
        # A rank without features of its own in a round takes part with one feature that counts for nothing.
        filled = (part if len(part) else np.zeros(1, np.int64) for part in parts)
        self.batches.epoch = epoch
        batches = iter(batch_loader(self.batches, filled, self.num_workers, pin_memory=self.pin_memory))
        for index in steps:
            own = self.sampler.micro_batches(order, index)
            yield [MicroBatch.place(next(batches), self.task, self.device, is_empty=len(part) == 0) for part in own]
