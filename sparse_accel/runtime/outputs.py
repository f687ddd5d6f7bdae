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
from sparse_accel.folders.publishing import RUN_FILE, RUN_FORMAT, make_readable
from sparse_accel.runtime.checkpoint import STATE_FILE, checkpoints, is_ours, write_json

# Beside the checkpoints of a run that was told to end: launchers turn its exit code into one of their own.
PREEMPTED_FILE = "preempted.json"
RESULTS_FILE = "all_results.json"
# What only a run that trained leaves.
STATES_FILE = "trainer_state.json"

# What a finished run leaves in its folder, whatever the model: --overwrite_output_dir replaces none of it unless it is ours.
_WRITTEN = frozenset(
    {
        "README.md", "config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json",
        "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "vocab.json", "merges.txt", "recipe.yaml",
        "compression_plan.json", "quantization.safetensors", STATES_FILE, "train_log.jsonl", RESULTS_FILE,
        "train_results.json", "eval_results.json", "predict_results.json", "eval_predictions.json",
        "eval_nbest_predictions.json", "eval_null_odds.json", "predict_predictions.json",
        "predict_nbest_predictions.json", "predict_null_odds.json", "report.html", "report.json", RUN_FILE,
    }
)  # fmt: skip


@dataclass(frozen=True)
class Start:
    """How a run begins: fresh, or from a checkpoint; `message` tells the user, `clears` says that old files go first, `joins`
    that the folder stays that of the run whose model is there, to which only scores are added."""

    checkpoint: Path | None
    message: str | None
    clears: bool = False
    joins: bool = False


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


def decide_start(
    output_dir: Path, command: Mapping[str, Any], *, overwrite: bool, resume: str | bool | None, trains: bool = True
) -> Start:
    """Whether this run may use `output_dir`, and from where it begins; writes nothing. One that does not train takes no trained
    model away.

    Raises OutputError when the folder holds something else than this command's own unfinished run.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise OutputError(f"--output_dir {output_dir} is a file; name a folder")
    if not trains and _holds_training(output_dir):
        if not overwrite:
            raise OutputError(
                f"--output_dir {output_dir} holds a training run; name another folder, or give --overwrite_output_dir to put "
                "these scores in the place of its own (its model and checkpoints stay as they are)"
            )
        return Start(None, f"the scores join the run in {output_dir}, whose model and checkpoints stay", joins=True)
    named = Path(resume) if isinstance(resume, str) else None
    if named is not None and not (named / STATE_FILE).is_file():
        raise OutputError(f"--resume_from_checkpoint {named}: no complete checkpoint there ({STATE_FILE} is missing)")
    message = f"resuming from {named}" if named is not None else None
    if overwrite:
        if resume is True or (named is not None and _is_inside(named, output_dir)):
            raise OutputError(
                "--overwrite_output_dir starts anew and --resume_from_checkpoint continues; give one of them"
            )
        _refuse_files_of_others(output_dir)
        return Start(named, message, clears=True)
    if not output_dir.is_dir() or not any(output_dir.iterdir()):
        if resume is True:
            raise OutputError(f"--resume_from_checkpoint: {output_dir} has no checkpoint")
        return Start(named, message)
    _refuse_other_command(output_dir, command)
    if named is not None:
        return Start(named, message)
    if resume is False:
        raise OutputError(
            f"--output_dir {output_dir} holds this command's earlier run and --resume_from_checkpoint False forbids to "
            "continue it; give --overwrite_output_dir to start anew"
        )
    saved = checkpoints(output_dir)
    if saved:
        return Start(saved[-1].path, f"resuming this command from {saved[-1].path} (step {saved[-1].step})")
    if resume is True:
        raise OutputError(f"--resume_from_checkpoint: {output_dir} has no complete checkpoint")
    if RESULTS_FILE in _own_files(output_dir):
        raise OutputError(
            f"--output_dir {output_dir} holds this command's finished run; give --overwrite_output_dir to do it again"
        )
    return Start(
        None, f"{output_dir} holds an earlier start of this command without a checkpoint; starting from the beginning"
    )


def _holds_training(output_dir: Path) -> bool:
    """Whether a run of `train` left a model or checkpoints here."""
    if not output_dir.is_dir() or _run_document(output_dir) is None:
        return False
    return STATES_FILE in _own_files(output_dir) or bool(checkpoints(output_dir))


def earlier_results(output_dir: Path) -> dict[str, Any]:
    """What the `all_results.json` of the run in `output_dir` holds; nothing where there is none that can be read."""
    if RESULTS_FILE not in _own_files(output_dir):
        return {}
    try:
        found = json.loads((output_dir / RESULTS_FILE).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _refuse_other_command(output_dir: Path, command: Mapping[str, Any]) -> None:
    document = _run_document(output_dir)
    if document is None:
        raise OutputError(
            f"--output_dir {output_dir} is not empty and was not written by this command; name another folder, or give "
            "--overwrite_output_dir to start anew there (it removes only what sparse_accel wrote)"
        )
    earlier = document["command"]
    differing = [name for name in sorted({*earlier, *command}) if earlier.get(name) != command.get(name)]
    if differing:
        shown = "; ".join(f"{name}: {earlier.get(name)} there, {command.get(name)} now" for name in differing[:5])
        raise OutputError(
            f"--output_dir {output_dir} holds a run of another command ({shown}); name another folder, or give "
            "--overwrite_output_dir to start anew there"
        )


def _refuse_files_of_others(output_dir: Path) -> None:
    """Starting anew removes what this program wrote; a file of somebody else's under a name that it needs stays."""
    if not output_dir.is_dir():
        return
    ours = {*_own_files(output_dir), RUN_FILE}
    in_the_way = sorted(path.name for path in output_dir.iterdir() if path.name in _WRITTEN and path.name not in ours)
    if in_the_way:
        raise OutputError(
            f"--output_dir {output_dir} holds files that sparse_accel did not write and would have to replace: "
            f"{', '.join(in_the_way)}; move them, or name another folder"
        )


def _is_inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _run_document(output_dir: Path) -> dict[str, Any] | None:
    path = output_dir / RUN_FILE
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise OutputError(
            f"{path} is damaged ({error}), and it alone says which files of the folder a run wrote; name another folder, or "
            "remove this one"
        ) from error
    ours = isinstance(document, dict) and document.get("sparse_accel_run") == RUN_FORMAT
    return document if ours and isinstance(document.get("command"), dict) else None


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


def missing_bytes(output_dir: Path, needed: int) -> int:
    """How much more than is free `needed` bytes would take; 0 when they fit."""
    return max(0, needed - shutil.disk_usage(output_dir).free)


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
        (output_dir / PREEMPTED_FILE).unlink(missing_ok=True)
        document = {
            "sparse_accel_run": RUN_FORMAT,
            "command": dict(command),
            "argv": argv,
            "files": _own_files(output_dir),
        }
        write_json(output_dir / RUN_FILE, document)
    except OSError as error:
        raise OutputError(f"--output_dir {output_dir} cannot be written: {error}") from error


def mark_preempted(output_dir: Path, step: int) -> None:
    """Leave word for whoever starts runs again: this one was told to end and goes on from its newest checkpoint."""
    write_json(output_dir / PREEMPTED_FILE, {"checkpoint": f"checkpoint-{step}", "step": step})


def _own_files(output_dir: Path) -> list[str]:
    document = _run_document(output_dir) if (output_dir / RUN_FILE).is_file() else None
    return document.get("files", []) if document else []


def _clear(output_dir: Path) -> None:
    for name in _own_files(output_dir):
        # Names in the list are plain: a changed run.json must not lead out of the folder.
        if Path(name).name != name:
            continue
        if (output_dir / name).is_dir():
            shutil.rmtree(output_dir / name)
        else:
            (output_dir / name).unlink(missing_ok=True)
    for checkpoint in checkpoints(output_dir):
        if is_ours(checkpoint.path):
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


def publish(output_dir: Path, write: Callable[[Path], None], *, replaced: tuple[str, ...] = ()) -> list[str]:
    """Let `write` fill a temporary folder, then move each file into `output_dir` by rename; returns their names.

    A file named in `replaced` that an earlier run left and that was not written this time goes.

    Raises OutputError when the disk is full or the folder not writable; what lay in `output_dir` is whole then.
    """
    partial = output_dir / ".final.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        write(partial)
        names = sorted(file.name for file in partial.iterdir())
        for name in names:
            make_readable(partial / name)
        record_files(output_dir, names)
        for name in names:
            (partial / name).replace(output_dir / name)
        for name in replaced:
            if name not in names and name in _own_files(output_dir):
                (output_dir / name).unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{output_dir} could not be written: {error}; its checkpoints are untouched") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return names
