"""Runs of the tiny world: a training command inside this process, or as a real one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from sparse_accel.runtime.option_parsing import load_options
from sparse_accel.runtime.run import train
from tests.tiny import TINY_TAGS, tiny_bert, tiny_squad, tiny_tagged

ROOT = Path(__file__).resolve().parent.parent

# Both recipes of the issue in small: 3 epochs, quantization from 1.0, ranges fixed from 2.0.
QUANT_ARGS = '{"num_epochs": 3, "qat_start_epoch": 1.0, "observer_epoch": 2.0, "init_lr": 1e-3}'


def prune(folder: Path, sparsity: float) -> None:
    """Set the smallest weights of the layers in a model folder to zero."""
    from safetensors.torch import save_file

    from sparse_accel.compress.masks import magnitude_mask

    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    for name, tensor in tensors.items():
        if ".layer." in name and tensor.dim() == 2:
            tensor[~magnitude_mask(tensor, sparsity)] = 0
    save_file(tensors, weights, metadata={"format": "pt"})


def tiny_world(folder: Path, *, rows: int = 64, dropout: float = 0.1, sparsity: float = 0.6) -> dict[str, Any]:
    """A pruned student, a teacher and data under `folder`; returns the options of a sparse-transfer command on them."""
    tiny_bert(folder / "teacher", seed=1)
    tiny_bert(folder / "student", seed=2, dropout=dropout)
    tiny_squad(folder / "train.json", rows=rows)
    tiny_squad(folder / "val.json", rows=24, seed=5)
    prune(folder / "student", sparsity)
    return {
        "train_file": str(folder / "train.json"),
        "validation_file": str(folder / "val.json"),
        "model_name_or_path": str(folder / "student"),
        "distill_teacher": str(folder / "teacher"),
        "recipe": str(ROOT / "recipes/question_answering/pruned_quant.yaml"),
        "recipe_args": QUANT_ARGS,
        "do_train": True,
        "do_eval": True,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 16,
        "gradient_accumulation_steps": 2,
        "max_seq_length": 128,
        "doc_stride": 32,
        "logging_steps": 1,
        "save_steps": 1000,
        "cache_dir": str(folder / "cache"),
    }


def tiny_token_world(folder: Path, *, rows: int = 64, dropout: float = 0.1, sparsity: float = 0.6) -> dict[str, Any]:
    """The same for token classification: a pruned tagger, one that is dense as its teacher, and tagged sentences."""
    tiny_bert(folder / "teacher", seed=1, head="TokenClassification", labels=TINY_TAGS)
    tiny_bert(folder / "student", seed=2, dropout=dropout, head="TokenClassification", labels=TINY_TAGS)
    prune(folder / "student", sparsity)
    return {
        "train_file": str(tiny_tagged(folder / "train.jsonl", rows)),
        "validation_file": str(tiny_tagged(folder / "val.jsonl", 24, seed=5)),
        "model_name_or_path": str(folder / "student"),
        "distill_teacher": str(folder / "teacher"),
        "recipe": str(ROOT / "recipes/token_classification/pruned_quant.yaml"),
        "recipe_args": QUANT_ARGS,
        "do_train": True,
        "do_eval": True,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 16,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "save_steps": 1000,
        "cache_dir": str(folder / "cache"),
    }


def run(options: dict[str, Any], output_dir: Path, task: str = "question_answering", **changes: Any) -> Path:
    """Carry out the command in this process; a value of None takes an option away. Returns the output folder."""
    flags = {
        name: value
        for name, value in {**options, **changes, "output_dir": str(output_dir)}.items()
        if value is not None
    }
    try:
        train(load_options(task, {name: str(value) for name, value in flags.items()}))
    finally:
        AcceleratorState._reset_state(True)
    return output_dir


def command(options: dict[str, Any], output_dir: Path, **changes: Any) -> list[str]:
    """The same as words of a command line, without the program."""
    words = ["train", "question_answering"]
    for name, value in {**options, **changes, "output_dir": str(output_dir)}.items():
        if value is not None:
            words += [f"--{name}", str(value)]
    return words


def start(words: list[str], *launcher: str, **environment: str) -> subprocess.Popen[str]:
    """A real process from the checkout's root."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **environment}
    prefix = list(launcher) or [sys.executable, "-m", "sparse_accel"]
    return subprocess.Popen(
        [*prefix, *words], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def results(folder: Path) -> dict[str, Any]:
    """all_results.json without what depends on the clock on the wall."""
    document: dict[str, Any] = json.loads((folder / "all_results.json").read_text("utf-8"))
    return {key: value for key, value in document.items() if not key.endswith(("_runtime", "_per_second"))}


def log(folder: Path) -> list[dict[str, Any]]:
    """The logged training lines."""
    lines = (folder / "train_log.jsonl").read_text("utf-8").splitlines()
    return [line for line in map(json.loads, lines) if "learning_rate" in line]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All that a run computed: weights, and scales and ranges where it quantized."""
    found = load_file(folder / "model.safetensors")
    ranges = folder / "quantization.safetensors"
    return found | (load_file(ranges) if ranges.is_file() else {})


def differing(one: Path, other: Path) -> list[str]:
    """Names of the tensors in which two output folders are not equal to the last bit."""
    ours, theirs = tensors(one), tensors(other)
    return sorted({*ours} ^ {*theirs}) + [
        name for name in ours if name in theirs and not torch.equal(ours[name], theirs[name])
    ]


def largest_difference(one: Path, other: Path) -> float:
    """Over all tensors, in absolute value."""
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    return max((ours[name].double() - theirs[name].double()).abs().nan_to_num(0.0).max().item() for name in ours)
