"""Puts a model folder into place: whole where there was none, file by file where there was one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from safetensors import SafetensorError

from sparse_accel.errors import OutputError
from sparse_accel.folders.sources import WEIGHT_FILES
from sparse_accel.folders.trained import PLAN_FILE, RANGES_FILE

COMPRESSED_FILE: Final = "model.compressed.safetensors"

# Asked once: the question can only be put by changing it for a moment, which another thread's new files would see.
_UMASK: Final = os.umask(0)
os.umask(_UMASK)


@contextmanager
def published_model(output: Path) -> Iterator[Path]:
    """A folder to write to, beside `output`, that is moved into place in the end: an `output` that was not there appears
    whole, in one that was each file is replaced at once, and weights, plan and ranges of an earlier model go.

    Raises OutputError when the disk refuses; `output` is then as it was.
    """
    partial = output.absolute().parent / f".{output.name}.partial-{os.getpid()}"
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        for file in partial.iterdir():
            make_readable(file)
        if not output.exists():
            partial.rename(output)
            return
        written = {file.name for file in partial.iterdir()}
        for name in sorted(written):
            (partial / name).replace(output / name)
        for name in {*WEIGHT_FILES, COMPRESSED_FILE, PLAN_FILE, RANGES_FILE} - written:
            (output / name).unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{output} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def make_readable(file: Path) -> None:
    """The rights that any new file would have: safetensors gives its files to their owner alone."""
    file.chmod(0o666 & ~_UMASK)
