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


def top_k_kl_divergence(
    student: Tensor, teacher: Tensor, temperature: float, k: int, keep: Tensor | None = None
) -> Tensor:
    """T^2 * (KL of the shares that the teacher's k largest classes and all others have + KL within the k), of softmax(teacher / T)
    and softmax(student / T); mean over rows, a scalar in fp32.

    Logits are [..., classes]; `keep`, bool [...], says which rows count. Of the teacher no more than [..., k] is kept for
    backward. Without the first part the student's mass outside the k would not count, and it would grow too sure (Anshumann
    et al. 2025, "Sparse Logit Sampling"). KL over the k and the others as one class is the same sum with the second part
    times the share of the k, which is next to nothing for a large vocabulary at a high temperature; so the two are decoupled
    (Zhao et al. 2022, "Decoupled Knowledge Distillation"). With k of all classes it is `kl_divergence`.
    """
    rows = student.shape[:-1].numel() if keep is None else keep.sum().clamp(min=1)
    s, t = student.float() / temperature, teacher.detach()
    if keep is not None:
        # Rows that do not count may hold anything; zeros are finite, and their gradient is cut below.
        s, t = s.masked_fill(~keep.unsqueeze(-1), 0.0), t.masked_fill(~keep.unsqueeze(-1), 0.0)
    with torch.no_grad():
        t = t.float() / temperature
        classes = t.topk(k, dim=-1, sorted=False).indices
        teacher_parts = _parted(t, classes)
    parts = zip(teacher_parts, _parted(s, classes), strict=True)
    divergence = torch.stack([(log_p.exp() * (log_p - log_q)).sum(-1) for log_p, log_q in parts]).sum(0)
    if keep is not None:
        divergence = divergence.masked_fill(~keep, 0.0)
    return divergence.sum() * temperature**2 / rows


def _parted(logits: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Log probabilities of `classes`, int64 [..., k], among themselves, [..., k]; and of all of them and of the others, [..., 2]."""
    chosen = logits.gather(-1, classes)
    # Finite, so that a row without others stays finite; exp of it is exactly 0.
    others = logits.scatter(-1, classes, torch.finfo(torch.float32).min).logsumexp(-1)
    shares = torch.stack([chosen.logsumexp(-1), others], dim=-1)
    return torch.log_softmax(chosen, dim=-1), torch.log_softmax(shares, dim=-1)
