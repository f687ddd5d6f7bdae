"""Whole runs against numbers that SparseML gives, beyond what the unit tests of each part compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from rich.console import Console
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForQuestionAnswering

from sparse_accel.compress.plan import CompressionPlan
from sparse_accel.modifiers.gradual_pruning import GradualPruning
from sparse_accel.recipe.schema import Recipe
from sparse_accel.runtime import setup, tracking
from sparse_accel.runtime.option_parsing import load_options
from sparse_accel.runtime.run import prepare
from sparse_accel.timeline import Clock
from tests import running
from tests.tiny import tiny_bert

# 64 rows, 16 a step, nothing accumulated: 4 steps an epoch, each a single forward, as SparseML observes ranges.
# Quantization from step 4, ranges fixed from step 8, 12 steps in all.
FIRST_OBSERVED, FIRST_FROZEN = 4, 8

LAYER = "bert.encoder.layer.0"
EMBEDDINGS = [f"bert.embeddings.{kind}_embeddings" for kind in ("word", "position", "token_type")]
LINEARS = [f"{LAYER}.attention.self.{kind}" for kind in ("query", "key", "value")]
LINEARS += [f"{LAYER}.{part}.dense" for part in ("attention.output", "intermediate", "output")] + ["qa_outputs"]
PRODUCTS = [f"{LAYER}.attention.self.{name}_matmul" for name in ("attention_scores", "context_layer")]

# What SparseML fake-quantizes in a one-layer BERT by the transfer recipe, and on which grid.
SYMMETRIC_INT8 = [f"{name}.weight_quantizer" for name in (*EMBEDDINGS, *LINEARS)]
SYMMETRIC_UINT8 = [f"{name}.right_quantizer" for name in PRODUCTS]
AFFINE_UINT8 = [
    *(f"{name}.output_quantizer" for name in (*EMBEDDINGS, *PRODUCTS)),
    *(f"{name}.input_quantizer" for name in LINEARS),
    *(f"{name}.left_quantizer" for name in PRODUCTS),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The tiny world with a student of one layer and no dropout."""
    folder = tmp_path_factory.mktemp("world")
    student = tiny_bert(folder / "one_layer", seed=3, layers=1, dropout=0.0)
    options = running.tiny_world(folder) | {
        "model_name_or_path": str(student),
        "do_eval": None,
        "validation_file": None,
    }
    return options | {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}


@pytest.fixture(scope="module")
def quantized(world: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of the shipped transfer recipe, with a checkpoint after every step."""
    return running.run(world, tmp_path_factory.mktemp("run") / "out", save_steps=1)


def ranges(folder: Path) -> dict[str, torch.Tensor]:
    """`<quantizer>.<number>` -> fp64."""
    return {name: tensor.double() for name, tensor in load_file(folder / "quantization.safetensors").items()}


def test_the_transfer_recipe_leaves_26_quantizers_in_a_one_layer_bert(quantized: Path) -> None:
    expected = sorted([*SYMMETRIC_INT8, *SYMMETRIC_UINT8, *AFFINE_UINT8])
    assert len(expected) == 26
    assert sorted(name.removesuffix(".scale") for name in ranges(quantized) if name.endswith(".scale")) == expected
    plan = CompressionPlan.load(quantized / "compression_plan.json")
    assert plan.num_quantizers == 26
    assert sorted(name for name, part in plan.modules.items() if part.mask) == sorted(LINEARS)
    assert [line["phase"] for line in running.log(quantized)] == ["float"] * 4 + ["observing"] * 4 + ["frozen"] * 4


@pytest.mark.parametrize("name", SYMMETRIC_INT8 + SYMMETRIC_UINT8)
def test_symmetric_scales_are_half_the_grid_over_the_larger_end_of_the_range(quantized: Path, name: str) -> None:
    found = ranges(quantized)
    low, high = found[f"{name}.min_val"], found[f"{name}.max_val"]
    assert low < 0 < high
    assert found[f"{name}.scale"].item() == pytest.approx(max(-low.item(), high.item()) / 127.5, rel=1e-6)
    assert found[f"{name}.zero_point"].item() == (0 if name in SYMMETRIC_INT8 else 128)


@pytest.mark.parametrize("name", AFFINE_UINT8)
def test_affine_scales_spread_the_range_and_zero_over_255_steps(quantized: Path, name: str) -> None:
    found = ranges(quantized)
    low, high = min(found[f"{name}.min_val"].item(), 0.0), max(found[f"{name}.max_val"].item(), 0.0)
    assert found[f"{name}.scale"].item() == pytest.approx((high - low) / 255, rel=1e-6)
    assert found[f"{name}.zero_point"].item() == pytest.approx(-low / ((high - low) / 255), abs=0.5 + 1e-3)
    # Probabilities begin at 0 and end at 1 at most: the left operand of the second product has no negative half.
    if name == f"{PRODUCTS[1]}.left_quantizer":
        assert found[f"{name}.zero_point"] == 0 and high <= 1.0


@pytest.mark.parametrize("layer", EMBEDDINGS + LINEARS)
def test_a_weights_range_is_the_moving_average_over_the_observed_forwards(quantized: Path, layer: str) -> None:
    """The first forward sets it, each later one moves it by 0.01 of the way; checkpoint-k holds the weights of forward
    k, counted from 0."""
    low = high = 0.0
    for step in range(FIRST_OBSERVED, FIRST_FROZEN):
        weight = load_file(quantized / f"checkpoint-{step}" / "model.safetensors")[f"{layer}.weight"].double()
        seen_low, seen_high = weight.min().item(), weight.max().item()
        is_first = step == FIRST_OBSERVED
        low = seen_low if is_first else low + 0.01 * (seen_low - low)
        high = seen_high if is_first else high + 0.01 * (seen_high - high)
    found = ranges(quantized)
    assert found[f"{layer}.weight_quantizer.min_val"].item() == pytest.approx(low, rel=1e-6)
    assert found[f"{layer}.weight_quantizer.max_val"].item() == pytest.approx(high, rel=1e-6)


def test_from_the_observers_epoch_on_no_range_moves_the_heads_neither(quantized: Path) -> None:
    """SparseML's stop did not reach a submodule that is itself a Linear (qa_outputs); what its users meant does."""
    before, after = (load_file(quantized / f"checkpoint-{step}" / "model.safetensors") for step in (FIRST_FROZEN, 12))
    moving = load_file(quantized / f"checkpoint-{FIRST_FROZEN - 1}" / "model.safetensors")
    numbers = [key for key in before if key.endswith((".min_val", ".max_val", ".scale", ".zero_point"))]
    assert len(numbers) == 4 * 26
    assert [key for key in numbers if not before[key].equal(after[key])] == []
    observed = [f"{name}.{part}_quantizer.max_val" for name in LINEARS for part in ("weight", "input")]
    assert [key for key in observed if moving[key].equal(before[key])] == []
    assert not before["qa_outputs.weight"].equal(after["qa_outputs.weight"])


@pytest.mark.parametrize("hardness", [0.25, 1.0])
def test_the_loss_of_the_first_step_is_sparsemls_sum_over_all_positions(
    world: dict[str, Any], tmp_path: Path, hardness: float
) -> None:
    """(1 - h) * task + h * mean over keys of T^2 * KL / rows, padding included, of the two models as they were loaded."""
    options = world | {
        "recipe": "question_answering/pruned",
        "recipe_args": json.dumps({"num_epochs": 3, "distill_hardness": hardness, "distill_temperature": 3.0}),
    }
    options |= {"distill_include_padding": True, "max_steps": 1}
    out = running.run(options, tmp_path / "out")
    batch = first_batch(options, tmp_path / "other")
    assert (batch["attention_mask"] == 0).any()

    folders = (world["model_name_or_path"], world["distill_teacher"])
    student, teacher = (AutoModelForQuestionAnswering.from_pretrained(folder).eval() for folder in folders)
    with torch.no_grad():
        ours, theirs = student(**batch), teacher(**batch)
    divergence = sum(
        9.0
        * F.kl_div((ours[key] / 3.0).log_softmax(-1), (theirs[key] / 3.0).softmax(-1), reduction="sum")
        / len(ours[key])
        for key in ("start_logits", "end_logits")
    )
    expected = (1 - hardness) * ours.loss + hardness * divergence / 2
    assert running.log(out)[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


def first_batch(options: dict[str, Any], output_dir: Path) -> dict[str, torch.Tensor]:
    """What the first step of the command is given."""
    words = {name: str(value) for name, value in (options | {"output_dir": output_dir}).items() if value is not None}
    parsed = load_options("question_answering", words)
    try:
        screen = tracking.Screen(Console(), is_shown=False, use_bar=False)
        session = prepare(parsed, *setup.start_accelerator(parsed), screen).session
        for tracker in session.trackers:
            tracker.close()
        (micro_batch,) = next(session.loader.steps(Clock(0, session.loader.steps_per_epoch), 1))
        return micro_batch.inputs
    finally:
        AcceleratorState._reset_state(True)


def test_a_resumed_run_goes_on_in_the_middle_of_its_schedule(world: dict[str, Any], tmp_path: Path) -> None:
    """Stopped at step 8 of 16, SparseML began again at 1.75e-4; half of the line is 8.75e-5."""
    options = world | {
        "recipe": "question_answering/pruned",
        "recipe_args": "num_epochs=4",
        "distill_teacher": "disable",
    }
    out = running.run(options, tmp_path / "out", max_steps=8)
    assert running.log(out)[0]["learning_rate"] == 1.75e-4
    running.run(options, out, max_steps=9)
    lines = running.log(out)
    assert len(lines) == 9 and lines[8]["learning_rate"] == pytest.approx(8.75e-5, rel=1e-12)


# Gradual pruning: fields, steps an epoch, epochs, and what SparseML's own modifier applied at each step of a run (None: not
# yet) when it was carried out; its weight had 1,000 entries, of which the same share was zero after the step.
APPLIED = {
    "linear to the run's end": (
        "init_sparsity: 0.1, final_sparsity: 0.5, start_epoch: 0.0, end_epoch: 1.0, update_frequency: -1, inter_func: linear",
        (4, 1),
        [0.1, 0.2, 0.30000000000000004, 0.4],
    ),
    "cubic, every half epoch": (
        "init_sparsity: 0.05, final_sparsity: 0.8, start_epoch: 0.5, end_epoch: 3.0, update_frequency: 0.5",
        (4, 4),
        [None] * 2
        + [0.05] * 2
        + [0.41599999999999987] * 2
        + [0.6380000000000001] * 2
        + [0.752] * 2
        + [0.794] * 2
        + [0.8] * 4,
    ),
    "inverse cubic, a frequency between steps": (
        "init_sparsity: 0.2, final_sparsity: 0.9, start_epoch: 0.4, end_epoch: 2.4, update_frequency: 0.3, "
        "inter_func: inverse_cubic",
        (5, 3),
        [None] * 2
        + [0.2] * 2
        + [0.2501775632942109] * 2
        + [0.3095971342887755] * 2
        + [0.38423559019034587] * 2
        + [0.4906375166501988] * 2
        + [0.9] * 3,
    ),
    "cubic, at every step": (
        "init_sparsity: 0.3, final_sparsity: 0.6, start_epoch: 0.0, end_epoch: 2.0, update_frequency: 0.25",
        (4, 3),
        [
            0.3,
            0.39902343749999997,
            0.47343749999999996,
            0.5267578125,
            0.5625,
            0.5841796875,
            0.5953124999999999,
            0.5994140625,
        ]
        + [0.6] * 4,
    ),
}


@pytest.mark.parametrize("tag", ["GMPruningModifier", "MagnitudePruningModifier", "GlobalMagnitudePruningModifier"])
@pytest.mark.parametrize("case", APPLIED)
def test_the_sparsity_of_each_step_is_sparsemls_but_the_last_steps_which_arrives(case: str, tag: str) -> None:
    fields, (steps_per_epoch, epochs), applied = APPLIED[case]
    recipe = Recipe.load(f"m_modifiers:\n  - !{tag} {{{fields}}}\n")
    (modifier,) = recipe.modifiers
    assert isinstance(modifier, GradualPruning) and isinstance(modifier.final_sparsity, float)
    clocks = [Clock(step, steps_per_epoch) for step in range(steps_per_epoch * epochs)]
    found = [modifier.course(clock, float(epochs), modifier.final_sparsity) for clock in clocks]
    assert found[:-1] == [share if share is None else pytest.approx(share, rel=1e-14) for share in applied[:-1]]
    assert found[-1] == modifier.final_sparsity, "SparseML never arrives where the run ends with the schedule"
    assert [share is None or round(1000 * share) for share in found[:-1]] == [
        share is None or round(1000 * share) for share in applied[:-1]
    ]
