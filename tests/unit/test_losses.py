"""Distillation loss: SparseML's formula, and what masking adds to it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_accel.compress.losses import kl_divergence, top_k_kl_divergence


def logits(*shape: int, seed: int) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reference(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 * KL summed over everything, over (numel / last dim), as SparseML writes it."""
    total = F.kl_div(
        F.log_softmax(student / temperature, dim=-1),
        F.log_softmax(teacher / temperature, dim=-1),
        log_target=True,
        reduction="sum",
    )
    return total * temperature**2 / (student.numel() / student.shape[-1])


@settings(deadline=None, max_examples=50)
@given(shape=st.sampled_from([(4, 16), (3, 5, 7), (1, 2)]), temperature=st.floats(0.5, 20.0), seed=st.integers(0, 999))
def test_without_a_mask_it_is_sparsemls_value(shape: tuple[int, ...], temperature: float, seed: int) -> None:
    student, teacher = logits(*shape, seed=seed), logits(*shape, seed=seed + 1000)
    torch.testing.assert_close(kl_divergence(student, teacher, temperature), reference(student, teacher, temperature))


@settings(deadline=None, max_examples=50)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5), seed=st.integers(0, 999))
def test_masked_positions_are_as_if_they_were_not_there(lengths: list[int], seed: int) -> None:
    student, teacher = logits(len(lengths), 12, seed=seed), logits(len(lengths), 12, seed=seed + 1000)
    keep = torch.arange(12) < torch.tensor(lengths).unsqueeze(1)
    cut = [
        reference(s[:length].unsqueeze(0), t[:length].unsqueeze(0), 5.0)
        for s, t, length in zip(student, teacher, lengths, strict=True)
    ]
    torch.testing.assert_close(kl_divergence(student, teacher, 5.0, keep), torch.stack(cut).mean())


def test_masked_positions_may_hold_anything_and_get_no_gradient() -> None:
    keep = torch.tensor([[True, True, False, True], [True, False, False, True]])
    student = logits(2, 4, seed=1).masked_fill(~keep, -torch.inf).requires_grad_()
    teacher = logits(2, 4, seed=2).masked_fill(~keep, torch.nan)
    loss = kl_divergence(student, teacher, 2.0, keep)
    loss.backward()
    assert student.grad is not None
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()
    assert (student.grad[~keep] == 0).all()
    assert (student.grad[keep] != 0).all()


def test_a_row_mask_counts_kept_rows_only() -> None:
    student, teacher = logits(2, 3, 5, seed=1), logits(2, 3, 5, seed=2)
    keep = torch.tensor([[True, False, True], [False, False, True]])
    expected = reference(student[keep], teacher[keep], 2.0)
    torch.testing.assert_close(kl_divergence(student, teacher, 2.0, keep), expected)


def test_with_nothing_kept_the_loss_is_zero_and_so_is_its_gradient() -> None:
    student = logits(2, 4, seed=1).requires_grad_()
    loss = kl_divergence(student, logits(2, 4, seed=2), 2.0, torch.zeros(2, 4, dtype=torch.bool))
    loss.backward()
    assert student.grad is not None
    assert loss.item() == 0.0
    assert (student.grad == 0).all()


def test_equal_logits_have_no_divergence_and_the_teacher_no_gradient() -> None:
    both = logits(2, 4, seed=1).requires_grad_()
    student = both.detach().clone().requires_grad_()
    loss = kl_divergence(student, both, 2.0)
    loss.backward()
    assert loss.item() == 0.0
    assert both.grad is None


def test_half_precision_logits_are_compared_in_float32() -> None:
    student, teacher = logits(2, 8, seed=1).bfloat16(), logits(2, 8, seed=2).bfloat16()
    loss = kl_divergence(student, teacher, 2.0)
    assert loss.dtype is torch.float32
    torch.testing.assert_close(loss, reference(student.float(), teacher.float(), 2.0))


@settings(deadline=None, max_examples=40)
@given(k=st.integers(1, 7), temperature=st.floats(0.5, 20.0), seed=st.integers(0, 999))
def test_the_k_largest_are_compared_within_and_against_the_rest(k: int, temperature: float, seed: int) -> None:
    """The formula written out, from probabilities."""
    student, teacher = logits(5, 8, seed=seed).double(), logits(5, 8, seed=seed + 1000).double()
    p, q = (torch.softmax(logits / temperature, dim=-1) for logits in (teacher, student))
    largest = p.topk(k, dim=-1).indices
    p, q = p.gather(-1, largest), q.gather(-1, largest)
    p_share, q_share = p.sum(-1), q.sum(-1)
    shares = p_share * (p_share / q_share).log() + (1 - p_share) * ((1 - p_share) / (1 - q_share)).log()
    p, q = p / p_share[:, None], q / q_share[:, None]
    expected = (shares + (p * (p / q).log()).sum(-1)).mean() * temperature**2
    found = top_k_kl_divergence(student.float(), teacher.float(), temperature, k)
    torch.testing.assert_close(found, expected.float(), rtol=2e-4, atol=1e-5)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 999))
def test_with_all_classes_top_k_is_the_whole_divergence_gradient_included(seed: int) -> None:
    keep = torch.tensor([[True, True, False], [True, False, False]])
    losses, gradients = [], []
    for whole in (True, False):
        student = logits(2, 3, 9, seed=seed).requires_grad_()
        teacher = logits(2, 3, 9, seed=seed + 1000).masked_fill(~keep.unsqueeze(-1), torch.nan)
        found = (
            kl_divergence(student, teacher, 2.0, keep) if whole else top_k_kl_divergence(student, teacher, 2.0, 9, keep)
        )
        found.backward()
        losses.append(found.detach())
        gradients.append(student.grad)
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(gradients[0], gradients[1])
    assert gradients[1] is not None and (gradients[1][~keep] == 0).all()


def test_top_k_draws_mass_out_of_the_rest() -> None:
    """A student that is right about the k among themselves, but has its mass elsewhere, is not right."""
    teacher = torch.tensor([[5.0, 4.0, -20.0, -20.0]])
    student = torch.tensor([[1.0, 0.0, 8.0, 8.0]], requires_grad=True)
    top_k_kl_divergence(student, teacher, 1.0, 2).backward()
    assert student.grad is not None
    assert (student.grad[0, :2] < -0.1).all() and (student.grad[0, 2:] > 0.1).all()


def test_top_k_without_a_row_is_zero_with_no_gradient() -> None:
    student = torch.full((1, 2, 4), torch.inf, requires_grad=True)
    found = top_k_kl_divergence(student, torch.full((1, 2, 4), torch.nan), 2.0, 2, torch.zeros(1, 2, dtype=torch.bool))
    found.backward()
    assert found.item() == 0 and student.grad is not None and (student.grad == 0).all()


def test_top_k_says_something_of_a_large_vocabulary_at_a_high_temperature() -> None:
    """As one class the others would have all the weight: what the student does not know of the k must count as in the whole."""
    teacher = 3 * logits(4, 2000, seed=1)
    student = teacher.clone()
    largest = teacher.topk(16, dim=-1).indices
    student.scatter_add_(-1, largest, logits(4, 16, seed=2))
    assert top_k_kl_divergence(student, teacher, 5.5, 16) > kl_divergence(student, teacher, 5.5)
