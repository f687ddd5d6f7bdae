"""Compact weights shorten what is sent and held by exactly what they leave out: counted in real steps of two processes."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[2]
HIDDEN, LAYERS = 32, 2

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("world")


@pytest.fixture(scope="module")
def arms(world: Path) -> dict[str, Any]:
    """What the benchmark counts under DDP for a model of two small layers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        benchmark = importlib.import_module("distributed_bytes")
        importlib.import_module("bert_shapes").write_world(world, "tiny", sparsity=0.9, rows=8)
    counted: dict[str, Any] = benchmark.count("DDP", world)
    return counted


@pytest.fixture(scope="module")
def numel(world: Path, arms: Mapping[str, Any]) -> dict[str, int]:
    """How many numbers each parameter stores: of a pruned matrix, those that are not zero, up to a multiple of 32."""
    found = {}
    with safe_open(world / "sparse" / "model.safetensors", "pt") as file:
        for name in file.keys():
            tensor = file.get_tensor(name)
            is_pruned = ".layer." in name and tensor.dim() == 2
            found[name] = 32 * math.ceil(int(tensor.count_nonzero()) / 32) if is_pruned else tensor.numel()
    return found


def test_compact_gradients_and_moments_are_as_short_as_what_is_kept(
    arms: Mapping[str, Any], numel: Mapping[str, int]
) -> None:
    compact = arms["compact"]
    assert compact["step"]["bytes"]["all_reduce"] == 4 * sum(numel.values())
    assert compact["optimizer_bytes"] == 2 * 4 * sum(numel.values())


def test_masked_gradients_and_moments_are_the_dense_models(arms: Mapping[str, Any]) -> None:
    left_out = arms["compact"]["compact"]["weights"] - arms["compact"]["compact"]["values"]
    for key in ("step", "trained_bytes", "optimizer_bytes"):
        assert arms["masked"][key] == arms["dense"][key]
    sent = {arm: arms[arm]["step"]["bytes"]["all_reduce"] for arm in ("dense", "compact")}
    assert left_out > 0
    assert sent["dense"] - sent["compact"] == 4 * left_out


def test_nothing_is_sent_or_held_for_frozen_embeddings(arms: Mapping[str, Any], numel: Mapping[str, int]) -> None:
    frozen = arms["compact, frozen embeddings"]
    trained = sum(count for name, count in numel.items() if "embeddings" not in name)
    assert frozen["step"]["bytes"]["all_reduce"] == 4 * trained
    assert frozen["optimizer_bytes"] == 2 * 4 * trained


def test_beside_gradients_a_step_sends_two_numbers(arms: Mapping[str, Any]) -> None:
    """How many units and how many tokens it has, in one message."""
    for counted in arms.values():
        assert counted["step"]["calls"] == {"scalars": 1, "all_reduce": 1}
        assert counted["step"]["bytes"]["scalars"] == 8


def test_a_compact_checkpoint_holds_what_is_kept_and_where(arms: Mapping[str, Any], numel: Mapping[str, int]) -> None:
    sizes = arms["compact"]["checkpoint_bytes"]
    positions = arms["compact"]["compact"]["position_bytes"]
    matrices = LAYERS * (4 * HIDDEN * HIDDEN + 2 * HIDDEN * 2 * HIDDEN)
    assert positions == matrices / 8
    # The head of a file names its tensors, in some hundred bytes each at most; AdamW counts each one's steps.
    head = 200 * len(numel)
    stored = 4 * sum(numel.values()) + positions
    assert stored <= sizes["model.compact.safetensors"] <= stored + head + matrices_kept_whole(arms)
    moments = 2 * 4 * sum(numel.values()) + 4 * len(numel)
    assert moments <= sizes["optimizer.safetensors"] <= moments + 3 * head


def matrices_kept_whole(arms: Mapping[str, Any]) -> int:
    """Masks of weights that a recipe holds and that are too dense to be compact: the head of the model."""
    return 2 * HIDDEN + 1
