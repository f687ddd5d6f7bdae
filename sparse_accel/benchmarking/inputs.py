"""How long it takes to make a batch: our collator against Hugging Face's over a datasets.Dataset."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from sparse_accel.benchmarking.baselines import padded_dataset
from sparse_accel.benchmarking.lengths import random_features, spread_lengths
from sparse_accel.tasks.collating import Collate, Collator, PackedCollator

BATCH = 32
# Calls of our collator in a turn: one alone is too short to time.
_CALLS = 20


def measure_collating(rounds: int, seed: int) -> dict[str, Any]:
    """Milliseconds per 32 features of SQuAD's lengths, round by round, of our packed and padded batches and of Hugging Face's
    way: rows of a datasets.Dataset padded to 384, put together by default_data_collator."""
    from transformers import default_data_collator

    lengths = spread_lengths("squad_v1", 4 * BATCH, longest=384)
    features = random_features(lengths, 30522, seed)
    dataset = padded_dataset(features, 384)
    batches = [np.arange(at, at + BATCH) for at in range(0, len(features), BATCH)]
    fillers = {"input_ids": 0, "token_type_ids": 0}
    packed, padded = PackedCollator(fillers), Collator(fillers, 384, pad_to_max_length=True)

    def theirs() -> None:
        for batch in batches:
            default_data_collator([dataset[int(index)] for index in batch])

    def ours(collate: Collate) -> Callable[[], None]:
        def work() -> None:
            for _ in range(_CALLS):
                for batch in batches:
                    collate(features, batch)

        return work

    arms = {"hugging_face": (theirs, 1), "packed": (ours(packed), _CALLS), "padded": (ours(padded), _CALLS)}
    found: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(-1, rounds):
        for name in arms if number % 2 == 0 else reversed(list(arms)):
            work, calls = arms[name]
            begun = time.process_time()
            work()
            if number >= 0:
                found[name].append(round(1000 * (time.process_time() - begun) / calls / len(batches), 5))
    return {"milliseconds_per_32_features": found}
