"""The command `predict` for models that label words: texts from arguments, a file or standard input."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import IO, TYPE_CHECKING, Any

from sparse_accel.cli import json_lines
from sparse_accel.errors import DataError, OptionError, suggestion

if TYPE_CHECKING:
    from sparse_accel.serving.token_predicting import Tagging, TokenPredictor

# Columns that hold what is to be labelled: words, or a text.
COLUMNS = ("tokens", "text")


@dataclass(frozen=True)
class Asked:
    """A text, or a list of words, and a phrase that leads a person to it."""

    id: str
    text: str | Sequence[str]
    where: str


def from_arguments(texts: Sequence[str]) -> list[Asked]:
    """The texts of `--text`."""
    return [Asked(f"row-{number}", text, f"--text (number {number})") for number, text in enumerate(texts, start=1)]


def from_file(file: str, named: str | None, refuse: Callable[[str], None]) -> Iterator[Asked]:
    """The rows of a file: training's column of words (`named`), else `tokens` (a list of words) or `text`; of a CoNLL file,
    the words. `refuse` gets those that are none. Raises DataError for a file that cannot be read."""
    import functools

    from sparse_accel.tasks.conll import SUFFIXES, read_conll
    from sparse_accel.tasks.reading import read_file

    rows = read_file(file, dict.fromkeys(SUFFIXES, functools.partial(read_conll, words="tokens", tags="tags")))
    for number, row in enumerate(rows, start=1):
        try:
            if row.problem is not None:
                raise DataError(f"{row.where}: {row.problem}")
            yield _asked(row.values, number, row.where, named)
        except DataError as error:
            refuse(str(error))


def from_lines(stream: IO[bytes], named: str | None, refuse: Callable[[str], None]) -> Iterator[Asked]:
    """JSON objects line by line, none read before it is asked for; columns as `from_file` takes them."""
    import functools

    return json_lines.from_lines(stream, "'text' or 'tokens'", functools.partial(_asked, named=named), refuse)


def _asked(row: Any, number: int, where: str, named: str | None) -> Asked:
    from sparse_accel.tasks.reading import kind_of

    column = next((name for name in (named, *COLUMNS) if name in row), None)
    if column is None:
        raise DataError(f"{where}: has neither 'tokens' nor 'text'{suggestion('tokens', row)}")
    value = row[column]
    is_text = column == "text" and column != named
    if not is_text and isinstance(value, str):  # a cell of a table
        try:
            value = json.loads(value)
        except ValueError as error:
            raise DataError(f"{where}: {column!r} should be a list of words, it is text that is not JSON") from error
    if not isinstance(value, str if is_text else list):
        kind = "text" if is_text else "a list of words"
        raise DataError(f"{where}: {column!r} should be {kind}, it is {kind_of(value)}")
    return Asked(json_lines.id_of(row, number, where), value, where)


def tagged(
    predictor: TokenPredictor, asked: Iterator[Asked], refuse: Callable[[str], None], *, at_once: bool
) -> Iterator[tuple[Asked, Tagging]]:
    """Texts with what is found in them. `at_once` reads no text before the last is done."""
    from collections import deque

    waiting: deque[Asked] = deque()

    def texts() -> Iterator[str | Sequence[str]]:
        for one in asked:
            waiting.append(one)
            yield one.text

    for found in predictor.taggings(texts(), **({"chunk": 1} if at_once else {})):
        one = waiting.popleft()
        if isinstance(found, DataError):
            refuse(f"{one.where}: {found}")
        else:
            yield one, found


def source_of(texts: Sequence[str], file: str | None, *, has_input: bool) -> str:
    """Where the texts come from: arguments, file or lines. Raises OptionError where that is not clear."""
    if file is not None:
        if texts:
            raise OptionError("--file brings texts; --text does not go with it")
        return "file"
    if texts:
        return "arguments"
    if not has_input:
        raise OptionError(
            'predict: no texts; pass --text TEXT, or --file FILE, or pipe JSON lines with "text" or "tokens" into it'
        )
    return "lines"


class JsonLines:
    """One JSON object a line: id, text, words, tags and entities."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream

    def __call__(self, one: Asked, found: Tagging) -> None:
        """Write what was found."""
        print(json.dumps({"id": one.id, **asdict(found)}, ensure_ascii=False), file=self.stream, flush=True)


class Readable:
    """The text with its entities marked, and a line for each of them."""

    def __init__(self, stream: IO[str]) -> None:
        from rich.console import Console

        self.console = Console(file=stream, highlight=False)

    def __call__(self, one: Asked, found: Tagging) -> None:
        """Write what was found."""
        from rich.text import Text

        shown = Text(found.text)
        for entity in found.entities:
            shown.stylize("bold green", entity.start, entity.end)
        self.console.print(shown, soft_wrap=True)
        for entity in found.entities:
            line = Text("  ") + Text(" ".join(entity.text.split()), style="bold green") + Text(f"  {entity.label}")
            where = f"  (score {entity.score:.3f}, characters {entity.start} to {entity.end})"
            self.console.print(line + Text(where, style="dim"), soft_wrap=True)
        if not found.entities:
            self.console.print(Text("  nothing found", style="italic"))
        self.console.print()
        self.console.file.flush()
