"""Masks: which weights are kept (True) and which are zero (False), as pure functions of the weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def nonzero_mask(weight: Tensor) -> Tensor:
    """Bool tensor of `weight`'s shape, True where it is not zero: the pattern that constant pruning holds."""
    return weight.detach() != 0


def magnitude_mask(weight: Tensor, sparsity: float) -> Tensor:
    """Bool tensor of `weight`'s shape with exactly round(sparsity * numel) entries False: the smallest magnitudes.

    Entries of equal magnitude go in storage order, so that the mask is the same on every device and rank; zeros have
    the smallest magnitude and therefore go first. `sparsity` lies in [0, 1], else ValueError.
    """
    return _keep_largest(weight.detach().abs().flatten(), sparsity).view(weight.shape)


def global_magnitude_masks(weights: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """One magnitude threshold over all `weights`: exactly round(sparsity * total numel) entries are False in all."""
    if not weights:
        return {}
    scores = torch.cat([weight.detach().abs().float().flatten() for weight in weights.values()])
    kept = torch.split(_keep_largest(scores, sparsity), [weight.numel() for weight in weights.values()])
    return {name: mask.view(weight.shape) for (name, weight), mask in zip(weights.items(), kept, strict=True)}


def sparsity(tensor: Tensor) -> float:
    """Share of zeros in [0, 1]; an empty tensor has none. Waits for the device."""
    return 1.0 - int(torch.count_nonzero(tensor)) / tensor.numel() if tensor.numel() else 0.0


def _keep_largest(scores: Tensor, share: float) -> Tensor:
    """Flat bool mask with exactly round(share * n) False, the lowest scores first; ties by position."""
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"a sparsity lies between 0 and 1, got {share}")
    keep = torch.ones_like(scores, dtype=torch.bool)
    dropped = round(share * scores.numel())
    if dropped:
        # Not kthvalue: it finds the threshold, yet not which of the entries that equal it to drop.
        keep[torch.argsort(scores, stable=True)[:dropped]] = False
    return keep
