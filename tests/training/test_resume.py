"""Killed anywhere and resumed, a run ends with the same bits."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from sparse_accel.errors import ModelError, OutputError
from sparse_accel.reports.run_files import read_story
from tests import running


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return running.tiny_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def unbroken(world: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return running.run(world, tmp_path_factory.mktemp("unbroken") / "out")


# 4 steps an epoch: before quantization, at its first step, in its first epoch, with fixed ranges.
@pytest.mark.parametrize("stop", [2, 4, 6, 9])
def test_a_run_that_stopped_anywhere_ends_with_the_same_bits(
    world: dict[str, Any], unbroken: Path, tmp_path: Path, stop: int
) -> None:
    out = tmp_path / "out"
    running.run(world, out, max_steps=stop)
    running.run(world, out)
    assert running.differing(unbroken, out) == []
    assert running.results(out) == running.results(unbroken)
    assert running.log(out) == running.log(unbroken)
    story = read_story(out)  # what the report is made of: the whole run, not its second half
    assert [line["step"] for line in story.lines] == list(range(1, 13)) and story.facts["steps"]["done"] == 12
    assert (out / "eval_predictions.json").read_bytes() == (unbroken / "eval_predictions.json").read_bytes()


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("sent", "after"),
    [(signal.SIGKILL, 3), pytest.param(signal.SIGKILL, 9, marks=pytest.mark.exhaustive), (signal.SIGTERM, 5)],
)
def test_a_killed_process_resumes_by_itself(
    world: dict[str, Any],
    unbroken: Path,
    tmp_path: Path,
    sent: signal.Signals,
    after: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Killed, or told to end, after so many logged steps; checkpoints every second step. Resumed in this process."""
    out = tmp_path / "out"
    words = running.command(world, out, save_steps=2)
    process = running.start(words)
    log = out / "train_log.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if log.is_file() and len(log.read_text().splitlines()) >= after:
            break
        time.sleep(0.002)
    process.send_signal(sent)
    output, _ = process.communicate()
    assert not (out / "model.safetensors").exists(), "the run ended before it was killed"
    assert not (out / "report.html").exists()
    if sent == signal.SIGTERM:
        assert process.returncode == 75, output
        marker = json.loads((out / "preempted.json").read_text())
        assert marker["step"] >= after and (out / marker["checkpoint"]).is_dir()
        assert f"told to end (SIGTERM): saved {marker['checkpoint']}" in output
    else:
        assert process.returncode == -signal.SIGKILL
    running.run(world, out, save_steps=2)
    assert "resuming this command" in capsys.readouterr().out
    assert not (out / "preempted.json").exists() and (out / "report.html").is_file()
    assert running.differing(unbroken, out) == []
    assert running.results(out) == running.results(unbroken)


def test_a_finished_run_started_again_ends_with_the_same_bits(
    world: dict[str, Any], unbroken: Path, tmp_path: Path
) -> None:
    out = running.run(world, tmp_path / "out")
    running.run(world, out)
    assert running.differing(unbroken, out) == []
    assert running.results(out) == running.results(unbroken)
    assert running.log(out) == running.log(unbroken)


def test_a_half_written_checkpoint_is_never_resumed_from(world: dict[str, Any], unbroken: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    running.run(world, out, max_steps=6, save_steps=3)
    torn = out / "checkpoint-6"
    (torn / "trainer_state.json").unlink()
    running.run(world, out)
    assert running.differing(unbroken, out) == []


def test_a_damaged_checkpoint_is_named(world: dict[str, Any], tmp_path: Path) -> None:
    out = running.run(world, tmp_path / "out", max_steps=2)
    weights = out / "checkpoint-2" / "optimizer.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(OutputError, match=r"optimizer\.safetensors is damaged"):
        running.run(world, out)


def test_another_command_is_refused_and_the_folder_left_alone(world: dict[str, Any], tmp_path: Path) -> None:
    out = running.run(world, tmp_path / "out", max_steps=2)
    before = {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    with pytest.raises(OutputError, match=r"another command \(seed: 42 there, 43 now\)"):
        running.run(world, out, seed=43)
    with pytest.raises(OutputError, match=r"another command \(recipe: "):
        running.run(world, out, recipe_args=running.QUANT_ARGS.replace("1e-3", "1e-4"))
    assert {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()} == before


def test_a_named_checkpoint_does_not_open_a_folder_of_somebody_elses(world: dict[str, Any], tmp_path: Path) -> None:
    first = running.run(world, tmp_path / "first", max_steps=2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("years of work")
    with pytest.raises(OutputError, match="not written by this command"):
        running.run(world, tmp_path / "out", resume_from_checkpoint=str(first / "checkpoint-2"))
    with pytest.raises(OutputError, match=r"did not write and would have to replace: README\.md"):
        running.run(world, tmp_path / "out", overwrite_output_dir=True)


def test_a_refused_checkpoint_leaves_the_run_as_it_was(world: dict[str, Any], tmp_path: Path) -> None:
    first = running.run(world, tmp_path / "first", max_steps=2)
    changes = {"per_device_train_batch_size": 4, "resume_from_checkpoint": str(first / "checkpoint-2")}
    with pytest.raises(OutputError, match="steps an epoch"):
        running.run(world, tmp_path / "second", **changes)
    assert not (tmp_path / "second").exists()
    with pytest.raises(OutputError, match="another command"):
        running.run(world, first, **changes)
    running.run(world, first, max_steps=3)


def test_a_finished_run_without_checkpoints_is_not_done_again_unasked(world: dict[str, Any], tmp_path: Path) -> None:
    out = running.run(world, tmp_path / "out", max_steps=1, save_strategy="no", save_steps=None)
    with pytest.raises(OutputError, match="finished run"):
        running.run(world, out, max_steps=1, save_strategy="no", save_steps=None)


def test_a_checkpoint_after_the_very_first_micro_batch(world: dict[str, Any], tmp_path: Path) -> None:
    out = running.run(
        world, tmp_path / "out", max_steps=1, save_steps=1, gradient_accumulation_steps=1, logging_steps=500
    )
    assert (out / "checkpoint-1").is_dir()


def test_a_folder_of_somebody_elses_is_refused(world: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="not written by this command"):
        running.run(world, tmp_path / "out")


def test_starting_anew_removes_only_what_was_ours(world: dict[str, Any], tmp_path: Path) -> None:
    out = running.run(world, tmp_path / "out", max_steps=2)
    (out / "notes.txt").write_text("mine")
    (out / "checkpoint-77").mkdir()
    (out / "checkpoint-77" / "weights").write_text("mine too")
    running.run(world, out, max_steps=1, seed=43, overwrite_output_dir=True)
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "checkpoint-77" / "weights").read_text() == "mine too"
    assert not (out / "checkpoint-2").exists() and (out / "checkpoint-1").is_dir()


def test_only_the_newest_checkpoints_are_kept(world: dict[str, Any], tmp_path: Path) -> None:
    out = running.run(world, tmp_path / "out", save_steps=2, save_total_limit=2)
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-12"]


def test_a_checkpoint_opens_with_plain_transformers(world: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForQuestionAnswering

    out = running.run(world, tmp_path / "out", max_steps=3, sparse_storage="masked")
    _, info = AutoModelForQuestionAnswering.from_pretrained(out / "checkpoint-3", output_loading_info=True)
    assert not info["missing_keys"]


def test_a_compact_checkpoint_is_not_taken_for_a_model(world: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForQuestionAnswering

    out = running.run(world, tmp_path / "out", max_steps=1)
    with pytest.raises(ModelError, match="is a checkpoint that stores compact weights"):
        running.run(world, tmp_path / "other", model_name_or_path=str(out / "checkpoint-1"))
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForQuestionAnswering.from_pretrained(out / "checkpoint-1")


@pytest.mark.parametrize("first", ["masked", "compact"])
def test_a_run_goes_on_with_the_other_storage_to_the_same_bits(
    first: str, world: dict[str, Any], tmp_path: Path
) -> None:
    """Gradients are not clipped: a norm over fewer numbers is summed in another order."""
    out = tmp_path / "out"
    running.run(world, out, max_steps=5, max_grad_norm=0, sparse_storage=first)
    running.run(world, out, max_grad_norm=0, sparse_storage="compact" if first == "masked" else "masked")
    whole = running.run(world, tmp_path / "whole", max_grad_norm=0, sparse_storage="masked")
    assert running.differing(whole, out) == []


def test_a_new_optimizer_continues_from_the_same_weights(
    world: dict[str, Any], unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    running.run(world, out, max_steps=5, reset_optimizer=True)
    assert "--reset_optimizer has no effect: there is no checkpoint" in capsys.readouterr().out.replace("\n", " ")
    running.run(world, out, reset_optimizer=True)
    printed = capsys.readouterr().out
    assert "resuming this command" in printed and "has no effect" not in printed
    # The same place in time, other moments.
    assert [line["step"] for line in running.log(out)] == [line["step"] for line in running.log(unbroken)]
    assert running.differing(unbroken, out) != []


def test_a_named_checkpoint_is_continued_elsewhere(world: dict[str, Any], unbroken: Path, tmp_path: Path) -> None:
    first = running.run(world, tmp_path / "first", max_steps=5)
    out = running.run(world, tmp_path / "second", resume_from_checkpoint=str(first / "checkpoint-5"))
    assert running.differing(unbroken, out) == []
    assert json.loads((out / "all_results.json").read_text())["epoch"] == 3.0
