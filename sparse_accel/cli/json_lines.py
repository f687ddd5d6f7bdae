"""JSON objects that come line by line, none read before it is asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any, TypeVar

from sparse_accel.errors import DataError

Made = TypeVar("Made")


def from_lines(
    stream: IO[bytes],
    wanted: str,
    make: Callable[[Mapping[str, Any], int, str], Made],
    refuse: Callable[[str], None],
) -> Iterator[Made]:
    """What `make` makes of each line's object, its number and a phrase that leads to it. `wanted` names the keys that an object
    should have; `refuse` is told of lines that cannot be used. Raises DataError where there is no line at all."""
    found = False
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        found = True
        where = f"standard input:{number}"
        try:
            yield make(_object(line, wanted, where), number, where)
        except DataError as error:
            refuse(str(error))
    if not found:
        raise DataError(f"standard input holds no line; expected JSON lines with {wanted}")


def _object(line: bytes, wanted: str, where: str) -> dict[str, Any]:
    from sparse_accel.tasks.reading import kind_of

    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: is not UTF-8 (byte {line[error.start]:#04x})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: should be an object with {wanted}, it is {kind_of(row)}")
    return row


def id_of(row: Mapping[str, Any], number: int, where: str) -> str:
    """What a row calls itself, else one made of its number. Raises DataError for what is no name."""
    from sparse_accel.tasks.reading import kind_of

    given = row.get("id")
    if isinstance(given, bool) or not isinstance(given, str | int | None):
        raise DataError(f"{where}: the id should be text or a whole number, it is {kind_of(given)}")
    return f"row-{number}" if given in (None, "") else str(given)
