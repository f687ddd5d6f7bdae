"""Checkpoints: written whole under a temporary name, then renamed; read back to the bit.

checkpoint-N/
  model.safetensors            stored weights, masks and ranges (the keys of the model in training); where weights are
                               stored compact, model.compact.safetensors
  optimizer.safetensors        `<parameter name>/<state name>` -> tensor
  rank-<rank>.safetensors      each rank's random state and running sums
  trainer_state.json           the clock, best metric, log so far
  compression_plan.json, recipe.yaml, config.json, tokenizer files
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparse_accel.compress.compact import CompactLinear
from sparse_accel.compress.layers import compressed_layers
from sparse_accel.errors import OutputError
from sparse_accel.folders.publishing import make_readable
from sparse_accel.folders.sources import COMPACT_FILE
from sparse_accel.runtime import gathering
from sparse_accel.runtime.host_copies import copies_started, start_copy
from sparse_accel.runtime.together import on_all, on_main
from sparse_accel.runtime.training import TrainState
from sparse_accel.session import Session
from sparse_accel.timeline import Clock

STATE_FILE = "trainer_state.json"
WEIGHTS_FILE = "model.safetensors"
FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class SavedCheckpoint:
    """A complete checkpoint on disk."""

    path: Path
    step: int


def checkpoints(output_dir: Path) -> list[SavedCheckpoint]:
    """The complete checkpoints of a folder, oldest first. A half-written one has another name and is not among them."""
    if not output_dir.is_dir():
        return []
    found = []
    for path in output_dir.iterdir():
        match = _NAME.fullmatch(path.name)
        if match and (path / STATE_FILE).is_file():
            found.append(SavedCheckpoint(path, int(match.group(1))))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def is_ours(checkpoint: Path) -> bool:
    """Whether this program wrote the checkpoint."""
    try:
        document = json.loads((checkpoint / STATE_FILE).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and "sparse_accel_checkpoint" in document


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a file under a temporary name beside `path`, then rename; on failure nothing is left behind."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """JSON with a final newline, atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_text(path, text)


def write_text(path: Path, text: str) -> None:
    """UTF-8 text, atomically."""

    def write(partial: Path) -> None:
        partial.write_text(text, "utf-8")

    write_atomically(path, write)


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint will hold. Only the main process, which alone writes, has tensors here.

    `wait` returns when they may be read: copies from a GPU are under way before.
    """

    document: dict[str, Any]
    weights_file: str
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    ranks: list[dict[str, Tensor]]
    wait: Callable[[], None]

    @property
    def name(self) -> str:
        """The checkpoint's folder."""
        return f"checkpoint-{self.document['global_step']}"


def snapshot(session: Session, state: TrainState, *, copies: bool) -> Snapshot:
    """What a checkpoint would hold now; every rank calls this. With `copies` it keeps what it holds while training goes on
    (host memory of a checkpoint's size); without, it is for writing at once."""
    kept = start_copy if copies else gathering.as_it_is
    is_compact = any(isinstance(layer, CompactLinear) for layer in compressed_layers(session.module).values())
    weights, optimizer = gathering.whole_state(session, kept), gathering.whole_optimizer(session, kept)
    return Snapshot(
        document=_document(session, state),
        weights_file=COMPACT_FILE if is_compact else WEIGHTS_FILE,
        weights=weights,
        optimizer=optimizer,
        ranks=_states_of_ranks(state, session.accelerator),
        wait=copies_started(session.accelerator.device),
    )


def write(taken: Snapshot, output_dir: Path, *, extra: Callable[[Path], None]) -> Path:
    """Write `checkpoint-<step>` on the main process; `extra` adds the files that make the folder loadable elsewhere. Touches
    nothing but its arguments and the disk, so that a thread can do it while training goes on.

    Raises OutputError when the disk refuses; older checkpoints are untouched then.
    """
    final = output_dir / taken.name
    partial = output_dir / f".{taken.name}.partial"
    taken.wait()
    failure = (
        _attempt(lambda: _start_folder(partial))
        or _attempt(lambda: _write_files(taken, partial, extra))
        or _attempt(lambda: _publish(partial, final))
    )
    if failure is not None:
        shutil.rmtree(partial, ignore_errors=True)
        raise OutputError(f"a checkpoint could not be written: {failure}")
    return final


def save(session: Session, state: TrainState, output_dir: Path, *, extra: Callable[[Path], None]) -> Path:
    """Take and write a checkpoint before training goes on. Every rank calls this, and raises OutputError when the main
    process cannot write."""
    taken = snapshot(session, state, copies=False)
    on_main(session.accelerator, lambda: write(taken, output_dir, extra=extra))
    return output_dir / taken.name


def _start_folder(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def _states_of_ranks(state: TrainState, accelerator: Any) -> list[dict[str, Tensor]]:
    """Each rank's random state and running sums, on the main process, which alone writes: nodes may have disks of their
    own."""
    tensors = {f"rng.{name}": value for name, value in rng_state().items()}
    tensors |= {f"window.{name}": value.cpu() for name, value in state.window.items()}
    if state.total_loss is not None:
        tensors["total_loss"] = state.total_loss.cpu()
    if accelerator.num_processes == 1:
        return [tensors]
    gathered: list[dict[str, Tensor]] = [{}] * accelerator.num_processes
    torch.distributed.all_gather_object(gathered, tensors)
    return gathered


def _document(session: Session, state: TrainState) -> dict[str, Any]:
    """What `trainer_state.json` says."""
    return {
        "sparse_accel_checkpoint": FORMAT,
        "global_step": state.clock.step,
        "epoch": state.clock.epoch,
        "steps_per_epoch": state.clock.steps_per_epoch,
        "world_size": session.accelerator.num_processes,
        "backend": session.backend.name,
        "features_per_step": session.loader.features_per_step,
        "window_steps": state.window_steps,
        "best_metric": state.best_metric,
        "best_model_checkpoint": state.best_checkpoint,
        "seconds": state.seconds,
        "loss_scaler": session.accelerator.scaler.state_dict() if session.accelerator.scaler is not None else None,
        # A list of its own: more lines come while this one is written.
        "log_history": list(state.log_history),
    }


def _write_files(taken: Snapshot, partial: Path, extra: Callable[[Path], None]) -> None:
    for rank, tensors in enumerate(taken.ranks):
        save_file(tensors, partial / f"rank-{rank}.safetensors")
    save_file(_contiguous(taken.weights), partial / taken.weights_file, metadata={"format": "pt"})
    save_file(_contiguous(taken.optimizer), partial / "optimizer.safetensors")
    extra(partial)
    (partial / STATE_FILE).write_text(json.dumps(taken.document, indent=2) + "\n", "utf-8")


def _publish(partial: Path, final: Path) -> None:
    for file in partial.iterdir():
        make_readable(file)
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
    if final.exists():
        if not is_ours(final):
            raise OSError(f"{final} is in the way and was not written by sparse_accel")
        # The same step saved once more: the old one goes only when the new one stands.
        outdated = final.with_name(f".{final.name}.old.partial")
        os.replace(final, outdated)
        os.replace(partial, final)
        shutil.rmtree(outdated)
    else:
        os.replace(partial, final)


def _attempt(action: Callable[[], None]) -> str | None:
    """The reason why `action` failed for want of disk or rights, or None."""
    try:
        action()
    except (OSError, SafetensorError) as error:
        no_space = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        return "the disk is full" if no_space else str(error)
    return None


def prune_checkpoints(output_dir: Path, limit: int | None, keep: set[str]) -> list[Path]:
    """Remove the oldest checkpoints beyond `limit`, never those named in `keep` (the best one); returns what went."""
    saved = checkpoints(output_dir)
    if limit is None or limit <= 0 or len(saved) <= limit:
        return []
    removable = [checkpoint.path for checkpoint in saved[:-1] if checkpoint.path.name not in keep]
    doomed = removable[: len(saved) - limit]
    for path in doomed:
        shutil.rmtree(path)
    return doomed


def read_document(checkpoint: Path) -> dict[str, Any]:
    """`trainer_state.json` of a checkpoint. Raises OutputError when it is damaged or not this program's."""
    try:
        document = json.loads((checkpoint / STATE_FILE).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(_damaged(checkpoint / STATE_FILE, error)) from error
    if not isinstance(document, dict) or document.get("sparse_accel_checkpoint") != FORMAT:
        raise OutputError(f"{checkpoint}: {STATE_FILE} was not written by this program")
    return document


def check(checkpoint: Path, steps_per_epoch: int) -> None:
    """Raise OutputError when the checkpoint is not of a run like this one; reads only its `trainer_state.json`."""
    document = read_document(checkpoint)
    if document["steps_per_epoch"] != steps_per_epoch:
        raise OutputError(
            f"{checkpoint} was written with {document['steps_per_epoch']} steps an epoch, this run has {steps_per_epoch}: "
            "the data, the batch size or the accumulation differ"
        )


def accumulation(checkpoint: Path, micro_batch_size: int, gradient_accumulation_steps: int, num_processes: int) -> int:
    """The gradient accumulation with which `num_processes` go on: a step keeps the features that it had.

    Raises OutputError when no accumulation gives as many.
    """
    document = read_document(checkpoint)
    world_size, features = document["world_size"], document.get("features_per_step")
    if world_size == num_processes:
        return gradient_accumulation_steps
    features = features or world_size * micro_batch_size * gradient_accumulation_steps
    together = micro_batch_size * num_processes
    if features % together:
        fitting = [count for count in range(1, 2 * world_size + 1) if features % (micro_batch_size * count) == 0]
        raise OutputError(
            f"{checkpoint} was written by {world_size} processes with {features} features a step; {num_processes} processes with "
            f"--per_device_train_batch_size {micro_batch_size} cannot make as many. Resume with one of "
            f"{', '.join(map(str, fitting))} processes"
        )
    return int(features // together)


def load(session: Session, checkpoint: Path, last_step: int, *, reset_optimizer: bool = False) -> TrainState:
    """Restore weights, masks, ranges, optimizer and random numbers, and return where the run stood.

    With another number of processes than wrote it, each draws new random numbers, and the main process takes over the
    running sums. Raises OutputError when a file is damaged or does not fit this run's model.
    """
    accelerator = session.accelerator
    document = on_main(accelerator, lambda: read_document(checkpoint))
    load_model(session, checkpoint)
    if not reset_optimizer:
        moments = gathering.as_stored(session, _read(checkpoint / "optimizer.safetensors", accelerator), checkpoint)
        session.backend.put_optimizer(session.module, session.optimizer, moments)
    if accelerator.scaler is not None and document["loss_scaler"] is not None:
        accelerator.scaler.load_state_dict(document["loss_scaler"])
    if document["world_size"] == accelerator.num_processes:
        own = _states_of(checkpoint, document["world_size"], accelerator)[accelerator.process_index]
        set_rng_state(_under(own, "rng."))
    else:
        torch.manual_seed(_new_seed(session.options.seed, accelerator.process_index, document["global_step"]))
        ranks = _states_of(checkpoint, document["world_size"], accelerator)
        own = _sums_of_all(ranks, keep=accelerator.is_main_process)
    sums = {name: value.to(accelerator.device) for name, value in own.items() if not name.startswith("rng.")}
    return TrainState(
        clock=Clock(document["global_step"], document["steps_per_epoch"]),
        last_step=last_step,
        total_loss=sums.get("total_loss"),
        window=_under(sums, "window."),
        window_steps=document["window_steps"],
        best_metric=document["best_metric"],
        best_checkpoint=document["best_model_checkpoint"],
        log_history=document["log_history"],
        seconds=document["seconds"],
    )


def _damaged(path: Path, error: Exception) -> str:
    return f"{path} is damaged ({error}); remove its folder to resume from the checkpoint before it"


def _read(path: Path, accelerator: Any) -> dict[str, Tensor]:
    """A file's tensors, on every rank: each reads it, or, where a node has another disk, the main process sends them."""

    def read() -> dict[str, Tensor]:
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise OutputError(_damaged(path, error)) from error

    return read() if on_all(accelerator, path.is_file()) else on_main(accelerator, read)


def _states_of(checkpoint: Path, world_size: int, accelerator: Any) -> list[dict[str, Tensor]]:
    return [_read(checkpoint / f"rank-{rank}.safetensors", accelerator) for rank in range(world_size)]


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def load_model(session: Session, checkpoint: Path) -> None:
    """Load the model's whole state; every key must be there. Raises OutputError otherwise."""
    accelerator = session.accelerator
    is_compact = on_main(accelerator, (checkpoint / COMPACT_FILE).is_file)
    tensors = _read(checkpoint / (COMPACT_FILE if is_compact else WEIGHTS_FILE), accelerator)
    gathering.put_state(session, gathering.as_stored(session, tensors, checkpoint), checkpoint)


def _new_seed(seed: int, rank: int, step: int) -> int:
    """A seed of its own for each rank and step; never one that another rank had at another step."""
    return int(np.random.SeedSequence([seed, rank, step]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _sums_of_all(ranks: list[dict[str, Tensor]], *, keep: bool) -> dict[str, Tensor]:
    """The running sums of all ranks that wrote a checkpoint, added up; zeros unless `keep`."""
    total: dict[str, Tensor] = {}
    for tensors in ranks:
        for name, value in tensors.items():
            if not name.startswith("rng."):
                total[name] = total[name] + value if name in total else value
    return total if keep else {name: torch.zeros_like(value) for name, value in total.items()}


def rng_state() -> dict[str, Tensor]:
    """The states that dropout draws from."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Tensor]) -> None:
    """Put back what `rng_state` gave."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _contiguous(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Safetensors refuses two names for one memory: tied weights are written once more."""
    seen: set[int] = set()
    result = {}
    for name, tensor in state_dict.items():
        tensor = tensor.detach().contiguous()
        result[name] = tensor.clone() if tensor.data_ptr() in seen and tensor.numel() else tensor
        seen.add(tensor.data_ptr())
    return result


def checkpoint_bytes(model: torch.nn.Module, *, num_moments: int) -> int:
    """An estimate of one checkpoint's size: the stored state, and the optimizer's moments of what is trained."""
    stored = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return stored + num_moments * trained
