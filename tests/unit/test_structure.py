"""N:M patterns and blocks of zeros, against matrices that are written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_accel.compress.structure import as_matrix, structure_of


def matrix(*rows: str) -> Tensor:
    """`x.` is what is not zero and what is."""
    return torch.tensor([[letter == "x" for letter in row] for row in rows])


@pytest.mark.parametrize(
    ("rows", "pattern"),
    [
        (["x....x..", "...xx..."], "1:4"),
        (["xx...x..", "...xx..."], "2:4"),
        (["xxx....x", "....xxxx"], "4:8"),
        (["xxxxx...", "........"], None),
        (["xxxxxxxx"], None),
        (["........"], "1:4"),
    ],
)
def test_the_tightest_pattern_that_every_group_holds_is_named(rows: list[str], pattern: str | None) -> None:
    assert structure_of(matrix(*rows)).pattern == pattern


def test_shares_of_groups_and_blocks_are_counted() -> None:
    found = structure_of(matrix("xx..xxx.", "........", "xxxx...."))
    assert (found.numel, found.zeros) == (24, 15)
    assert found.share_2_of_4 == pytest.approx(4 / 6)
    assert found.share_zero_blocks == pytest.approx(3 / 6)
    assert found.zeros_in_blocks == 12 and not found.is_blocked


def test_zeros_in_whole_blocks_alone_are_told_from_others() -> None:
    assert structure_of(matrix("xxxx....", "....xxxx")).is_blocked
    assert not structure_of(matrix("xxxx....", "...xxxxx")).is_blocked
    assert not structure_of(matrix("xxxxxxxx")).is_blocked  # there are none


def test_a_last_group_has_what_is_left() -> None:
    found = structure_of(matrix("xxxx..", "..xxxx"))
    assert (found.num_groups, found.zero_blocks, found.zeros_in_blocks) == (4, 1, 2)
    assert structure_of(matrix("xx...x", "......")).pattern == "2:4"


@settings(max_examples=40)
@given(st.integers(1, 5), st.integers(1, 19), st.integers(0, 2**31))
def test_counts_agree_with_counting_by_hand(outputs: int, inputs: int, seed: int) -> None:
    nonzero = torch.rand(outputs, inputs, generator=torch.Generator().manual_seed(seed)) < 0.4
    found = structure_of(nonzero)
    groups = [row[start : start + 4] for row in nonzero.tolist() for start in range(0, inputs, 4)]
    assert found.num_groups == len(groups)
    assert found.groups_2_of_4 == sum(sum(group) <= 2 for group in groups)
    assert found.zero_blocks == sum(not any(group) for group in groups)
    assert found.zeros_in_blocks == sum(len(group) for group in groups if not any(group))


def test_weights_are_laid_out_as_outputs_by_inputs() -> None:
    linear = torch.arange(6).view(2, 3)
    assert torch.equal(as_matrix(linear), linear)
    assert torch.equal(as_matrix(linear, inputs_first=True), linear.t())
    convolution = torch.arange(2 * 3 * 2).view(2, 3, 2)  # [out, in, kernel]
    assert as_matrix(convolution).tolist() == [[0, 2, 4], [1, 3, 5], [6, 8, 10], [7, 9, 11]]
