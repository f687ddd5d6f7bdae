"""From a data file or data set, in any of the layouts that people have, to rows that each know where they stand."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_accel.errors import DataError, suggestion

# Suffix -> format; each may be followed by .gz.
FORMATS: dict[str, str] = {
    ".json": "json",
    ".jsonl": "json lines",
    ".ndjson": "json lines",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}


@dataclass(frozen=True)
class Row:
    """One row as it was found: its columns, and a phrase that leads a person to it (`train.json: row 3`).

    A row that is no row at all (a number in the list, a CSV line with a cell too few) has a `problem` and no columns.
    """

    where: str
    values: Mapping[str, Any]
    problem: str | None = None


def read_file(path: str | Path, more: Mapping[str, Callable[[Path], list[Row]]] | None = None) -> list[Row]:
    """The rows of a JSON, JSON lines, CSV, TSV or parquet file, or of one that a reader of `more` (suffix -> reader) knows.

    SQuAD's nested layout is flattened: a row a question. Raises DataError when the file is missing, is a folder, has an
    unknown suffix, is not UTF-8, is malformed (with line and column) or holds no row.
    """
    path = Path(path)
    _check_is_file(path)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    suffix = suffixes[-2] if len(suffixes) > 1 and suffixes[-1] == ".gz" else (suffixes or [""])[-1]
    readers = {name: READERS[format] for name, format in FORMATS.items()} | dict(more or {})
    if suffix not in readers:
        raise DataError(
            f"{path}: cannot tell the format from the name; it should end in {', '.join(readers)} (or in that and .gz)"
        )
    rows = readers[suffix](path)
    if not rows:
        raise DataError(f"{path}: holds no rows")
    return rows


def _check_is_file(path: Path) -> None:
    if path.is_dir():
        raise DataError(
            f"{path}: is a folder, and a file was expected (a data set saved by `datasets` goes to --dataset_name)"
        )
    if not path.exists():
        siblings = [entry.name for entry in path.parent.iterdir() if entry.is_file()] if path.parent.is_dir() else []
        hint = suggestion(path.name, siblings) if path.parent.is_dir() else f"; there is no folder {path.parent} either"
        raise DataError(f"{path}: there is no such file{hint}")


def _read_bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix.lower() == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def read_text(path: Path) -> str:
    """The file as text, without a byte order mark; line ends are left as they are."""
    data = _read_narrow(path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line}: is not UTF-8 (byte {data[error.start]:#04x} at position {error.start})"
        ) from error
    if not text.strip():
        raise DataError(f"{path}: is empty")
    return text


def read_text_lines(path: Path) -> tuple[list[str], dict[int, str]]:
    """The lines of a text file, as `read_text` reads it; and by its number, from 1 on, what is wrong with each that is not
    UTF-8: there, the character U+FFFD stands for what cannot be read.

    Only "\\n" ends a line: a text may hold what str.splitlines takes for another end.
    """
    data = _read_narrow(path).removeprefix(codecs.BOM_UTF8)
    try:
        lines = data.decode("utf-8").split("\n")
        problems = {}
    except UnicodeDecodeError:
        raw = data.split(b"\n")
        lines = [line.decode("utf-8", errors="replace") for line in raw]
        found = {number: _encoding_problem(line) for number, line in enumerate(raw, start=1)}
        problems = {number: problem for number, problem in found.items() if problem is not None}
    if not any(line.strip() for line in lines):
        raise DataError(f"{path}: is empty")
    return lines, problems


def _read_narrow(path: Path) -> bytes:
    """The file's bytes. Raises DataError for UTF-16."""
    data = _read_bytes(path)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{path}: is UTF-16; save it as UTF-8")
    return data


def _encoding_problem(line: bytes) -> str | None:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"is not UTF-8 (byte {line[error.start]:#04x} at position {error.start} of the line)"
    return None


def _read_json(path: Path) -> list[Row]:
    text = read_text(path)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        # One value that is whole, and then another: JSON lines under the name .json, as `datasets` writes them.
        first = text[: error.pos]
        if error.msg == "Extra data" and first.endswith("\n") and "\n" not in first.strip():
            return _lines_of(path, text)
        raise DataError(_json_message(path, error)) from error
    except RecursionError as error:
        raise DataError(f"{path}: is nested too deeply to be read") from error
    return _rows_of(path, content)


def _read_json_lines(path: Path) -> list[Row]:
    return _lines_of(path, read_text(path))


def _lines_of(path: Path, text: str) -> list[Row]:
    rows = []
    # Only "\n" ends a line: str.splitlines would also split at U+2028, which JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(_json_message(path, error, line=number)) from error
        rows.append(_row(f"{path}:{number}", value))
    return rows


def _json_message(path: Path, error: json.JSONDecodeError, line: int | None = None) -> str:
    place = f"{path}:{line or error.lineno}:{error.colno}"
    if not error.doc[error.pos :].strip() or error.msg.startswith("Unterminated string"):
        return f"{place}: the JSON breaks off here; the file is truncated ({error.msg})"
    return f"{place}: is not JSON: {error.msg}"


def _rows_of(path: Path, content: Any) -> list[Row]:
    """Rows of a JSON document: `{"data": [...]}` or a list, of flat rows or of SQuAD's articles, or a single row."""
    if isinstance(content, dict) and "data" not in content:
        if "paragraphs" in content or {"question", "context"} <= content.keys():
            content = [content]
        else:
            raise DataError(
                f"{path}: an object with the key 'data', or a list of rows, was expected; its keys are "
                f"{', '.join(map(repr, list(content)[:10])) or 'none'}{suggestion('data', content) if content else ''}"
            )
    items = content["data"] if isinstance(content, dict) else content
    if not isinstance(items, list):
        key = "'data'" if isinstance(content, dict) else "the document"
        raise DataError(f"{path}: {key} should be a list of rows, it is {kind_of(items)}")
    rows: list[Row] = []
    for number, item in enumerate(items, start=1):
        if isinstance(item, dict) and "paragraphs" in item:
            rows.extend(_questions_of(f"{path}: article {number}", item))
        else:
            rows.append(_row(f"{path}: row {number}", item))
    return rows


def _row(where: str, value: Any) -> Row:
    if isinstance(value, dict):
        return Row(where, value)
    return Row(where, {}, problem=f"should be an object with named columns, it is {kind_of(value)}")


def _questions_of(where: str, article: Mapping[str, Any]) -> Iterator[Row]:
    title = article.get("title")
    if isinstance(title, str) and title:
        where = f"{where} ({title})"
    for paragraph_number, paragraph in enumerate(_list_at(where, article, "paragraphs"), start=1):
        place = f"{where}, paragraph {paragraph_number}"
        if not isinstance(paragraph, dict):
            raise DataError(f"{place}: should be an object with 'context' and 'qas', it is {kind_of(paragraph)}")
        if "context" not in paragraph:
            raise DataError(f"{place}: has no 'context'{suggestion('context', paragraph)}")
        for question_number, question in enumerate(_list_at(place, paragraph, "qas"), start=1):
            spot = f"{place}, question {question_number}"
            if isinstance(question, dict):
                question = {**question, "context": paragraph["context"], "title": title}
            yield _row(spot, question)


def _list_at(where: str, parent: Mapping[str, Any], key: str) -> list[Any]:
    if key not in parent:
        raise DataError(f"{where}: has no {key!r}{suggestion(key, parent)}")
    value = parent[key]
    if not isinstance(value, list):
        raise DataError(f"{where}: {key!r} should be a list, it is {kind_of(value)}")
    return value


def _read_csv(path: Path, delimiter: str = ",") -> list[Row]:
    # Python's own reader, because the one of `datasets` turns answers such as "NA", "null" or "007" into other things.
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
    rows = []
    try:
        header = next(reader)
        _check_header(path, header)
        for number, cells in enumerate(reader, start=1):
            if not cells:
                continue
            where = f"{path}: row {number} (line {reader.line_num})"
            if len(cells) == len(header):
                rows.append(Row(where, dict(zip(header, cells, strict=True))))
            else:
                problem = f"has {len(cells)} cells, and the header names {len(header)} columns"
                rows.append(Row(where, {}, problem))
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: is not CSV: {error}") from error
    return rows


def _read_tsv(path: Path) -> list[Row]:
    return _read_csv(path, delimiter="\t")


def _check_header(path: Path, header: list[str]) -> None:
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise DataError(f"{path}:1: the header names the column {repeated[0]!r} twice")


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(io.BytesIO(_read_bytes(path)))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: is not a readable parquet file: {error}") from error
    return [Row(f"{path}: row {number}", row) for number, row in enumerate(table.to_pylist(), start=1)]


READERS = {
    "json": _read_json,
    "json lines": _read_json_lines,
    "csv": _read_csv,
    "tsv": _read_tsv,
    "parquet": _read_parquet,
}


def _open_data_set(name: str, config: str | None, cache_dir: str | None) -> Any:
    import datasets

    try:
        if (Path(name) / "dataset_dict.json").is_file() or (Path(name) / "state.json").is_file():
            loaded = datasets.load_from_disk(name)
        else:
            loaded = datasets.load_dataset(name, config, cache_dir=cache_dir)
    except Exception as error:  # `datasets` raises whatever its many layers raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(
            f"the data set {name!r} cannot be loaded: {reason[0]} (files go to --train_file and --validation_file)"
        ) from error
    return datasets.DatasetDict({"train": loaded}) if isinstance(loaded, datasets.Dataset) else loaded


def data_set_splits(name: str, config: str | None, cache_dir: str | None) -> list[str]:
    """The names of the splits of a data set. Raises DataError as `read_data_set` does."""
    return list(_open_data_set(name, config, cache_dir))


def read_data_set(name: str, config: str | None, split: str, cache_dir: str | None) -> list[Row]:
    """The rows of one split of a hub data set, or of a local folder that `datasets` saved or can load. Labels that the data
    set gives as numbers of named classes become their names.

    Raises DataError when it cannot be loaded or has no such split.
    """
    loaded = open_data_set(name, config, split, cache_dir)
    named = _class_names(loaded.features)
    return [
        Row(f"{name} ({split}): row {number}", _with_names(row, named)) for number, row in enumerate(loaded, start=1)
    ]


def open_data_set(name: str, config: str | None, split: str, cache_dir: str | None) -> Any:
    """One split of a data set of the `datasets` library, whose rows stay on disk. Raises DataError as `read_data_set` does."""
    loaded = _open_data_set(name, config, cache_dir)
    if split not in loaded:
        raise DataError(
            f"the data set {name!r} has no split {split!r}; it has {', '.join(map(repr, loaded)) or 'none'}"
        )
    if not len(loaded[split]):
        raise DataError(f"the data set {name!r}, split {split!r}: holds no rows")
    return loaded[split]


def _class_names(features: Mapping[str, Any]) -> dict[str, list[str]]:
    """The columns whose numbers (or lists of numbers) stand for named classes, and the names."""
    import datasets

    kinds = {name: getattr(kind, "feature", kind) for name, kind in features.items()}
    return {name: kind.names for name, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)}


def _with_names(row: Mapping[str, Any], named: Mapping[str, list[str]]) -> Mapping[str, Any]:
    """A row with names in the place of their numbers; -1, which GLUE gives where the label is secret, becomes None."""

    def name_of(value: Any, names: list[str]) -> Any:
        if isinstance(value, list):
            return [name_of(item, names) for item in value]
        if isinstance(value, int) and not isinstance(value, bool):
            return names[value] if 0 <= value < len(names) else None
        return value

    return {**row, **{column: name_of(row[column], names) for column, names in named.items()}} if named else row


def kind_of(value: Any) -> str:
    """What a value is, in words that are not Python's."""
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "nothing (null)" if value is None else kinds.get(type(value), f"a {type(value).__name__}")
