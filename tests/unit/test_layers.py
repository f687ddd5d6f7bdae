"""Compressed layers and attention: exact zeros under any optimizer, in what is stored and in what is computed."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_accel.compress.attention import quantized_attention, self_attention_modules
from sparse_accel.compress.compact import CompactLinear
from sparse_accel.compress.fakequant import QuantSpec, fake_quantize, scale_and_zero_point
from sparse_accel.compress.layers import (
    CompressedEmbedding,
    CompressedLinear,
    compressed_layers,
    effective_weight,
    restore_layer,
)
from sparse_accel.compress.plan import CompressionPlan, check_masks, install, prunable_parameters, request_masks
from sparse_accel.compress.ranges import Phase, begin_step, calibrating, end_calibration, end_step, set_phase
from tests.unit.qat_bert import alone, batch, bert, tutorial_plan

WEIGHT = QuantSpec(symmetric=True, signed=True)
ACTIVATION = QuantSpec()
RIGHT = QuantSpec(symmetric=True)

OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adamw with decay": lambda model: torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1),
    "sgd with momentum and decay": lambda model: torch.optim.SGD(
        model.parameters(), 0.05, momentum=0.9, weight_decay=0.1
    ),
}


def linear(sparse: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5))
    with torch.no_grad():
        model[0].weight[::2, 1::2] = 0.0 if sparse else 1.0
    return model


def installed(model: nn.Module, name: str = "0", mask: bool = False, **quantization: object) -> nn.Module:
    plan = CompressionPlan()
    if quantization:
        plan.add_quantization(name, **quantization)  # type: ignore[arg-type]
    if mask:
        plan.add_mask(name, "test")
    install(model, plan)
    return model


@pytest.mark.parametrize("quantized", [False, True], ids=["masks", "masks and QAT"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_masked_weights_stay_exactly_zero_for_fifty_steps(optimizer: str, quantized: bool) -> None:
    model = bert(sparsity=0.8, dropout=0.1)
    zeros = {name: model.get_parameter(name) == 0 for name in prunable_parameters(model)}
    plan = tutorial_plan(model, masks=True)
    install(model, plan)
    steps = OPTIMIZERS[optimizer](model)
    for step in range(50):
        set_phase(model, Phase.OBSERVE if quantized and step >= 5 else Phase.OFF)
        request_masks(model, plan.masked_by("test"), "nonzero")
        begin_step(model, step)
        if quantized and step == 5:
            with torch.no_grad(), calibrating(model):
                model(**batch(seed=step))
            end_calibration(model, alone)
        model(**batch(padding=2, seed=step)).loss.backward()
        steps.step()
        steps.zero_grad()
        end_step(model, alone)
    assert set(check_masks(model).values()) == {0}
    for name, pattern in zeros.items():
        stored = model.get_parameter(name)
        computed = effective_weight(model.get_submodule(name.removesuffix(".weight")))
        assert (stored[pattern] == 0).all(), name
        assert (computed[pattern] == 0).all(), name
        assert (stored[~pattern] != 0).all(), name
    for state in steps.state.values():
        assert all(torch.isfinite(value).all() for value in state.values() if isinstance(value, Tensor))


def test_a_broken_promise_is_counted() -> None:
    model = installed(linear(), mask=True)
    request_masks(model, ["0"], "nonzero")
    model(torch.randn(2, 6))
    assert check_masks(model) == {"0": 0}
    with torch.no_grad():
        model[0].weight[0, 1] = 1.0
        model[0].weight[2, 3] = -1.0
    assert check_masks(model) == {"0": 2}
    request_masks(model, ["0"], None)
    assert check_masks(model) == {}


def test_the_pattern_is_that_of_the_first_request_and_survives_saving() -> None:
    model = installed(linear(), mask=True)
    model(torch.randn(2, 6))
    assert model[0].mask.all()  # nobody asked yet
    request_masks(model, ["0"], "nonzero")
    model(torch.randn(2, 6))
    pattern = model[0].mask.clone()
    assert torch.equal(pattern, model[0].weight != 0)
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    model(torch.randn(2, 6))
    assert torch.equal(model[0].mask, pattern)

    resumed = installed(linear(sparse=False), mask=True)
    resumed(torch.randn(2, 6))
    assert not resumed[0].captured  # read on the host once, so a load must make it forget
    resumed.load_state_dict(model.state_dict())
    request_masks(resumed, ["0"], "nonzero")
    assert torch.equal(effective_weight(resumed[0]) != 0, pattern)


def test_a_released_mask_lets_weights_grow_again() -> None:
    model = installed(linear(), mask=True)
    request_masks(model, ["0"], "nonzero")
    model(torch.randn(2, 6)).sum().backward()
    assert (model[0].weight.grad[model[0].weight == 0] == 0).all()
    model.zero_grad()
    request_masks(model, ["0"], None)
    model(torch.randn(2, 6)).sum().backward()
    assert (model[0].weight.grad != 0).all()


def test_an_infinite_gradient_does_not_reach_a_pruned_weight() -> None:
    model = installed(linear(), mask=True)
    request_masks(model, ["0"], "nonzero")
    (model(torch.ones(2, 6)).sum() * torch.inf).backward()
    assert (model[0].weight.grad[~model[0].mask] == 0).all()


def test_a_quantized_linear_is_the_product_of_its_quantized_parts() -> None:
    model = installed(linear(), mask=True, weight=WEIGHT, inputs=(ACTIVATION,), output=ACTIVATION)
    request_masks(model, ["0"], "nonzero")
    set_phase(model, Phase.OBSERVE)
    x = torch.randn(3, 4, 6)
    stored = model[0].weight.detach()
    float_result = F.linear(x, stored, model[0].bias.detach())
    with torch.no_grad(), calibrating(model):
        assert torch.equal(model(x), float_result)
    end_calibration(model, alone)

    def on_grid(tensor: Tensor, range_of: Tensor, spec: QuantSpec) -> Tensor:
        return fake_quantize(tensor, *scale_and_zero_point(range_of.min(), range_of.max(), spec), spec)

    weight = on_grid(stored, stored, WEIGHT)
    product = F.linear(on_grid(x, x, ACTIVATION), weight, model[0].bias)
    assert torch.equal(model(x), on_grid(product, float_result, ACTIVATION))
    assert torch.equal(effective_weight(model[0]), weight)


def test_an_embedding_quantizes_looked_up_rows_on_the_grid_of_its_whole_table() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Embedding(10, 4, padding_idx=0))
    with torch.no_grad():
        plain[0].weight[9] = 50.0  # a row that is never looked up sets the range
        plain[0].weight[1:3, :2] = 0.0
    reference = copy.deepcopy(plain)
    model = installed(plain, mask=True, weight=WEIGHT)
    request_masks(model, ["0"], "nonzero")
    set_phase(model, Phase.OBSERVE)
    ids = torch.tensor([[0, 1, 2], [3, 3, 5]])
    rows = model(ids)
    table = reference[0].weight.detach()
    expected = fake_quantize(table, *scale_and_zero_point(table.min(), table.max(), WEIGHT), WEIGHT)
    assert torch.equal(rows, expected[ids])
    rows.sum().backward()
    reference(ids).sum().backward()
    pruned = reference[0].weight == 0
    assert torch.equal(model[0].weight.grad, reference[0].weight.grad.masked_fill(pruned, 0.0))
    assert model[0].padding_idx == 0


def test_compression_keeps_parameters_and_other_attributes() -> None:
    model = bert()
    before = dict(model.named_parameters())
    model.qa_outputs.note = "kept"
    install(model, tutorial_plan(model, masks=True))
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert model.qa_outputs.note == "kept"
    assert isinstance(model.qa_outputs, CompressedLinear)
    assert isinstance(model.bert.embeddings.word_embeddings, CompressedEmbedding)
    assert model.bert.embeddings.word_embeddings.padding_idx == 0
    assert set(compressed_layers(model)) == set(tutorial_plan(bert(), masks=True).modules) - {
        f"bert.encoder.layer.0.attention.self.{product}"
        for product in ("attention_scores_matmul", "context_layer_matmul")
    }


def test_a_compact_layer_keeps_its_bias_and_hooks_and_is_restored_with_the_weight_that_it_has_then() -> None:
    model, seen = linear(), []
    bias, pruned = model[0].bias, model[0].weight == 0
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    plan = CompressionPlan()
    plan.add_mask("0", "test", lasting=True)
    plan.make_compact("0")
    install(model, plan)
    assert type(model[0]) is CompactLinear
    steps = OPTIMIZERS["adamw with decay"](model)
    for _ in range(3):
        model(torch.randn(2, 6)).square().sum().backward()
        steps.step()
        steps.zero_grad()
    trained = model[0].effective_weight().detach()
    restore_layer(model[0])
    assert type(model[0]) is nn.Linear
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias"]
    assert model[0].bias is bias
    assert torch.equal(model[0].weight, trained)
    assert (trained[pruned] == 0).all()
    assert (trained[~pruned] != linear()[0].weight[~pruned]).all()
    assert len(seen) == 3


def attention_inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, 2, 5, 8, generator=generator) for _ in range(3))
    mask = torch.ones(3, 1, 5, 5, dtype=torch.bool)
    mask[1, ..., 3:] = False
    return query, key, value, mask if dtype is torch.bool else torch.zeros(mask.shape).masked_fill(~mask, -1e30)


def attention_module(phase: Phase) -> nn.Module:
    model = bert()
    install(model, tutorial_plan(model))
    set_phase(model, phase)
    return model.bert.encoder.layer[0].attention.self.eval()


@pytest.mark.parametrize("mask_type", [torch.bool, torch.float32], ids=["bool mask", "additive mask"])
def test_attention_while_quantization_is_off_is_plain_attention(mask_type: torch.dtype) -> None:
    query, key, value, mask = attention_inputs(mask_type)
    module = attention_module(Phase.OFF)
    fused, _ = quantized_attention(module, query, key, value, mask, scaling=0.3)
    with calibrating(module):
        explicit, probabilities = quantized_attention(module, query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(fused, explicit)
    assert probabilities is not None
    assert (probabilities[1, ..., 3:] == 0).all()
    assert fused.shape == (3, 5, 2, 8)


def test_attention_quantizes_both_products_where_sparseml_does() -> None:
    query, key, value, mask = attention_inputs()
    module = attention_module(Phase.FROZEN)
    with torch.no_grad(), calibrating(module):
        quantized_attention(module, query, key, value, mask)
    end_calibration(module, alone)

    def on_grid(tensor: Tensor, range_of: Tensor, spec: QuantSpec) -> Tensor:
        return fake_quantize(tensor, *scale_and_zero_point(range_of.min(), range_of.max(), spec), spec)

    scaling = 8**-0.5
    float_scores = query @ key.transpose(2, 3)
    float_probabilities = torch.softmax(float_scores * scaling + mask, dim=-1)
    scores = on_grid(query, query, ACTIVATION) @ on_grid(key, key, RIGHT).transpose(2, 3)
    scores = on_grid(scores, float_scores, ACTIVATION)  # before scaling
    probabilities = torch.softmax(scores * scaling + mask, dim=-1)
    context = on_grid(probabilities, float_probabilities, ACTIVATION) @ on_grid(value, value, RIGHT)
    expected = on_grid(context, float_probabilities @ value, ACTIVATION).transpose(1, 2)
    found, _ = quantized_attention(module, query, key, value, mask)
    torch.testing.assert_close(found, expected)
    assert module.attention_scores_matmul.right_quantizer.zero_point == 128


def test_attention_serves_fewer_key_heads_and_causal_models() -> None:
    query, key, value, _ = attention_inputs()
    query = torch.cat([query, query + 1], dim=1)
    module = attention_module(Phase.OFF)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)
    fused, _ = quantized_attention(module, query, key, value, None, is_causal=True)
    with calibrating(module):
        explicit, _ = quantized_attention(module, query, key, value, None, is_causal=True)
    torch.testing.assert_close(fused, expected)
    torch.testing.assert_close(explicit, expected)


def test_dropout_of_probabilities_is_applied_in_training() -> None:
    query, key, value, mask = attention_inputs()
    module = attention_module(Phase.FROZEN).train()
    with torch.no_grad(), calibrating(module):
        quantized_attention(module, query, key, value, mask)
    end_calibration(module, alone)
    _, probabilities = quantized_attention(module, query, key, value, mask, dropout=0.5)
    assert probabilities is not None
    assert 0.3 < float((probabilities == 0).float().mean()) < 0.8


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta", "electra", "albert"])
def test_self_attention_is_found_in_the_usual_encoders(kind: str) -> None:
    import transformers

    name, shape = {
        "bert": (
            "Bert",
            {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
        ),
        "roberta": (
            "Roberta",
            {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
        ),
        "electra": (
            "Electra",
            {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
        ),
        "albert": (
            "Albert",
            {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
        ),
        "distilbert": ("DistilBert", {"dim": 16, "hidden_dim": 16, "n_layers": 2, "n_heads": 2}),
    }[kind]
    config = getattr(transformers, f"{name}Config")(vocab_size=20, max_position_embeddings=16, **shape)
    model = getattr(transformers, f"{name}ForQuestionAnswering")(config)
    # ALBERT has one layer that runs twice.
    assert len(self_attention_modules(model)) == (1 if kind == "albert" else 2)
