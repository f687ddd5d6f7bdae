"""Which features form which step."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_accel.runtime.batches import StepSampler

sizes = st.integers(1, 70)
small = st.integers(1, 5)


def features_of_step(
    num_features: int, micro: int, accumulation: int, world_size: int, index: int, seed: int = 3
) -> list[int]:
    samplers = [StepSampler(num_features, micro, accumulation, seed, rank, world_size) for rank in range(world_size)]
    order = samplers[0].order(0)
    return sorted(int(f) for s in samplers for part in s.micro_batches(order, index) for f in part)


@given(sizes, small, small, small)
def test_an_epoch_gives_every_feature_once(num_features: int, micro: int, accumulation: int, world_size: int) -> None:
    steps = StepSampler(num_features, micro, accumulation, 3, 0, world_size).steps_per_epoch
    seen = [f for index in range(steps) for f in features_of_step(num_features, micro, accumulation, world_size, index)]
    assert sorted(seen) == list(range(num_features))


@given(sizes, small, small, small)
def test_steps_an_epoch_are_batches_per_rank_over_accumulation_rounded_up(
    num_features: int, micro: int, accumulation: int, world_size: int
) -> None:
    sampler = StepSampler(num_features, micro, accumulation, 3, 0, world_size)
    assert sampler.steps_per_epoch == math.ceil(math.ceil(num_features / (micro * world_size)) / accumulation)


@given(sizes, small, small, small)
def test_all_ranks_have_equally_many_micro_batches(
    num_features: int, micro: int, accumulation: int, world_size: int
) -> None:
    samplers = [StepSampler(num_features, micro, accumulation, 3, rank, world_size) for rank in range(world_size)]
    order = samplers[0].order(1)
    for index in range(samplers[0].steps_per_epoch):
        parts = [sampler.micro_batches(order, index) for sampler in samplers]
        assert len({len(part) for part in parts}) == 1
        assert all(len(batch) <= micro for part in parts for batch in part)


@pytest.mark.parametrize(("micro", "accumulation", "world_size"), [(1, 16, 1), (4, 4, 1), (4, 2, 2), (2, 2, 4)])
def test_a_step_holds_the_same_features_however_it_is_split(micro: int, accumulation: int, world_size: int) -> None:
    for index in range(5):
        assert features_of_step(70, micro, accumulation, world_size, index) == features_of_step(70, 16, 1, 1, index)


def test_epochs_have_different_orders_and_the_same_epoch_the_same() -> None:
    sampler = StepSampler(50, 4, 2, 7)
    assert not np.array_equal(sampler.order(0), sampler.order(1))
    assert np.array_equal(sampler.order(1), StepSampler(50, 4, 2, 7).order(1))
    assert not np.array_equal(sampler.order(0), StepSampler(50, 4, 2, 8).order(0))


def test_grouping_by_length_keeps_every_feature_and_saves_padding() -> None:
    lengths = np.random.default_rng(0).integers(20, 380, 1000)
    plain, grouped = StepSampler(1000, 8, 2, 0), StepSampler(1000, 8, 2, 0, grouping="length", lengths=lengths)
    assert sorted(grouped.order(0)) == list(range(1000))

    def padded(sampler: StepSampler) -> int:
        order = sampler.order(0)
        parts = [part for index in range(sampler.steps_per_epoch) for part in sampler.micro_batches(order, index)]
        return sum(len(part) * lengths[part].max() for part in parts)

    assert padded(grouped) < 1.1 * lengths.sum() < 1.5 * lengths.sum() < padded(plain)


def test_dropping_the_last_batch_leaves_whole_ones_only() -> None:
    sampler = StepSampler(21, 4, 2, 0, drop_last=True)
    order = sampler.order(0)
    parts = [part for index in range(sampler.steps_per_epoch) for part in sampler.micro_batches(order, index)]
    assert [len(part) for part in parts] == [4] * 5


# --- as many tokens in all batches ------------------------------------------------------------------------------------


def squad_like_lengths(count: int) -> np.ndarray:
    """Mean, spread and cap of SQuAD's windows."""
    return np.random.default_rng(1).gamma(6, 29, count).clip(40, 384).astype(np.int64)


@pytest.mark.parametrize(("micro", "accumulation", "world_size"), [(16, 1, 8), (16, 2, 1), (32, 1, 1)])
def test_balanced_batches_have_equally_many_features_and_tokens(micro: int, accumulation: int, world_size: int) -> None:
    lengths = squad_like_lengths(20_000)
    sampler = StepSampler(20_000, micro, accumulation, 3, 0, world_size, grouping="tokens", lengths=lengths)
    order = sampler.order(0)
    assert sorted(order) == list(range(20_000))
    whole = 20_000 // sampler.features_per_step * sampler.features_per_step
    tokens = lengths[order[:whole]].reshape(-1, world_size, micro).sum(2)
    assert tokens.std() / tokens.mean() < 0.01
    assert (tokens.max(1) / tokens.mean(1)).mean() < 1.02  # what the slowest rank makes the others wait


@pytest.mark.parametrize("count", [320, 2208])
def test_balanced_steps_are_others_in_another_epoch_and_with_another_seed(count: int) -> None:
    """Also where no feature is left over, and where no two are equally long."""
    for lengths in (squad_like_lengths(count), np.arange(count) + 5):

        def steps(epoch: int, seed: int, lengths: np.ndarray = lengths) -> set[frozenset[int]]:
            sampler = StepSampler(count, 16, 1, seed, grouping="tokens", lengths=lengths)
            return {frozenset(step) for step in sampler.order(epoch).reshape(-1, 16).tolist()}

        assert len(steps(0, 3) & steps(1, 3)) + len(steps(0, 3) & steps(0, 4)) == 0


def test_balanced_batches_of_one_feature_are_what_they_can_be() -> None:
    sampler = StepSampler(10, 1, 1, 3, grouping="tokens", lengths=squad_like_lengths(10))
    assert sorted(sampler.order(0)) == list(range(10))
    assert StepSampler(0, 1, 1, 3, grouping="tokens", lengths=squad_like_lengths(0)).order(0).tolist() == []


@given(sizes, small, small, small)
def test_a_balanced_step_holds_the_same_features_however_it_is_split(
    num_features: int, micro: int, accumulation: int, world_size: int
) -> None:
    lengths = np.random.default_rng(0).integers(5, 60, num_features)
    product = micro * accumulation * world_size

    def steps(micro: int, accumulation: int, world_size: int) -> list[list[int]]:
        sampler = StepSampler(num_features, micro, accumulation, 3, 0, world_size, grouping="tokens", lengths=lengths)
        order = sampler.order(2)
        return [sorted(order[at : at + product]) for at in range(0, num_features, product)]

    assert steps(micro, accumulation, world_size) == steps(product, 1, 1)


def test_a_grouping_that_is_not_known_or_lacks_lengths_is_refused() -> None:
    for settings in ({"grouping": "size", "lengths": np.ones(4)}, {"grouping": "tokens"}):
        with pytest.raises(ValueError, match="random, length, tokens"):
            StepSampler(4, 2, 1, 0, **settings)  # type: ignore[arg-type]
