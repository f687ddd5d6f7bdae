"""From rows of any kind of file, or of data sets, to texts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from sparse_accel.errors import DataError, suggestion
from sparse_accel.tasks.reading import FORMATS, Row, kind_of, read_file, read_text_lines
from sparse_accel.tasks.rows import NUM_ROWS_NAMED, BadRows

# The column of a text in rows, where nobody says otherwise; a line of a text file is a row with it alone.
TEXT_COLUMN: Final = "text"
# Plain text, a line a row; WikiText's files have the last two.
TEXT_SUFFIXES: Final = (".txt", ".text", ".raw", ".tokens")


def plain_suffix(path: Path) -> str:
    """The suffix that tells the format: the one before `.gz`, where there is one."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return suffixes[-2] if len(suffixes) > 1 and suffixes[-1] == ".gz" else (suffixes or [""])[-1]


def read_lines(path: str | Path) -> list[Row]:
    """The rows of a data file: lines of text, of which those that are none are bad rows, or what `reading.read_file` reads.
    Raises DataError."""
    path = Path(path)
    suffix = plain_suffix(path)
    if suffix not in TEXT_SUFFIXES:
        if suffix not in FORMATS:
            known = ", ".join((*TEXT_SUFFIXES, *FORMATS))
            raise DataError(
                f"{path}: cannot tell the format from the name; it should end in {known} (or in that and .gz)"
            )
        return read_file(path)
    lines, problems = read_text_lines(path)
    rows = []
    for number, line in enumerate(lines, start=1):
        problem = problems.get(number)
        if problem is None and "\0" in line:
            problem = "holds a NUL character: is it text, and UTF-8?"
        rows.append(Row(f"{path}:{number}", {} if problem else {TEXT_COLUMN: line.rstrip("\r")}, problem))
    return rows


def columns_of(rows: Sequence[Row]) -> list[str]:
    """The columns of the first row that is one. Raises DataError where none is."""
    whole = next((row for row in rows if row.problem is None), None)
    if whole is None:
        raise DataError(f"{rows[0].where}: {rows[0].problem}")
    return list(whole.values)


def text_column(names: Sequence[str], wanted: str | None, source: str, notes: list[str]) -> str:
    """Which of a row's columns holds the text: the wanted one, else the one called `text`, else the first, with a note.
    Raises DataError naming the nearest."""
    if wanted is not None:
        if wanted not in names:
            raise DataError(f"{source}: there is no column {wanted!r} (--text_column_name){suggestion(wanted, names)}")
        return wanted
    if TEXT_COLUMN in names:
        return TEXT_COLUMN
    if not names:
        raise DataError(f"{source}: its rows have no columns")
    notes.append(
        f"{source}: no column is called {TEXT_COLUMN!r}; the first, {names[0]!r}, is taken for it (--text_column_name names "
        "another)"
    )
    return names[0]


def texts_of(rows: Sequence[Row], wanted: str | None, source: str, bad: BadRows, notes: list[str]) -> list[str]:
    """The texts of `rows` without the empty ones. Raises DataError for a missing column, for what is no text as `bad` says,
    and when nothing is left."""
    column = text_column(columns_of(rows), wanted, source, notes)
    texts = []
    for row in rows:
        problem = row.problem or text_problem(row.values, column)
        if problem is not None:
            bad.add(row.where, problem)
        elif row.values[column].strip():
            texts.append(row.values[column])
    if not texts:
        reasons = f": {'; '.join(bad.messages[:NUM_ROWS_NAMED])}" if bad.messages else f": every {column!r} is empty"
        raise DataError(f"{source}: no text is left{reasons}")
    return texts


def text_problem(values: Mapping[str, Any], column: str) -> str | None:
    """Why a row's `column` is no text that can be tokenized, a clause; None if it is one."""
    if column not in values:
        return f"has no {column!r}{suggestion(column, values)}"
    value = values[column]
    if not isinstance(value, str):
        return f"{column!r} should be text, it is {kind_of(value)}"
    half = re.search(r"[\ud800-\udfff]", value)
    return None if half is None else f"{column!r} has half of a surrogate pair at character {half.start()}"
