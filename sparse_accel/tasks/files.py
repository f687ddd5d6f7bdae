"""Files that appear whole or not at all, and where cached features live."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from sparse_accel.errors import OutputError


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A binary file to write to; it takes the name `path` when the block ends well and vanishes when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Write JSON with an indent of 4, as Hugging Face's example does. Raises OutputError when the disk refuses."""
    write_text(path, json.dumps(content, indent=4) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8. Raises OutputError when the disk refuses."""
    try:
        with replacing(path) as file:
            file.write(text.encode("utf-8"))
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def cache_folder(cache_dir: str | None) -> Path:
    """Where features are cached: below `cache_dir` when it is given, else in the user's cache folder."""
    if cache_dir is not None:
        return Path(cache_dir) / "sparse_accel_features"
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "sparse_accel" / "features"
