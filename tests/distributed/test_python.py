"""The functions, and a loop of one's own, in two processes: twice in one launch, and the same as in one process."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState, GradientState

from tests import running
from tests.distributed.python_worker import own_loop

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive, pytest.mark.timeout(600)]


@pytest.mark.parametrize("config", ["ddp", "fsdp2"])
def test_two_processes_train_twice_and_go_through_a_loop(config: str, tmp_path: Path) -> None:
    options: dict[str, Any] = running.tiny_world(tmp_path, rows=32, dropout=0.0)
    options |= {"recipe": "question_answering/pruned", "recipe_args": {"num_epochs": 1}, "save_strategy": "no"}
    del options["save_steps"]
    (tmp_path / "options.json").write_text(json.dumps(options))
    process = running.start(
        [str(tmp_path)],
        *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port", "0"),
        *("--config_file", f"launch_configs/{config}.yaml", "tests/distributed/python_worker.py"),
        PYTHONPATH=str(running.ROOT),
        **({"ACCELERATE_USE_CPU": "1"} if config == "ddp" else {}),
    )
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    loop = tmp_path / "loop"
    try:
        own_loop(tmp_path, tmp_path / "one", accumulation=1)
    finally:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
    assert running.largest_difference(tmp_path / "one" / "model", loop / "model") < 1e-5
    assert running.differing(loop / "model", loop / "again") == []
    assert running.tensors(tmp_path / "accumulated" / "model").keys() == running.tensors(loop / "model").keys()
