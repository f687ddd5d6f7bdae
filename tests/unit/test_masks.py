"""Masks: exact counts, the smallest first, the same choice every time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_accel.compress.masks import global_magnitude_masks, held, magnitude_mask, nonzero_mask, sparsity

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
