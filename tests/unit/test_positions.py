"""Positions of kept weights: the documented bits, the smaller form, and nothing lost."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_accel.compress.positions import kept_indices, mask_of, pack_positions, unpack_positions
from sparse_accel.errors import ModelError

MASKS = st.lists(st.booleans(), min_size=1, max_size=70).map(torch.tensor)
# Mostly zeros, so that the indices are the smaller form.
SPARSE = st.tuples(st.integers(100, 600), st.sets(st.integers(0, 99), max_size=3))


@given(mask=MASKS)
def test_the_bitmask_is_numpys_little_endian_one(mask: torch.Tensor) -> None:
    packed = pack_positions(torch.cat([mask, torch.ones(64, dtype=torch.bool)]))  # dense enough to be one
    expected = np.packbits(torch.cat([mask, torch.ones(64, dtype=torch.bool)]).numpy(), bitorder="little")
    assert packed.dtype == torch.uint8
    assert packed.tolist() == expected.tolist()


@given(mask=MASKS)
def test_a_bitmask_comes_back(mask: torch.Tensor) -> None:
    packed = torch.from_numpy(np.packbits(mask.numpy(), bitorder="little"))
    assert torch.equal(unpack_positions(packed, mask.numel()), mask)
    assert kept_indices(packed, mask.numel()).tolist() == mask.nonzero().flatten().tolist()


@given(pattern=SPARSE)
def test_both_forms_come_back_from_packing(pattern: tuple[int, set[int]]) -> None:
    size, kept = pattern
    mask = torch.zeros(size, dtype=torch.bool)
    mask[list(kept)] = True
    packed = pack_positions(mask)
    assert torch.equal(unpack_positions(packed, size), mask)
    assert kept_indices(packed, size).dtype == torch.int32
    assert kept_indices(packed, size).tolist() == sorted(kept)


@pytest.mark.parametrize(
    ("kept", "dtype", "nbytes"),
    [
        (0, torch.int32, 0),
        (31, torch.int32, 124),
        (32, torch.uint8, 128),
        (33, torch.uint8, 128),
        (1024, torch.uint8, 128),
    ],
)
def test_one_kept_weight_in_32_is_where_indices_stop_being_smaller(kept: int, dtype: torch.dtype, nbytes: int) -> None:
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask.view(-1)[torch.randperm(1024, generator=torch.Generator().manual_seed(0))[:kept]] = True
    packed = pack_positions(mask)
    assert (packed.dtype, packed.nbytes) == (dtype, nbytes)
    assert torch.equal(unpack_positions(packed, 1024).view(32, 32), mask)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (torch.zeros(3, dtype=torch.uint8), r"over 12 entries is uint8 \[2\]"),
        (torch.tensor([0, 16], dtype=torch.uint8), "past the last of 12"),
        (torch.tensor([0, 12], dtype=torch.int32), "do not ascend from 0 to at most 11"),
        (torch.tensor([-1, 2], dtype=torch.int32), "do not ascend"),
        (torch.tensor([3, 3], dtype=torch.int32), "do not ascend"),
        (torch.tensor([1.0]), "uint8 or int32 vectors"),
        (torch.ones(4, 3, dtype=torch.bool), r"is \[3, 4\], but the mask that is given \[4, 3\]"),
    ],
)
def test_what_is_no_pattern_of_a_weight_is_refused_with_the_layers_name(positions: torch.Tensor, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        mask_of("encoder.0", positions, (3, 4))
    assert str(caught.value).startswith("encoder.0: ")
