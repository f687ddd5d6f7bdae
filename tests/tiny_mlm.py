"""The tiny world of masked language modelling: a dense model, its teacher, and lines of text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.tiny import tiny_bert, tiny_rows


def tiny_lines(path: Path, count: int, seed: int = 0) -> Path:
    """Write `count` passages of the generator, a line each."""
    path.write_text("\n".join(row["context"] for row in tiny_rows(4 * count, seed)[::4]), "utf-8")
    return path


def tiny_mlm_world(folder: Path, *, rows: int = 64, dropout: float = 0.1) -> dict[str, Any]:
    """A dense student, a teacher and text under `folder`; returns the options of a command that prunes upstream."""
    tiny_bert(folder / "teacher", seed=1, head="MaskedLM")
    tiny_bert(folder / "student", seed=2, head="MaskedLM", dropout=dropout)
    return {
        "train_file": str(tiny_lines(folder / "train.txt", rows)),
        "validation_file": str(tiny_lines(folder / "validation.txt", 24, seed=5)),
        "model_name_or_path": str(folder / "student"),
        "distill_teacher": str(folder / "teacher"),
        "do_train": True,
        "do_eval": True,
        "line_by_line": True,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 16,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "save_steps": 1000,
        "max_seq_length": 64,
        "cache_dir": str(folder / "cache"),
    }
