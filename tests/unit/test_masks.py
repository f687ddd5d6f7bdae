"""Masks: exact counts, the smallest first, the same choice every time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_accel.compress.masks import (
    BLOCK4,
    UNSTRUCTURED,
    MaskType,
    count_dropped,
    global_keep,
    global_magnitude_masks,
    held,
    magnitude_mask,
    nonzero_mask,
    pruned_mask,
    sparsity,
    unit_scores,
)

SHARES = st.floats(0.0, 1.0)
# Few distinct values, so that ties and zeros are the rule.
WEIGHTS = st.lists(st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0]), min_size=1, max_size=60).map(torch.tensor)


@settings(deadline=None)
@given(weight=WEIGHTS, share=SHARES)
def test_a_magnitude_mask_drops_exactly_the_rounded_count(weight: torch.Tensor, share: float) -> None:
    assert int((~magnitude_mask(weight, share)).sum()) == round(share * weight.numel())


@settings(deadline=None)
@given(weight=WEIGHTS, share=SHARES)
def test_no_dropped_weight_is_larger_than_a_kept_one(weight: torch.Tensor, share: float) -> None:
    mask = magnitude_mask(weight, share)
    if mask.any() and not mask.all():
        assert weight[~mask].abs().max() <= weight[mask].abs().min()


@settings(deadline=None)
@given(weight=WEIGHTS, share=SHARES)
def test_zeros_go_before_anything_else(weight: torch.Tensor, share: float) -> None:
    mask = magnitude_mask(weight, share)
    dropped, zeros = int((~mask).sum()), int((weight == 0).sum())
    assert int((~mask & (weight == 0)).sum()) == min(dropped, zeros)


def test_ties_are_dropped_in_storage_order() -> None:
    assert magnitude_mask(torch.ones(2, 3), 0.5).tolist() == [[False, False, False], [True, True, True]]


@settings(deadline=None)
@given(first=WEIGHTS, second=WEIGHTS, share=SHARES)
def test_a_global_threshold_is_the_mask_of_all_weights_laid_end_to_end(
    first: torch.Tensor, second: torch.Tensor, share: float
) -> None:
    masks = global_magnitude_masks({"a": first, "b": second}, share)
    assert torch.equal(torch.cat([masks["a"], masks["b"]]), magnitude_mask(torch.cat([first, second]), share))


def test_no_weights_have_no_masks() -> None:
    assert global_magnitude_masks({}, 0.5) == {}


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_sparsity_outside_zero_and_one_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        magnitude_mask(torch.ones(3), share)


def test_the_zero_pattern_and_its_share() -> None:
    weight = torch.tensor([[0.0, -1.0], [2.0, -0.0]])
    assert nonzero_mask(weight).tolist() == [[False, True], [True, False]]
    assert sparsity(weight) == 0.5
    assert sparsity(torch.empty(0)) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_what_is_held_has_the_bits_of_where(dtype: torch.dtype) -> None:
    odd = [0.0, -0.0, 1e-40, math.inf, -math.inf, math.nan, -1.5]
    weight = torch.cat([torch.tensor(odd, dtype=dtype).repeat(2), torch.randn(50, dtype=dtype)]).view(16, 4)
    mask = torch.rand(16, 4) > 0.5
    mask.view(-1)[:14] = torch.arange(14) < 7
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    assert torch.equal(held(weight, mask).view(integer), torch.where(mask, weight, 0.0).view(integer))


def test_no_gradient_passes_the_mask_not_even_an_infinite_one() -> None:
    weight, mask = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.rand(3, 4) > 0.5
    assert torch.autograd.gradcheck(lambda w: held(w, mask), weight)
    held(weight, mask).backward(torch.full((4, 3), math.inf).t().double())
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.where(mask, torch.full_like(weight, math.inf), 0.0))


# --- blocks, N:M, masks that grow -------------------------------------------------------------------------------------

SEVERAL = [UNSTRUCTURED, BLOCK4, MaskType(2, 2), MaskType(-1, 1), MaskType(1, 4, kept=2), MaskType(1, 2, kept=1)]


def reference_weight(columns: int) -> torch.Tensor:
    return torch.tensor([[(r * 7 + c * 5) % 11 + 0.25 * ((r + c) % 3) for c in range(columns)] for r in range(4)])


def grown(weight: torch.Tensor, mask_type: MaskType, share: float) -> torch.Tensor:
    """A first mask of that sparsity."""
    dropped = mask_type.num_dropped(tuple(weight.shape), share)
    return pruned_mask(weight, torch.ones_like(weight, dtype=torch.bool), mask_type, dropped)


def bits(text: str) -> torch.Tensor:
    return torch.tensor([[digit == "1" for digit in row] for row in text.split()])


@pytest.mark.parametrize(
    ("mask_type", "share", "columns", "expected"),
    [
        (UNSTRUCTURED, 0.4, 6, "011010 101011 010101 111010"),
        (BLOCK4, 0.5, 6, "000011 000011 000000 111111"),
        (BLOCK4, 0.3, 6, "111111 000011 111100 111111"),
        (MaskType(1, 4, kept=2), 0.5, 8, "01101010 10100101 01010101 10101010"),
        (MaskType(1, 4, kept=1), 0.75, 8, "00101000 10000100 01000100 10001000"),
        (MaskType(1, 2), 0.5, 8, "00111100 00001111 11000000 11111100"),
        (MaskType(2, 1), 0.5, 8, "00101111 00101111 11100000 11100000"),
    ],
    ids=["unstructured", "block4", "block4 sparser", "2:4", "1:4", "1 x 2", "2 x 1"],
)
def test_masks_are_those_that_sparseml_makes(mask_type: MaskType, share: float, columns: int, expected: str) -> None:
    """References: SparseML's own mask creators on the same weight."""
    assert torch.equal(grown(reference_weight(columns), mask_type, share), bits(expected))


def test_a_global_mask_is_the_one_that_sparseml_makes() -> None:
    masks = global_magnitude_masks({"a": reference_weight(6), "b": reference_weight(8) + 0.1}, 0.6)
    assert torch.equal(masks["a"], bits("001010 100001 010100 101010"))
    assert torch.equal(masks["b"], bits("00101010 10000101 01010100 10101010"))


def test_a_tile_is_a_tile() -> None:
    """SparseML's [2, 2] is a run of four in memory; its users meant rows and columns."""
    weight = torch.tensor([[1.0, 1.0, 5.0, 5.0], [1.0, 1.0, 5.0, 5.0]])
    assert torch.equal(grown(weight, MaskType(2, 2), 0.5), bits("0011 0011"))


def test_a_short_last_block_counts_with_its_own_mean() -> None:
    weight = torch.tensor([[3.0, 3.0, 3.0, 3.0, 4.0], [2.0, 2.0, 2.0, 2.0, 1.0]])
    assert unit_scores(weight, torch.ones(2, 5, dtype=torch.bool), BLOCK4).tolist() == [3.0, 4.0, 2.0, 1.0]
    assert torch.equal(grown(weight, BLOCK4, 0.5), bits("11111 00000"))


def test_the_later_of_equal_weights_stay_in_each_group() -> None:
    assert torch.equal(grown(torch.ones(1, 8), MaskType(1, 4, kept=2), 0.5), bits("00110011"))


MATRICES = st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.5, 0.5, 3.0]), min_size=32, max_size=32).map(
    lambda values: torch.tensor(values).view(4, 8)
)


@settings(deadline=None, max_examples=60)
@given(first=MATRICES, second=MATRICES, shares=st.tuples(SHARES, SHARES), mask_type=st.sampled_from(SEVERAL))
def test_what_is_pruned_never_comes_back_and_counts_are_exact(
    first: torch.Tensor, second: torch.Tensor, shares: tuple[float, float], mask_type: MaskType
) -> None:
    """Whatever the stored weight has become under the mask."""
    low, high = sorted(shares)
    before = grown(first, mask_type, low)
    wanted = mask_type.num_dropped((4, 8), high)
    after = pruned_mask(second, before, mask_type, max(wanted, int(count_dropped(before, mask_type))))
    assert not (after & ~before).any()
    assert int(count_dropped(before, mask_type)) == mask_type.num_dropped((4, 8), low)
    assert int(count_dropped(after, mask_type)) == wanted


@settings(deadline=None, max_examples=60)
@given(weight=MATRICES, share=SHARES)
def test_no_dropped_block_is_larger_than_a_kept_one(weight: torch.Tensor, share: float) -> None:
    mask = grown(weight, BLOCK4, share)
    kept = weight.abs().view(-1, 4).mean(1)[mask.view(-1, 4).any(1)]
    dropped = weight.abs().view(-1, 4).mean(1)[~mask.view(-1, 4).any(1)]
    assert not len(kept) or not len(dropped) or dropped.max() <= kept.min()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.77, 1.0])
def test_the_global_threshold_is_that_of_a_sort_over_all_scales_of_numbers(share: float) -> None:
    torch.manual_seed(0)
    scores = {f"{i}": torch.randn(997).abs() * 10.0 ** (5 * i - 20) for i in range(8)}
    scores["pruned before"] = torch.full((50,), -1.0)
    everything = torch.cat(list(scores.values()))
    dropped = round(share * len(everything))
    expected = torch.ones(len(everything), dtype=torch.bool)
    expected[everything.argsort(stable=True)[:dropped]] = False
    found = torch.cat([keep for _, keep in global_keep(scores.items, dropped)])
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("mask_type", "shape", "said"),
    [
        (MaskType(3, 4), (4, 8), "its 4 rows are no multiple of 3"),
        (MaskType(2, 3), (4, 8), "its 8 columns are no multiple of 3"),
        (MaskType(1, 4, kept=2), (4, 6), "its 6 columns are no multiple of 4"),
        (BLOCK4, (4, 6), None),
        (MaskType(-1, -1), (4, 6), None),
        (BLOCK4, (4, 6, 3, 3), "a weight of 4 dimensions has no 1 x 4 pattern"),
    ],
)
def test_what_does_not_fit_a_weight_is_said(mask_type: MaskType, shape: tuple[int, ...], said: str | None) -> None:
    assert mask_type.obstacle(shape) == said
