"""A promise that is broken stops the run and says so."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparse_accel.cli import main
from sparse_accel.compress.plan import compressed_layers, install
from sparse_accel.compress.ranges import quantizers
from sparse_accel.errors import InvariantError
from sparse_accel.runtime import training
from sparse_accel.runtime.finishing import check_saved
from sparse_accel.runtime.invariants import checksums, require_agreement
from tests import running
from tests.unit.qat_bert import bert, tutorial_plan


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return running.tiny_world(tmp_path_factory.mktemp("world"))


def test_a_revived_weight_stops_the_run_with_its_layer_and_exit_code_3(
    world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def end_step_and_revive(model: torch.nn.Module, reduce_max: Any) -> None:
        layer = compressed_layers(model)["bert.encoder.layer.1.output.dense"]
        layer.weight.data[layer.weight.data == 0] = 1e-3

    monkeypatch.setattr(training, "end_step", end_step_and_revive)
    code = main(
        running.command(
            world,
            tmp_path / "out",
            recipe="question_answering/pruned",
            recipe_args="num_epochs=1",
            check_sparsity_every=2,
            sparse_storage="masked",
        )
    )
    printed = capfd.readouterr()
    assert code == 3
    assert "bert.encoder.layer.1.output.dense are no longer zero" in printed.err
    assert "step 2/" in printed.out and "step 3/" not in printed.out
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_loss_that_is_not_finite_stops_the_run(
    world: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "student"
    shutil.copytree(world["model_name_or_path"], weights)
    tensors = load_file(weights / "model.safetensors")
    tensors["qa_outputs.bias"][0] = float("nan")
    save_file(tensors, weights / "model.safetensors", metadata={"format": "pt"})
    code = main(running.command(world, tmp_path / "nan", model_name_or_path=str(weights)))
    assert code == 3
    assert "the loss is not finite at step 1" in capfd.readouterr().err


def test_a_mask_or_range_that_differs_between_ranks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = bert()
    install(model, tutorial_plan(model, masks=True))
    session: Any = SimpleNamespace(module=model, accelerator=SimpleNamespace(num_processes=3))
    others = [checksums(model) for _ in range(2)]

    def gather(target: list[Any], own: Any) -> None:
        target[:] = [own, *others]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    require_agreement(session)
    quantizer = next(iter(quantizers(model)))
    model.get_submodule(quantizer).scale += 1e-6  # type: ignore[operator]
    others[0] = checksums(model)
    with pytest.raises(InvariantError, match=f"the range of {quantizer} is another on rank 2 than on rank 0 .1 masks"):
        require_agreement(session)


def test_the_saved_file_is_read_back(tmp_path: Path) -> None:
    mask = torch.tensor([[True, False], [False, True]])
    save_file({"layer.weight": torch.eye(2)}, tmp_path / "model.safetensors")
    check_saved(tmp_path, {"layer.weight": mask})
    save_file({"layer.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(InvariantError, match=r"2 pruned weights of layer\.weight are not zero"):
        check_saved(tmp_path, {"layer.weight": mask})
