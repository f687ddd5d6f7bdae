"""Losses that compare a student's outputs with a teacher's."""

from __future__ import annotations

import torch
from torch import Tensor


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float, keep: Tensor | None = None) -> Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)) over the last dim, mean over rows; a scalar in fp32.

    student and teacher are logits [..., classes] (or [batch, positions]). T^2 keeps the gradient's size independent of
    T (Hinton et al. 2015). `keep` is a bool mask: of the logits' shape, the softmax runs over the kept entries only; of
    the shape without the last dim, only kept rows count. What is left out may hold anything, -inf too, and gets a
    gradient of exactly 0. With nothing kept the loss is 0.
    """
    s, t = student.float() / temperature, teacher.detach().float() / temperature
    entries = keep if keep is not None and keep.shape == s.shape else None
    rows = entries.any(-1) if entries is not None else keep
    kept = entries if entries is not None else None if rows is None else rows.unsqueeze(-1)
    if kept is not None:
        # Finite, so that a row without a kept entry stays finite; exp of it is exactly 0 beside any kept logit.
        lowest = torch.finfo(torch.float32).min
        s, t = s.masked_fill(~kept, lowest), t.masked_fill(~kept, lowest)
    log_p, log_q = torch.log_softmax(t, dim=-1), torch.log_softmax(s, dim=-1)
    divergence = log_p.exp() * (log_p - log_q)
    if kept is not None:
        divergence = divergence.masked_fill(~kept, 0.0)
    total = divergence.sum() * temperature**2
    return total / (s.shape[:-1].numel() if rows is None else rows.sum().clamp(min=1))
