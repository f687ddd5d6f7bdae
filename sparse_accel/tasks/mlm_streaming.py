"""Text that does not fit into memory, read where it is needed.

A step has as many lanes as it has features. Each lane begins at its own place in the data, all equally far apart, and reads
on from there, round and round; it gives one feature a step. So a step's features come from all over the data, are the same
however they are spread over processes, and each process reads and tokenizes those of its own lanes alone.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from sparse_accel.errors import DataError, OptionError
from sparse_accel.tasks.features import Features, concatenate
from sparse_accel.tasks.mlm_features import TextEncoder, TextSpec
from sparse_accel.tasks.mlm_rows import TEXT_SUFFIXES, plain_suffix, text_column, text_problem
from sparse_accel.tasks.reading import kind_of, open_data_set
from sparse_accel.tasks.rows import MOST_COUNTED, NUM_ROWS_NAMED

# How much a lane reads at a time: bytes of a file, rows of a data set.
_BYTES: Final = 1 << 15
_ROWS: Final = 64


class TextSource(Protocol):
    """Texts at places from 0 to `size`."""

    @property
    def size(self) -> int: ...

    def begin(self, place: int) -> int:
        """The first place at or after `place` where a text begins; 0 behind the last."""
        ...

    def read(self, place: int) -> tuple[list[str], int]:
        """Some texts from `place`, where one begins, without the empty ones (there may be none left), and where the next
        text begins: 0 behind the last. Raises DataError for what is no text."""
        ...


class SkippedRows(dict[int, str]):
    """What is wrong with the rows that were left out, by their place: a row counts once, however often it is read."""

    def add(self, place: int, problem: str) -> None:
        """Take note of a row, unless there are so many that they would fill the memory."""
        if len(self) < MOST_COUNTED:
            # The first few are named, the others counted.
            self.setdefault(place, problem if len(self) < NUM_ROWS_NAMED else "")


@dataclass(frozen=True)
class LinesOfText:
    """A text file, or one of JSON lines, whose texts are then in `column`; a place is a byte. Lines that cannot be read are
    left out and noted in `skipped`, where there is one."""

    path: Path
    column: str | None = None
    skipped: SkippedRows | None = None

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    def begin(self, place: int) -> int:
        """See `TextSource`."""
        if place == 0:
            return 0
        with self.path.open("rb") as file:
            file.seek(place - 1)
            file.readline()
            return file.tell() % self.size

    def read(self, place: int) -> tuple[list[str], int]:
        """See `TextSource`."""
        texts = []
        with self.path.open("rb") as file:
            file.seek(place)
            lines = file.readlines(_BYTES)
            end = file.tell() % self.size
        for line in lines:
            try:
                text = self._text(line, place)
            except DataError as error:
                if self.skipped is None:
                    raise
                self.skipped.add(place, str(error))
                text = ""
            if text.strip():
                texts.append(text)
            place += len(line)
        return texts, end

    def _text(self, line: bytes, place: int) -> str:
        where = f"{self.path}: the line at byte {place}"
        try:
            text = line.decode("utf-8-sig" if place == 0 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise DataError(f"{where} is not UTF-8 (byte {line[error.start]:#04x})") from error
        if "\0" in text:
            raise DataError(f"{where} holds a NUL character: is it text?")
        if self.column is None or not text.strip():
            return text
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{where} is not JSON: {error.msg}") from error
        problem = (
            text_problem(row, self.column)
            if isinstance(row, dict)
            else f"should be an object with {self.column!r}, it is {kind_of(row)}"
        )
        if problem is not None:
            raise DataError(f"{where}: {problem}")
        found: str = row[self.column]
        return found


@dataclass(frozen=True)
class RowsOnDisk:
    """A column of data sets of the `datasets` library, one after the other, which stay on disk; a place is a row. Rows without
    text are left out and noted in `skipped`, where there is one."""

    data_sets: Sequence[Any]
    columns: Sequence[str]
    name: str
    skipped: SkippedRows | None = None

    @property
    def size(self) -> int:
        return sum(map(len, self.data_sets))

    def begin(self, place: int) -> int:
        """See `TextSource`."""
        return place % self.size

    def read(self, place: int) -> tuple[list[str], int]:
        """See `TextSource`."""
        which, first = 0, 0
        while place >= first + len(self.data_sets[which]):
            first += len(self.data_sets[which])
            which += 1
        column = self.columns[which]
        texts = self.data_sets[which][place - first : place - first + _ROWS][column]
        for at, text in enumerate(texts):
            if not isinstance(text, str):
                problem = f"{self.name}: row {place + at + 1}: {column!r} should be text, it is {kind_of(text)}"
                if self.skipped is None:
                    raise DataError(problem)
                self.skipped.add(place + at, problem)
        return [text for text in texts if isinstance(text, str) and text.strip()], (place + len(texts)) % self.size


def check_holds_text(source: TextSource, name: str) -> None:
    """Raise DataError when nothing but empty texts is there. Reads up to the first text."""
    place = 0
    while True:
        texts, place = source.read(place)
        if texts:
            return
        if place == 0:
            raise DataError(f"{name}: holds no text")


@dataclass
class _Lane:
    place: int
    # What is read and not given yet: texts of lines, or tokens of text that is put together.
    texts: deque[str] = field(default_factory=deque)
    tokens: list[Features] = field(default_factory=list)
    num_tokens: int = 0


class Lanes:
    """The lanes `own`, int64 [n], of `num_lanes`, from their beginnings."""

    def __init__(self, source: TextSource, spec: TextSpec, own: np.ndarray, num_lanes: int) -> None:
        self.source = source
        self.spec = spec
        self.encoder = TextEncoder(spec)
        size = source.size
        self.lanes = [_Lane(source.begin(size * int(lane) // num_lanes)) for lane in own]

    def take(self) -> Features:
        """One feature of each lane: a line, or `max_length` tokens."""
        if self.spec.line_by_line:
            return self.encoder(self._lines())
        self._fill()
        parts = [self._cut(lane) for lane in self.lanes]
        return concatenate(parts)

    def skip(self, count: int) -> None:
        """Go on as after `count` times `take`: lines are only counted, text that is put together has to be tokenized."""
        for _ in range(count):
            if self.spec.line_by_line:
                self._lines()
                continue
            self._fill()
            for lane in self.lanes:
                self._cut(lane)

    def _lines(self) -> list[str]:
        for lane in self.lanes:
            while not lane.texts:
                lane.texts.extend(self._read(lane))
        return [lane.texts.popleft() for lane in self.lanes]

    def _fill(self) -> None:
        """Read and tokenize, all lanes that want more together, until each has a feature's tokens."""
        while wanting := [lane for lane in self.lanes if lane.num_tokens < self.spec.max_length]:
            texts = [self._read(lane) for lane in wanting]
            encoded = self.encoder([text for some in texts for text in some])
            first = 0
            for lane, some in zip(wanting, texts, strict=True):
                part = _between(encoded, int(encoded.bounds[first]), int(encoded.bounds[first + len(some)]))
                first += len(some)
                lane.tokens.append(part)
                lane.num_tokens += int(part.bounds[-1])

    def _read(self, lane: _Lane) -> list[str]:
        texts, lane.place = self.source.read(lane.place)
        return texts

    def _cut(self, lane: _Lane) -> Features:
        """The first `max_length` of a lane's tokens, as one feature."""
        length = self.spec.max_length
        whole = concatenate(lane.tokens) if len(lane.tokens) > 1 else lane.tokens[0]
        total = lane.num_tokens
        lane.tokens, lane.num_tokens = [_between(whole, length, total)], total - length
        return _between(whole, 0, length)


class StreamOptions(Protocol):
    """The options that say what is streamed: some of `tasks.base.DataOptions`."""

    @property
    def dataset_name(self) -> str | None: ...
    @property
    def dataset_config_name(self) -> str | None: ...
    @property
    def dataset_name_2(self) -> str | None: ...
    @property
    def dataset_config_name_2(self) -> str | None: ...
    @property
    def train_file(self) -> str | None: ...
    @property
    def text_column_name(self) -> str | None: ...
    @property
    def cache_dir(self) -> str | None: ...
    @property
    def on_bad_rows(self) -> str: ...


@dataclass(frozen=True)
class TextStream:
    """Training text that is read while training."""

    source: TextSource
    spec: TextSpec
    skipped: SkippedRows

    def lanes(self, own: np.ndarray, num_lanes: int) -> Lanes:
        """The lanes `own` of `num_lanes`, from their beginnings."""
        return Lanes(self.source, self.spec, own, num_lanes)


def open_stream(options: StreamOptions, spec: TextSpec, notes: list[str]) -> TextStream:
    """The training text of `options`, of which no more is read than shows that it is there. Raises DataError, and OptionError
    for what cannot be read from any place on."""
    source: TextSource
    found = SkippedRows()
    skipped = found if options.on_bad_rows == "skip" else None
    if options.dataset_name is not None:
        source, name = _data_sets(options, options.dataset_name, skipped, notes)
    else:
        assert options.train_file is not None, "checked with the options"
        source, name = _file(options, Path(options.train_file), skipped, notes), options.train_file
    check_holds_text(source, name)
    return TextStream(source, spec, found)


def _file(options: StreamOptions, path: Path, skipped: SkippedRows | None, notes: list[str]) -> TextSource:
    suffix = plain_suffix(path)
    if path.suffix.lower() == ".gz":
        raise OptionError(
            f"--streaming: {path} is compressed and can only be read from its beginning; unpack it (gunzip --keep), or leave "
            "--streaming out"
        )
    if path.stat().st_size == 0:
        raise DataError(f"{path}: is empty")
    if suffix in TEXT_SUFFIXES:
        return LinesOfText(path, None, skipped)
    if suffix in (".jsonl", ".ndjson"):
        names = _names_of_first(path, skips_bad=skipped is not None)
        return LinesOfText(path, text_column(names, options.text_column_name, str(path), notes), skipped)
    raise OptionError(
        f"--streaming: {path}: lines of text ({', '.join(TEXT_SUFFIXES)}) and JSON lines (.jsonl) can be read from any place "
        "on; other files cannot, but as a data set of the `datasets` library (--dataset_name) they can"
    )


def _names_of_first(path: Path, *, skips_bad: bool) -> list[str]:
    """The columns of the first row of JSON lines; with `skips_bad`, of the first that is one. Raises DataError."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                if skips_bad:
                    continue
                raise DataError(f"{path}:{number}: is not JSON: {error}") from error
            if isinstance(row, dict):
                return list(row)
            if not skips_bad:
                raise DataError(f"{path}:{number}: should be a JSON object, it is {kind_of(row)}")
    raise DataError(f"{path}: holds no text")


def _data_sets(
    options: StreamOptions, name: str, skipped: SkippedRows | None, notes: list[str]
) -> tuple[RowsOnDisk, str]:
    wanted = [(name, options.dataset_config_name)]
    if options.dataset_name_2 is not None:
        wanted.append((options.dataset_name_2, options.dataset_config_name_2))
    data_sets, columns = [], []
    for part, config in wanted:
        data_set = open_data_set(part, config, "train", options.cache_dir)
        data_sets.append(data_set)
        columns.append(text_column(list(data_set.column_names), options.text_column_name, part, notes))
    whole = " and ".join(part for part, _ in wanted)
    return RowsOnDisk(data_sets, columns, whole, skipped), whole


def _between(features: Features, first: int, last: int) -> Features:
    """The tokens from `first` to `last` of all, as one feature."""
    return Features(
        tokens={name: column[first:last] for name, column in features.tokens.items()},
        bounds=np.array([0, last - first], np.int64),
        labels={},
        facts={},
        extra={name: column[first:last] for name, column in features.extra.items()},
    )
