"""What there is to see in a model folder, plain, compressed or SparseML's own; no model is built of it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sparse_accel.compress.inspection import Inspection, inspect_tensors
from sparse_accel.compress.plan import CompressionPlan
from sparse_accel.errors import ModelError
from sparse_accel.folders.publishing import COMPRESSED_FILE
from sparse_accel.folders.sources import check_source
from sparse_accel.folders.sparseml import is_sparseml_state, numbers_of, plan_of, read_state, split_state
from sparse_accel.folders.storage import is_compressed, read_compressed, read_plain
from sparse_accel.folders.trained import PLAN_FILE, RANGES_FILE

# Models whose linear layers hold their weights as [inputs, outputs], and what these layers are called.
_INPUTS_FIRST: Final = {"gpt2", "imagegpt", "openai-gpt"}
_TURNED: Final = re.compile(r"\bc_(attn|proj|fc)\.weight$")


def inspect_folder(folder: str | Path) -> Inspection:
    """Count what a model folder holds. Raises ModelError for one that holds no weights or cannot be read."""
    folder = Path(folder)
    notes: list[str] = []
    state: Mapping[str, Tensor]
    if is_compressed(folder):
        form, state, plan = "folder with compressed weights", read_compressed(folder), _plan(folder)
        ranges, disk_bytes = _ranges(folder), (folder / COMPRESSED_FILE).stat().st_size
    else:
        check_source(str(folder), "DIR", weights=True)
        if is_sparseml_state(folder):
            form = "folder with SparseML's state dict"
            state, plan, ranges, disk_bytes = _read_sparseml(folder, notes)
        else:
            form = "model folder"
            state, disk_bytes = read_plain(folder)
            plan, ranges = _plan(folder), _ranges(folder)
    if plan.num_quantizers and not ranges:
        notes.append(
            f"{PLAN_FILE} quantizes {plan.num_quantizers} tensors, but their scales, {RANGES_FILE}, are not there"
        )
    config = _config(folder)
    return inspect_tensors(
        state,
        plan,
        ranges,
        source=str(folder),
        form=form,
        model=_architecture(config),
        disk_bytes=disk_bytes,
        inputs_first=_TURNED if config.get("model_type") in _INPUTS_FIRST else None,
        notes=tuple(notes),
    )


def architecture(folder: Path) -> str | None:
    """The class that a folder's config.json names, where there is one."""
    return _architecture(_config(folder))


def _architecture(config: Mapping[str, object]) -> str | None:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else None


def _read_sparseml(
    folder: Path, notes: list[str]
) -> tuple[Mapping[str, Tensor], CompressionPlan, Mapping[str, Tensor], int]:
    state, remarks = read_state(folder)
    notes += remarks
    try:
        plain, quantized, switched_off = split_state(state)
        plan, _ = plan_of(quantized)
    except ModelError as error:
        raise ModelError(f"{folder}: SparseML's state dict cannot be read: {error}") from error
    if switched_off:
        notes.append(f"{len(switched_off)} quantizers are switched off, among them {switched_off[0]}")
    files = (path for path in folder.iterdir() if path.suffix in (".bin", ".safetensors"))
    return plain, plan, numbers_of(quantized), sum(file.stat().st_size for file in files)


def _plan(folder: Path) -> CompressionPlan:
    path = folder / PLAN_FILE
    return CompressionPlan.load(path) if path.is_file() else CompressionPlan()


def _ranges(folder: Path) -> Mapping[str, Tensor]:
    path = folder / RANGES_FILE
    if not path.is_file():
        return {}
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error


def _config(folder: Path) -> Mapping[str, object]:
    """config.json, as far as it can be read: it only tells names here."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
