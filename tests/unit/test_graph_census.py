"""The census of an ONNX file: zeros at the zero point, scales, bytes, what the plan wants, and integer kernels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from transformers import AutoModelForQuestionAnswering

from sparse_accel.compress.plan import CompressionPlan, Phase, install, set_phase
from sparse_accel.compress.ranges import calibrating, end_step
from sparse_accel.errors import ModelError
from sparse_accel.folders.trained import TrainedModel
from sparse_accel.onnx_export.graph_census import (
    GraphCensus,
    Initializer,
    MatMuls,
    census_of,
    check_census,
    check_kernels,
    expected_integer_matmuls,
    expected_matmuls,
    integer_kernels,
    matmuls_of,
)
from tests.tiny import tiny_bert
from tests.unit.qat_bert import alone, batch, bert, tutorial_plan

RNG = np.random.default_rng(0)


def sparse_integers(shape: tuple[int, ...], zero_point: int, dtype: type, zeros: int) -> np.ndarray:
    """Integers of which exactly `zeros` lie at the zero point; others at 0 where that is another number."""
    limits = np.iinfo(dtype)
    others = [value for value in range(limits.min, limits.max + 1) if value != zero_point]
    values = RNG.choice(others, size=shape)
    values.flat[RNG.choice(values.size, zeros, replace=False)] = zero_point
    return values.astype(dtype)


def write(path: Path, nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray], inputs: dict[str, int]) -> Path:
    """A model with float [1, n] inputs (int64 for `ids`) whose output is `y`."""
    graph = helper.make_graph(
        nodes,
        "hand_made",
        [
            helper.make_tensor_value_info(name, TensorProto.INT64 if name == "ids" else TensorProto.FLOAT, [1, size])
            for name, size in inputs.items()
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * (3 if "ids" in inputs else 2))],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def quantized_product(path: Path, zeros: int = 30) -> Path:
    """QuantizeLinear -> DequantizeLinear -> MatMul with an int8 [8, 6] weight that has a scale for each column."""
    constants = {
        "x_scale": np.float32(0.02),
        "x_zero": np.uint8(120),
        "layer.weight_quantized_transposed": sparse_integers((8, 6), 0, np.int8, zeros),
        "layer.weight_scale": np.full(6, 0.01, np.float32),
        "layer.weight_zero_point": np.zeros(6, np.int8),
    }
    weight = ["layer.weight_quantized_transposed", "layer.weight_scale", "layer.weight_zero_point"]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "x_scale", "x_zero"], ["d"]),
        helper.make_node("DequantizeLinear", weight, ["w"], axis=1),
        helper.make_node("MatMul", ["d", "w"], ["y"]),
    ]
    return write(path, nodes, constants, {"x": 8})


def entry(census: GraphCensus, name: str) -> Initializer:
    return next(found for found in census.initializers if found.name == name)


def test_zeros_of_a_dequantized_weight_are_counted_with_its_scales(tmp_path: Path) -> None:
    census = census_of(quantized_product(tmp_path / "model.onnx", zeros=30))
    weight = census.weight_of("layer", integer=True)
    assert weight is not None and (weight.zeros, weight.numel, weight.num_scales) == (30, 48, 6)
    assert census.weight_of("layer", integer=False) is None
    assert census.integer_weights == (weight,)


def test_zeros_of_unsigned_weights_lie_at_their_zero_point(tmp_path: Path) -> None:
    constants = {
        "layer.weight_quantized_unsigned": sparse_integers((8, 6), 128, np.uint8, 17),
        "layer.weight_quantized_unsigned_zero_point": np.uint8(128),
        "layer.weight_quantized_unsigned_product_scale": np.full(6, 0.1, np.float32),
    }
    names = list(constants)
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("MatMulInteger", ["q", names[0], "z", names[1]], ["p"]),
        helper.make_node("Cast", ["p"], ["c"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["c", names[2]], ["y"]),
    ]
    census = census_of(write(tmp_path / "model.onnx", nodes, constants, {"x": 8}))
    weight = census.weight_of("layer", integer=True)
    assert weight is not None and (weight.dtype, weight.zeros, weight.num_scales) == ("uint8", 17, 6)


def test_zeros_of_an_embedding_are_found_behind_its_gather(tmp_path: Path) -> None:
    constants = {
        "table.weight_quantized": sparse_integers((9, 4), -3, np.int8, 11),
        "table.weight_scale": np.float32(0.5),
        "table.weight_zero_point": np.int8(-3),
    }
    nodes = [
        helper.make_node("Gather", ["table.weight_quantized", "ids"], ["rows"]),
        helper.make_node("DequantizeLinear", ["rows", "table.weight_scale", "table.weight_zero_point"], ["y"]),
    ]
    found = census_of(write(tmp_path / "model.onnx", nodes, constants, {"ids": 3})).weight_of("table", integer=True)
    assert found is not None and (found.zeros, found.num_scales) == (11, 1)


def test_every_channel_is_held_against_its_own_zero_point(tmp_path: Path) -> None:
    constants = {
        "layer.weight_quantized": np.array([[5, 7], [5, 5], [7, 7]], np.int8),
        "layer.weight_scale": np.ones(2, np.float32),
        "layer.weight_zero_point": np.array([5, 7], np.int8),
    }
    nodes = [helper.make_node("DequantizeLinear", list(constants), ["w"], axis=1)]
    nodes.append(helper.make_node("MatMul", ["x", "w"], ["y"]))
    census = census_of(write(tmp_path / "model.onnx", nodes, constants, {"x": 3}))
    assert entry(census, "layer.weight_quantized").zeros == 4


def test_bytes_are_those_of_the_file_with_its_external_data(tmp_path: Path) -> None:
    path = quantized_product(tmp_path / "model.onnx")
    assert census_of(path).file_bytes == path.stat().st_size
    ir.save(ir.load(path), tmp_path / "split.onnx", external_data="split.data", size_threshold_bytes=0)
    assert (tmp_path / "split.data").stat().st_size > 0
    expected = sum((tmp_path / name).stat().st_size for name in ("split.onnx", "split.data"))
    assert census_of(tmp_path / "split.onnx").file_bytes == expected


def test_totals_by_dtype_and_the_compressed_size_are_sums(tmp_path: Path) -> None:
    census = census_of(quantized_product(tmp_path / "model.onnx", zeros=30))
    counts = census.by_dtype()
    assert {dtype: (c.tensors, c.numel, c.num_bytes) for dtype, c in counts.items()} == {
        "int8": (2, 48 + 6, 48 + 6),
        "float": (2, 7, 28),
        "uint8": (1, 1, 1),
    }
    # 48 bits and 18 survivors; six zeros of a zero point as one byte of bits; a constant of one number as it is.
    assert census.compressed_bytes == (6 + 18) + 1 + 28 + 1


# --- the plan ---------------------------------------------------------------------------------------------------------


def trained(model: nn.Module, plan: CompressionPlan) -> TrainedModel:
    """The model as a folder would be opened: quantizers frozen, with the ranges of one batch."""
    if plan.num_quantizers:
        install(model, plan)
        set_phase(model, Phase.FROZEN)
        inputs = batch()
        with torch.no_grad(), calibrating(model):
            model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
            end_step(model, alone)
    model.eval()
    return TrainedModel(Path("model"), model, None, plan)


def file_of(model: nn.Module) -> GraphCensus:
    """The census of a graph that keeps every promise."""
    entries = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Embedding):
            continue
        weight, quantizer = module.weight.detach(), getattr(module, "weight_quantizer", None)
        if quantizer is None:
            zeros = int((weight == 0).sum())
            shape = tuple(weight.shape)
            entries.append(Initializer(f"{name}.weight", "float", shape, 4 * weight.numel(), zeros, None))
            continue
        # Symmetric: what lies within half a step of zero becomes zero.
        zeros = int((weight.double().abs() <= float(quantizer.scale) / 2).sum())
        shape = tuple(weight.T.shape)
        suffix = "" if isinstance(module, nn.Embedding) else "_transposed"
        entries.append(
            Initializer(f"{name}.weight_quantized{suffix}", "int8", shape, weight.numel(), zeros, num_scales=1)
        )
    return GraphCensus(tuple(entries), 1000)


QUERY = "bert.encoder.layer.0.attention.self.query"


@pytest.fixture(scope="module")
def quantized() -> TrainedModel:
    model = bert(layers=2, sparsity=0.6)
    return trained(model, tutorial_plan(model, masks=True))


def changed(census: GraphCensus, prefix: str, /, **fields: object) -> GraphCensus:
    """The census with one entry changed, or left out where no field is given."""
    kept = [found for found in census.initializers if not found.name.startswith(prefix)]
    others = [found for found in census.initializers if found.name.startswith(prefix)]
    assert len(others) == 1
    return replace(census, initializers=(*kept, *(replace(other, **fields) for other in others if fields)))  # type: ignore[arg-type]


def test_a_file_that_holds_what_was_planned_passes(quantized: TrainedModel) -> None:
    census = file_of(quantized.model)
    assert any(found.sparsity >= 0.6 for found in census.initializers)
    assert check_census(census, quantized) == []


def test_a_weight_that_was_left_float_is_named(quantized: TrainedModel) -> None:
    census = changed(file_of(quantized.model), QUERY, name=f"{QUERY}.weight_transposed", dtype="float")
    (sentence,) = check_census(census, quantized)
    assert QUERY in sentence and "float" in sentence


def test_a_weight_that_is_there_twice_is_named(quantized: TrainedModel) -> None:
    census = file_of(quantized.model)
    second = Initializer(f"{QUERY}.weight", "float", (16, 16), 1024, 0, None)
    (sentence,) = check_census(replace(census, initializers=(*census.initializers, second)), quantized)
    assert QUERY in sentence and "float" in sentence


@pytest.mark.parametrize("change", [-1, 1])
def test_one_zero_more_or_less_is_found(quantized: TrainedModel, change: int) -> None:
    census = file_of(quantized.model)
    zeros = next(found.zeros for found in census.initializers if found.name.startswith(QUERY))
    (sentence,) = check_census(changed(census, QUERY, zeros=zeros + change), quantized)
    assert QUERY in sentence and f"{zeros + change} of 256" in sentence and f"{zeros} are in the model" in sentence


def test_a_weight_that_is_missing_is_named(quantized: TrainedModel) -> None:
    (sentence,) = check_census(changed(file_of(quantized.model), QUERY), quantized)
    assert sentence == f"{QUERY}: the file does not hold its weight as 8-bit integers"


def test_scales_of_another_number_are_named(quantized: TrainedModel) -> None:
    (sentence,) = check_census(changed(file_of(quantized.model), QUERY, num_scales=16), quantized)
    assert QUERY in sentence and "16 scales" in sentence


def test_the_zeros_of_a_float_model_are_held_against_its_weights() -> None:
    model = trained(bert(layers=1, sparsity=0.6), CompressionPlan())
    census = file_of(model.model)
    assert check_census(census, model, integer=False) == []
    (sentence,) = check_census(changed(census, QUERY, zeros=0), model, integer=False)
    assert QUERY in sentence and "0 of 256" in sentence


def test_a_small_float_weight_may_have_lost_its_name() -> None:
    model = trained(bert(layers=1, sparsity=0.6), CompressionPlan())
    name = "bert.encoder.layer.0.intermediate.dense"
    census = changed(file_of(model.model), name, name="val_22", shape=(16, 24))
    assert check_census(census, model, integer=False) == []
    assert len(check_census(changed(census, "val_22", zeros=1), model, integer=False)) == 1


# --- products ---------------------------------------------------------------------------------------------------------


def test_six_linears_and_two_products_a_layer_and_the_head_are_expected_as_integers(quantized: TrainedModel) -> None:
    assert expected_matmuls(quantized) == MatMuls(integer=2 * (6 + 2) + 1, floating=0)
    assert expected_integer_matmuls(quantized) == 17


def test_products_of_attention_that_are_not_quantized_stay_float() -> None:
    model = bert(layers=2)
    plan = tutorial_plan(model)
    plan.modules = {name: c for name, c in plan.modules.items() if not name.endswith("_matmul")}
    assert expected_matmuls(trained(model, plan)) == MatMuls(integer=13, floating=4)


def test_a_shared_layer_counts_as_often_as_it_is_called(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path / "albert", kind="albert", layers=3)
    model = AutoModelForQuestionAnswering.from_pretrained(folder)
    # The mapping of the embeddings, three times six linears and two products, the head.
    assert expected_matmuls(trained(model, CompressionPlan())) == MatMuls(integer=0, floating=1 + 3 * 8 + 1)


def test_onnx_runtime_makes_an_integer_kernel_of_quantized_operands(tmp_path: Path) -> None:
    kernels = integer_kernels(quantized_product(tmp_path / "model.onnx"))
    assert matmuls_of(kernels) == MatMuls(integer=1, floating=0)


def test_a_float_product_is_counted_as_one(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    kernels = integer_kernels(write(tmp_path / "m.onnx", nodes, {"w": np.ones((8, 6), np.float32)}, {"x": 8}))
    assert kernels == {"MatMul": 1}


def test_products_that_stayed_float_are_reported(quantized: TrainedModel) -> None:
    assert check_kernels({"MatMulIntegerToFloat": 13, "QLinearMatMul": 4}, quantized) == []
    too_few, too_many = check_kernels({"MatMulIntegerToFloat": 13, "MatMul": 4}, quantized)
    assert "13 times, 17 were expected" in too_few and "4 times, 0 were expected" in too_many


def test_a_file_that_onnx_runtime_refuses_is_a_model_error(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(ModelError, match=r"model\.onnx: ONNX Runtime cannot open it"):
        integer_kernels(tmp_path / "model.onnx")
