"""Compiled layers on two real processes: what plain ones compute there, compiled in the first steps alone."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from tests import running
from tests.distributed.launching import launch

FLOAT = {"recipe": "question_answering/pruned", "recipe_args": '{"num_epochs": 3, "init_lr": 0.5}'}
ZERO = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Dropout off: compiled code draws other random numbers. 60 rows: the last batches are unequal."""
    made = running.tiny_world(tmp_path_factory.mktemp("world"), rows=60, dropout=0.0)
    changes = {"optim": "sgd", "recipe_args": running.QUANT_ARGS.replace("1e-3", "0.5")}
    return made | changes | {"gradient_accumulation_steps": 1, "teacher_cache": "off"}


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "config", ["ddp", "fsdp2", pytest.param("zero1", marks=ZERO), pytest.param("zero2", marks=ZERO)]
)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_train_compiled_what_they_train_plainly(
    config: str, accumulation: int, world: dict[str, Any], tmp_path: Path
) -> None:
    """Masks alone, evaluated along the way; and then quantization from step 4."""
    changes = {"gradient_accumulation_steps": accumulation}
    runs = {"float": {**FLOAT, "eval_strategy": "epoch"}, "quantized": {}}
    commands = [
        running.command(world, tmp_path / f"{name}_{kind}", **changes, **options, compile=kind == "compiled")
        for name, options in runs.items()
        for kind in ("plain", "compiled")
    ]
    launch(config, commands, tmp_path, timeout=1500, program="compile_worker")
    for rank in range(2):
        counted = json.loads((tmp_path / f"cases.json.{rank}.json").read_text())
        by_run = dict(zip(("plain", "compiled", "quantized plain", "quantized compiled"), counted, strict=True))
        steps = by_run["compiled"]
        per_epoch = len(steps) // 3
        # Compiled by the second step, and once more in the first evaluation.
        assert 0 < steps[1] == steps[per_epoch - 1], steps
        assert steps[per_epoch] == steps[-1], steps
        assert by_run["quantized compiled"][1] == by_run["quantized compiled"][-1] > 0
        assert set(by_run["plain"]) == set(by_run["quantized plain"]) == {0}
    for name, is_close in (("float", 1e-4), ("quantized", 5e-3)):
        plain, compiled = tmp_path / f"{name}_plain", tmp_path / f"{name}_compiled"
        for ours, theirs in zip(running.log(plain), running.log(compiled), strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4 if ours["phase"] == "dense" else is_close)
        assert running.largest_difference(plain, compiled) < (1e-4 if name == "float" else 5e-3)
        tensors = running.tensors(plain), running.tensors(compiled)
        zeros = [{key: (tensor == 0) for key, tensor in found.items() if ".layer." in key} for found in tensors]
        assert all(bool((zeros[0][key] == zeros[1][key]).all()) for key in zeros[0])
