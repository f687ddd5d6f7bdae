"""Goldens: what every shipped recipe does to the tiny world, step by step, as lines of text.

`trace` makes the lines of one recipe, `RUNS` says how each recipe is shortened. Dropout is off, so that the lines do not
depend on the stream of random numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from sparse_accel.compress.census import Census
from tests import running, tiny_mlm, tiny_text

FOLDER = Path(__file__).resolve().parent.parent / "golden"
HEADER = "step loss lr sparsity phase"

# How each shipped recipe is run: options that differ from those of the tiny world. 4 steps an epoch, 3 epochs.
RUNS: dict[str, dict[str, Any]] = {
    "question_answering/dense": {
        "distill_teacher": None,
        "recipe_args": '{"num_epochs": 3, "init_lr": 1e-3, "warmup_epoch": 0.5}',
    },
    # From 60% zeros, which is where the tiny student stands.
    "question_answering/gradual_pruning": {
        "recipe_args": '{"num_epochs": 3, "init_lr": 1e-3, "pruning_start_epoch": 0.5, "pruning_end_epoch": 2.5, '
        '"pruning_update_frequency": 0.5, "init_sparsity": 0.6, "final_sparsity": 0.8}'
    },
    "question_answering/pruned": {"recipe_args": '{"num_epochs": 3, "init_lr": 1e-3}'},
    # A low rate: Adam makes full steps of rounding noise, which quantization grids enlarge; so processors agree to 4e-4.
    "question_answering/pruned_quant": {
        "recipe_args": '{"num_epochs": 3, "qat_start_epoch": 1.0, "observer_epoch": 2.0, "init_lr": 3e-4}'
    },
    "question_answering/quant": {
        "distill_teacher": None,
        "recipe_args": '{"num_epochs": 3, "observer_epoch": 2.0, "init_lr": 1e-4}',
    },
    "text_classification/dense": {
        "distill_teacher": None,
        "recipe_args": '{"num_epochs": 3, "init_lr": 1e-3, "warmup_epoch": 0.5}',
    },
    "text_classification/gradual_pruning": {
        "recipe_args": '{"num_epochs": 3, "init_lr": 3e-4, "pruning_start_epoch": 0.5, "pruning_end_epoch": 2.5, '
        '"pruning_update_frequency": 0.5, "init_sparsity": 0.6, "final_sparsity": 0.8}'
    },
    "text_classification/pruned": {"recipe_args": '{"num_epochs": 3, "init_lr": 3e-4}'},
    "text_classification/pruned_quant": {
        "recipe_args": '{"num_epochs": 3, "qat_start_epoch": 1.0, "observer_epoch": 2.0, "init_lr": 3e-4}'
    },
    "text_classification/quant": {
        "distill_teacher": None,
        "recipe_args": '{"num_epochs": 3, "observer_epoch": 2.0, "init_lr": 3e-4}',
    },
    "token_classification/dense": {
        "distill_teacher": None,
        "recipe_args": '{"num_epochs": 3, "init_lr": 1e-3, "warmup_epoch": 0.5}',
    },
    "token_classification/gradual_pruning": {
        "recipe_args": '{"num_epochs": 3, "init_lr": 1e-3, "pruning_start_epoch": 0.5, "pruning_end_epoch": 2.5, '
        '"pruning_update_frequency": 0.5, "init_sparsity": 0.6, "final_sparsity": 0.8}'
    },
    "token_classification/pruned": {"recipe_args": '{"num_epochs": 3, "init_lr": 3e-4}'},
    "token_classification/pruned_quant": {
        "recipe_args": '{"num_epochs": 3, "qat_start_epoch": 1.0, "observer_epoch": 2.0, "init_lr": 1e-4}'
    },
    "token_classification/quant": {
        "distill_teacher": None,
        "recipe_args": '{"num_epochs": 3, "observer_epoch": 2.0, "init_lr": 1e-4}',
    },
    "masked_language_modeling/pruned": {"recipe_args": '{"num_epochs": 3, "init_lr": 3e-4}'},
    "masked_language_modeling/pruned_quant": {
        "recipe_args": '{"num_epochs": 3, "qat_start_epoch": 1.0, "observer_epoch": 2.0, "init_lr": 1e-4}'
    },
    "masked_language_modeling/quant": {
        "distill_teacher": None,
        "recipe_args": '{"num_epochs": 3, "observer_epoch": 2.0, "init_lr": 1e-4}',
    },
    "masked_language_modeling/dense": {
        "distill_teacher": None,
        "recipe_args": '{"num_epochs": 3, "init_lr": 1e-3, "warmup_epoch": 0.5}',
    },
    **{
        # 4 steps an epoch: masks at every second step, the last ones at step 8.
        f"masked_language_modeling/pruned{percent}": {
            "recipe_args": '{"pruning_end_epoch": 2.0, "pruning_update_frequency": 0.5, "cycle_epochs": 0.5, "init_lr": 1e-3}'
        }
        for percent in (80, 90, 97)
    },
}


# The tiny world of the task that a recipe's folder is named after.
WORLDS: dict[str, Callable[..., dict[str, Any]]] = {
    "question_answering": running.tiny_world,
    "text_classification": tiny_text.tiny_text_world,
    "token_classification": running.tiny_token_world,
    "masked_language_modeling": tiny_mlm.tiny_mlm_world,
}


def task_of(name: str) -> str:
    """The task that a shipped recipe is for."""
    return name.partition("/")[0]


def golden_file(name: str) -> Path:
    """Where the golden of a shipped recipe lies."""
    return FOLDER / f"{name.replace('/', '.')}.txt"


def world(folder: Path, task: str = "question_answering") -> dict[str, Any]:
    """The tiny world of a task without dropout, checkpoints after every step and no evaluation."""
    options = WORLDS[task](folder, dropout=0.0)
    options |= {"do_eval": None, "validation_file": None, "save_steps": 1, "save_total_limit": None}
    # Zeros are counted in the checkpoints, which hold whole weights only so.
    return options | {"sparse_storage": "masked"}


def trace(name: str, options: dict[str, Any], output_dir: Path) -> list[str]:
    """Train by the shipped recipe and give the lines of its golden: the header, then `step loss lr sparsity phase`.

    Sparsity is the share of zeros among the prunable weights of the checkpoint that was written after the step.
    """
    running.run(options, output_dir, task_of(name), recipe=name, **RUNS[name])
    lines = [HEADER]
    for logged in running.log(output_dir):
        weights = load_file(output_dir / f"checkpoint-{logged['step']}" / "model.safetensors")
        zeros = Census.of({key: tensor for key, tensor in weights.items() if not key.endswith(".mask")}).sparsity
        lines.append(
            f"{logged['step']} {logged['loss']:.6f} {logged['learning_rate']:.12e} {zeros:.9f} {logged['phase']}"
        )
    return lines
