"""Gradual pruning through whole commands, beyond what the shipped recipe's golden shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sparse_accel.errors import RecipeError
from tests import running

pytestmark = pytest.mark.exhaustive

RECIPE = """\
m_modifiers:
  - !EpochRangeModifier {{start_epoch: 0, end_epoch: 3}}
  - !{tag} {{start_epoch: 0.5, end_epoch: 3.0, init_sparsity: 0.6, final_sparsity: 0.8, update_frequency: -1, {more}}}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    made = running.tiny_world(tmp_path_factory.mktemp("world"), dropout=0.0)
    return made | {"distill_teacher": None, "recipe_args": None, "do_eval": None, "validation_file": None}


def recipe(folder: Path, tag: str = "GMPruningModifier", more: str = "params: ['re:.*layer']") -> Path:
    path = folder / f"{tag}.yaml"
    path.write_text(RECIPE.format(tag=tag, more=more))
    return path


def share_of_zeros(folder: Path) -> list[float]:
    weights = load_file(folder / "model.safetensors")
    layers = [tensor for name, tensor in weights.items() if ".layer." in name and tensor.dim() == 2]
    return [int((tensor == 0).sum()) / tensor.numel() for tensor in layers]


@pytest.mark.parametrize("tag", ["GMPruningModifier", "GlobalMagnitudePruningModifier"])
def test_one_shot_prunes_to_the_final_sparsity(tag: str, world: dict[str, Any], tmp_path: Path) -> None:
    out = running.run(world, tmp_path / "out", recipe=recipe(tmp_path, tag), one_shot=True)
    shares = share_of_zeros(out)
    assert sum(shares) / len(shares) == pytest.approx(0.8, abs=0.02)


def test_one_shot_that_would_let_go_is_refused(world: dict[str, Any], tmp_path: Path) -> None:
    released = recipe(tmp_path, more="params: [], leave_enabled: false")
    with pytest.raises(RecipeError, match=r":3: GMPruningModifier: leave_enabled must be true with --one_shot"):
        running.run(world, tmp_path / "out", recipe=released, one_shot=True)
    assert not (tmp_path / "out").exists()


def test_kept_and_accumulated_weights_are_those_of_one_batch(world: dict[str, Any], tmp_path: Path) -> None:
    """Micro-batches of one step share a mask, recomputed layers too."""
    options = {"recipe": recipe(tmp_path), "optim": "sgd", "learning_rate": 0.1}
    one = running.run(world, tmp_path / "one", **options, per_device_train_batch_size=16, gradient_accumulation_steps=1)
    many = running.run(
        world, tmp_path / "many", **options, per_device_train_batch_size=2, gradient_accumulation_steps=8
    )
    again = running.run(world, tmp_path / "again", **options, gradient_checkpointing=True)
    assert running.largest_difference(one, many) < 1e-5
    assert running.largest_difference(one, again) < 1e-5
    assert share_of_zeros(one) == [pytest.approx(0.8, abs=1e-3)] * 12


@pytest.mark.filterwarnings("ignore")  # torch warns of its own code
@pytest.mark.timeout(900)
def test_a_compiled_run_prunes_the_same(world: dict[str, Any], tmp_path: Path) -> None:
    options = {"recipe": recipe(tmp_path), "optim": "sgd", "learning_rate": 0.1}
    plain = running.run(world, tmp_path / "plain", **options)
    try:
        compiled = running.run(world, tmp_path / "compiled", **options, compile=True)
    finally:
        torch.compiler.reset()
    assert running.largest_difference(plain, compiled) < 1e-4
    assert share_of_zeros(compiled) == share_of_zeros(plain)
