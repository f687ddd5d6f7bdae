"""Saved state between the two ways to store a masked weight: compact (`values`, `positions`) and whole (`weight`, `mask`).

What is converted are names and whole tensors on the CPU, of a model (`<module>.values`) or of an optimizer
(`<module>.values/exp_avg`, whose scalars such as `step` only change their name). A run that goes on with the other way
goes on to the same bits: under a mask that holds from the first step, weights and an optimizer's moments are zero. (A zero
that was -0.0 becomes +0.0 there, which is what a masked layer computes with.)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparse_accel.compress.compact import CompactLinear, check_positions, num_values, padded
from sparse_accel.compress.layers import CompressedLinear
from sparse_accel.compress.positions import kept_indices, mask_of
from sparse_accel.errors import ModelError


def dense_state(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` as a model whose weights are all whole has it: what `module` saves, or a compact state for a masked
    `module` to load.

    Positions are those of `state`; where it has none (an optimizer's), those of `module`, which has loaded its own state
    before. Raises ModelError for positions that are not those of a compact `module`, or do not fit.
    """
    return _made_whole(
        {name: layer for name, layer in module.named_modules() if isinstance(layer, CompactLinear | CompressedLinear)},
        state,
    )


def fitting_state(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` as `module` loads it: each layer in the form that it has there, whichever it was saved in.

    Raises ModelError as `dense_state` and `compact_state`.
    """
    masked = {name: layer for name, layer in module.named_modules() if isinstance(layer, CompressedLinear)}
    return compact_state(module, _made_whole(masked, state))


def _made_whole(
    layers: Mapping[str, CompactLinear | CompressedLinear], state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """`state` with what it holds of `layers` in the form of masked ones."""
    converted: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name, part, entry = _split(key)
        layer = layers.get(name)
        if layer is None or part not in ("values", "positions"):
            converted[key] = tensor
        elif part == "positions":
            if isinstance(layer, CompactLinear):
                check_positions(name, layer, tensor)
            converted[f"{name}.mask"] = _saved_mask(name, layer, tensor)
            converted[f"{name}.mask_captured"] = torch.ones((), dtype=torch.bool)
        elif tensor.dim() == 0:
            converted[f"{name}.weight{entry}"] = tensor
        else:
            mask = _saved_mask(name, layer, state.get(f"{name}.positions"))
            num_kept = int(mask.sum())
            if tensor.numel() != num_values(num_kept):
                raise ModelError(f"{name}: {tensor.numel():,} values are saved for {num_kept:,} positions")
            whole = tensor.new_zeros(mask.shape)
            whole[mask] = tensor[:num_kept]
            converted[f"{name}.weight{entry}"] = whole
    return converted


def compact_state(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` as `module` has it, with the compact layers of `module` in their form; what is compact in `state` stays so.

    Raises ModelError where the zeros in `state` are not those of `module`.
    """
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, CompactLinear)}
    converted: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name, part, entry = _split(key)
        layer = layers.get(name)
        if layer is None or part not in ("weight", "mask", "mask_captured", "positions"):
            converted[key] = tensor
        elif part == "positions":
            check_positions(name, layer, tensor)
            converted[key] = tensor
        elif part != "weight":
            continue  # compared below, with the weight
        elif tensor.dim() == 0:
            converted[f"{name}.values{entry}"] = tensor
        else:
            shape, positions = (layer.out_features, layer.in_features), layer.positions.cpu()
            if tensor.shape != shape:
                raise ModelError(f"{key} is saved as {list(tensor.shape)}, and the weight of {name} is {list(shape)}")
            if not entry:
                _check_zeros(name, layer.mask.cpu(), state, tensor)
                converted[f"{name}.positions"] = positions
            converted[f"{name}.values{entry}"] = padded(tensor.flatten()[kept_indices(positions, layer.num_weights)])
    return converted


def _split(key: str) -> tuple[str, str, str]:
    """Module, its tensor, and what an optimizer calls its state of it, with the slash, or nothing."""
    parameter, slash, entry = key.partition("/")
    name, _, part = parameter.rpartition(".")
    return name, part, slash + entry


def _saved_mask(name: str, layer: CompactLinear | CompressedLinear, positions: Tensor | None) -> Tensor:
    """Bool [out_features, in_features] from what is saved, or from the layer where that is None."""
    if positions is not None:
        return mask_of(name, positions, (layer.out_features, layer.in_features))
    if layer.mask is None or not layer.captured:
        raise ModelError(
            f"{name}: its positions are not known; load the state of the model before that of the optimizer"
        )
    return layer.mask.cpu()


def _check_zeros(name: str, kept: Tensor, state: Mapping[str, Tensor], weight: Tensor) -> None:
    """The saved mask is the one that holds here; where none was captured yet, the weight's own zeros cover it."""
    if bool(state.get(f"{name}.mask_captured", torch.zeros(()))):
        differing = int((state[f"{name}.mask"] != kept).sum())
    else:
        differing = int(torch.count_nonzero(weight[~kept]))
    if differing:
        raise ModelError(
            f"{name}: the saved zeros are not those of this run's model: {differing:,} of {kept.numel():,} positions differ"
        )
