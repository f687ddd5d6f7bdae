"""Checkpoints that are written beside training: the same bits, never two at once, and a failure costs one checkpoint."""

from __future__ import annotations

import errno
import json
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from sparse_accel.errors import OutputError
from sparse_accel.runtime import checkpoint, host_copies
from sparse_accel.runtime.background import Background
from tests import running


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return running.tiny_world(tmp_path_factory.mktemp("world"))


def lines(out: Path) -> int:
    log = out / "train_log.jsonl"
    return len(log.read_text().splitlines()) if log.is_file() else 0


def files(folder: Path) -> dict[str, Any]:
    """What a checkpoint holds, without the time that it took."""
    found: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir()}
    found["trainer_state.json"] = json.loads(found["trainer_state.json"])
    del found["trainer_state.json"]["seconds"]
    return found


def test_training_goes_on_while_a_checkpoint_is_written_which_holds_what_was_then(
    world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of checkpoint-2 is written before step 4 is done."""
    waited = running.run(world, tmp_path / "waited", save_steps=2, max_steps=5, do_eval=False, async_checkpoints=False)
    out, write, seen = tmp_path / "beside", checkpoint.save_file, []

    def write_late(tensors: Any, path: Path, **kwargs: Any) -> None:
        if path.parent.name == ".checkpoint-2.partial":
            deadline = time.monotonic() + 60
            while lines(out) < 4 and time.monotonic() < deadline:
                time.sleep(0.002)
            seen.append((lines(out), threading.current_thread() is threading.main_thread()))
        write(tensors, path, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", write_late)
    running.run(world, out, save_steps=2, max_steps=5, do_eval=False)
    # No later: step 4 saves too, and waits for the checkpoint before.
    assert seen[0] == (4, False)
    for name in ("checkpoint-2", "checkpoint-4", "checkpoint-5"):
        assert files(out / name) == files(waited / name)


def test_a_checkpoint_that_fails_beside_training_is_warned_of_and_is_not_the_best(
    world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = checkpoint.save_file

    def fail_once(tensors: Any, path: Path, **kwargs: Any) -> None:
        if path.parent.name == ".checkpoint-2.partial":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(tensors, path, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", fail_once)
    choice = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "greater_is_better": False}
    out = running.run(world, tmp_path / "out", save_steps=2, max_steps=4, save_total_limit=1, **choice)
    state = json.loads((out / "trainer_state.json").read_text())
    scores = [line["eval_f1"] for line in state["log_history"] if "eval_f1" in line]
    assert scores[0] <= scores[1], "else checkpoint-2 would not be the best of the two"
    assert state["best_model_checkpoint"] == "checkpoint-4"
    assert [path.name for path in out.glob("*checkpoint-*")] == ["checkpoint-4"]
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("a checkpoint could not be written: the disk is full; training goes on") == 1


def test_without_memory_for_a_copy_training_waits_and_says_so_once(
    world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = []
    write = checkpoint.save_file

    def note(*args: Any, **kwargs: Any) -> None:
        threads.append(threading.current_thread())
        write(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", note)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    running.run(world, tmp_path / "out", save_steps=1, max_steps=3, do_eval=False, teacher_placement="replicated")
    assert set(threads) == {threading.main_thread()}
    assert capsys.readouterr().out.count("checkpoints are written while training waits") == 1


@pytest.mark.exhaustive
@pytest.mark.timeout(300)
def test_killed_while_a_checkpoint_is_written_a_run_goes_on_from_the_one_before(
    world: dict[str, Any], tmp_path: Path
) -> None:
    whole = running.run(world, tmp_path / "whole")
    for step in (4, 8):
        out = tmp_path / str(step)
        words = running.command(world, out, save_steps=2)
        process = running.start(words)
        while process.poll() is None and not (out / f".checkpoint-{step}.partial").is_dir():
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert checkpoint.checkpoints(out)[-1].step == step - 2
        again = running.start(words)
        output, _ = again.communicate(timeout=200)
        assert f"checkpoint-{step - 2}" in output
        assert running.differing(whole, out) == []


def accelerator(is_main: bool = True) -> Any:
    return SimpleNamespace(num_processes=1, is_main_process=is_main)


def raising(error: Exception) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


def test_a_failure_is_told_once_whether_it_is_asked_for_or_waited_for() -> None:
    background = Background(accelerator())
    background.start(raising(OutputError("full")))
    background.finish()
    assert str(background.failure()) == "full" and background.failure() is None
    assert not background.settle() and background.failure() is None
    background.start(raising(OutputError("again")))
    assert not background.settle()
    assert str(background.failure()) == "again" and background.failure() is None
    assert background.settle()
    background.start(raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        background.settle()
    background.close()


def test_closing_waits_for_the_work() -> None:
    background, done = Background(accelerator()), []
    background.start(lambda: (time.sleep(0.05), done.append(True)))
    background.close()
    assert done == [True]
    Background(accelerator(is_main=False)).start(raising(ZeroDivisionError()))


def test_a_copy_is_contiguous_and_its_own() -> None:
    tensor = torch.arange(6.0).view(2, 3).t().requires_grad_()
    copy = host_copies.start_copy(tensor)
    with torch.no_grad():
        tensor.zero_()
    assert copy.is_contiguous() and copy.tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    host_copies.copies_started(torch.device("cpu"))()


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    assert host_copies._free_in_container(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 300\n")
    assert host_copies._free_in_container(tmp_path) == 400
    (tmp_path / "memory.max").write_text("max\n")
    assert host_copies._free_in_container(tmp_path) is None
