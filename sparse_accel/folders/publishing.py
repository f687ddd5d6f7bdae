"""Puts a model folder into place: whole where there was none, file by file where there was one."""

from __future__ import annotations

import json
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

# Beside the model of a run of `train`: its command, and the files that it wrote.
RUN_FILE: Final = "run.json"
RUN_FORMAT: Final = 1
# Of those files, what may belong to another model as well, and the history that nobody has twice.
_STAYS: Final = frozenset(
    {
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "vocab.json", "merges.txt",
        "train_log.jsonl",
    }
)  # fmt: skip

# Asked once: the question can only be put by changing it for a moment, which another thread's new files would see.
_UMASK: Final = os.umask(0)
os.umask(_UMASK)


@contextmanager
def published_model(output: Path, *, replaced: tuple[str, ...] = ()) -> Iterator[Path]:
    """A folder to write to, beside `output`, that is moved into place in the end: an `output` that was not there appears
    whole, in one that was each file is replaced at once, and weights, plan and ranges of an earlier model go. So do the files
    named in `replaced`, and what a run of `train` left there about its model: recipe, report, scores, card.

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
        of_run = _files_of_run(output)
        for name in sorted(written):
            (partial / name).replace(output / name)
        for name in {*WEIGHT_FILES, COMPRESSED_FILE, PLAN_FILE, RANGES_FILE, *replaced, *of_run} - written:
            (output / name).unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{output} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _files_of_run(output: Path) -> set[str]:
    """The files that a run of `train` left in `output` about its model, and its own `run.json`; none where no run did."""
    try:
        document = json.loads((output / RUN_FILE).read_text("utf-8"))
    except (OSError, ValueError):
        return set()
    if not isinstance(document, dict) or document.get("sparse_accel_run") != RUN_FORMAT:
        return set()
    # Names in the list are plain: a changed run.json must not lead out of the folder.
    names = {name for name in document.get("files", []) if isinstance(name, str) and Path(name).name == name}
    return {RUN_FILE, *(name for name in names - _STAYS if (output / name).is_file())}


def make_readable(file: Path) -> None:
    """The rights that any new file would have: safetensors gives its files to their owner alone."""
    file.chmod(0o666 & ~_UMASK)
