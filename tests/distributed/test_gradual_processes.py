"""Gradual pruning on two real processes: masks that are the same on both, exact counts, exact zeros in what is saved."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import running
from tests.distributed.launching import launch

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive, pytest.mark.timeout(600)]

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
EVERY = [
    "ddp",
    "fsdp2",
    *(pytest.param(name, marks=needs_deepspeed) for name in ("zero1", "zero2", "zero3", "zero3_offload")),
]

# 4 steps an epoch, 12 steps: pruned in steps 2 to 8.
RECIPE = """\
m_modifiers:
  - !EpochRangeModifier {{start_epoch: 0, end_epoch: 3}}
  - !DistillationModifier {{hardness: 1.0, temperature: 2.0, distill_output_keys: [start_logits, end_logits]}}
  - !{tag}
    start_epoch: 0.5
    end_epoch: 2.0
    update_frequency: 0.25
    init_sparsity: {init}
    final_sparsity: 0.8
    params: ['re:.*layer\\.', 're:.*word_embeddings']
    mask_type: {mask_type}
    leave_enabled: {leave}
"""
LOCAL = {"tag": "GMPruningModifier", "init": 0.05, "mask_type": "unstructured", "leave": "true"}
CASES: dict[str, dict[str, Any]] = {
    "local": LOCAL,
    "blocks": {**LOCAL, "mask_type": "block4"},
    "global": {**LOCAL, "tag": "GlobalMagnitudePruningModifier"},
    "own": {**LOCAL, "init": "__FROM_PARAM__"},
    "released": {**LOCAL, "leave": "false"},
    "global released": {**LOCAL, "tag": "GlobalMagnitudePruningModifier", "leave": "false"},
}


def changes(case: str, folder: Path) -> dict[str, Any]:
    """Masks are compared between ranks after every step."""
    path = folder / f"{case.replace(' ', '_')}.yaml"
    path.write_text(RECIPE.format(**CASES[case]))
    return {
        "recipe": path,
        "recipe_args": None,
        "check_sparsity_every": 1,
        "learning_rate": 1e-3,
        "save_steps": 6,
        "max_grad_norm": 0,
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return running.tiny_world(tmp_path_factory.mktemp("world"), rows=64, dropout=0.0, sparsity=0.3)


@pytest.fixture(scope="module")
def alone(world: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of the same commands."""
    folder = tmp_path_factory.mktemp("alone")
    for case in CASES:
        running.run(world, folder / case, **changes(case, folder))
    return folder


def pruned(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for name, tensor in tensors.items()
        if name.endswith(".weight") and tensor.dim() == 2 and (".layer." in name or "word_embeddings" in name)
    }


@pytest.mark.parametrize("config", EVERY)
def test_two_processes_prune_as_one(config: str, world: dict[str, Any], alone: Path, tmp_path: Path) -> None:
    two = world | {"gradient_accumulation_steps": 1, "cache_dir": str(tmp_path / "cache")}
    commands = [running.command(two, tmp_path / case, **changes(case, tmp_path)) for case in CASES]
    for case in CASES:
        stopped = running.command(two, tmp_path / f"{case} stopped", **changes(case, tmp_path), max_steps=6)
        commands += [stopped, running.command(two, tmp_path / f"{case} stopped", **changes(case, tmp_path))]
    launch(config, commands, tmp_path)
    for case in CASES:
        ours, theirs = running.tensors(tmp_path / case), running.tensors(alone / case)
        weights = pruned(ours)
        counts = {name: int((tensor == 0).sum()) for name, tensor in weights.items()}
        total = sum(tensor.numel() for tensor in weights.values())
        if "released" in case:
            # Rows of the embeddings that no step looks up have no gradient.
            assert not any(count for name, count in counts.items() if ".layer." in name), "what is let go of grows"
        elif "global" in case:
            assert sum(counts.values()) == round(0.8 * total)
        elif case == "blocks":
            assert counts == {name: 4 * round(0.2 * tensor.numel()) for name, tensor in weights.items()}
        else:
            assert counts == {name: round(0.8 * tensor.numel()) for name, tensor in weights.items()}
        differing = sum(int(((ours[name] == 0) != (theirs[name] == 0)).sum()) for name in weights)
        assert differing <= 1e-3 * total, f"{case}: {differing} zeros of {total} stand elsewhere than in one process"
        lines = running.log(tmp_path / case)
        assert [line["sparsity"] for line in lines] == [line["sparsity"] for line in running.log(alone / case)]
        assert running.differing(tmp_path / case, tmp_path / f"{case} stopped") == [], f"{case}, resumed"
        # A checkpoint in the middle opens as the model that it is.
        half = pruned(load_file(tmp_path / case / "checkpoint-6" / "model.safetensors"))
        share = sum(int((tensor == 0).sum()) for tensor in half.values()) / total
        assert share == pytest.approx(lines[5]["sparsity"], abs=1e-3)
