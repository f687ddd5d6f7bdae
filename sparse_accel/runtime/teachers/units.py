"""The parts of a model whose weights are needed one after the other, so that only one of them need be whole."""

from __future__ import annotations

from typing import Any

from torch import nn

from sparse_accel.errors import ModelError


def blocks(model: nn.Module, *, in_list: bool = False) -> list[nn.Module]:
    """The layers of a transformer in their order: the members of its outermost lists of modules."""
    is_list = isinstance(model, nn.ModuleList)
    if in_list and not is_list:
        return [model]
    return [block for child in model.children() for block in blocks(child, in_list=is_list)]


def units(model: Any) -> list[nn.Module]:
    """The token embeddings and the blocks; what is left is small, and belongs to the model itself. Raises ModelError for
    a model without a list of layers, which could only be whole or absent."""
    found = blocks(model)
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no list of layers that could be spread; use --teacher_placement replicated"
        )
    return [model.get_input_embeddings(), *found]


def num_bytes(module: nn.Module) -> int:
    """Of all its parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def largest_gather(model: nn.Module) -> int:
    """Bytes of the weights that are whole at one time: the largest unit, beside what belongs to the model itself. All of
    them for a model that has no units."""
    if not blocks(model):
        return num_bytes(model)
    sizes = [num_bytes(unit) for unit in units(model)]
    return max(sizes) + num_bytes(model) - sum(sizes)
