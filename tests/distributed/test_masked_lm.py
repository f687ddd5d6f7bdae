"""Masked language modelling on two processes: masks, text and losses are those of one, however the model is spread."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import running, tiny_mlm
from tests.distributed.launching import launch
from tests.tiny import tiny_bert

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
pytestmark = [pytest.mark.exhaustive, pytest.mark.timeout(600)]


@pytest.mark.parametrize("streaming", [None, True])
def test_two_processes_train_as_one(streaming: bool | None, tmp_path: Path) -> None:
    options: dict[str, Any] = tiny_mlm.tiny_mlm_world(tmp_path, dropout=0.0)
    options |= {"distill_teacher": None, "streaming": streaming, "max_steps": 4, "num_train_epochs": 1}
    options |= {"gradient_accumulation_steps": 1, "line_by_line": None, "max_seq_length": 32}
    one = running.run(options, tmp_path / "one", "masked_language_modeling", per_device_train_batch_size=8)
    words = running.command(options, tmp_path / "two", per_device_train_batch_size=4)
    words[1] = "masked_language_modeling"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29641"]
    process = running.start(words, *launcher, "-m", "sparse_accel", ACCELERATE_USE_CPU="1")
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    for ours, theirs in zip(running.log(one), running.log(tmp_path / "two"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    scores = [running.results(folder)["eval_perplexity"] for folder in (one, tmp_path / "two")]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)


@pytest.mark.parametrize("config", ["fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def test_a_head_that_shares_its_matrix_is_trained_as_it_is_in_one_process(config: str, tmp_path: Path) -> None:
    """Also a new one, which under FSDP2 the first process alone draws."""
    options: dict[str, Any] = tiny_mlm.tiny_mlm_world(tmp_path, dropout=0.0)
    options |= {"distill_teacher": None, "recipe": None, "recipe_args": None, "max_steps": 3, "num_train_epochs": 1}
    options |= {"gradient_accumulation_steps": 1, "max_grad_norm": 0}
    starts = {"old": options["model_name_or_path"], "new": tiny_bert(tmp_path / "encoder", dropout=0.0)}
    commands = []
    for name, start in starts.items():
        one = options | {"model_name_or_path": start}
        running.run(one, tmp_path / f"{name} one", "masked_language_modeling", per_device_train_batch_size=8)
        words = running.command(one, tmp_path / f"{name} two", per_device_train_batch_size=4)
        words[1] = "masked_language_modeling"
        commands.append(words)
    launch(config, commands, tmp_path)
    for name in starts:
        assert running.largest_difference(tmp_path / f"{name} one", tmp_path / f"{name} two") < 1e-5
