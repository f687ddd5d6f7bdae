"""The output folder: who may write into it, and what a finished run leaves there."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sparse_accel.errors import OutputError
from sparse_accel.runtime.checkpoint import STATE_FILE, checkpoints, write_json

RUN_FILE = "run.json"
FORMAT = 1


@dataclass(frozen=True)
class Start:
    """How a run begins: fresh, or from a checkpoint; `message` tells the user, `clears` says that old files go first."""

    checkpoint: Path | None
    message: str | None
    clears: bool = False


def fingerprint(identity: Mapping[str, Any], recipe_text: str, train_file: str | None) -> dict[str, Any]:
    """What makes two commands the same: the options that shape the weights, the resolved recipe, the training data."""
    # Where a recipe lies and which of its values came from the command line does not matter, what it says does.
    command = {name: value for name, value in identity.items() if name not in ("recipe", "recipe_args")}
    command["recipe"] = hashlib.sha256(recipe_text.encode()).hexdigest()[:16] if recipe_text else None
    if train_file:
        command["content of train_file"] = _digest(Path(train_file))
    return command


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def decide_start(output_dir: Path, command: Mapping[str, Any], *, overwrite: bool, resume: str | bool | None) -> Start:
    """Whether this run may use `output_dir`, and from where it begins; writes nothing.

    Raises OutputError when the folder holds something else than this command's own earlier run.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise OutputError(f"--output_dir {output_dir} is a file; name a folder")
    if isinstance(resume, str):
        return _explicit(Path(resume), overwrite=overwrite and _is_inside(Path(resume), output_dir))
    if overwrite:
        if resume is True:
            raise OutputError(
                "--overwrite_output_dir starts anew and --resume_from_checkpoint continues; give one of them"
            )
        return Start(None, None, clears=True)
    earlier = _earlier_command(output_dir)
    saved = checkpoints(output_dir)
    if not output_dir.is_dir() or not any(output_dir.iterdir()):
        if resume is True:
            raise OutputError(f"--resume_from_checkpoint: {output_dir} has no checkpoint")
        return Start(None, None)
    if earlier is None:
        raise OutputError(
            f"--output_dir {output_dir} is not empty and was not written by this command; name another folder, or give "
            "--overwrite_output_dir to start anew there (it removes only what sparse_accel wrote)"
        )
    differing = [name for name in sorted({*earlier, *command}) if earlier.get(name) != command.get(name)]
    if differing:
        shown = "; ".join(f"{name}: {earlier.get(name)} there, {command.get(name)} now" for name in differing[:5])
        raise OutputError(
            f"--output_dir {output_dir} holds a run of another command ({shown}); name another folder, or give "
            "--overwrite_output_dir to start anew there"
        )
    if resume is False:
        raise OutputError(
            f"--output_dir {output_dir} holds this command's earlier run and --resume_from_checkpoint False forbids to continue it; "
            "give --overwrite_output_dir to start anew"
        )
    if not saved:
        if resume is True:
            raise OutputError(f"--resume_from_checkpoint: {output_dir} has no complete checkpoint")
        return Start(
            None,
            f"{output_dir} holds an earlier start of this command without a checkpoint; starting from the beginning",
        )
    latest = saved[-1]
    return Start(latest.path, f"resuming this command from {latest.path} (step {latest.step})")


def _explicit(checkpoint: Path, *, overwrite: bool) -> Start:
    if overwrite:
        raise OutputError(
            "--overwrite_output_dir would remove the checkpoint that --resume_from_checkpoint names; give one of them"
        )
    if not (checkpoint / STATE_FILE).is_file():
        raise OutputError(
            f"--resume_from_checkpoint {checkpoint}: no complete checkpoint there ({STATE_FILE} is missing)"
        )
    return Start(checkpoint, f"resuming from {checkpoint}")


def _is_inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _earlier_command(output_dir: Path) -> dict[str, Any] | None:
    document = _run_document(output_dir)
    return None if document is None else document.get("command")


def _run_document(output_dir: Path) -> dict[str, Any] | None:
    path = output_dir / RUN_FILE
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise OutputError(f"{path} is damaged ({error}); give --overwrite_output_dir to start anew") from error
    if not isinstance(document, dict) or document.get("sparse_accel_run") != FORMAT:
        return None
    return document


def check_disk(output_dir: Path, *, checkpoint_bytes: int, final_bytes: int, num_checkpoints: int) -> str | None:
    """Raise OutputError when not even one checkpoint and the final model fit on the disk; a warning when the checkpoints
    that the run will keep may not."""
    folder = next(parent for parent in [output_dir.absolute(), *output_dir.absolute().parents] if parent.exists())
    free = shutil.disk_usage(folder).free
    # A checkpoint is whole under its temporary name before an old one goes, hence one more than are kept.
    least = final_bytes + (checkpoint_bytes if num_checkpoints else 0)
    wanted = final_bytes + checkpoint_bytes * (num_checkpoints + 1 if num_checkpoints else 0)
    if free < least:
        raise OutputError(
            f"the disk of {folder} has {_size(free)} free; this run needs at least {_size(least)} (final model {_size(final_bytes)}, "
            f"a checkpoint {_size(checkpoint_bytes)}); free some, or name another --output_dir"
        )
    if free < wanted:
        return (
            f"the disk of {folder} has {_size(free)} free; all checkpoints of this run may take {_size(wanted)}; "
            "--save_total_limit keeps fewer"
        )
    return None


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def open_folder(output_dir: Path, command: Mapping[str, Any], argv: list[str], *, clears: bool) -> None:
    """Create the folder, take away an earlier run's own files where that was asked for, and sign it with `run.json`."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        if clears:
            _clear(output_dir)
        else:
            _clear_partials(output_dir)
        document = {"sparse_accel_run": FORMAT, "command": dict(command), "argv": argv, "files": _own_files(output_dir)}
        write_json(output_dir / RUN_FILE, document)
    except OSError as error:
        raise OutputError(f"--output_dir {output_dir} cannot be written: {error}") from error


def _own_files(output_dir: Path) -> list[str]:
    document = _run_document(output_dir) if (output_dir / RUN_FILE).is_file() else None
    return document.get("files", []) if document else []


def _clear(output_dir: Path) -> None:
    for name in _own_files(output_dir):
        # Names in the list are plain: a changed run.json must not lead out of the folder.
        if Path(name).name == name:
            (output_dir / name).unlink(missing_ok=True)
    for checkpoint in checkpoints(output_dir):
        if "sparse_accel_checkpoint" in json.loads((checkpoint.path / STATE_FILE).read_text("utf-8")):
            shutil.rmtree(checkpoint.path)
    _clear_partials(output_dir)
    (output_dir / RUN_FILE).unlink(missing_ok=True)


def _clear_partials(output_dir: Path) -> None:
    for pattern in (".checkpoint-*.partial", ".final.partial", f".{RUN_FILE}.partial"):
        for partial in output_dir.glob(pattern):
            if partial.is_dir():
                shutil.rmtree(partial)
            else:
                partial.unlink()


def record_files(output_dir: Path, names: list[str]) -> None:
    """Add to the list of files that this program wrote, so that starting anew knows what it may remove."""
    document = _run_document(output_dir)
    if document is not None:
        document["files"] = sorted({*document["files"], *names})
        write_json(output_dir / RUN_FILE, document)


def publish(output_dir: Path, write: Callable[[Path], None]) -> list[str]:
    """Let `write` fill a temporary folder, then move each file into `output_dir` by rename; returns their names.

    Raises OutputError when the disk is full or the folder not writable; what lay in `output_dir` is whole then.
    """
    partial = output_dir / ".final.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        write(partial)
        names = sorted(file.name for file in partial.iterdir())
        record_files(output_dir, names)
        for name in names:
            (partial / name).replace(output_dir / name)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{output_dir} could not be written: {error}; its checkpoints are untouched") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return names
