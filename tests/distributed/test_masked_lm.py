"""Masked language modelling on two processes: masks, text and losses are those of one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests import running, tiny_mlm

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
