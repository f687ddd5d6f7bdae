"""Whether a teacher and a student fit together, and the teacher that always does."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from sparse_accel.errors import ModelError
from sparse_accel.folders.loading import label_names
from sparse_accel.tasks.text_labels import order_in


def frozen_copy(student: nn.Module) -> nn.Module:
    """The teacher of `--distill_teacher self`: the student as it was loaded."""
    return copy.deepcopy(student)


def check_teacher(
    teacher: Any,
    student: Any,
    teacher_tokenizer: Any,
    tokenizer: Any,
    name: str,
    *,
    max_length: int,
    positions: int | None,
) -> None:
    """Raise ModelError unless the teacher reads the student's tokens, and its outputs mean the student's labels.

    `teacher_tokenizer` is None where the teacher's folder brings none; its embedding must then at least be large enough.
    """
    if teacher_tokenizer is not None and teacher_tokenizer.get_vocab() != tokenizer.get_vocab():
        ours, theirs = tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
        example = next((token for token in ours if theirs.get(token) != ours[token]), None)
        raise ModelError(
            f"the teacher {name} has another vocabulary than the student ({len(theirs)} tokens against {len(ours)}; "
            f"for example {example!r} is {theirs.get(example)} there and {ours.get(example)} here), so that the "
            "outputs of the two cannot be compared; take a teacher trained with the student's tokenizer"
        )
    teacher_size = teacher.get_input_embeddings().num_embeddings
    if len(tokenizer) > teacher_size:
        raise ModelError(
            f"the teacher {name} knows {teacher_size} tokens, the student's tokenizer has {len(tokenizer)}; "
            "take a teacher trained with the student's tokenizer"
        )
    if positions is not None and positions < max_length:
        raise ModelError(
            f"the teacher {name} reads at most {positions} tokens, --max_seq_length is {max_length}; lower it or take another teacher"
        )
    if student.config.num_labels != teacher.config.num_labels:
        raise ModelError(
            f"the teacher {name} has {teacher.config.num_labels} labels, the student {student.config.num_labels}; they must have "
            f"the same\n  teacher: {_labels(teacher)}\n  student: {_labels(student)}"
        )


def label_order(teacher: Any, student: Any, name: str) -> tuple[int, ...] | None:
    """Where each of the student's labels stands among the teacher's, by name; None where they stand alike, or where one of
    the two does not name its labels (`LABEL_0`).

    Raises ModelError, which shows both, for other labels.
    """
    ours, theirs = label_names(student.config), label_names(teacher.config)
    if ours is None or theirs is None:
        return None
    order = order_in(ours, theirs)
    if order is None:
        raise ModelError(
            f"the teacher {name} has other labels than the student, so that what it says of them means nothing to it\n"
            f"  teacher: {_labels(teacher)}\n  student: {_labels(student)}\n"
            "take a teacher that was trained on the same labels, or --distill_teacher disable"
        )
    return None if order == sorted(order) else tuple(order)


def _labels(model: Any) -> str:
    names = label_names(model.config)
    return f"{model.config.num_labels} without names" if names is None else ", ".join(names)
