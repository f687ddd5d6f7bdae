"""Distillation: the student's outputs are drawn to a teacher's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Self, final

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from sparse_accel.compress.losses import kl_divergence, top_k_kl_divergence
from sparse_accel.errors import RecipeError, suggestion
from sparse_accel.modifiers.base import Modifier
from sparse_accel.session import CACHED_PREFIX, LossTerms, Session
from sparse_accel.timeline import Clock


@final
class DistillationModifier(Modifier):
    """loss = (1 - hardness) * task + hardness * mean over keys of T^2 * KL(softmax(teacher/T) || softmax(student/T)).

    `distill_output_keys` are the outputs that are compared; None means those of the task. Padded positions are left out
    of the softmax unless `--distill_include_padding`. `teacher_input_keys` are the parts of a batch that the teacher is
    given; None means all. `--distill_top_k` compares the teacher's largest logits, and the others as one. Of a regression,
    whose output is one number, the mean squared error takes the place of KL. Does nothing in a run without a teacher.
    """

    ignored_fields: ClassVar = {"update_frequency": "the teacher speaks in every step, as in SparseML"}

    hardness: float = Field(0.5, ge=0.0, le=1.0)
    temperature: float = Field(2.0, gt=0.0, allow_inf_nan=False)
    distill_output_keys: tuple[str, ...] | None = Field(None, min_length=1)
    teacher_input_keys: tuple[str, ...] | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _has_length(self) -> Self:
        if self.end_epoch is not None and self.end_epoch <= self.interval.start:
            raise ValueError(f"end_epoch must lie after start_epoch ({self.interval.start}); got {self.end_epoch}")
        return self

    def owns(self) -> frozenset[str]:
        return frozenset({"distillation"})

    def problems(self, num_epochs: float) -> Iterator[str]:
        if self.interval.start >= num_epochs:
            yield f"starts at epoch {self.start_epoch}, but training ends at {num_epochs}"

    def on_loss(
        self,
        terms: LossTerms,
        batch: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
        session: Session,
        clock: Clock,
    ) -> LossTerms:
        if session.teacher is None or not self.interval.contains(clock):
            return terms
        keys = session.task.output_keys if self.distill_output_keys is None else self.distill_output_keys
        teacher_outputs = session.teacher(self.teacher_inputs(batch))
        losses, per_token = [], False
        for key in keys:
            student, teacher = _output(outputs, key, "student"), _output(teacher_outputs, key, "teacher")
            if student.shape != teacher.shape:
                raise RecipeError(
                    f"DistillationModifier: {key} of the student is {list(student.shape)}, of the teacher "
                    f"{list(teacher.shape)}; the two must have the same labels and the same tokens"
                )
            whole = session.options.distill_include_padding
            keep = None if whole else session.task.distillation_keep(key, student, batch)
            # A mean over tokens, where each has classes of its own; else over features.
            per_token = student.dim() > 2
            k = session.options.distill_top_k
            if student.shape[-1] == 1 and keep is None:
                # Of a single output every softmax is 1: a number is compared as what it is.
                losses.append(F.mse_loss(student.float(), teacher.detach().float()))
            elif k:
                losses.append(top_k_kl_divergence(student, teacher, self.temperature, min(k, student.shape[-1]), keep))
            else:
                losses.append(kl_divergence(student, teacher, self.temperature, keep))
        return terms.scaled(1.0 - self.hardness).plus(
            "distillation", torch.stack(losses).mean(), self.hardness, per_token=per_token
        )

    def teacher_inputs(self, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The part of a batch that the teacher is given; what a cache brought along is always there."""
        if self.teacher_input_keys is None:
            return batch
        for key in self.teacher_input_keys:
            if key not in batch:
                raise RecipeError(f"teacher_input_keys: a batch has no {key!r}{suggestion(key, batch)}")
        cached = [name for name in batch if name.startswith(CACHED_PREFIX)]
        return {key: batch[key] for key in (*self.teacher_input_keys, *cached)}


def _output(outputs: Mapping[str, Tensor], key: str, whose: str) -> Tensor:
    """The logits called `key`. Raises RecipeError naming what there is."""
    value = outputs.get(key)
    if not isinstance(value, Tensor) or value.dim() < 2:
        logits = sorted(name for name, tensor in outputs.items() if isinstance(tensor, Tensor) and tensor.dim() >= 2)
        raise RecipeError(f"distill_output_keys: the {whose} has no logits called {key!r}; it has {', '.join(logits)}")
    return value
