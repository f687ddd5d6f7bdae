"""Attention that is fused while it is quantized: operands on their grids, probabilities with a range that is known."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from sparse_accel.compress.attention import CONTEXT_MATMUL, SCORES_MATMUL, packed_attention, quantized_attention
from sparse_accel.compress.fakequant import QuantSpec
from sparse_accel.compress.plan import CompressionPlan, install, set_phase
from sparse_accel.compress.ranges import Phase, begin_step, calibrating, end_calibration, end_step, quantizers
from sparse_accel.errors import ModelError
from sparse_accel.packing import BOUNDS, LONGEST
from tests.unit.qat_bert import alone, batch, bert, tutorial_plan

ATTENTION = "bert.encoder.layer.0.attention.self"
PROBABILITIES = f"{ATTENTION}.{CONTEXT_MATMUL}.left_quantizer"


def fused_model() -> Any:
    model = bert()
    plan = tutorial_plan(model)
    assert plan.fuse_attention() == [ATTENTION]
    install(model, plan)
    set_phase(model, Phase.OBSERVE)
    return model


def train_a_step(model: Any, step: int) -> None:
    begin_step(model, step)
    with calibrating(model), torch.no_grad():
        model.eval()(**batch(seed=step))
    end_calibration(model, alone)
    model.train()(**batch(seed=step)).loss.backward()
    end_step(model, alone)


def test_the_range_of_probabilities_is_known_and_never_moves() -> None:
    model = fused_model()
    for step in range(3):
        train_a_step(model, step)
        found = quantizers(model)[PROBABILITIES]
        assert (found.min_val.item(), found.max_val.item(), found.zero_point.item()) == (0.0, 1.0, 0)
        assert found.scale.item() == pytest.approx(1 / 255)
    others = [q for name, q in quantizers(model).items() if name.startswith(ATTENTION) and name != PROBABILITIES]
    assert len(others) >= 4 and all(q.min_val < q.max_val for q in others)
    assert f"{ATTENTION}.{SCORES_MATMUL}.output_quantizer" not in quantizers(model)


@pytest.mark.parametrize("is_packed", [False, True])
def test_training_is_fused_attention_of_operands_on_their_grids(is_packed: bool) -> None:
    model = fused_model()
    train_a_step(model, 0)
    module = model.get_submodule(ATTENTION)
    torch.manual_seed(1)
    query, key, value = torch.randn(3, 1, 2, 8, 8).unbind()
    more: dict[str, Any] = {BOUNDS: torch.tensor([0, 5, 8], dtype=torch.int32), LONGEST: 5} if is_packed else {}
    found, _ = quantized_attention(module, query, key, value, None, 0.3, 0.0, **more)
    scores, context = getattr(module, SCORES_MATMUL), getattr(module, CONTEXT_MATMUL)
    q, k, v = (
        quantizer.fake_quantize(x)
        for quantizer, x in (
            (scores.left_quantizer, query),
            (scores.right_quantizer, key),
            (context.right_quantizer, value),
        )
    )
    bounds = more.get(BOUNDS, torch.tensor([0, 8], dtype=torch.int32))
    expected = packed_attention(q, k, v, bounds, 8, 0.0, 0.3)
    torch.testing.assert_close(
        found, context.output_quantizer.fake_quantize(expected) if context.output_quantizer else expected
    )


def test_evaluation_rounds_probabilities_as_the_exported_graph_does() -> None:
    model = fused_model()
    train_a_step(model, 0)
    module = model.eval().get_submodule(ATTENTION)
    seen: list[torch.Tensor] = []
    getattr(module, CONTEXT_MATMUL).left_quantizer.register_forward_hook(lambda _, args, output: seen.append(output))
    with torch.no_grad():
        model(**batch())
    (probabilities,) = seen
    steps = probabilities * 255
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)


def test_a_plan_with_fused_attention_is_read_back_as_it_was() -> None:
    plan = tutorial_plan(bert())
    plan.fuse_attention()
    read = CompressionPlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert read == plan
    assert read.modules[f"{ATTENTION}.{CONTEXT_MATMUL}"].inputs[0].fixed_range == (0.0, 1.0)
    assert "fixed_range" not in QuantSpec().to_json()


def test_a_range_without_zero_is_refused() -> None:
    with pytest.raises(ModelError, match="holds 0"):
        QuantSpec.from_json({"fixed_range": [0.5, 1.0]})


def test_a_plan_without_products_has_nothing_to_fuse() -> None:
    assert CompressionPlan().fuse_attention() == []
