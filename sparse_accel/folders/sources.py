"""Whether a model's name can be one: what can be told without reading a file."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from sparse_accel.errors import ModelError, suggestion
from sparse_accel.zoo.stubs import is_stub

# The files of which a model folder holds one: weights as transformers saves them, whole or in shards.
WEIGHT_FILES: Final = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

# Where a checkpoint keeps weights of which only those that a mask keeps are stored. By this name no other program takes
# them for a model's.
COMPACT_FILE: Final = "model.compact.safetensors"


def check_source(source: str, where: str, *, weights: bool) -> None:
    """Refuse a model, config or tokenizer that cannot be one: a `zoo:` stub (commands look it up before), a missing or an
    empty folder. A bare name may be a hub id and is left to whoever loads it. Raises ModelError; reads no file."""
    if is_stub(source):
        raise ModelError(
            f"{where}: {source}: a stub does not stand for a model here; pass what `sparse_accel zoo resolve` says it stands for"
        )
    folder = Path(source)
    looks_like_a_path = source.startswith((".", "/", "~")) or source.count("/") > 1
    if not folder.exists():
        if looks_like_a_path:
            raise ModelError(f"{where}: no such folder: {source}{neighbour(folder)}")
        return
    if not folder.is_dir():
        raise ModelError(f"{where}: is a file; expected a model folder (config.json, weights, tokenizer): {source}")
    if weights and not (folder / "config.json").is_file():
        raise ModelError(f"{where}: {source} has no config.json, so it is not a model folder{_inner_models(folder)}")
    if weights and (folder / COMPACT_FILE).is_file():
        raise ModelError(
            f"{where}: {source} is a checkpoint that stores compact weights, which only the command that wrote it goes on from; "
            "take the finished run's folder, or train with --sparse_storage masked, whose checkpoints open as models"
        )
    if weights and not any((folder / name).is_file() for name in WEIGHT_FILES):
        raise ModelError(
            f"{where}: {source} has no weights: expected one of {', '.join(WEIGHT_FILES)}{_inner_models(folder)}"
        )


def _inner_models(folder: Path) -> str:
    """A clause that names sub-folders which are model folders; SparseML's downloads keep theirs in training/."""
    inner = sorted(path.parent.name for path in folder.glob("*/config.json"))
    return f"; but {', '.join(str(folder / name) for name in inner[:3])} has one" if inner else ""


def neighbour(path: Path) -> str:
    """A clause that names files beside a missing one whose names look like it."""
    try:
        beside = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return f" (there is no folder {path.parent} either)"
    clause = suggestion(path.name, beside) if beside else ""
    return clause if clause.startswith("; did") else ""
