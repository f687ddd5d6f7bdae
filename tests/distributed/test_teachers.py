"""Teachers spread over two real processes: the whole teacher's answers, half its memory, beside every kind of student."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import running
from tests.tiny import tiny_bert

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

LIMIT = 200.0  # seconds
needs_deepspeed = [
    pytest.mark.deepspeed,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed here"),
]


def two(words: list[str], **environ: str) -> str:
    """Run on two processes and return what they printed; they and all that they started are killed at the limit."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "FSDP_", "LOCAL_"))
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *words],
        cwd=running.ROOT,
        env=inherited | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(running.ROOT)} | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"not ended after {LIMIT:g} s:\n{process.communicate()[0]}")
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with six times the layers and four times the width of its student."""
    made = tmp_path_factory.mktemp("models")
    tiny_bert(made / "teacher", seed=1, layers=12, hidden=128)
    tiny_bert(made / "student", seed=2, layers=2, hidden=32)
    return made


@pytest.mark.parametrize(
    ("placement", "tolerance"),
    # The default run has one of ZeRO-3 in test_backends.
    [("fsdp2", 0.0), pytest.param("zero3", 1e-5, marks=[*needs_deepspeed, pytest.mark.exhaustive])],
)
def test_a_sharded_teacher_answers_as_a_whole_one_and_takes_half_the_memory(
    placement: str, tolerance: float, folder: Path, tmp_path: Path
) -> None:
    environ = {"DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    two([str(Path(__file__).with_name("teacher_worker.py")), placement, str(folder)], **environ)
    reports: list[dict[str, Any]] = json.loads((folder / "report.json").read_text())
    for report in reports:
        assert report["no"] <= tolerance
        assert report["bf16"] <= tolerance, "autocast and all"
        assert 0.49 < report["idle"] < 0.53
        assert report["peak"] < 0.75, "slices and what is gathered at one time"
        assert report["trainable"] == 0 and not report["training"]
        assert report["freed"], "when it is let go nothing holds it"
        kinds = {"ddp", "fsdp2"} | ({"zero1", "zero2", "zero3"} if placement == "zero3" else set())
        assert set(report["beside"]) == kinds
        for student in report["beside"].values():
            assert student["losses"] == sorted(student["losses"], reverse=True), (
                "the student comes closer at every step"
            )
            assert student["difference"] <= tolerance


@pytest.mark.exhaustive
def test_a_run_with_a_sharded_teacher_gives_the_result_of_one_with_a_whole_one(tmp_path: Path) -> None:
    """Distillation alone, on unequal batches: 60 rows leave a rank with fewer than the other, and then with none."""
    world = running.tiny_world(tmp_path / "world", rows=57, dropout=0.0)
    tiny_bert(tmp_path / "world/teacher", seed=1, layers=4, hidden=64)
    world |= {"optim": "sgd", "recipe": "question_answering/pruned", "recipe_args": '{"num_epochs": 2, "init_lr": 0.5}'}
    one = running.run(world, tmp_path / "one")
    changes = {"gradient_accumulation_steps": 1, "teacher_placement": "fsdp2", "teacher_cache": "off"}
    words = running.command(world, tmp_path / "two", **changes)
    output = two(["-m", "sparse_accel", *words], ACCELERATE_USE_CPU="1")
    assert "fsdp2; with the student about" in output
    assert "Warning" not in output
    assert running.largest_difference(one, tmp_path / "two") < 1e-5
