"""FSDP2 and DeepSpeed ZeRO on two real processes: the result of one process, exact zeros, and resuming from anywhere."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import running

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
BACKENDS = [
    pytest.param("fsdp2", "FSDP2", id="fsdp2"),
    *(
        pytest.param(f"zero{stage}", f"DeepSpeed ZeRO-{stage}", id=f"zero{stage}", marks=[needs_deepspeed])
        for stage in (1, 2, 3)
    ),
]
FLOAT = {"recipe": "question_answering/pruned", "recipe_args": '{"num_epochs": 3, "init_lr": 0.5}', "optim": "sgd"}
QUANTIZED = {"recipe_args": running.QUANT_ARGS.replace("1e-3", "0.5"), "optim": "sgd"}


def launch(config: str, commands: list[list[str]], folder: Path) -> str:
    """Carry out command lines on two processes that accelerate starts with a shipped configuration; what was printed."""
    cases = folder / "cases.json"
    cases.write_text(json.dumps(commands))
    process = running.start(
        ["cases", str(cases)],
        *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port", "0"),
        *("--config_file", f"launch_configs/{config}.yaml", "tests/distributed/on_cpu.py"),
        TORCH_EXTENSIONS_DIR=str(folder / "extensions"),
    )
    try:
        output, _ = process.communicate(timeout=400)
    finally:
        process.kill()
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Dropout off: two processes draw other random numbers than one. 60 rows: the last batches are unequal."""
    return running.tiny_world(tmp_path_factory.mktemp("world"), rows=60, dropout=0.0)


@pytest.fixture(scope="module")
def alone(world: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of the same commands, under `float`, `quantized` and (stopped at step 5) `stopped`."""
    folder = tmp_path_factory.mktemp("alone")
    running.run(world, folder / "float", **FLOAT)
    running.run(world, folder / "quantized", **QUANTIZED)
    running.run(world, folder / "whole", save_steps=5)
    running.run(world, folder / "stopped", save_steps=5, max_steps=5)
    return folder


@pytest.mark.parametrize(("config", "name"), BACKENDS)
def test_two_processes_give_the_result_of_one_and_resume(
    config: str, name: str, world: dict[str, Any], alone: Path, tmp_path: Path
) -> None:
    two = {"gradient_accumulation_steps": 1}
    # Written by one process and without sharding; its steps are to have as many features here.
    shutil.copytree(alone / "stopped", tmp_path / "taken_over")
    output = launch(
        config,
        [
            running.command(world, tmp_path / "float", **FLOAT, **two),
            running.command(world, tmp_path / "quantized", **QUANTIZED, **two),
            running.command(world, tmp_path / "whole", save_steps=5, **two),
            running.command(world, tmp_path / "stopped", save_steps=5, max_steps=5, **two),
            running.command(world, tmp_path / "stopped", save_steps=5, **two),
            running.command(world, tmp_path / "taken_over", save_steps=5),
        ],
        tmp_path,
    )
    assert output.count(f"2 processes ({name})") == 6, output
    assert output.count("written to") == 6, "only the main process prints"
    assert "Warning" not in output, output
    assert running.largest_difference(alone / "float", tmp_path / "float") < 1e-5
    # Once tensors are rounded to a grid, noise of 1e-7 now and then decides which point of the grid they go to.
    assert running.largest_difference(alone / "quantized", tmp_path / "quantized") < 5e-3
    assert running.results(tmp_path / "float")["eval_f1"] == running.results(alone / "float")["eval_f1"]
    zeros_of_student = load_file(Path(world["model_name_or_path"]) / "model.safetensors")
    for case in ("float", "quantized", "whole", "taken_over"):
        for key, tensor in load_file(tmp_path / case / "model.safetensors").items():
            if ".layer." in key and tensor.dim() == 2:
                assert torch.equal(tensor == 0, zeros_of_student[key] == 0), key
    # Stopped in the middle of an epoch, after quantization began, and resumed: the bits of the run that was not stopped.
    assert "resuming this command" in output
    assert running.differing(tmp_path / "whole", tmp_path / "stopped") == []
    # Resumed from one process without sharding: what one process would have gone on to.
    assert "1 micro-batches a step instead of 2" in output
    assert running.largest_difference(alone / "whole", tmp_path / "taken_over") < 5e-3
