"""Two real processes over gloo: the same result as one, from every rank's work, and one message when a rank fails."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import running
from tests.distributed.launching import launch

pytestmark = pytest.mark.timeout(300)

FLOAT = {"recipe": "question_answering/pruned", "recipe_args": '{"num_epochs": 3, "init_lr": 0.5}'}


def torchrun(port: int) -> list[str]:
    """Two processes as a person starts them, on a port of their own."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port), "-m", "sparse_accel",
    ]  # fmt: skip


def both(words: list[str], port: int) -> str:
    """Run to the end and return what was printed; fails with it otherwise."""
    process = running.start(words, *torchrun(port), ACCELERATE_USE_CPU="1")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


def wait_for_steps(folder: Path, count: int) -> None:
    """Until a run has logged so many steps, two minutes at most."""
    log = folder / "train_log.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.is_file() and len(log.read_text().splitlines()) >= count):
        time.sleep(0.002)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Dropout off: two processes draw other random numbers than one. 60 rows: the last batches are unequal."""
    made = running.tiny_world(tmp_path_factory.mktemp("world"), rows=60, dropout=0.0)
    return made | {"optim": "sgd", "recipe_args": running.QUANT_ARGS.replace("1e-3", "0.5")}


@pytest.fixture(scope="module")
def two(world: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What two processes make of both recipes, one after the other: the folder of both, and what was printed."""
    folder = tmp_path_factory.mktemp("two")
    changes = {**FLOAT, "gradient_accumulation_steps": 1, "teacher_cache": str(folder / "teachers")}
    commands = [
        running.command(world, folder / "float", **changes),
        running.command(world, folder / "quantized", gradient_accumulation_steps=1, save_steps=2),
    ]
    return folder, launch("ddp", commands, folder, timeout=240)


def test_two_processes_give_the_result_of_one(world: dict[str, Any], two: tuple[Path, str], tmp_path: Path) -> None:
    folder, output = two
    one = running.run(world, tmp_path / "one", **FLOAT)
    assert output.count("written to") == 2, "only the main process prints"
    assert "Warning" not in output
    assert running.largest_difference(one, folder / "float") < 1e-5
    assert running.results(folder / "float")["eval_f1"] == running.results(one)["eval_f1"]
    for ours, theirs in zip(running.log(one), running.log(folder / "float"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    (filled,) = (folder / "teachers").iterdir()
    alone = Path(world["cache_dir"]) / "sparse_accel_features/teachers" / filled.name / "outputs.safetensors"
    assert (filled / "outputs.safetensors").read_bytes() == alone.read_bytes(), "however many fill it"


def test_masks_ranges_and_resume_hold_on_two_processes(
    world: dict[str, Any], two: tuple[Path, str], tmp_path: Path
) -> None:
    """Quantization from step 4, told to end in step 7 or later, resumed: the bits of the run that was not."""
    unbroken = two[0] / "quantized"
    one = running.run(world, tmp_path / "one")
    # Once tensors are rounded to a grid, noise of 1e-7 now and then decides which point of the grid they go to.
    assert running.largest_difference(one, unbroken) < 5e-3

    killed = tmp_path / "killed"
    words = running.command(world, killed, gradient_accumulation_steps=1, save_steps=2)
    process = running.start(words, *torchrun(29613), ACCELERATE_USE_CPU="1")
    wait_for_steps(killed, 7)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert not (killed / "model.safetensors").exists(), "the run ended before it was killed"
    # Told to end, it saved where it stood and left word for whoever starts runs again.
    marker = json.loads((killed / "preempted.json").read_text())
    assert marker["checkpoint"] == f"checkpoint-{marker['step']}" and (killed / marker["checkpoint"]).is_dir()
    output = both(words, 29614)
    assert f"resuming this command from {killed / marker['checkpoint']}" in output
    assert not (killed / "preempted.json").exists()
    assert running.differing(unbroken, killed) == []


def test_a_rank_that_dies_ends_the_run(world: dict[str, Any], tmp_path: Path) -> None:
    words = running.command(world, tmp_path / "out", gradient_accumulation_steps=1)
    process = running.start(words, *torchrun(29616), ACCELERATE_USE_CPU="1")
    wait_for_steps(tmp_path / "out", 2)
    ranks = {child.environ().get("RANK"): child for child in psutil.Process(process.pid).children(recursive=True)}
    ranks["1"].kill()
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "Signal 9" in output or "exitcode" in output, output
    assert not (tmp_path / "out" / "model.safetensors").exists(), "the run ended before the rank was killed"


def test_bad_data_ends_both_with_one_message(world: dict[str, Any], tmp_path: Path) -> None:
    document = json.loads(Path(world["train_file"]).read_text())
    document["data"][7]["answers"]["answer_start"] = [3]
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps(document))
    process = running.start(
        running.command(world, tmp_path / "out", train_file=str(bad)), *torchrun(29615), ACCELERATE_USE_CPU="1"
    )
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert output.count(f"error: {bad}") == 1, output
    assert not (tmp_path / "out").exists()
