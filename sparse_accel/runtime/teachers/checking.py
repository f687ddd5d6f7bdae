"""Whether a teacher and a student fit together, and the teacher that always does."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from sparse_accel.errors import ModelError


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
    ours, theirs = student.config.num_labels, teacher.config.num_labels
    if ours != theirs:
        raise ModelError(f"the teacher {name} has {theirs} labels, the student {ours}; they must have the same")
