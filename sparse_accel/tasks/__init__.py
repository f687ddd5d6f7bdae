"""The tasks by name. Looking one up imports it, and no sooner: `--help` needs the names alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sparse_accel.errors import OptionError, suggestion

if TYPE_CHECKING:
    from sparse_accel.tasks.base import Task


def _question_answering() -> Task:
    from sparse_accel.tasks.question_answering import QuestionAnswering

    return QuestionAnswering()


def _text_classification() -> Task:
    from sparse_accel.tasks.text_classification import TextClassification

    return TextClassification()


def _token_classification() -> Task:
    from sparse_accel.tasks.token_classification import TokenClassification

    return TokenClassification()


def _masked_language_modeling() -> Task:
    from sparse_accel.tasks.masked_language_modeling import MaskedLanguageModeling

    return MaskedLanguageModeling()


TASKS: dict[str, Callable[[], Task]] = {
    "question_answering": _question_answering,
    "text_classification": _text_classification,
    "token_classification": _token_classification,
    "masked_language_modeling": _masked_language_modeling,
}

ALIASES: dict[str, str] = {
    "qa": "question_answering",
    "glue": "text_classification",
    "sequence_classification": "text_classification",
    "sentiment_analysis": "text_classification",
    "ner": "token_classification",
    "mlm": "masked_language_modeling",
    "masked_lm": "masked_language_modeling",
}


def resolve_task(name: str) -> Task:
    """The task of that name (`_`, `-` and spaces are the same) or alias. Raises OptionError with the nearest name."""
    key = name.strip().lower().replace("-", "_").replace(" ", "_")
    key = ALIASES.get(key, key)
    if key not in TASKS:
        raise OptionError(f"there is no task {name!r}{suggestion(key, [*TASKS, *ALIASES])}")
    return TASKS[key]()
