"""A teacher's outputs on disk: flat arrays in the order of the features, written once and read through a memory map.

A cache is a folder named by its fingerprint, with `outputs.safetensors` (of each output, the values of all tokens, or of all
features, end to end and without padding) and `about.json` (what it was made of, its sizes and checksums). It is written
under another name and renamed when it is whole.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
import uuid
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Self, final

import numpy as np
import torch
from torch import Tensor

from sparse_accel.session import CACHED_PREFIX

OUTPUTS_FILE: Final = "outputs.safetensors"
ABOUT_FILE: Final = "about.json"
FORMAT: Final = 1

# dtype -> the name that safetensors has for it, and the numpy dtype that holds its bits: numpy knows no bfloat16.
DTYPES: Final[dict[str, tuple[str, type[np.generic]]]] = {
    "float32": ("F32", np.float32),
    "bfloat16": ("BF16", np.uint16),
    "float16": ("F16", np.float16),
}

# Folders of caches that nobody finished are swept away when they are as old as this, in seconds.
_ABANDONED: Final = 24 * 3600.0


class DamagedCacheError(Exception):
    """A cache that is there and cannot be used; the message says why."""


@dataclass(frozen=True)
class Column:
    """One output: for each token, or for each feature, an array of `shape` (`()`: a number) in one of DTYPES."""

    by_token: bool
    shape: tuple[int, ...]
    dtype: str

    def whole_shape(self, num_features: int, num_tokens: int) -> tuple[int, ...]:
        """Of the values of all features."""
        return (num_tokens if self.by_token else num_features, *self.shape)

    def num_bytes(self, num_features: int, num_tokens: int) -> int:
        """On disk, for so many features."""
        item = np.dtype(DTYPES[self.dtype][1]).itemsize
        return math.prod(self.whole_shape(num_features, num_tokens)) * item


@dataclass(frozen=True)
class Layout:
    """What a cache holds: each output by name, and of how many features and tokens."""

    columns: Mapping[str, Column]
    num_features: int
    num_tokens: int

    @property
    def num_bytes(self) -> int:
        """Of all outputs."""
        return sum(column.num_bytes(self.num_features, self.num_tokens) for column in self.columns.values())

    def header(self) -> bytes:
        """How the file of outputs begins, as safetensors has it; widest dtype first, so that every array is aligned."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name, column in sorted(self.columns.items(), key=lambda item: (item[1].dtype != "float32", item[0])):
            size = column.num_bytes(self.num_features, self.num_tokens)
            entries[name] = {
                "dtype": DTYPES[column.dtype][0],
                "shape": list(column.whole_shape(self.num_features, self.num_tokens)),
                "data_offsets": [at, at + size],
            }
            at += size
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def arrays(self, path: Path, mode: str) -> dict[str, np.ndarray]:
        """The file's arrays, mapped into memory; `mode` is "r" or "r+"."""
        header = self.header()
        entries = json.loads(header[8:])
        # As plain arrays: a slice of a memmap costs ten times one of an array.
        return {
            name: np.asarray(
                np.memmap(
                    path,
                    DTYPES[column.dtype][1],
                    mode,  # type: ignore[call-overload]  # any of numpy's modes
                    offset=len(header) + entries[name]["data_offsets"][0],
                    shape=column.whole_shape(self.num_features, self.num_tokens),
                )
            )
            for name, column in self.columns.items()
        }


@final
class CacheWriter:
    """A cache that is being filled in a folder of its own. `bounds` int64 [N + 1] are those of the features.

    Claims all the room that it will need at once. Raises OSError where the disk has less, or may not be written.
    """

    def __init__(self, folder: Path, layout: Layout, bounds: np.ndarray) -> None:
        self.folder = folder
        self.layout = layout
        self.bounds = bounds
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        self.temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
        self.temporary.mkdir()
        try:
            path = self.temporary / OUTPUTS_FILE
            header = layout.header()
            with path.open("xb") as file:
                file.write(header)
                file.flush()
                _claim(file.fileno(), len(header) + layout.num_bytes)
            self.arrays = layout.arrays(path, "r+")
        except BaseException:
            self.discard()
            raise

    def put(self, indices: np.ndarray, values: Mapping[str, np.ndarray]) -> None:
        """The outputs of some features: of each output, the values of their tokens (or of them) end to end, as `bits`
        gives them."""
        places = _token_places(self.bounds, indices)
        for name, column in self.layout.columns.items():
            self.arrays[name][places if column.by_token else indices] = values[name]

    def commit(self, fingerprint: str, made_of: Mapping[str, Any]) -> None:
        """Write what the cache is, and give it its name. Where another run was quicker its cache is kept, if it is whole."""
        path = self.temporary / OUTPUTS_FILE
        with path.open("rb") as file:
            checksums = {name: _checksum(array) for name, array in self.arrays.items()}
            del self.arrays
            os.fsync(file.fileno())
        about = {
            "sparse_accel_teacher_cache": FORMAT,
            "fingerprint": fingerprint,
            "made_of": made_of,
            "num_features": self.layout.num_features,
            "num_tokens": self.layout.num_tokens,
            "outputs": {
                name: {**asdict(column), "crc32": checksums[name]} for name, column in self.layout.columns.items()
            },
        }
        with (self.temporary / ABOUT_FILE).open("x", encoding="utf-8") as text:
            json.dump(about, text, indent=4)
            text.flush()
            os.fsync(text.fileno())
        while True:
            try:
                self.temporary.rename(self.folder)
                return
            except OSError:
                if not self.folder.exists():
                    raise
            with contextlib.suppress(DamagedCacheError):
                open_cache(self.folder, fingerprint, self.bounds)
                self.discard()
                return
            remove(self.folder)

    def discard(self) -> None:
        """Take away what was written, unless it has its name already."""
        shutil.rmtree(self.temporary, ignore_errors=True)


@final
class CachedOutputs:
    """The outputs of a cache, as columns of a batch. Nothing is read before it is asked for.

    A process that is given one, by fork or by pickle, maps the file for itself.
    """

    def __init__(self, folder: Path, layout: Layout, bounds: np.ndarray, padding_side: str = "right") -> None:
        self.folder = folder
        self.layout = layout
        self.bounds = bounds
        self.padding_side = padding_side
        self.arrays = layout.arrays(folder / OUTPUTS_FILE, "r")

    def __reduce__(self) -> tuple[type[Self], tuple[Any, ...]]:
        # A mapped array would be pickled with all that it maps.
        return type(self), (self.folder, self.layout, self.bounds, self.padding_side)

    def __call__(self, indices: np.ndarray, length: int) -> dict[str, Tensor]:
        """For the features at `indices`, int64 [N]: each output, in the dtype of the cache, [N, length, ...] by token, with 0
        on padding, or [N, ...] by feature. Their names begin with CACHED_PREFIX."""
        firsts, lasts = self.bounds[indices].tolist(), self.bounds[indices + 1].tolist()
        columns = {}
        for name, column in self.layout.columns.items():
            array = self.arrays[name]
            if column.by_token:
                found = np.zeros((len(firsts), length, *column.shape), array.dtype)
                for row, (first, last) in enumerate(zip(firsts, lasts, strict=True)):
                    start = 0 if self.padding_side == "right" else length - (last - first)
                    found[row, start : start + last - first] = array[first:last]
            else:
                found = array[indices]
            columns[CACHED_PREFIX + name] = torch.from_numpy(found).view(getattr(torch, column.dtype))
        return columns


def open_cache(
    folder: Path, fingerprint: str, bounds: np.ndarray, *, padding_side: str = "right", verifies: bool = True
) -> CachedOutputs | None:
    """The cache in `folder`; None where there is no such folder. Reads all of it once, for the checksums, unless told not to.

    Raises DamagedCacheError for one that is not whole, that is damaged, or that was made of something else.
    """
    if not folder.exists():
        return None
    about = _about(folder, fingerprint)
    try:
        layout, checksums = _layout(about)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedCacheError(f"{ABOUT_FILE} is malformed ({type(error).__name__}: {error})") from error
    if (layout.num_features, layout.num_tokens) != (len(bounds) - 1, int(bounds[-1])):
        raise DamagedCacheError(
            f"it has {layout.num_features} features of {layout.num_tokens} tokens in all, the data has {len(bounds) - 1} of "
            f"{int(bounds[-1])}"
        )
    path, header = folder / OUTPUTS_FILE, layout.header()
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            begins = file.read(len(header)) == header
        if size != len(header) + layout.num_bytes:
            raise DamagedCacheError(f"{OUTPUTS_FILE} has {size} bytes instead of {len(header) + layout.num_bytes}")
        if not begins:
            raise DamagedCacheError(f"{OUTPUTS_FILE} begins with something else than {ABOUT_FILE} says")
        found = CachedOutputs(folder, layout, bounds, padding_side)
        for name, array in found.arrays.items():
            if verifies and _checksum(array) != checksums[name]:
                raise DamagedCacheError(f"{OUTPUTS_FILE}: the checksum of {name} is wrong")
    except OSError as error:
        raise DamagedCacheError(f"{OUTPUTS_FILE} cannot be read ({error.strerror or error})") from error
    return found


def remove(folder: Path) -> None:
    """Take a cache away; whoever has it mapped keeps it."""
    aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    with contextlib.suppress(FileNotFoundError):  # another process was quicker
        folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def free_bytes(folder: Path) -> int:
    """Free on the disk that `folder` will be on."""
    return shutil.disk_usage(_existing(folder)).free


def is_same_disk(one: Path, other: Path) -> bool:
    """Whether two folders, which need not exist, are or will be on the same disk."""
    return _existing(one).stat().st_dev == _existing(other).stat().st_dev


def _existing(folder: Path) -> Path:
    return next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.exists())


def bits(values: Tensor) -> np.ndarray:
    """Values on the CPU in one of DTYPES, as they are stored."""
    if values.dtype == torch.bfloat16:
        values = values.view(torch.uint16)
    found: np.ndarray = values.numpy()
    return found


def _about(folder: Path, fingerprint: str) -> dict[str, Any]:
    try:
        about = json.loads((folder / ABOUT_FILE).read_text("utf-8"))
    except OSError as error:
        raise DamagedCacheError(f"{ABOUT_FILE} cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise DamagedCacheError(f"{ABOUT_FILE} is not JSON") from error
    if not isinstance(about, dict) or about.get("sparse_accel_teacher_cache") != FORMAT:
        raise DamagedCacheError("it has another format than this version's")
    if about.get("fingerprint") != fingerprint:
        raise DamagedCacheError("it was made of something else: its fingerprint is another")
    return about


def _layout(about: Mapping[str, Any]) -> tuple[Layout, dict[str, int]]:
    columns = {
        name: Column(bool(entry["by_token"]), tuple(int(size) for size in entry["shape"]), str(entry["dtype"]))
        for name, entry in about["outputs"].items()
    }
    unknown = sorted({column.dtype for column in columns.values()} - set(DTYPES))
    if unknown or not columns:
        raise ValueError(f"unknown dtype {unknown[0]}" if unknown else "no outputs")
    checksums = {name: int(entry["crc32"]) for name, entry in about["outputs"].items()}
    return Layout(columns, int(about["num_features"]), int(about["num_tokens"])), checksums


def _token_places(bounds: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Which of all tokens are those of some features, int64."""
    firsts = bounds[indices]
    sizes = bounds[indices + 1] - firsts
    ends = np.cumsum(sizes)
    places: np.ndarray = np.arange(ends[-1]) + np.repeat(firsts - (ends - sizes), sizes)
    return places


def _checksum(array: np.ndarray) -> int:
    return zlib.crc32(array.reshape(-1).view(np.uint8).data)


def _claim(descriptor: int, size: int) -> None:
    """Give a file its size, with room on the disk: a mapped page without any would end the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.truncate(descriptor, size)


def _sweep(folder: Path) -> None:
    """Remove what an ended process left of this cache."""
    for left in _temporaries(folder):
        shutil.rmtree(left, ignore_errors=True)


def _temporaries(folder: Path) -> Iterator[Path]:
    for path in folder.parent.glob(f".{folder.name}.*"):
        with contextlib.suppress(FileNotFoundError):  # finished in this moment
            if time.time() - path.stat().st_mtime > _ABANDONED:
                yield path
