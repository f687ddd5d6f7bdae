"""Checkpoints that continue elsewhere: how steps keep their size, what other ranks learn from the first, and refusals."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparse_accel.compress.plan import install
from sparse_accel.errors import OutputError, RecipeError
from sparse_accel.runtime import checkpoint, gathering, together
from sparse_accel.runtime.backends import PlainBackend
from sparse_accel.runtime.preemption import StopRequest
from tests.unit.qat_bert import bert, tutorial_plan


def saved(folder: Path, **facts: Any) -> Path:
    document = {"sparse_accel_checkpoint": 1, "global_step": 7, **facts}
    (folder / "trainer_state.json").write_text(json.dumps(document))
    return folder


@pytest.mark.parametrize(
    ("world_size", "features", "processes", "accumulation"),
    [(2, 32, 2, 2), (2, 32, 1, 4), (2, 32, 4, 1), (8, 64, 2, 4), (1, None, 2, 1)],
)
def test_a_step_keeps_its_features(
    world_size: int, features: int | None, processes: int, accumulation: int, tmp_path: Path
) -> None:
    folder = saved(tmp_path, world_size=world_size, features_per_step=features)
    assert checkpoint.accumulation(folder, 8, 2, processes) == accumulation


def test_processes_that_cannot_make_a_step_are_refused_with_those_that_can(tmp_path: Path) -> None:
    folder = saved(tmp_path, world_size=2, features_per_step=32)
    with pytest.raises(
        OutputError, match=r"2 processes with 32 features a step; 3 processes .* one of 1, 2, 4 processes"
    ):
        checkpoint.accumulation(folder, 8, 2, 3)


def test_what_goes_wrong_on_the_first_rank_goes_wrong_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def broadcast(shared: list[Any], src: int) -> None:
        shared[:] = [None, RecipeError("a bad line", "recipe.yaml:3")]

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    other = SimpleNamespace(num_processes=2, is_main_process=False)
    with pytest.raises(RecipeError, match=r"recipe\.yaml:3: a bad line"):
        together.on_main(other, lambda: pytest.fail("only the first rank does it"))
    assert together.on_main(SimpleNamespace(num_processes=1), lambda: 5) == 5


def test_a_state_of_another_model_is_refused_and_changes_nothing() -> None:
    model = bert()
    install(model, tutorial_plan(model))
    session: Any = SimpleNamespace(module=model, backend=PlainBackend(None, "no"))
    tensors = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for change, message in (
        ({"qa_outputs.bias": None}, r"qa_outputs\.bias is missing"),
        ({"more": torch.zeros(1)}, "more is not known"),
        ({"qa_outputs.bias": torch.zeros(3)}, r"qa_outputs\.bias is \[3\] there and \[2\] here"),
    ):
        changed = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
        with pytest.raises(OutputError, match=f"checkpoint-7 does not fit the model of this run: {message}"):
            gathering.put_state(session, changed, Path("checkpoint-7"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    gathering.put_state(session, tensors, Path("checkpoint-7"))
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())


def test_a_request_to_end_is_due_at_the_next_step_and_the_handler_is_put_back() -> None:
    stop, before = StopRequest(1, None), signal.getsignal(signal.SIGTERM)
    with stop.listening():
        assert not stop.is_due()
        signal.raise_signal(signal.SIGTERM)
        assert stop.is_due()
    assert signal.getsignal(signal.SIGTERM) is before


def test_seeds_of_new_ranks_are_all_different() -> None:
    seeds = {checkpoint._new_seed(42, rank, step) for rank in range(40) for step in range(40)}
    assert len(seeds) == 1600 and all(0 <= seed < 2**63 for seed in seeds)
