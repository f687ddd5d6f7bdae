"""Compiled layers on two real processes: what plain ones compute there, compiled in the first steps alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import running
from tests.distributed.launching import launch

FLOAT = {"recipe": "question_answering/pruned", "recipe_args": '{"num_epochs": 3, "init_lr": 0.5}'}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Dropout off: compiled code draws other random numbers. 60 rows: the last batches are unequal."""
    made = running.tiny_world(tmp_path_factory.mktemp("world"), rows=60, dropout=0.0)
    changes = {"optim": "sgd", "recipe_args": running.QUANT_ARGS.replace("1e-3", "0.5")}
    return made | changes | {"teacher_cache": "off"}


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("config", ["ddp", "fsdp2"])
def test_two_processes_train_compiled_what_they_train_plainly(
    config: str, world: dict[str, Any], tmp_path: Path
) -> None:
    """Masks alone, evaluated after each epoch of two steps, the second of which has fewer sequences; under DDP also
    quantization from step 2."""
    runs: dict[str, dict[str, Any]] = {"float": {**FLOAT, "eval_strategy": "epoch"}}
    if config == "ddp":
        runs["quantized"] = {}
    commands = [
        running.command(world, tmp_path / f"{name}_{kind}", **options, compile=kind == "compiled")
        for name, options in runs.items()
        for kind in ("plain", "compiled")
    ]
    launch(config, commands, tmp_path, timeout=1500, program="compile_worker")
    for rank in range(2):
        plain_steps, steps, *quantized = json.loads((tmp_path / f"cases.json.{rank}.json").read_text())
        assert set(plain_steps) == {0}
        # Compiled in the first step, and once more in the first evaluation.
        assert 0 < steps[0] == steps[1] < steps[2] == steps[-1], steps
        if quantized:
            steps = quantized[1]
            assert set(quantized[0]) == {0} and 0 < steps[0] == steps[-1], steps
    for name in runs:
        plain, compiled = tmp_path / f"{name}_plain", tmp_path / f"{name}_compiled"
        for ours, theirs in zip(running.log(plain), running.log(compiled), strict=True):
            # Once tensors are rounded to a grid, noise of 1e-7 now and then decides which point of the grid they go to.
            is_close = 1e-4 if ours["phase"] == "dense" else 5e-3
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=is_close)
        assert running.largest_difference(plain, compiled) < (1e-4 if name == "float" else 5e-3)
        found = running.tensors(plain), running.tensors(compiled)
        assert all(torch.equal(found[0][key] == 0, found[1][key] == 0) for key in found[0] if ".layer." in key)
