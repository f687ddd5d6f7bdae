"""The command `predict` for models that classify texts: texts from arguments, a file or standard input."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, Final

from sparse_accel.cli import json_lines
from sparse_accel.errors import DataError, OptionError, suggestion

if TYPE_CHECKING:
    from sparse_accel.serving.text_predicting import Classification, TextPredictor

# Labels that are shown with their probabilities.
_SHOWN: Final = 5
# Characters of a text that are shown.
_WIDTH: Final = 200


@dataclass(frozen=True)
class Asked:
    """A text, or a pair, and a phrase that leads a person to it."""

    id: str
    text: str
    text_pair: str | None
    where: str


def source_of(texts: Sequence[str], pairs: Sequence[str], file: str | None, *, has_input: bool) -> str:
    """Where texts come from: arguments, file or lines. Raises OptionError where that is not clear."""
    if file is not None:
        if texts or pairs:
            raise OptionError("--file brings the texts; --text and --text_pair do not go with it")
        return "file"
    if pairs and len(pairs) != len(texts):
        raise OptionError(f"{len(texts)} times --text and {len(pairs)} times --text_pair: each pair needs both")
    if texts:
        return "arguments"
    if not has_input:
        raise OptionError(
            'predict: no text; pass --text TEXT, or --file FILE, or pipe JSON lines with "text" (and "text_pair") into it'
        )
    return "lines"


def from_arguments(texts: Sequence[str], pairs: Sequence[str]) -> list[Asked]:
    """The texts of `--text`, each with the one of `--text_pair`."""
    others: Sequence[str | None] = list(pairs) or [None] * len(texts)
    return [
        Asked(f"row-{number}", text, other, f"--text (number {number})")
        for number, (text, other) in enumerate(zip(texts, others, strict=True), start=1)
    ]


def from_file(
    file: str,
    named: tuple[str, ...] | None,
    label: str,
    task_name: str | None,
    refuse: Callable[[str], None],
    note: Callable[[str], None],
) -> Iterator[Asked]:
    """The rows of a file, with texts in the columns of training (`named`, or those of the GLUE task, or the usual ones; never
    `label`, the column of labels); `refuse` gets those that are none. Raises DataError for a file that cannot be read or lacks
    the columns."""
    from sparse_accel.tasks.glue import glue_task, read_glue_file
    from sparse_accel.tasks.reading import read_file
    from sparse_accel.tasks.text_rows import text_columns, text_example

    glue = glue_task(task_name) if task_name is not None else None
    rows = (read_glue_file(file, glue) if glue is not None else None) or read_file(file)
    columns, notes = text_columns(rows, named, label, glue, labelled=False)
    for text in notes:
        note(text)
    for number, row in enumerate(rows, start=1):
        example = text_example(row, columns)
        if isinstance(example, str):
            refuse(f"{row.where}: {example}")
            continue
        try:
            yield Asked(json_lines.id_of(row.values, number, row.where), example.first, example.second, row.where)
        except DataError as error:
            refuse(str(error))


def from_lines(
    stream: IO[bytes], named: tuple[str, ...] | None, label: str, refuse: Callable[[str], None]
) -> Iterator[Asked]:
    """JSON objects line by line, none read before it is asked for; columns as `from_file` takes them."""

    def asked(row: Mapping[str, Any], number: int, where: str) -> Asked:
        return _asked(row, number, named, label, where)

    return json_lines.from_lines(stream, "'text' (and 'text_pair')", asked, refuse)


def _asked(row: Mapping[str, Any], number: int, named: tuple[str, ...] | None, label: str, where: str) -> Asked:
    from sparse_accel.tasks.reading import Row
    from sparse_accel.tasks.text_rows import TextColumns, text_columns, text_example

    if "text" in row:
        columns = TextColumns(("text", "text_pair") if row.get("text_pair") is not None else ("text",), None)
    else:
        names = named if named is not None and set(named) <= row.keys() else None
        try:
            columns, _ = text_columns([Row(where, row)], names, label, None, labelled=False)
        except DataError:
            raise DataError(f"{where}: has no 'text'{suggestion('text', row)}") from None
    example = text_example(Row(where, row), columns)
    if isinstance(example, str):
        raise DataError(f"{where}: {example}")
    return Asked(json_lines.id_of(row, number, where), example.first, example.second, where)


def classified(
    predictor: TextPredictor, asked: Iterator[Asked], refuse: Callable[[str], None], *, at_once: bool
) -> Iterator[tuple[Asked, Classification]]:
    """Texts with what they are. `at_once` reads none before the last is answered."""
    waiting: deque[Asked] = deque()

    def texts() -> Iterator[tuple[str, str | None]]:
        for one in asked:
            waiting.append(one)
            yield one.text, one.text_pair

    chunk = {"chunk": 1} if at_once else {}
    for found in predictor.classifications(texts(), **chunk):
        one = waiting.popleft()
        if isinstance(found, DataError):
            refuse(f"{one.where}: {found}")
        else:
            yield one, found


class JsonLines:
    """One JSON object a line."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream

    def __call__(self, one: Asked, found: Classification) -> None:
        """Write what a text is."""
        row: dict[str, Any] = {"id": one.id, "text": one.text}
        if one.text_pair is not None:
            row["text_pair"] = one.text_pair
        if found.value is not None:
            row["value"] = found.value
        else:
            row |= {"label": found.label, "labels": found.labels, "scores": found.scores}
        row["is_truncated"] = found.is_truncated
        print(json.dumps(row, ensure_ascii=False), file=self.stream, flush=True)


class Readable:
    """The text, and below it what it is."""

    def __init__(self, stream: IO[str]) -> None:
        from rich.console import Console

        self.console: Console = Console(file=stream, highlight=False)

    def __call__(self, one: Asked, found: Classification) -> None:
        """Write what a text is."""
        from rich.text import Text

        for text in (one.text, one.text_pair):
            if text is not None:
                self.console.print(Text(_short(text), style="bold"), soft_wrap=True)
        if found.value is not None:
            self.console.print(Text(f"  {found.value:.4f}", style="bold green"), soft_wrap=True)
        elif not found.labels:
            self.console.print(Text("  no label", style="italic"), soft_wrap=True)
        for rank, (label, score) in enumerate(found.scores.items()):
            if rank < _SHOWN or label in found.labels:
                style = "bold green" if label in found.labels else "dim"
                self.console.print(Text(f"  {score:.4f}  {label}", style=style), soft_wrap=True)
        if found.is_truncated:
            self.console.print(
                Text("  (the text is longer than the model reads: its rest was not looked at)", style="dim")
            )
        self.console.print()
        self.console.file.flush()


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _WIDTH else text[: _WIDTH - 3] + "..."
