"""On a GPU a line of the log is written a step after its own, so that no step waits: the same lines, in the same order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from sparse_accel.errors import InvariantError
from sparse_accel.runtime import checkpoint
from sparse_accel.runtime.pauses import Run
from tests import running


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return running.tiny_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[tuple[int, int]]]:
    """Lets runs read late from now on, and gives the list to which each line adds (step when written, its own step)."""

    def begin() -> list[tuple[int, int]]:
        init, write, written = Run.__post_init__, Run.write_line, []

        def init_late(run: Run) -> None:
            init(run)
            run.reads_late = True

        def note(run: Run) -> None:
            if run.line is not None:
                written.append((run.state.clock.step, run.line.reading.clock.step))
            write(run)

        monkeypatch.setattr(Run, "__post_init__", init_late)
        monkeypatch.setattr(Run, "write_line", note)
        return written

    return begin


def test_lines_written_late_are_those_written_at_once(world: dict[str, Any], tmp_path: Path, late: Any) -> None:
    changes = {"max_steps": 7, "save_steps": 3, "eval_strategy": "steps", "eval_steps": 5, "check_sparsity_every": 100}
    at_once = running.run(world, tmp_path / "at_once", **changes)
    written = late()
    out = running.run(world, tmp_path / "late", **changes)
    # A save (3, 6), an evaluation (5) and the end need the line of their own step.
    assert written == [(2, 1), (3, 2), (3, 3), (5, 4), (5, 5), (6, 6), (7, 7)]
    assert running.log(out) == running.log(at_once)
    histories = [checkpoint.read_document(folder / "checkpoint-6")["log_history"] for folder in (out, at_once)]
    assert [line["step"] for line in histories[0]] == [line["step"] for line in histories[1]] == [1, 2, 3, 4, 5, 5, 6]


def test_a_loss_that_is_not_finite_is_of_its_own_step(world: dict[str, Any], tmp_path: Path, late: Any) -> None:
    weights = tmp_path / "student"
    weights.mkdir()
    for file in Path(world["model_name_or_path"]).iterdir():
        (weights / file.name).write_bytes(file.read_bytes())
    tensors = load_file(weights / "model.safetensors")
    tensors["qa_outputs.bias"][0] = float("nan")
    save_file(tensors, weights / "model.safetensors", metadata={"format": "pt"})
    written = late()
    with pytest.raises(InvariantError, match="not finite at step 1 "):
        running.run(world, tmp_path / "out", model_name_or_path=str(weights))
    assert written == [(2, 1)]
