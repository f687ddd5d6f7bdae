"""QuantizationModifier: SparseML's counts and grids in both spellings, its phases, and what it refuses."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from sparse_accel.compress.fakequant import QuantSpec
from sparse_accel.compress.plan import CompressionPlan, install
from sparse_accel.compress.ranges import Phase, quantizers
from sparse_accel.errors import RecipeError, TargetError
from sparse_accel.modifiers.quantization import QuantizationModifier
from sparse_accel.timeline import Clock
from tests.unit.qat_bert import TUTORIAL, bert

NO_FLAGS = {"submodules": TUTORIAL["submodules"]}
INT8 = QuantSpec(symmetric=True, signed=True)
UINT8 = QuantSpec()
UINT8_SYMMETRIC = QuantSpec(symmetric=True)
AFFINE_INT8 = QuantSpec(signed=True)

SELF = "bert.encoder.layer.0.attention.self"
TABLES = [f"bert.embeddings.{kind}_embeddings" for kind in ("word", "position", "token_type")]


def planned(model: nn.Module | None = None, **fields: Any) -> CompressionPlan:
    plan = CompressionPlan()
    QuantizationModifier(**fields).plan(plan, bert() if model is None else model)
    return plan


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        pytest.param({}, 26, id="the tutorial's settings"),
        pytest.param({"exclude_module_types": None}, 29, id="layer norms too"),
        pytest.param({"quantize_embedding_activations": False}, 23, id="without the embeddings' outputs"),
        pytest.param({"quantize_embeddings": 0}, 23, id="without the embeddings' weights"),
        pytest.param({"submodules": ["bert.encoder"]}, 21, id="the encoder only"),
        pytest.param({"tensorrt": True}, 23, id="tensorrt"),
        pytest.param({"activation_bits": 4, "weight_bits": 4}, 26, id="4 bits"),
    ],
)
def test_as_many_tensors_are_quantized_as_by_sparseml(changes: dict[str, Any], count: int) -> None:
    model = bert()
    plan = planned(model, **TUTORIAL | changes)
    assert plan.num_quantizers == count
    install(model, plan)
    assert len(quantizers(model)) == count


def test_without_any_flag_every_output_is_quantized() -> None:
    assert planned(**NO_FLAGS).num_quantizers == 36


def test_a_classifier_with_its_pooler_has_28() -> None:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(vocab_size=50, max_position_embeddings=20, **shape))
    submodules = ["bert.embeddings", "bert.encoder", "bert.pooler", "classifier"]
    assert planned(model, **TUTORIAL | {"submodules": submodules}).num_quantizers == 28


def test_the_tutorials_specs_module_by_module() -> None:
    modules = planned(**TUTORIAL).modules
    for name in TABLES:
        assert (modules[name].weight, modules[name].inputs, modules[name].output) == (INT8, (), UINT8)
    linears = [f"{SELF}.query", f"{SELF}.key", f"{SELF}.value", "qa_outputs"]
    linears += [f"bert.encoder.layer.0.{name}.dense" for name in ("attention.output", "intermediate", "output")]
    for name in linears:
        assert (modules[name].weight, modules[name].inputs, modules[name].output) == (INT8, (UINT8,), None)
    products = [f"{SELF}.attention_scores_matmul", f"{SELF}.context_layer_matmul"]
    for name in products:
        found = modules[name]
        assert (found.weight, found.inputs, found.output) == (None, (UINT8, UINT8_SYMMETRIC), UINT8)
    assert set(modules) == {*TABLES, *linears, *products}


def test_embeddings_outside_the_submodules_are_affine_and_their_outputs_float() -> None:
    modules = planned(**TUTORIAL | {"submodules": ["bert.encoder"]}).modules
    assert [(modules[name].weight, modules[name].output) for name in TABLES] == [(AFFINE_INT8, None)] * 3
    assert "qa_outputs" not in modules


def test_tensorrt_is_symmetric_and_signed_throughout() -> None:
    modules = planned(**TUTORIAL | {"tensorrt": 1}).modules
    specs = {spec for c in modules.values() for spec in (c.weight, *c.inputs, c.output) if spec is not None}
    assert specs == {INT8}


def test_fewer_bits_and_a_faster_average_reach_every_spec() -> None:
    changes = {"activation_bits": 4, "weight_bits": 4, "activation_qconfig_kwargs": {"averaging_constant": 0.1}}
    modules = planned(**TUTORIAL | changes).modules
    weight, (activation,) = modules["qa_outputs"].weight, modules["qa_outputs"].inputs
    assert weight is not None
    assert (weight.quant_min, weight.quant_max, weight.averaging_constant) == (-8, 7, 0.01)
    assert (activation.quant_min, activation.quant_max, activation.averaging_constant) == (0, 15, 0.1)


def test_excluded_types_stay_float() -> None:
    excluded = ["LayerNorm", "Embedding", "QATMatMul"]
    assert planned(**TUTORIAL | {"exclude_module_types": excluded}).num_quantizers == 14
    assert planned(**TUTORIAL | {"exclude_module_types": ["LayerNorm", "Linear"]}).num_quantizers == 12


def test_a_reduced_range_costs_activations_a_bit_and_cannot_be_had_with_attention_products() -> None:
    fields = TUTORIAL | {"reduce_range": True, "exclude_module_types": ["LayerNorm", "QATMatMul"]}
    compression = planned(**fields).modules["qa_outputs"]
    assert compression.inputs[0].quant_max == 127
    assert compression.weight == INT8
    with pytest.raises(RecipeError, match="reduce_range cannot be had with quantized attention products"):
        planned(**TUTORIAL | {"reduce_range": True})


def test_without_submodules_the_whole_model_is_meant() -> None:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(vocab_size=50, max_position_embeddings=20, **shape))
    fields = {key: value for key, value in TUTORIAL.items() if key != "submodules"}
    assert planned(model, **fields).num_quantizers == 28


def test_a_missing_submodule_is_refused_with_its_nearest_name() -> None:
    with pytest.raises(TargetError, match=r"submodules: 'bert\.encoderr' .*'bert\.encoder'"):
        planned(**TUTORIAL | {"submodules": ["bert.encoderr"]})


def test_nothing_left_to_quantize_is_an_error() -> None:
    with pytest.raises(TargetError, match="nothing in the model is left"):
        planned(submodules=["bert.embeddings.dropout"], quantize_embeddings=0)


def test_convolutions_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Conv1d(1, 1, 1), nn.Linear(1, 1))
    with pytest.raises(RecipeError, match=r"0: convolutions .* add Conv1d to exclude_module_types"):
        planned(model, quantize_embeddings=0)
    assert set(planned(model, exclude_module_types=["Conv1d"]).modules) == {"1"}
    with pytest.raises(RecipeError, match="add Conv1d to ignore"):
        planned(model, scheme="default")


SIGNED_INPUT = QuantSpec(signed=True)


def test_the_default_scheme_is_signed_and_leaves_outputs_float() -> None:
    for fields in ({}, {"scheme": "default"}, {"scheme": "deepsparse"}):
        modules = planned(**fields).modules
        linear, table = modules["qa_outputs"], modules[TABLES[0]]
        assert (linear.weight, linear.inputs, linear.output) == (INT8, (SIGNED_INPUT,), None)
        assert (table.weight, table.inputs, table.output) == (INT8, (), None)
        assert modules[f"{SELF}.context_layer_matmul"].inputs == (SIGNED_INPUT, INT8)
    assert planned(scheme="tensorrt").modules["qa_outputs"].inputs == (INT8,)


def test_a_scheme_can_be_written_out_overridden_and_ignored() -> None:
    modules = planned(
        scheme={"input_activations": {"num_bits": 4}, "weights": {"symmetric": True, "strategy": "channel"}},
        scheme_overrides={
            "Embedding": {"input_activations": None, "weights": {"num_bits": 6}},
            "bert.encoder": "tensorrt",
            f"{SELF}.query": {"input_activations": None, "output_activations": {"kwargs": {"averaging_constant": 0.5}}},
        },
        ignore=["QATMatMul", "bert.encoder.layer.0.output", "LayerNorm"],
    ).modules
    assert modules["qa_outputs"].inputs == (QuantSpec(4, signed=True),)
    assert modules["qa_outputs"].weight == QuantSpec(symmetric=True, signed=True, channel_axis=0)
    assert modules[TABLES[0]].weight == QuantSpec(6, signed=True)
    assert modules[f"{SELF}.key"].inputs == (INT8,)
    assert modules[f"{SELF}.query"].inputs == ()
    assert modules[f"{SELF}.query"].output == QuantSpec(signed=True, averaging_constant=0.5)
    assert not any("matmul" in name or name.startswith("bert.encoder.layer.0.output.") for name in modules)


def test_what_a_scheme_names_must_be_there() -> None:
    with pytest.raises(TargetError, match=r"ignore: 'LayerNrom' .*did you mean 'LayerNorm'"):
        planned(ignore=["LayerNrom"])
    assert planned(ignore=["LayerNrom"], strict=False).num_quantizers == planned().num_quantizers
    with pytest.raises(TargetError, match="scheme_overrides: 'classifier'"):
        planned(scheme_overrides={"classifier": "tensorrt"})
    with pytest.raises(RecipeError, match="word_embeddings: an embedding has one scale"):
        planned(scheme={"weights": {"strategy": "channel"}})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"end_epoch": 9.0}, "end_epoch must be -1 .* got 9.0"),
        ({"submodules": ["a"], "scheme": "default"}, "scheme and submodules belong to two spellings"),
        ({"quantize_embeddings": 2}, "quantize_embeddings"),
        ({"quantize_embeddings": "perhaps"}, "quantize_embeddings"),
        ({"activation_bits": 1}, "greater than or equal to 2"),
        ({"scheme": "tensorflow"}, "no scheme 'tensorflow'; did you mean 'tensorrt'"),
        ({"scheme": {"input_activations": {"strategy": "channel"}}}, "strategy must be tensor"),
        ({"scheme": {"weights": {"strategy": "block"}}}, "'tensor' or 'channel'"),
        ({"model_fuse_fn_name": "mine"}, "only no_fuse and conv_bn_relus"),
        ({"model_fuse_fn_kwargs": {"a": 1}}, "without kwargs"),
        ({"custom_quantizable_module_types": ["GELU"]}, "other modules cannot"),
        ({"exclude_batchnorm": 0}, "batch norms are never quantized"),
        ({"weight_qconfig_kwargs": {"observer": "MinMax"}}, "setting 'observer' is not offered"),
        ({"scheme": {"weights": {"kwargs": {"eps": 1}}}}, "setting 'eps' is not offered"),
        ({"activation_qconfig_kwargs": {"averaging_constant": 0}}, "averaging_constant"),
        ({"num_calibration_steps": 0}, "num_calibration_steps"),
        ({"ignore": ["re:.*classifier"]}, "takes no patterns, only names .*: 're:.*classifier' can mean none"),
        ({"scheme_overrides": {"re:.*": "tensorrt"}}, "takes no patterns"),
        ({"exclude_module_types": ["re:.*Norm"]}, "takes no patterns"),
        ({"quantize_everything": 1}, "quantize_everything"),
    ],
)
def test_what_cannot_be_honoured_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        QuantizationModifier(**fields)
    assert re.search(message, str(caught.value)), str(caught.value)


def test_fields_that_change_nothing_here_are_taken() -> None:
    fields = {"model_fuse_fn_name": "no_fuse", "exclude_batchnorm": True, "custom_quantizable_module_types": []}
    assert planned(**TUTORIAL | fields).num_quantizers == 26


@pytest.mark.parametrize("value", [1, 0, True, False])
def test_a_flag_prints_as_it_was_written(value: bool | int) -> None:
    printed = QuantizationModifier(quantize_embeddings=value).model_dump()["quantize_embeddings"]
    assert (printed, type(printed)) == (value, type(value))


@pytest.mark.parametrize(("written", "meant"), [(1.0, 1), (0.0, 0), ("true", True), ("False", False)])
def test_a_flag_from_recipe_arguments_is_understood(written: Any, meant: bool | int) -> None:
    assert QuantizationModifier(quantize_embeddings=written).quantize_embeddings == meant


@pytest.mark.parametrize(
    "fields", [TUTORIAL, {}, {"scheme": "tensorrt"}, {"scheme_overrides": {"Embedding": {"weights": None}}}]
)
def test_a_printed_modifier_reads_back_as_the_same(fields: dict[str, Any]) -> None:
    modifier = QuantizationModifier(**fields)
    printed = {name: value for name, value in modifier.model_dump(mode="json").items() if value is not None}
    again = QuantizationModifier(**printed)
    assert again == modifier
    assert again.is_legacy is modifier.is_legacy
    assert planned(**printed) == planned(**fields)
    assert hash(again) == hash(modifier)


def test_the_clock_alone_decides_the_phase() -> None:
    modifier = QuantizationModifier(**TUTORIAL | {"start_epoch": 1.0, "disable_quantization_observer_epoch": 2.0})
    phases = [modifier.phase(Clock(step, 4)) for step in range(10)]
    assert phases == [Phase.OFF] * 4 + [Phase.OBSERVE] * 4 + [Phase.FROZEN] * 2
    never_frozen = QuantizationModifier(start_epoch=-1, disable_quantization_observer_epoch=-1)
    assert never_frozen.phase(Clock(0, 4)) is Phase.OBSERVE
    assert never_frozen.phase(Clock(10**6, 4)) is Phase.OBSERVE


def test_every_quantizer_is_switched_the_heads_too() -> None:
    model = bert()
    modifier = QuantizationModifier(**TUTORIAL | {"disable_quantization_observer_epoch": 1.0})
    plan = CompressionPlan()
    modifier.plan(plan, model)
    install(model, plan)
    session: Any = SimpleNamespace(module=model)
    for step, phase in ((0, Phase.OBSERVE), (2, Phase.FROZEN), (1, Phase.OBSERVE), (2, Phase.FROZEN)):
        modifier.on_step_start(session, Clock(step, 2))
        assert {quantizer.phase for quantizer in quantizers(model).values()} == {phase}
    assert model.qa_outputs.input_quantizer.phase is Phase.FROZEN


def test_batch_norm_statistics_freeze_when_asked() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).train()
    modifier = QuantizationModifier(submodules=["0"], freeze_bn_stats_epoch=1.0)
    session: Any = SimpleNamespace(module=model)
    modifier.on_step_start(session, Clock(0, 1))
    assert model[1].training
    modifier.on_step_start(session, Clock(1, 1))
    assert not model[1].training


def test_moments_that_make_no_sense_are_problems() -> None:
    late = QuantizationModifier(start_epoch=3.0, disable_quantization_observer_epoch=2.0, freeze_bn_stats_epoch=1.0)
    assert list(late.problems(3)) == [
        "starts at epoch 3, and training does not go on beyond that: nothing would be quantized",
        "disable_quantization_observer_epoch must be start_epoch (3.0) or later; got 2.0",
        "freeze_bn_stats_epoch must be start_epoch (3.0) or later; got 1.0",
    ]
    assert list(QuantizationModifier(**TUTORIAL | {"disable_quantization_observer_epoch": 0.0}).problems(3)) == []
