"""How the zeros of a matrix lie: in N of every M inputs, in blocks, or anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

# The patterns that are looked for, the tightest first: at most so many of so many neighbouring inputs are not zero.
PATTERNS: Final = {"1:4": (1, 4), "2:4": (2, 4), "4:8": (4, 8)}
BLOCK: Final = 4


@dataclass(frozen=True)
class Structure:
    """Of one matrix: `pattern` is the tightest of PATTERNS that every group holds, None where none does; groups and
    blocks are 4 neighbouring inputs of one output, and `zeros_in_blocks` counts the zeros of wholly zero blocks."""

    numel: int
    zeros: int
    pattern: str | None
    num_groups: int
    groups_2_of_4: int
    zero_blocks: int
    zeros_in_blocks: int

    @property
    def share_2_of_4(self) -> float:
        """Share of the groups of 4 inputs with at most 2 that are not zero."""
        return self.groups_2_of_4 / self.num_groups if self.num_groups else 0.0

    @property
    def share_zero_blocks(self) -> float:
        """Share of the blocks of 4 inputs that are wholly zero."""
        return self.zero_blocks / self.num_groups if self.num_groups else 0.0

    @property
    def is_blocked(self) -> bool:
        """Whether there are zeros and all of them lie in wholly zero blocks."""
        return 0 < self.zeros == self.zeros_in_blocks

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "pattern": self.pattern,
            "share_of_groups_2_of_4": self.share_2_of_4,
            "share_of_zero_blocks_1x4": self.share_zero_blocks,
            "zeros_only_in_blocks_1x4": self.is_blocked,
        }


def structure_of(nonzero: Tensor) -> Structure:
    """The structure of a matrix of which `nonzero`, bool [outputs, inputs], says what is not zero. Where the number of
    inputs is no multiple of a group's size, the last group has what is left. Waits for the device."""
    counts = _counts(nonzero, BLOCK)  # [outputs, groups]
    numel, zeros = nonzero.numel(), nonzero.numel() - int(nonzero.sum())
    num_groups = counts.numel()
    empty = (counts == 0).sum(0)  # [groups]
    left = nonzero.shape[1] % BLOCK
    zeros_in_blocks = int(empty.sum()) * BLOCK - (int(empty[-1]) * (BLOCK - left) if left else 0)
    held = (
        name for name, (most, size) in PATTERNS.items() if num_groups and bool((_counts(nonzero, size) <= most).all())
    )
    return Structure(
        numel,
        zeros,
        next(held, None),
        num_groups,
        int((counts <= 2).sum()),
        int(empty.sum()),
        zeros_in_blocks,
    )


def as_matrix(weight: Tensor, *, inputs_first: bool = False) -> Tensor:
    """A weight as [outputs, inputs]: of a linear layer as it is, or turned where it is [inputs, outputs]; of a
    convolution [out, in, *kernel] with a row for each output and place of the kernel."""
    if weight.dim() > 2:
        return weight.movedim(1, -1).reshape(-1, weight.shape[1])
    return weight.t() if inputs_first else weight


def _counts(nonzero: Tensor, size: int) -> Tensor:
    """How many of each `size` neighbouring inputs are not zero: [outputs, groups]."""
    outputs, inputs = nonzero.shape
    padded = F.pad(nonzero.to(torch.uint8), (0, -inputs % size))
    groups = padded.reshape(outputs, (inputs + size - 1) // size, size)
    # Adding a few large tensors is many times as fast as a sum over a dimension this short.
    counts = groups[..., 0].clone()
    for place in range(1, size):
        counts += groups[..., place]
    return counts
