"""Rows of a classification data set: which columns hold the texts and the label, and each row checked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from sparse_accel.errors import DataError, OptionError, suggestion
from sparse_accel.tasks.glue import GlueTask
from sparse_accel.tasks.reading import Row, kind_of
from sparse_accel.tasks.rows import KnownColumns

# Columns that number rows and are never taken for a text.
_NUMBERING: Final = frozenset({"idx", "index", "id", "guid", "Unnamed: 0", ""})


# What columns hold, by their order.
TEXTS: Final = ("texts", "second texts")


@dataclass(frozen=True, slots=True)
class TextExample:
    """One text, or a pair of them, with its label as the file has it (None where it has none)."""

    first: str
    second: str | None
    label: Any
    where: str


@dataclass(frozen=True)
class TextColumns:
    """The names of one or two columns of texts, and of the one of labels (None: labels are not read)."""

    texts: tuple[str, ...]
    label: str | None


def named_columns(option: str | None) -> tuple[str, ...] | None:
    """What `--input_column_names a,b` names. Raises OptionError for none, more than two or the same twice."""
    if option is None:
        return None
    names = tuple(name.strip() for name in option.split(","))
    if not all(names) or len(names) > 2 or len(set(names)) < len(names):
        raise OptionError(
            f"--input_column_names should name one column of texts, or two with a comma between them; it is {option!r}"
        )
    return names


def text_columns(
    rows: Sequence[Row],
    named: tuple[str, ...] | None,
    label: str,
    glue: GlueTask | None,
    *,
    labelled: bool,
    known: KnownColumns | None = None,
) -> tuple[TextColumns, list[str]]:
    """The columns to read, and notes on those that were guessed.

    Texts: `named` ones, else those of the GLUE task, else those of other data of the run (`known`), else `sentence1` and
    `sentence2`, else `sentence`, else the first two (or the only one) that are not the label. Raises DataError naming the
    nearest columns.
    """
    row = _typical(rows)
    names = list(row.values)
    source = source_of(rows)
    found_label = _label_column(row, label, glue) if labelled else None
    of_labels = {label, glue.file_label if glue is not None else label}
    if named is not None:
        for name in named:
            if name not in names:
                raise DataError(
                    f"{row.where}: there is no column {name!r} (--input_column_names){suggestion(name, names)}"
                )
        return TextColumns(named, found_label), []
    if known is not None and glue is None:
        texts = [
            known.require(holds, row.where, names, "--input_column_names") for holds in TEXTS if holds in known.names
        ]
        return TextColumns(tuple(texts), found_label), []
    usual = _usual_columns(glue)
    for candidate in usual:
        if set(candidate) <= set(names):
            return TextColumns(candidate, found_label), []
    if glue is not None:
        wanted = usual[0]
        missing = next(name for name in wanted if name not in names)
        raise DataError(
            f"{row.where}: there is no column {missing!r}{suggestion(missing, names)} (--task_name {glue.name} wants "
            f"{' and '.join(wanted)}; --input_column_names names others)"
        )
    texts = [
        name for name in names if name not in of_labels and name not in _NUMBERING and isinstance(row.values[name], str)
    ]
    if not texts:
        raise DataError(
            f"{row.where}: no column holds texts; its columns are {', '.join(map(repr, names))}; --input_column_names names them"
        )
    taken = tuple(texts[:2])
    columns = " and ".join(map(repr, taken))
    note = f"{source}: the texts are taken from {columns}"
    others = texts[2:]
    if others:
        note += f", and {', '.join(map(repr, others))} {'is' if len(others) == 1 else 'are'} not read"
    return TextColumns(taken, found_label), [f"{note} (--input_column_names names them)"]


def _usual_columns(glue: GlueTask | None) -> list[tuple[str, ...]]:
    if glue is None:
        return [("sentence1", "sentence2"), ("sentence",)]
    single = [("sentence",), ("text",), ("sentence1",)]
    pairs = [("sentence1", "sentence2"), ("text_a", "text_b")]
    return [glue.texts, glue.columns_in_files, *(single if len(glue.texts) == 1 else pairs)]


def _label_column(row: Row, label: str, glue: GlueTask | None) -> str:
    names = list(row.values)
    # The name that was asked for comes first: it may be written beside the task's own.
    for name in (label, glue.file_label if glue is not None else label):
        if name in names:
            return name
    raise DataError(
        f"{row.where}: there is no column {label!r}{suggestion(label, names)} (--label_column_name names it)"
    )


def source_of(rows: Sequence[Row]) -> str:
    """The file or data set that rows come from, for a message."""
    return re.split(r":(?: row )?\d", rows[0].where, maxsplit=1)[0]


def _typical(rows: Sequence[Row]) -> Row:
    whole = next((row for row in rows if row.problem is None), None)
    if whole is None:
        raise DataError(f"{rows[0].where}: {rows[0].problem}")
    return whole


def text_example(row: Row, columns: TextColumns) -> TextExample | str:
    """The row's texts and label; a sentence on what is wrong with it where it cannot be used."""
    if row.problem is not None:
        return row.problem
    texts = []
    for name in columns.texts:
        if name not in row.values:
            return f"has no {name!r}{suggestion(name, row.values)}"
        problem = problem_of_text(row.values[name], repr(name))
        if problem is not None:
            return problem
        texts.append(row.values[name])
    label = row.values.get(columns.label) if columns.label is not None else None
    if columns.label is not None and columns.label not in row.values:
        return f"has no {columns.label!r}{suggestion(columns.label, row.values)}"
    return TextExample(texts[0], texts[1] if len(texts) > 1 else None, label, row.where)


def problem_of_text(value: Any, name: str) -> str | None:
    """Why a text cannot be read, None when it can; `name` is what the message calls it."""
    if not isinstance(value, str):
        return f"{name} should be text, it is {kind_of(value)}"
    if not value.strip():
        return f"{name} is empty"
    half = _HALF.search(value)
    if half:
        return f"{name} has half of a surrogate pair at character {half.start()}: a broken \\u escape"
    return None


_HALF: Final = re.compile(r"[\ud800-\udfff]")
