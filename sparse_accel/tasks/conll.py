"""CoNLL files: a word and its tag a line, and a blank line between sentences."""

from __future__ import annotations

import re
from pathlib import Path

from sparse_accel.errors import DataError
from sparse_accel.tasks.reading import Row, read_text_lines

# What the first column of a line between documents says.
DOCUMENT = "-DOCSTART-"
# How the names of such files end; each may be followed by .gz.
SUFFIXES = (".conll", ".iob", ".bio", ".txt")


def read_conll(path: Path, words: str, tags: str) -> list[Row]:
    """A row a sentence, with a list of words in the column `words` and, unless the file has one column, of tags in `tags`.

    Columns are separated by tabs where the line has one, else by spaces; the first is the word, the last the tag. A line of
    white space alone ends a sentence, and so does one that begins with -DOCSTART-. A line that has not as many columns as
    the first, or is not UTF-8, makes its sentence a bad row. Raises DataError as `read_file` does.
    """
    rows = []
    num_columns: int | None = None
    sentence: list[list[str]] = []
    start = 0
    malformed: Row | None = None

    def finish() -> None:
        nonlocal malformed
        if sentence:
            values = {words: [cells[0] for cells in sentence]}
            if num_columns is not None and num_columns > 1:
                values[tags] = [cells[-1] for cells in sentence]
            rows.append(malformed or Row(f"{path}:{start}", values))
        sentence.clear()
        malformed = None

    lines, problems = read_text_lines(path)
    for number, line in enumerate(lines, start=1):
        cells = _cells(line.rstrip("\r"))
        if not cells or cells[0] == DOCUMENT:
            finish()
            continue
        if not sentence:
            start = number
        if num_columns is None:
            num_columns = len(cells)
        if number in problems and malformed is None:
            malformed = Row(f"{path}:{number}", {}, problems[number])
        if len(cells) != num_columns and malformed is None:
            found = f"{line.strip()[:40]!r} has {_columns(len(cells))}"
            problem = f"{found}, and the lines before it have {num_columns}: a word, and last its tag"
            malformed = Row(f"{path}:{number}", {}, problem)
        sentence.append(cells)
    finish()
    if not rows:
        raise DataError(f"{path}: holds no sentence")
    return rows


def _cells(line: str) -> list[str]:
    """The columns of a line, none for a blank one."""
    if not line.strip():
        return []
    if "\t" in line:
        return [cell.strip(" ") for cell in line.rstrip("\t ").split("\t")]
    return re.split(" +", line.strip(" "))


def _columns(count: int) -> str:
    return "1 column" if count == 1 else f"{count} columns"
