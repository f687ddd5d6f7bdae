"""Rows of a question-answering data set, checked one by one: every answer is found at its offset."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparse_accel.errors import DataError, suggestion
from sparse_accel.tasks.reading import Row, kind_of
from sparse_accel.tasks.rows import NUM_ROWS_NAMED, BadRows, KnownColumns


@dataclass(frozen=True, slots=True)
class Example:
    """One question. Offsets count characters (code points) of `context`; without answers: unanswerable, or unknown."""

    id: str
    question: str
    context: str
    answer_texts: tuple[str, ...]
    answer_starts: tuple[int, ...]
    where: str


class _Bad(Exception):
    """A problem of the row at hand."""


@dataclass(frozen=True)
class _Columns:
    question: str
    context: str
    # None: there is a pair of columns answer_text and answer_start, or no answers at all.
    answers: str | None


def check_rows(rows: Sequence[Row], bad: BadRows, *, answers: str) -> tuple[list[Example], list[str]]:
    """Examples in the order of `rows`, and notes for the user.

    answers: "required" (each row must have one), "optional" (a row may have an empty list) or "ignored" (there
    may be no such column; answers that are there are checked all the same). Raises DataError for missing columns, for
    bad rows and repeated ids as `bad` says, and when no row is left.
    """
    source = rows[0].where.split(": ")[0]
    columns, notes = _columns_of(_typical(rows), answers)
    contexts: dict[str, str] = {}
    examples: list[Example] = []
    seen: dict[str, str] = {}
    given = {str(row.values["id"]) for row in rows if row.values.get("id") not in (None, "")}
    for number, row in enumerate(rows, start=1):
        try:
            example = _example(row, columns, answers, number, given, contexts)
        except _Bad as problem:
            bad.add(row.where, str(problem))
            continue
        if example.id in seen:
            bad.add(
                row.where, f"has the id {example.id!r}, which {seen[example.id]} has already; each id should occur once"
            )
            continue
        seen[example.id] = row.where
        examples.append(example)
    if not examples:
        raise DataError(f"{source}: no usable row is left: {'; '.join(bad.messages[:NUM_ROWS_NAMED])}")
    return examples, notes


def under_usual_names(rows: Sequence[Row], named: Mapping[str, str | None]) -> list[Row]:
    """The rows with what a person calls otherwise (usual name -> their name, None for no other) under the usual name too.

    Raises DataError, with the nearest names, where no row has a column that was named.
    """
    others = {usual: name for usual, name in named.items() if name is not None}
    for option, name in ((f"--{usual.removesuffix('s')}_column", name) for usual, name in others.items()):
        if not any(name in row.values for row in rows):
            raise DataError(
                f"{rows[0].where}: there is no column {name!r} ({option}){suggestion(name, rows[0].values)}"
            )
    if not others:
        return list(rows)
    return [
        Row(
            row.where,
            {**row.values, **{usual: row.values[name] for usual, name in others.items() if name in row.values}},
            row.problem,
        )
        for row in rows
    ]


def known_columns(rows: Sequence[Row], answers: str, source: str) -> KnownColumns:
    """The columns that `check_rows` reads of the rows of `source`. Raises DataError where there are none."""
    found, _ = _columns_of(_typical(rows), answers)
    names = {"question": found.question, "context": found.context, "answers": found.answers}
    return KnownColumns({what: name for what, name in names.items() if name is not None}, source)


def under_known_names(rows: Sequence[Row], known: KnownColumns, answers: str) -> list[Row]:
    """The rows with the columns that other data of the run was read from under their usual names. Raises DataError where they
    lack one; answers may be written otherwise (`answer_text` and `answer_start`), and be absent where they are "ignored"."""
    row = _typical(rows)
    others: dict[str, str | None] = {}
    for what in known.names:
        if what == "answers" and (answers == "ignored" or "answer_text" in row.values):
            continue
        name = known.require(what, row.where, row.values, f"--{what.removesuffix('s')}_column")
        others[what] = name if name != what else None
    return under_usual_names(rows, others)


def _typical(rows: Sequence[Row]) -> Row:
    """The first row that has the usual columns, else the first that has any: the others are measured by it."""
    whole = [row for row in rows if row.problem is None]
    if not whole:
        raise DataError(f"{rows[0].where}: {rows[0].problem}")
    return next((row for row in whole if {"question", "context"} <= row.values.keys()), whole[0])


def _columns_of(row: Row, answers: str) -> tuple[_Columns, list[str]]:
    """Which columns to read: those called question, context and answers, else the first, second or third."""
    names = list(row.values)
    separate = {"answer_text", "answer_start"} <= set(names) and "answers" not in names
    wanted = ["question", "context"] + ([] if separate else ["answers"])
    # Columns that have a known meaning are never taken for another.
    taken = {"id", "title", "is_impossible", "plausible_answers", "answer_text", "answer_start"}
    taken |= {name for name in wanted if name in names}
    found: dict[str, str | None] = {}
    notes = []
    for position, name in enumerate(wanted):
        if name in names:
            found[name] = name
        elif position < len(names) and len(names) >= len(wanted) and names[position] not in taken:
            found[name] = names[position]
            ordinal = ("first", "second", "third")[position]
            notes.append(f"no column is called {name!r}; the {ordinal} column, {names[position]!r}, is taken for it")
        elif name == "answers" and answers == "ignored":
            found[name] = None
        else:
            raise DataError(f"{row.where}: there is no column {name!r}{suggestion(name, names)}")
    assert found["question"] is not None and found["context"] is not None
    source = row.where.split(": ")[0]
    return _Columns(found["question"], found["context"], found.get("answers")), [f"{source}: {note}" for note in notes]


def _example(
    row: Row, columns: _Columns, answers: str, number: int, given: set[str], contexts: dict[str, str]
) -> Example:
    if row.problem is not None:
        raise _Bad(row.problem)
    question = _text(row, columns.question)
    context = _text(row, columns.context)
    if not question.strip():
        raise _Bad("the question is empty")
    if not context.strip():
        raise _Bad("the context is empty")
    texts, starts = _answers(row, columns, answers)
    for text, start in zip(texts, starts, strict=True):
        _check_answer(text, start, context)
    if row.values.get("is_impossible") is True and texts:
        raise _Bad("says is_impossible and has answers all the same")
    if answers == "required" and not texts:
        raise _Bad("has no answer; data with unanswerable questions needs --version_2_with_negative")
    # Rows of one paragraph share one string.
    context = contexts.setdefault(context, context)
    return Example(_id(row, number, given), question, context, texts, starts, row.where)


def _id(row: Row, number: int, given: set[str]) -> str:
    """The row's own id, or one made of its number that no row has."""
    value = row.values.get("id")
    if value is None or value == "":
        name = f"row-{number}"
        while name in given:
            name += "-"
        return name
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _Bad(f"the id should be text or a whole number, it is {kind_of(value)}")
    return str(value)


def _text(row: Row, column: str) -> str:
    if column not in row.values:
        raise _Bad(f"has no {column!r}{suggestion(column, row.values)}")
    value = row.values[column]
    if not isinstance(value, str):
        raise _Bad(f"{column!r} should be text, it is {kind_of(value)}")
    half = re.search(r"[\ud800-\udfff]", value)
    if half:
        raise _Bad(f"{column!r} has half of a surrogate pair at character {half.start()}: a broken \\u escape")
    return value


def _answers(row: Row, columns: _Columns, answers: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    values = row.values
    if columns.answers is not None:
        if columns.answers not in values:
            if answers == "ignored":
                return (), ()
            raise _Bad(f"has no {columns.answers!r}{suggestion(columns.answers, values)}")
        found = values[columns.answers]
    elif values.get("answer_start") in (None, "") and values.get("answer_text") in (None, ""):
        return (), ()
    else:
        found = {"text": values["answer_text"], "answer_start": values["answer_start"]}
    if isinstance(found, str):
        found = _parsed(found)
    if found is None:
        return (), ()
    if isinstance(found, list):
        found = _transposed(found)
    if not isinstance(found, Mapping):
        raise _Bad(f"'answers' should hold 'text' and 'answer_start', it is {kind_of(found)}")
    for key in ("text", "answer_start"):
        if key not in found:
            raise _Bad(f"'answers' has no {key!r}{suggestion(key, found)}")
    texts, starts = (_list(found[key]) for key in ("text", "answer_start"))
    if len(texts) != len(starts):
        raise _Bad(f"'answers' has {len(texts)} texts and {len(starts)} offsets")
    return tuple(_answer_text(text) for text in texts), tuple(_offset(start) for start in starts)


def _parsed(text: str) -> Any:
    """What a CSV cell says: JSON, or a Python literal as pandas writes it (with numpy's `array([...])`, too)."""
    if not text.strip():
        return None
    try:
        return json.loads(text)
    except ValueError:
        pass
    plain = re.sub(r"\barray\((\[.*?\])(?:, dtype=\w+)?\)", r"\1", text, flags=re.DOTALL)
    try:
        return ast.literal_eval(plain)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise _Bad(f"'answers' is neither JSON nor a Python literal: {text[:60]!r}") from error


def _transposed(answers: list[Any]) -> dict[str, list[Any]]:
    """SQuAD's list of {text, answer_start} as two lists."""
    columns: dict[str, list[Any]] = {"text": [], "answer_start": []}
    for number, answer in enumerate(answers, start=1):
        if not isinstance(answer, Mapping):
            raise _Bad(f"answer {number} should be an object with 'text' and 'answer_start', it is {kind_of(answer)}")
        for key, column in columns.items():
            if key not in answer:
                raise _Bad(f"answer {number} has no {key!r}{suggestion(key, answer)}")
            column.append(answer[key])
    return columns


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _answer_text(value: Any) -> str:
    if not isinstance(value, str):
        raise _Bad(f"the text of an answer should be text, it is {kind_of(value)}")
    if not value:
        raise _Bad("an answer is empty; an unanswerable question has an empty list of answers")
    return value


def _offset(value: Any) -> int:
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d+\s*", value):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise _Bad(f"answer_start should be a whole number, it is {value!r}")
    return value


def _check_answer(text: str, start: int, context: str) -> None:
    if 0 <= start and context.startswith(text, start):
        return
    elsewhere = [match.start() for match in re.finditer(re.escape(text), context)]
    nearest = min(elsewhere, key=lambda offset: abs(offset - start), default=None)
    hint = "the context does not hold it anywhere" if nearest is None else f"the context holds it at {nearest}"
    if not 0 <= start < len(context):
        size = len(context)
        raise _Bad(
            f"answer_start {start} is outside the context of {size} characters; the answer is {_short(text)}; {hint}"
        )
    there = context[start : start + len(text)]
    raise _Bad(f"at answer_start {start} the context reads {_short(there)}, not the answer {_short(text)}; {hint}")


def _short(text: str) -> str:
    return repr(text) if len(text) <= 40 else repr(text[:37] + "...")
