"""DistillationModifier: SparseML's sum of losses, when it speaks, and what it says when outputs do not fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from sparse_accel.compress.losses import kl_divergence
from sparse_accel.errors import RecipeError
from sparse_accel.modifiers.distillation import DistillationModifier
from sparse_accel.session import LossTerms
from sparse_accel.timeline import Clock

KEYS = ("start_logits", "end_logits")
MASK = torch.tensor([[True, True, True, False], [True, True, False, False]])


def outputs(seed: int, shape: tuple[int, ...] = (2, 4)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = {key: torch.randn(shape, generator=generator) for key in KEYS}
    return {"loss": torch.tensor(1.5), **logits}


@dataclass
class Spans:
    """A question-answering task as far as distillation asks."""

    output_keys: tuple[str, ...] = KEYS

    def distillation_keep(self, key: str, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor | None:
        return batch["attention_mask"].bool()


class Recorder:
    """A teacher that gives fixed outputs and keeps what it was asked."""

    def __init__(self, answer: Mapping[str, Tensor]) -> None:
        self.answer = answer
        self.asked: list[Mapping[str, Tensor]] = []

    def __call__(self, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        self.asked.append(batch)
        return self.answer


BATCH = {"input_ids": torch.ones(2, 4, dtype=torch.long), "attention_mask": MASK.long()}


def session(teacher: Any, include_padding: bool = False) -> Any:
    return SimpleNamespace(
        teacher=teacher, task=Spans(), options=SimpleNamespace(distill_include_padding=include_padding, distill_top_k=0)
    )


def loss(
    modifier: DistillationModifier, run: Any, epoch: int = 0, student: Mapping[str, Tensor] | None = None
) -> LossTerms:
    student = outputs(1) if student is None else student
    return modifier.on_loss(LossTerms.task(student["loss"]), BATCH, student, run, Clock(epoch, 1))


@pytest.mark.parametrize("hardness", [0.0, 0.3, 1.0])
def test_the_loss_is_the_weighted_sum_of_task_and_mean_divergence(hardness: float) -> None:
    teacher = Recorder(outputs(2))
    modifier = DistillationModifier(hardness=hardness, temperature=5.0)
    terms = loss(modifier, session(teacher, include_padding=True))
    each = [kl_divergence(outputs(1)[key], outputs(2)[key], 5.0) for key in KEYS]
    distillation = (each[0] + each[1]) / 2
    torch.testing.assert_close(terms.terms["distillation"].value, distillation)
    torch.testing.assert_close(terms.total(), (1 - hardness) * torch.tensor(1.5) + hardness * distillation)


def test_padding_is_left_out_unless_asked_for() -> None:
    modifier = DistillationModifier(hardness=1.0, temperature=2.0, distill_output_keys=["start_logits"])
    without = loss(modifier, session(Recorder(outputs(2)))).total()
    whole = loss(modifier, session(Recorder(outputs(2)), include_padding=True)).total()
    student, teacher = outputs(1)["start_logits"], outputs(2)["start_logits"]
    torch.testing.assert_close(without, kl_divergence(student, teacher, 2.0, MASK))
    torch.testing.assert_close(whole, kl_divergence(student, teacher, 2.0))
    assert without != whole


def test_it_speaks_inside_its_interval_only() -> None:
    modifier = DistillationModifier(start_epoch=1.0, end_epoch=3.0)
    teacher = Recorder(outputs(2))
    spoken = ["distillation" in loss(modifier, session(teacher), epoch).terms for epoch in range(4)]
    assert spoken == [False, True, True, False]
    assert len(teacher.asked) == 2  # a silent teacher costs nothing


def test_without_a_teacher_the_loss_is_the_tasks() -> None:
    terms = loss(DistillationModifier(hardness=1.0), session(None))
    assert list(terms.terms) == ["task"]
    assert terms.total() == 1.5


def test_the_teacher_is_given_the_parts_that_were_named() -> None:
    teacher = Recorder(outputs(2))
    loss(DistillationModifier(teacher_input_keys=["input_ids"]), session(teacher))
    loss(DistillationModifier(), session(teacher))
    assert [set(asked) for asked in teacher.asked] == [{"input_ids"}, {"input_ids", "attention_mask"}]
    with pytest.raises(RecipeError, match="a batch has no 'input_id'; did you mean 'input_ids'"):
        loss(DistillationModifier(teacher_input_keys=["input_id"]), session(teacher))


@pytest.mark.parametrize("key", ["logits", "loss"])
def test_outputs_that_are_not_there_are_named_with_those_that_are(key: str) -> None:
    modifier = DistillationModifier(distill_output_keys=[key])
    with pytest.raises(RecipeError, match=f"the student has no logits called '{key}'; it has end_logits, start_logits"):
        loss(modifier, session(Recorder(outputs(2))))
    student = {**outputs(1), key: outputs(1)["start_logits"]}
    with pytest.raises(RecipeError, match=f"the teacher has no logits called '{key}'"):
        modifier.on_loss(LossTerms.task(torch.tensor(1.0)), BATCH, student, session(Recorder(outputs(2))), Clock(0, 1))


def test_a_teacher_of_another_shape_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"start_logits of the student is \[2, 4\], of the teacher \[2, 6\]"):
        loss(DistillationModifier(), session(Recorder(outputs(2, (2, 6)))))


@pytest.mark.parametrize(
    "fields",
    [
        {"hardness": 1.1},
        {"hardness": -0.1},
        {"temperature": 0.0},
        {"temperature": float("inf")},
        {"distill_output_keys": []},
        {"start_epoch": 2.0, "end_epoch": 1.0},
        {"gain": 1.0},
    ],
)
def test_bad_fields_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=list(fields)[-1]):
        DistillationModifier(**fields)


def test_a_start_after_training_is_a_problem() -> None:
    assert list(DistillationModifier(start_epoch=3.0).problems(3)) == ["starts at epoch 3.0, but training ends at 3"]
    assert list(DistillationModifier().problems(3)) == []
