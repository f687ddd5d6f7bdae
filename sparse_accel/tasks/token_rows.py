"""Rows of a token-classification data set, checked one by one: as many labels as words, all of them known."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sparse_accel.errors import DataError, suggestion
from sparse_accel.tasks.reading import Row, kind_of
from sparse_accel.tasks.rows import NUM_ROWS_NAMED, BadRows, KnownColumns

# Columns that hold neither words nor labels.
OTHER_COLUMNS = ("id",)


@dataclass(frozen=True, slots=True)
class Example:
    """One sentence: its words, and their tags where they are known; `id` is what the row calls itself, if it does."""

    words: tuple[str, ...]
    tags: tuple[str, ...] | None
    where: str
    id: str | int | None = None


@dataclass(frozen=True)
class Columns:
    """Which columns hold the words and the labels; None for data without labels."""

    words: str
    labels: str | None


class _Bad(Exception):
    """A problem of the row at hand."""


def find_columns(
    rows: Sequence[Row],
    *,
    words: str | None,
    labels: str | None,
    task_name: str,
    labels_wanted: bool,
    known: KnownColumns | None = None,
) -> tuple[Columns, list[str]]:
    """The columns to read, and notes for the user.

    Words: the column that `words` names, else `tokens`, else the first that holds lists. Labels: the one that `labels`
    names, else `{task_name}_tags`, else the first other that holds lists; both as other data had them (`known`), where there was
    some. Raises DataError where there is none. Where not
    `labels_wanted`, labels are read if the column with that name is there, and never guessed.
    """
    row = _typical(rows)
    source = row.where.split(": ")[0]
    notes: list[str] = []

    def find(named: str | None, usual: str, taken: Sequence[str], flag: str, what: str) -> str | None:
        if named is not None:
            if named in row.values:
                return named
            raise DataError(f"{row.where}: there is no column {named!r} ({flag}){suggestion(named, row.values)}")
        if known is not None and what in known.names:
            return known.require(what, row.where, row.values, flag)
        if usual in row.values and usual not in taken:
            return usual
        lists = [name for name, value in row.values.items() if name not in taken and _looks_like_a_list(value)]
        if not lists:
            return None
        notes.append(f"{source}: no column is called {usual!r}; {lists[0]!r} is taken for the {what} ({flag})")
        return lists[0]

    found = find(words, "tokens", [*OTHER_COLUMNS, labels or ""], "--text_column_name", "words")
    if found is None:
        raise DataError(f"{row.where}: there is no column 'tokens'{suggestion('tokens', row.values)}")
    usual = f"{task_name}_tags"
    if labels_wanted:
        tagged = find(labels, usual, [*OTHER_COLUMNS, found], "--label_column_name", "labels")
        if tagged is None:
            raise DataError(f"{row.where}: there is no column {usual!r}{suggestion(usual, row.values)}")
    else:
        tagged = next((name for name in (labels or usual,) if name in row.values), None)
    if tagged == found:
        raise DataError(f"{row.where}: the column {found!r} cannot hold both the words and the labels")
    return Columns(found, tagged), notes


def _typical(rows: Sequence[Row]) -> Row:
    """The first row that is one: the others are measured by it."""
    for row in rows:
        if row.problem is None:
            return row
    raise DataError(f"{rows[0].where}: {rows[0].problem}")


def _looks_like_a_list(value: Any) -> bool:
    return isinstance(value, list | tuple) or (isinstance(value, str) and value.lstrip().startswith("["))


def check_rows(
    rows: Sequence[Row], columns: Columns, bad: BadRows, *, names: Sequence[str] | None, labels_wanted: bool
) -> list[Example]:
    """Examples in the order of `rows`; labels that are numbers stand for the model's labels, `names`.

    Raises DataError for bad rows as `bad` says (a number that has no name makes one), and when no row is left.
    """
    examples = []
    for row in rows:
        try:
            examples.append(_example(row, columns, names, labels_wanted))
        except _Bad as problem:
            bad.add(row.where, str(problem))
    if not examples:
        raise DataError(
            f"{rows[0].where.split(': ')[0]}: no usable row is left: {'; '.join(bad.messages[:NUM_ROWS_NAMED])}"
        )
    return examples


def check_labels(examples: Sequence[Example], labels: Sequence[str], source: str, bad: BadRows) -> list[Example]:
    """The examples all of whose tags are among `labels`, which `source` has; the others are bad rows."""
    known = set(labels)
    kept = []
    for example in examples:
        if example.tags is None or known.issuperset(example.tags):
            kept.append(example)
            continue
        place = next(place for place, tag in enumerate(example.tags) if tag not in known)
        tag = example.tags[place]
        bad.add(
            example.where,
            f"{_word(place, example.words)} has the label {tag!r}, which {source} does not have{suggestion(tag, labels)}",
        )
    if examples and not kept:
        raise DataError(f"no usable row is left: {'; '.join(bad.messages[:NUM_ROWS_NAMED])}")
    return kept


def with_tags(example: Example, tags: Sequence[str]) -> Example:
    """The same sentence with its tags written otherwise."""
    return replace(example, tags=tuple(tags))


def _example(row: Row, columns: Columns, names: Sequence[str] | None, labels_wanted: bool) -> Example:
    if row.problem is not None:
        raise _Bad(row.problem)
    words = tuple(_list(row.values, columns.words))
    if not words:
        raise _Bad(f"{columns.words!r} is empty: a sentence has one word at least")
    for place, word in enumerate(words, start=1):
        _check_text(word, f"word {place}")
        if not word:
            raise _Bad(f"word {place} is empty")
    tags = None
    if columns.labels is not None and (labels_wanted or row.values.get(columns.labels) is not None):
        given = _list(row.values, columns.labels)
        if len(given) != len(words):
            raise _Bad(
                f"has {_count(len(words), 'word')} ({columns.words!r}) and {_count(len(given), 'label')} ({columns.labels!r})"
            )
        tags = tuple(_tag(label, place, words, names) for place, label in enumerate(given))
    own_id = row.values.get("id")
    return Example(words, tags, row.where, own_id if isinstance(own_id, str | int) and "id" != columns.words else None)


def _list(values: Mapping[str, Any], column: str) -> list[Any]:
    if column not in values:
        raise _Bad(f"has no {column!r}{suggestion(column, values)}")
    value = values[column]
    if isinstance(value, str):
        value = _parsed(value, column)
    if not isinstance(value, list | tuple):
        raise _Bad(f"{column!r} should be a list, it is {kind_of(value)}")
    return list(value)


def _parsed(text: str, column: str) -> Any:
    """What a CSV cell says: JSON, or a Python literal as pandas writes it."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    raise _Bad(f"{column!r} should be a list, it is text that is neither JSON nor a Python literal: {text[:60]!r}")


def _check_text(value: Any, what: str) -> None:
    if not isinstance(value, str):
        raise _Bad(f"{what} should be text, it is {kind_of(value)}")
    half = re.search(r"[\ud800-\udfff]", value)
    if half:
        raise _Bad(f"{what} has half of a surrogate pair at character {half.start()}: a broken \\u escape")


def _tag(label: Any, place: int, words: Sequence[str], names: Sequence[str] | None) -> str:
    what = f"the label of {_word(place, words)}"
    if isinstance(label, bool) or not isinstance(label, int):
        _check_text(label, what)
        text = str(label)
        if not text.strip():
            raise _Bad(f"{what} is empty")
        return text
    if names is None:
        raise _Bad(
            f"{what} is {label}, and nothing says what the numbers stand for: write the names themselves into the data, "
            "or put them into the model's config.json (id2label)"
        )
    if not 0 <= label < len(names):
        raise _Bad(f"{what} is {label}, and the model has {len(names)} labels, numbered from 0 to {len(names) - 1}")
    return names[label]


def _word(place: int, words: Sequence[str]) -> str:
    word = words[place]
    shown = repr(word if len(word) <= 40 else f"{word[:37]}...")
    return f"word {place + 1} ({shown})"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
