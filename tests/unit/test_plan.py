"""The plan: data that installs, refuses, folds and survives a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparse_accel.compress.fakequant import QuantSpec, fake_quantize
from sparse_accel.compress.plan import (
    CompressionPlan,
    Phase,
    check_masks,
    fold,
    install,
    needs_quantized_attention,
    prunable_parameters,
    quantization_state,
    request_masks,
    set_phase,
)
from sparse_accel.compress.ranges import calibrating, end_step
from sparse_accel.errors import ModelError, RecipeError
from tests.unit.qat_bert import alone, batch, bert, tutorial_plan

WEIGHT = QuantSpec(symmetric=True, signed=True)
AFFINE_WEIGHT = QuantSpec(signed=True)
ACTIVATION = QuantSpec()


def quantized_bert() -> nn.Module:
    """A sparse tiny BERT, masked, quantized and calibrated."""
    model = bert(sparsity=0.8)
    plan = tutorial_plan(model, masks=True)
    install(model, plan)
    set_phase(model, Phase.FROZEN)
    request_masks(model, plan.masked_by("test"), "nonzero")
    model.eval()
    with torch.no_grad(), calibrating(model):
        model(**batch())
        end_step(model, alone)
    return model


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    plan = tutorial_plan(bert(), masks=True)
    plan.save(tmp_path / "plan.json")
    loaded = CompressionPlan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert loaded.masked_by("test") == ()  # who asked for a mask is a matter of the run
    assert '"bert.encoder.layer.0.attention.self.query"' in (tmp_path / "plan.json").read_text()


def test_compact_weights_are_in_the_file_of_a_run_and_not_in_what_it_publishes(tmp_path: Path) -> None:
    plan = CompressionPlan()
    for name in ("a", "b"):
        plan.add_mask(name, "test", lasting=True)
    plan.add_quantization("a", WEIGHT)
    plan.make_compact("a")
    plan.save(tmp_path / "plan.json")
    loaded = CompressionPlan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert (loaded.modules["a"].compact, loaded.modules["b"].compact) == (True, False)
    assert repr(loaded) == "CompressionPlan(2 masks (1 compact), 1 quantizers)"
    published = plan.with_whole_weights()
    assert "compact" not in str(published.to_json())
    assert published.modules["a"].weight == WEIGHT
    assert not any(compression.compact for compression in plan.masks_only().modules.values())
    (tmp_path / "old.json").write_text('{"format": 1, "modules": {"a": {"mask": true}}}')
    assert not CompressionPlan.load(tmp_path / "old.json").modules["a"].compact


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot read the compression plan"),
        ("[]", "is a JSON object"),
        ('{"format": 99, "modules": {}}', "format is 99"),
        ('{"format": 1, "modules": {"a": {"masked": true}}}', "no entry 'masked'; did you mean 'mask'"),
        ('{"format": 1, "modules": {"a": {"weight": {"bits": 99}}}}', "2 to 16 bits"),
        ('{"format": 1, "modules": {"a": {"compact": true}}}', "compact without a mask"),
        ('{"format": 1, "modules": {"a": 3}}', "entry of 'a' is not a mapping"),
    ],
)
def test_a_bad_plan_file_is_refused_with_its_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ModelError, match=message) as caught:
        CompressionPlan.load(path)
    assert "plan.json" in str(caught.value)


def test_a_missing_plan_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere\.json"):
        CompressionPlan.load(tmp_path / "nowhere.json")


def test_masks_are_found_again_by_their_owner() -> None:
    plan = CompressionPlan()
    plan.add_mask("b", "first")
    plan.add_mask("a", "second")
    plan.add_mask("a", "first")
    plan.add_mask("b", "first")
    plan.add_quantization("a", WEIGHT)
    assert plan.masked_by("first") == ("b", "a")
    assert plan.masked_by("second") == ("a",)
    assert plan.masked_by("nobody") == ()
    assert plan.modules["a"].mask
    assert plan.modules["a"].weight == WEIGHT


def test_two_modifiers_cannot_quantize_one_module() -> None:
    plan = CompressionPlan()
    plan.add_quantization("a", WEIGHT)
    with pytest.raises(RecipeError, match="a is quantized twice"):
        plan.add_quantization("a", output=ACTIVATION)


@pytest.mark.parametrize(
    ("module", "quantization", "message"),
    [
        ("bert.encoder.layer.0.attention.self.qeury", {"weight": WEIGHT}, r"did you mean '.*self\.query'"),
        ("bert.encoder.layer.0.intermediate.attention_scores_matmul", {"output": ACTIVATION}, "does not have"),
        ("bert.embeddings.dropout", {"output": ACTIVATION}, r"\(Dropout\) cannot be masked or quantized"),
        ("bert.embeddings.LayerNorm", {"weight": WEIGHT}, "output quantized, not its weight"),
        ("bert.embeddings.word_embeddings", {"inputs": (ACTIVATION,)}, "takes token ids"),
        ("bert.embeddings.word_embeddings", {"weight": QuantSpec(channel_axis=0)}, "one scale for its table"),
        ("qa_outputs", {"inputs": (QuantSpec(channel_axis=1),)}, "scale per channel"),
        ("qa_outputs", {"inputs": (ACTIVATION, ACTIVATION)}, "has one input, not 2"),
        ("bert.encoder.layer.0.attention.self.context_layer_matmul", {"inputs": (ACTIVATION,)}, "two input specs"),
    ],
)
def test_what_cannot_be_installed_is_refused_and_leaves_the_model_alone(
    module: str, quantization: dict[str, Any], message: str
) -> None:
    model = bert()
    plan = CompressionPlan()
    plan.add_mask("bert.encoder.layer.0.intermediate.dense", "test")
    plan.add_quantization(module, **quantization)
    with pytest.raises(ModelError, match=message):
        install(model, plan)
    assert type(model.bert.encoder.layer[0].intermediate.dense) is nn.Linear
    assert list(model.state_dict()) == list(bert().state_dict())


@pytest.mark.parametrize("name", ["bert.embeddings.word_embeddings", "bert.embeddings.LayerNorm"])
def test_only_linear_layers_become_compact(name: str) -> None:
    model, plan = bert(), CompressionPlan()
    plan.add_mask(name, "test", lasting=True)
    plan.make_compact(name)
    with pytest.raises(ModelError, match=rf"{name} \(\w+\) cannot be compact: only nn.Linear can"):
        install(model, plan)


def test_a_plan_cannot_be_installed_twice() -> None:
    model = bert()
    install(model, tutorial_plan(model))
    with pytest.raises(ModelError, match="compressed already; fold"):
        install(model, tutorial_plan(bert()))


def tied() -> nn.Module:
    model = nn.ModuleDict({"table": nn.Embedding(7, 3), "decoder": nn.Linear(3, 7, bias=False)})
    model["decoder"].weight = model["table"].weight
    return model


def test_one_weight_under_two_modules_gets_one_treatment() -> None:
    masked_once = CompressionPlan()
    masked_once.add_mask("decoder", "test")
    with pytest.raises(ModelError, match="table and decoder share one weight"):
        install(tied(), masked_once)
    two_grids = CompressionPlan()
    two_grids.add_quantization("table", WEIGHT)
    two_grids.add_quantization("decoder", AFFINE_WEIGHT)
    with pytest.raises(ModelError, match="table and decoder share one weight"):
        install(tied(), two_grids)
    agreed, model = CompressionPlan(), tied()
    for name in ("table", "decoder"):
        agreed.add_quantization(name, WEIGHT)
        agreed.add_mask(name, "test")
    install(model, agreed)
    assert model["decoder"].weight is model["table"].weight


def test_prunable_parameters_are_matrices_of_layers_without_embeddings() -> None:
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 3))
            self.bias = nn.Parameter(torch.ones(3))

    model = nn.ModuleDict({"gpt": Conv1D(), "conv": nn.Conv2d(1, 1, 2), "norm": nn.LayerNorm(3), "tied": tied()})
    assert prunable_parameters(model) == ["gpt.weight", "conv.weight"]
    layer = "bert.encoder.layer.0"
    assert prunable_parameters(bert()) == [
        f"{layer}.attention.self.query.weight",
        f"{layer}.attention.self.key.weight",
        f"{layer}.attention.self.value.weight",
        f"{layer}.attention.output.dense.weight",
        f"{layer}.intermediate.dense.weight",
        f"{layer}.output.dense.weight",
        "qa_outputs.weight",
    ]
    installed = bert()
    install(installed, tutorial_plan(installed, masks=True))
    assert prunable_parameters(installed) == prunable_parameters(bert())


def test_parameter_names_stay_and_a_checkpoint_goes_back_and_forth() -> None:
    model = quantized_bert()
    other = bert(seed=5)
    install(other, tutorial_plan(other, masks=True))
    other.load_state_dict(model.state_dict())
    set_phase(other, Phase.FROZEN)
    request_masks(other, tutorial_plan(bert(), masks=True).masked_by("test"), "nonzero")
    other.eval()
    assert torch.equal(other(**batch()).start_logits, model(**batch()).start_logits)


def test_folding_leaves_a_plain_model_with_exact_zeros() -> None:
    model = quantized_bert()
    reference = bert(sparsity=0.8)
    hidden = model.qa_outputs
    with torch.no_grad():  # what a sloppy optimizer would leave behind
        hidden.weight[~hidden.mask] = 1e-3
    assert check_masks(model)["qa_outputs"] > 0
    fold(model)
    assert list(model.state_dict()) == list(reference.state_dict())
    assert [type(m) for m in model.modules()] == [type(m) for m in reference.modules()]
    for name, parameter in reference.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
    assert not model._forward_pre_hooks
    assert quantization_state(model) == {}
    assert repr(model) == repr(reference)
    install(model, tutorial_plan(model, masks=True))  # and it can begin again
    assert model(**batch()).start_logits.shape == (4, 8)


def test_folding_can_write_the_quantized_weight() -> None:
    model = quantized_bert()
    quantizer = model.qa_outputs.weight_quantizer
    expected = fake_quantize(model.qa_outputs.weight.detach(), quantizer.scale, quantizer.zero_point, quantizer.spec)
    fold(model, bake_quantization=True)
    assert torch.equal(model.qa_outputs.weight, expected)


def test_a_mask_that_was_asked_for_but_not_yet_served_is_folded_in() -> None:
    model = bert(sparsity=0.5)
    plan = tutorial_plan(model, masks=True)
    install(model, plan)
    request_masks(model, plan.masked_by("test"), "nonzero")
    fold(model)
    assert torch.equal(model.qa_outputs.weight, bert(sparsity=0.5).qa_outputs.weight)


def test_masks_are_requested_of_masked_modules_only() -> None:
    model = bert()
    plan = CompressionPlan()
    plan.add_mask("qa_outputs", "test")
    install(model, plan)
    with pytest.raises(ModelError, match="'qa_output' has no mask; did you mean 'qa_outputs'"):
        request_masks(model, ["qa_output"], "nonzero")
    with pytest.raises(ValueError, match="nonzero"):
        request_masks(model, ["qa_outputs"], "largest")


def test_only_quantized_products_need_the_attention_interface() -> None:
    masks_only = CompressionPlan()
    masks_only.add_mask("qa_outputs", "test")
    assert not needs_quantized_attention(masks_only)
    assert needs_quantized_attention(tutorial_plan(bert()))
