"""Each graph pass on a graph of a few nodes: the numbers before and after, what it needs, and what it promises."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from sparse_accel.compress.fakequant import QuantSpec, fake_quantize, scale_and_zero_point
from sparse_accel.onnx_export.graph_census import integer_kernels
from sparse_accel.onnx_export.passes.editing import initializer
from sparse_accel.onnx_export.passes.fold_scaling import FoldScaling
from sparse_accel.onnx_export.passes.fold_weights import FoldWeights
from sparse_accel.onnx_export.passes.gemm_to_matmul import GemmToMatMul
from sparse_accel.onnx_export.passes.integer_products import IntegerProducts
from sparse_accel.onnx_export.passes.quantize_gemm_bias import QuantizeGemmBias
from sparse_accel.onnx_export.passes.share_quantize import ShareQuantize
from sparse_accel.onnx_export.passes.simplify import Simplify
from sparse_accel.onnx_export.passes.sum_residuals import SumResiduals
from sparse_accel.onnx_export.passes.transpose_weights import TransposeWeights
from sparse_accel.onnx_export.pipeline import PIPELINES

PASSES = {step for steps in PIPELINES.values() for step in steps}
X = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)


def graph(body: str, *, inputs: str = "float[n, 4] x", outputs: str = "float[n, m] y", **constants: Any) -> ir.Model:
    """A model of opset 21 from ONNX's text form; `constants` are its initializers."""
    tensors = {name: ir.tensor(np.asarray(array), name=name) for name, array in constants.items()}
    text = f'<ir_version: 10, opset_import: ["" : 21]>\ngraph ({inputs}) => ({outputs}) {{\n{body}\n}}'
    read = {name for name in tensors if re.search(rf"\b{name}\b", body)}
    model = ir.from_onnx_text(text, initializers=[tensors[name] for name in read])
    for name in tensors.keys() - read:
        initializer(model.graph, name, np.asarray(constants[name]))
    return model


def run(model: ir.Model, **inputs: np.ndarray) -> list[np.ndarray]:
    """The outputs by ONNX's reference implementation."""
    results: list[np.ndarray] = ReferenceEvaluator(ir.to_proto(model)).run(None, inputs or {"x": X})
    return results


def kinds(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def held(model: ir.Model, name: str) -> np.ndarray:
    value = model.graph.initializers[name].const_value
    assert value is not None
    return value.numpy()


def quantized(weight: np.ndarray, spec: QuantSpec) -> dict[str, Any]:
    """Scale and zero point of a weight's own range, the latter as the graph holds it, and training's rounded weight."""
    low, high = torch.from_numpy(weight), torch.from_numpy(weight)
    if spec.channel_axis is None:
        low, high = low.amin(), high.amax()
    else:
        others = [axis for axis in range(weight.ndim) if axis != spec.channel_axis]
        low, high = low.amin(others), high.amax(others)
    scale, zero_point = scale_and_zero_point(low, high, spec)
    shift = 0 if spec.signed else -128
    return {
        "scale": scale.numpy(),
        "zero": (zero_point + shift).numpy().astype(np.int8),
        "low": spec.quant_min + shift,
        "high": spec.quant_max + shift,
        "expected": fake_quantize(torch.from_numpy(weight), scale, zero_point, spec).numpy(),
    }


# --- FoldWeights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(symmetric=True, signed=True),
        QuantSpec(symmetric=True, signed=True, channel_axis=0),
        QuantSpec(symmetric=True, signed=True, channel_axis=1),
        QuantSpec(bits=4, symmetric=True, signed=True),
        QuantSpec(bits=2, symmetric=True, signed=True, channel_axis=0),
        QuantSpec(symmetric=True),
        QuantSpec(bits=4, symmetric=True),
        QuantSpec(symmetric=False, signed=True, channel_axis=0),
        QuantSpec(bits=4, symmetric=False),
    ],
    ids=str,
)
def test_weights_are_stored_as_the_integers_that_training_computed_with(spec: QuantSpec) -> None:
    weight = np.random.default_rng(0).normal(size=(40, 30)).astype(np.float32)
    weight[weight < 0.3] = 0.0
    weight[3] *= 0.01
    made = quantized(weight, spec)
    axis = "" if spec.channel_axis is None else f"axis={spec.channel_axis}"
    grid = ", ".join(filter(None, [axis, f"quant_min={made['low']}", f"quant_max={made['high']}"]))
    model = graph(
        f"q = QuantizeLinear <{grid}> (weight, s, z)\n y = DequantizeLinear {f'<{axis}>' if axis else ''} (q, s, z)",
        inputs="",
        outputs="float[40, 30] y",
        weight=weight,
        s=made["scale"],
        z=made["zero"],
    )
    model.graph.initializers["weight"].name = "fc.weight"
    assert FoldWeights()(model).modified
    integers = held(model, "fc.weight_quantized")
    assert integers.dtype == np.int8 and kinds(model) == {"DequantizeLinear": 1}
    assert made["low"] <= integers.min() and integers.max() <= made["high"]
    assert np.array_equal(run(model)[0], made["expected"])
    zero = np.broadcast_to(made["zero"].reshape(-1, *([1] * (spec.channel_axis == 0))), weight.shape)
    assert (integers == zero)[weight == 0].all()
    assert {"fc.weight_scale", "fc.weight_zero_point"} <= set(model.graph.initializers)


def test_a_weight_between_two_integers_goes_where_training_rounded_it() -> None:
    """Training multiplies by 1 / scale, QuantizeLinear divides by the scale; for some weights that differs."""
    scale = np.float32(0.0123)
    steps = (np.arange(-127, 127) + 0.5).astype(np.float32)
    near = [(steps * scale).astype(np.float32)]
    for _ in range(3):
        near.append(np.nextafter(near[-1], np.float32(np.inf)))
    weight = np.concatenate(near)
    model = graph(
        "q = QuantizeLinear <quant_min=-128, quant_max=127> (weight, s, z)\n y = DequantizeLinear(q, s, z)",
        inputs="",
        outputs="float[c] y",
        weight=weight,
        s=scale,
        z=np.int8(0),
    )
    FoldWeights()(model)
    spec = QuantSpec(symmetric=True, signed=True)
    trained = fake_quantize(torch.from_numpy(weight), torch.tensor(scale), torch.tensor(0), spec).numpy()
    by_division = run(graph("y = QuantizeLinear(x, s, z)", outputs="int8[n, m] y", s=scale, z=np.int8(0)), x=weight)[0]
    assert np.array_equal(run(model)[0], trained)
    assert (held(model, "weight.weight_quantized") != by_division).sum() > 0


GATHERED = """
    rows = Gather(table, x)
    q = QuantizeLinear <quant_min=-128, quant_max=127> (rows, s, z)
    y = DequantizeLinear(q, s, z)
"""


def test_an_embedding_is_looked_up_in_the_table_of_integers() -> None:
    table = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    made = quantized(table, QuantSpec(symmetric=True, signed=True))
    model = graph(GATHERED, inputs="int64[n] x", outputs="float[n, 4] y", table=table, s=made["scale"], z=made["zero"])
    FoldWeights()(model)
    Simplify()(model)
    gather = next(node for node in model.graph if node.op_type == "Gather")
    assert gather.outputs[0].dtype == ir.DataType.INT8
    assert set(model.graph.initializers) == {
        "table.weight_quantized",
        "table.weight_scale",
        "table.weight_zero_point",
    }
    ids = np.array([8, 0, 3, 3])
    assert np.array_equal(run(model, x=ids)[0], made["expected"][ids])


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        (GATHERED + "other = Relu(rows)", "float[n, 4] y, float[n, 4] other"),
        (GATHERED, "float[n, 4] y, float[n, 4] rows"),
    ],
    ids=["by another node", "as an output"],
)
def test_rows_that_are_read_as_floats_too_are_refused(body: str, outputs: str) -> None:
    table = np.ones((9, 4), np.float32)
    model = graph(body, inputs="int64[n] x", outputs=outputs, table=table, s=np.float32(0.1), z=np.int8(0))
    with pytest.raises(ir.passes.PreconditionError, match=r"rows of .*table.* are read before they are quantized"):
        FoldWeights()(model)


def test_a_weight_quantizer_of_a_computed_tensor_is_refused() -> None:
    model = graph(
        "q = QuantizeLinear <quant_min=-8, quant_max=7> (x, s, z)\n y = DequantizeLinear(q, s, z)",
        s=np.float32(0.1),
        z=np.int8(0),
    )
    with pytest.raises(ir.passes.PreconditionError, match="which is no weight"):
        FoldWeights()(model)


def test_a_weight_that_several_layers_share_is_stored_once() -> None:
    """ALBERT runs one layer many times: each call has nodes of its own."""
    weight = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    made = quantized(weight, QuantSpec(symmetric=True, signed=True, channel_axis=0))
    body = "".join(
        f"""
        q{call} = QuantizeLinear <axis=0, quant_min=-128, quant_max=127> (weight, s, z)
        w{call} = DequantizeLinear <axis=0> (q{call}, s, z)
        t{call} = Transpose <perm=[1, 0]> (w{call})
        h{call + 1} = MatMul(h{call}, t{call})
        """
        for call in range(3)
    )
    model = graph("h0 = Identity(x)" + body + "y = Identity(h3)", weight=weight, s=made["scale"], z=made["zero"])
    FoldWeights()(model)
    TransposeWeights()(model)
    Simplify()(model)
    assert [name for name in model.graph.initializers if "quantized" in name] == ["weight.weight_quantized_transposed"]
    assert kinds(model)["MatMul"] == 3 and kinds(model)["Transpose"] == 0
    np.testing.assert_allclose(
        run(model)[0], X @ np.linalg.matrix_power(made["expected"].T.astype(np.float64), 3), rtol=1e-5, atol=1e-5
    )


# --- TransposeWeights -------------------------------------------------------------------------------------------------

INTEGERS = np.random.default_rng(2).integers(-128, 128, (3, 4)).astype(np.int8)
SCALES = np.array([0.5, 0.02, 0.001], np.float32)
ZEROS = np.array([0, 3, -7], np.int8)


@pytest.mark.parametrize(("axis", "moved"), [(0, 1), (-2, 1)])
@pytest.mark.parametrize("perm", ["<perm=[1, 0]>", ""])
def test_the_channels_move_with_their_axis(axis: int, moved: int, perm: str) -> None:
    model = graph(
        f"d = DequantizeLinear <axis={axis}> (w, s, z)\n t = Transpose {perm} (d)\n y = MatMul(x, t)",
        w=INTEGERS,
        s=SCALES,
        z=ZEROS,
    )
    before = run(model)[0]
    TransposeWeights()(model)
    Simplify()(model)
    dequantize = next(node for node in model.graph if node.op_type == "DequantizeLinear")
    assert kinds(model) == {"DequantizeLinear": 1, "MatMul": 1}
    assert dequantize.attributes.get_int("axis") == moved
    assert held(model, "w_transposed").shape == (4, 3)
    assert np.array_equal(run(model)[0], before)


def test_weights_with_one_scale_and_float_weights_are_transposed_too() -> None:
    model = graph(
        """
        d = DequantizeLinear(w, s, z)
        t = Transpose <perm=[1, 0]> (d)
        h = MatMul(x, t)
        f = Transpose <perm=[1, 0]> (v)
        y = MatMul(h, f)
        """,
        w=INTEGERS,
        s=SCALES[0],
        z=ZEROS[0],
        v=INTEGERS.T.astype(np.float32),
    )
    before = run(model)[0]
    TransposeWeights()(model)
    assert kinds(model)["Transpose"] == 0
    assert np.array_equal(run(model)[0], before)


def test_a_vector_with_one_scale_has_no_axis_to_move() -> None:
    model = graph(
        "d = DequantizeLinear(w, s, z)\n t = Transpose(d)\n y = Add(x, t)", w=INTEGERS[0], s=SCALES[0], z=ZEROS[0]
    )
    before = run(model)[0]
    TransposeWeights()(model)
    assert kinds(model)["Transpose"] == 0
    assert np.array_equal(run(model)[0], before)


def test_a_weight_that_is_read_both_ways_is_stored_both_ways() -> None:
    model = graph(
        "d = DequantizeLinear <axis=0> (w, s, z)\n t = Transpose(d)\n h = MatMul(x, t)\n y = MatMul(h, d)",
        w=INTEGERS,
        s=SCALES,
        z=ZEROS,
    )
    before = run(model)[0]
    TransposeWeights()(model)
    assert {"w", "w_transposed"} <= set(model.graph.initializers)
    assert np.array_equal(run(model)[0], before)


def test_a_transposed_constant_that_is_an_output_stays() -> None:
    model = graph("y = Transpose(v)", inputs="", outputs="float[4, 3] y", v=INTEGERS.astype(np.float32))
    assert not TransposeWeights()(model).modified
    assert np.array_equal(run(model)[0], INTEGERS.T)


def test_a_transposed_activation_is_left_alone() -> None:
    model = graph("t = Transpose(x)\n y = MatMul(x, t)")
    assert not TransposeWeights()(model).modified


# --- ShareQuantize ----------------------------------------------------------------------------------------------------

PAIR = """
    q1 = QuantizeLinear {first} (x, s, z)
    q2 = QuantizeLinear {second} (x, {scale}, {zero})
    d1 = DequantizeLinear {first} (q1, s, z)
    d2 = DequantizeLinear {second} (q2, {scale}, {zero})
    y = Sub(d1, d2)
"""


def _pair(first: str = "", second: str = "", scale: str = "s", zero: str = "z", **constants: Any) -> ir.Model:
    constants = {"s": np.float32(0.1), "z": np.uint8(7)} | constants
    return graph(PAIR.format(first=first, second=second, scale=scale, zero=zero), **constants)


def test_equal_quantizers_of_one_tensor_become_one_and_each_reader_keeps_its_dequantizer() -> None:
    model = _pair(scale="s2", zero="z2", s2=np.float32(0.1), z2=np.uint8(7))
    assert ShareQuantize()(model).modified
    assert kinds(model) == {"QuantizeLinear": 1, "DequantizeLinear": 2, "Sub": 1}
    assert not run(model)[0].any()


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(_pair(scale="s2", s2=np.float32(0.2)), id="scale"),
        pytest.param(_pair(zero="z2", z2=np.uint8(8)), id="zero point"),
        pytest.param(_pair(zero="z2", z2=np.int8(7)), id="integer type"),
        pytest.param(
            _pair("<axis=0>", "<axis=1>", s=np.array([1, 2, 3, 4], np.float32), z=np.zeros(4, np.uint8)), id="axis"
        ),
    ],
)
def test_quantizers_that_differ_stay_two(model: ir.Model) -> None:
    inputs = X[:4]
    before = run(model, x=inputs)[0]
    assert not ShareQuantize()(model).modified
    assert kinds(model)["QuantizeLinear"] == 2
    assert before.any() and np.array_equal(run(model, x=inputs)[0], before)


def test_a_quantizer_whose_scale_is_computed_is_no_duplicate() -> None:
    model = graph(
        """
        s = ReduceMax <keepdims=0> (x)
        q1 = QuantizeLinear(x, s, z)
        q2 = QuantizeLinear(x, s, z)
        d1 = DequantizeLinear(q1, s, z)
        d2 = DequantizeLinear(q2, s, z)
        y = Add(d1, d2)
        """,
        z=np.uint8(0),
    )
    assert not ShareQuantize()(model).modified


def test_integers_that_are_an_output_keep_their_node() -> None:
    model = graph(
        "y = QuantizeLinear(x, s, z)\n other = QuantizeLinear(x, s, z)",
        outputs="uint8[n, 4] y, uint8[n, 4] other",
        s=np.float32(0.1),
        z=np.uint8(7),
    )
    before = run(model)
    ShareQuantize()(model)
    assert [value.name for value in model.graph.outputs] == ["y", "other"]
    assert all(np.array_equal(one, other) for one, other in zip(before, run(model), strict=True))


# --- FoldScaling ------------------------------------------------------------------------------------------------------

SCALED = "q = QuantizeLinear(x, s, z)\n d = DequantizeLinear(q, s, z)\n"
GRID = {"s": np.float32(0.1), "z": np.uint8(128), "c": np.float32(0.176776695)}


@pytest.mark.parametrize("product", ["y = Mul(d, c)", "y = Mul(c, d)"])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_scaling_moves_into_the_scale_before_it(product: str, shape: tuple[int, ...]) -> None:
    model = graph(SCALED + product, **GRID | {"c": GRID["c"].reshape(shape)})
    before = run(model)[0]
    assert FoldScaling()(model).modified
    Simplify()(model)
    assert kinds(model) == {"QuantizeLinear": 1, "DequantizeLinear": 1}
    assert [value.name for value in model.graph.outputs] == ["y"]
    np.testing.assert_allclose(run(model)[0], before, rtol=3e-7)
    assert held(model, "s") == np.float32(0.1), "the quantizer before it keeps its scale"


def test_layers_that_share_a_grid_may_scale_by_different_factors() -> None:
    model = graph(
        SCALED + "a = Mul(d, c)\n p = QuantizeLinear(a, s, z)\n e = DequantizeLinear(p, s, z)\n y = Mul(e, b)",
        **GRID,
        b=np.float32(3.0),
    )
    before = run(model)[0]
    FoldScaling()(model)
    assert kinds(model)["Mul"] == 0
    np.testing.assert_allclose(run(model)[0], before, rtol=3e-7)


@pytest.mark.parametrize(
    ("body", "changes"),
    [
        pytest.param(SCALED + "m = Mul(d, c)\n y = Add(m, d)", {}, id="another reader"),
        pytest.param(SCALED + "y = Mul(d, d)", {}, id="a square"),
        pytest.param(SCALED + "y = Mul(d, x)", {}, id="a computed factor"),
        pytest.param(SCALED + "y = Mul(d, c)", {"c": np.float32(-1)}, id="a negative factor"),
        pytest.param(SCALED + "y = Mul(d, c)", {"c": np.float32(0)}, id="zero"),
        pytest.param(SCALED + "y = Mul(d, c)", {"c": np.ones(4, np.float32)}, id="a factor for each column"),
        pytest.param(
            SCALED + "y = Mul(d, c)", {"c": np.ones((1, 1, 1), np.float32)}, id="a factor that adds a dimension"
        ),
        pytest.param(
            "d = DequantizeLinear(w, s, z)\n m = Mul(d, c)\n y = Add(x, m)",
            {"w": np.ones((5, 4), np.uint8)},
            id="a weight",
        ),
    ],
)
def test_other_products_stay(body: str, changes: dict[str, Any]) -> None:
    model = graph(body, outputs="float y", **GRID | changes)
    assert not FoldScaling()(model).modified
    assert kinds(model)["Mul"] == 1


def test_a_dequantized_activation_that_is_an_output_keeps_its_scale() -> None:
    model = graph(SCALED + "y = Mul(d, c)", outputs="float[n, 4] y, float[n, 4] d", **GRID)
    assert not FoldScaling()(model).modified


# --- GemmToMatMul -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("bias", [None, (3,), (1, 3), (1,), ()], ids=str)
def test_a_gemm_is_a_product_and_a_sum(transposed: int, bias: tuple[int, ...] | None) -> None:
    rng = np.random.default_rng(0)
    constants = {"w": rng.normal(size=(3, 4) if transposed else (4, 3)).astype(np.float32)}
    if bias is not None:
        constants["b"] = rng.normal(size=bias).astype(np.float32)
    model = graph(f"y = Gemm <transB={transposed}> (x, w{', b' if bias is not None else ''})", **constants)
    before = run(model)[0]
    assert GemmToMatMul()(model).modified
    assert kinds(model) == Counter(["MatMul"] + ["Transpose"] * transposed + ["Add"] * (bias is not None))
    assert [value.name for value in model.graph.outputs] == ["y"]
    np.testing.assert_allclose(run(model)[0], before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("attributes", ["alpha=2.0", "beta=0.5", "transA=1"])
def test_a_gemm_that_does_more_stays(attributes: str) -> None:
    model = graph(f"y = Gemm <{attributes}> (x, w, b)", w=np.ones((4, 3), np.float32), b=np.ones(3, np.float32))
    assert not GemmToMatMul()(model).modified


# --- QuantizeGemmBias -------------------------------------------------------------------------------------------------

OPERANDS = "q = QuantizeLinear(x, s, z)\n a = DequantizeLinear(q, s, z)\n w = DequantizeLinear {axis} (wq, ws, wz)\n"
RNG = np.random.default_rng(3)
LAYER = {
    "s": np.float32(0.03),
    "z": np.uint8(120),
    "wq": INTEGERS,
    "ws": SCALES,
    "wz": np.zeros(3, np.int8),
    "b": RNG.normal(size=3).astype(np.float32),
}
PER_TENSOR = LAYER | {"ws": np.float32(0.02), "wz": np.int8(0)}


def _gemm(transposed: bool, per_channel: bool, third: str = ", b", **changes: Any) -> ir.Model:
    axis = f"<axis={0 if transposed else 1}>" if per_channel else ""
    constants = (LAYER if per_channel else PER_TENSOR) | {"wq": INTEGERS if transposed else INTEGERS.T} | changes
    if third != ", b":
        constants = {name: value for name, value in constants.items() if name != "b"}
    return graph(OPERANDS.format(axis=axis) + f"y = Gemm <transB={int(transposed)}> (a, w{third})", **constants)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_bias_of_an_integer_gemm_is_int32_and_off_by_half_a_step_at_most(
    transposed: bool, per_channel: bool, tmp_path: Path
) -> None:
    model = _gemm(transposed, per_channel)
    before = run(model)[0]
    assert QuantizeGemmBias()(model).modified
    step = np.float32(0.03) * (SCALES if per_channel else np.float32(0.02))
    integers = held(model, "b_quantized")
    assert integers.dtype == np.int32 and not held(model, "b_zero_point").any()
    assert np.array_equal(held(model, "b_scale"), step)
    assert np.array_equal(integers, np.rint(LAYER["b"].astype(np.float64) / step))
    assert (np.abs(run(model)[0] - before) <= step / 2 + 1e-6).all()
    Simplify()(model)
    ir.save(model, tmp_path / "model.onnx")
    assert integer_kernels(tmp_path / "model.onnx") == {"QGemm": 1}


def test_a_bias_too_large_for_the_products_scale_is_added_behind(tmp_path: Path) -> None:
    """A channel whose weights are all zero has the smallest scale there is."""
    dead = np.array([0.5, 1.2e-7, 0.001], np.float32)
    model = _gemm(True, True, ws=dead, b=np.array([0.3, 4.0, -0.2], np.float32))
    before = run(model)[0]
    QuantizeGemmBias()(model)
    Simplify()(model)
    assert kinds(model)["Gemm"] == kinds(model)["Add"] == 1
    assert [value.name for value in model.graph.outputs] == ["y"]
    np.testing.assert_allclose(run(model)[0], before, rtol=1e-6)
    ir.save(model, tmp_path / "model.onnx")
    assert integer_kernels(tmp_path / "model.onnx") == {"QGemm": 1}


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(_gemm(True, True, third=""), id="no bias"),
        pytest.param(
            graph(
                OPERANDS.format(axis="<axis=0>") + "b = ReduceMax <keepdims=0> (x)\n y = Gemm <transB=1> (a, w, b)",
                **{name: value for name, value in LAYER.items() if name != "b"},
            ),
            id="a computed bias",
        ),
        pytest.param(
            graph("y = Gemm(x, v, b)", v=INTEGERS.T.astype(np.float32), b=np.ones(3, np.float32)), id="floats"
        ),
    ],
)
def test_other_gemms_keep_their_bias(model: ir.Model) -> None:
    assert not QuantizeGemmBias()(model).modified


# --- IntegerProducts --------------------------------------------------------------------------------------------------


def _product(
    tail: str = "y = Add(p, b)", *, outputs: str = "float[n, 3] y", axis: str = "<axis=1>", **changes: Any
) -> ir.Model:
    constants = LAYER | {"wq": INTEGERS.T} | changes
    return graph(
        OPERANDS.format(axis=axis) + "p = MatMul(a, w)\n" + tail,
        outputs=outputs,
        **{name: value for name, value in constants.items() if value is not None},
    )


@pytest.mark.parametrize("tail", ["y = Add(p, b)", "y = Add(b, p)"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_product_and_its_bias_are_computed_in_integers(tail: str, per_channel: bool) -> None:
    model = _product(tail) if per_channel else _product(tail, axis="", ws=np.float32(0.02), wz=np.int8(0))
    before = run(model)[0]
    assert IntegerProducts()(model).modified
    Simplify()(model)
    assert kinds(model) == {"QuantizeLinear": 1, "MatMulInteger": 1, "Add": 1, "Cast": 1, "Mul": 1}
    unsigned = held(model, "wq_unsigned")
    assert unsigned.dtype == np.uint8 and np.array_equal(unsigned.astype(int), INTEGERS.T.astype(int) + 128)
    assert held(model, "wq_zero_point") == 128
    step = np.float32(0.03) * (SCALES if per_channel else np.float32(0.02))
    assert (np.abs(run(model)[0] - before) <= step / 2 + 1e-5).all()


def test_channels_with_zero_points_of_their_own_keep_them(tmp_path: Path) -> None:
    model = _product("y = Identity(p)", wz=ZEROS, b=None)
    before = run(model)[0]
    IntegerProducts()(model)
    Simplify()(model)
    assert np.array_equal(held(model, "wq_zero_point"), ZEROS.astype(int) + 128)
    np.testing.assert_allclose(run(model)[0], before, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(_by_onnxruntime(model, tmp_path), before, rtol=1e-5, atol=1e-5)


def test_two_activations_are_multiplied_with_their_own_zero_points(tmp_path: Path) -> None:
    model = graph(
        """
        q = QuantizeLinear(x, s, z)
        a = DequantizeLinear(q, s, z)
        t = Transpose(x)
        r = QuantizeLinear(t, s2, z2)
        c = DequantizeLinear(r, s2, z2)
        y = MatMul(a, c)
        """,
        s=np.float32(0.03),
        z=np.uint8(120),
        s2=np.float32(0.04),
        z2=np.uint8(130),
    )
    before = run(model)[0]
    IntegerProducts()(model)
    Simplify()(model)
    assert kinds(model)["MatMulInteger"] == 1 and kinds(model)["MatMul"] == kinds(model)["DequantizeLinear"] == 0
    np.testing.assert_allclose(run(model)[0], before, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(_by_onnxruntime(model, tmp_path), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("tail", "changes"),
    [
        pytest.param("v = ReduceMax <keepdims=0> (p, first)\n y = Add(p, v)", {"b": None, "first": [0]}, id="computed"),
        pytest.param("y = Add(p, b)", {"b": RNG.normal(size=(5, 3)).astype(np.float32)}, id="a matrix"),
        pytest.param("t = Add(p, b)\n y = Mul(t, p)", {}, id="another reader"),
        pytest.param("y = Add(p, p)", {"b": None}, id="a double"),
        pytest.param("y = Add(p, b)", {"ws": np.full(3, 1e-9, np.float32)}, id="too large for int32"),
    ],
)
def test_what_cannot_be_added_as_integers_is_added_as_floats(tail: str, changes: dict[str, Any]) -> None:
    model = _product(tail, **changes)
    before = run(model)[0]
    IntegerProducts()(model)
    Simplify()(model)
    order = [node.op_type for node in model.graph]
    assert order.count("MatMulInteger") == 1 and order.index("Add") > order.index("Cast")
    np.testing.assert_allclose(run(model)[0], before, rtol=1e-5, atol=1e-5)


def test_a_product_that_is_an_output_keeps_its_name_and_its_bias_comes_after() -> None:
    model = _product(outputs="float[n, 3] y, float[n, 3] p")
    before = run(model)
    IntegerProducts()(model)
    assert [value.name for value in model.graph.outputs] == ["y", "p"]
    for one, other in zip(before, run(model), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-5)


def test_a_scale_for_each_row_of_the_right_operand_is_refused() -> None:
    model = _product(axis="<axis=0>", ws=np.ones(4, np.float32), wz=np.zeros(4, np.int8))
    with pytest.raises(ir.passes.PreconditionError, match="right operand has a scale for each row"):
        IntegerProducts()(model)


def test_a_product_with_one_float_operand_stays_float() -> None:
    model = graph("w = DequantizeLinear(wq, s, z)\n y = MatMul(x, w)", wq=INTEGERS.T, s=np.float32(0.1), z=np.int8(0))
    assert not IntegerProducts()(model).modified


def _by_onnxruntime(model: ir.Model, folder: Path) -> np.ndarray:
    import onnxruntime

    ir.save(model, folder / "model.onnx")
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {"x": X})[0]
    return result


# --- SumResiduals -----------------------------------------------------------------------------------------------------

RESIDUAL = "c = Relu(x)\n s = Add(c, x)\n y = LayerNormalization <axis=-1, epsilon=1e-12> (s, g, b)"
NORM = {"g": np.float32([1.0, 2.0, 0.5, 1.5]), "b": np.float32([0.1, -0.2, 0.3, 0.0])}


def _norm(body: str = RESIDUAL, **constants: Any) -> ir.Model:
    tensor = "float[batch, n, 4]"
    return graph(body, inputs=f"{tensor} x", outputs=f"{tensor} y", **NORM, **constants)


@pytest.mark.parametrize("keeps_add", [True, False])
def test_a_residual_is_a_sum_that_onnx_runtime_does_not_fuse(keeps_add: bool, tmp_path: Path) -> None:
    import onnxruntime

    model, batch = _norm(), X[None]
    before = run(model, x=batch)[0]
    if not keeps_add:
        SumResiduals()(model)
        assert kinds(model) == {"Relu": 1, "Sum": 1, "LayerNormalization": 1}
        np.testing.assert_array_equal(run(model, x=batch)[0], before)
    ir.save(model, tmp_path / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"x": batch})[0], before, rtol=1e-5, atol=1e-6)
    # What the pass is for; should a version stop fusing, the pass can go.
    assert ("SkipLayerNormalization" in kinds(ir.load(tmp_path / "optimized.onnx"))) is keeps_add


def test_a_bias_and_a_norm_of_one_tensor_keep_their_add() -> None:
    biased = _norm("c = Add(x, b)\n y = LayerNormalization <axis=-1> (c, g, b)")
    plain = _norm("y = LayerNormalization <axis=-1> (x, g, b)")
    assert not SumResiduals()(biased).modified and not SumResiduals()(plain).modified


# --- Simplify ---------------------------------------------------------------------------------------------------------


def test_clean_up_leaves_integers_integers_and_takes_what_nothing_reads() -> None:
    model = graph(
        """
        d = DequantizeLinear <axis=1> (w, s, z)
        one = Identity(x)
        p = MatMul(one, d)
        k = Add(two, two)
        y = Mul(p, k)
        again = MatMul(x, unread)
        """,
        w=INTEGERS.T,
        s=SCALES,
        z=ZEROS,
        two=np.float32(2),
        unread=INTEGERS.T.astype(np.float32),
    )
    before = run(model)[0]
    node = next(iter(model.graph))
    node.metadata_props["pkg.torch.onnx.stack_trace"] = 'File "model.py", line 1'
    node.doc_string = "where it is from"
    Simplify()(model)
    assert kinds(model) == {"DequantizeLinear": 1, "MatMul": 1, "Mul": 1}
    assert {"w", "s", "z"} <= set(model.graph.initializers) and "unread" not in model.graph.initializers
    assert "File" not in str(ir.to_proto(model)) and "where it is from" not in str(ir.to_proto(model))
    assert np.array_equal(run(model)[0], before)


# --- all passes -------------------------------------------------------------------------------------------------------


def _examples() -> dict[type[ir.passes.InPlacePass], ir.Model]:
    """A graph for each pass that it has work in."""
    table = {"table": np.ones((9, 4), np.float32), "s": np.float32(0.1), "z": np.int8(0)}
    return {
        FoldWeights: graph(GATHERED, inputs="int64[n] x", **table),
        TransposeWeights: graph(
            "d = DequantizeLinear <axis=0> (w, s, z)\n t = Transpose(d)\n y = MatMul(x, t)",
            w=INTEGERS,
            s=SCALES,
            z=ZEROS,
        ),
        ShareQuantize: _pair(),
        FoldScaling: graph(SCALED + "y = Mul(d, c)", **GRID),
        GemmToMatMul: graph("y = Gemm(x, w)", w=np.ones((4, 3), np.float32)),
        QuantizeGemmBias: _gemm(True, True),
        IntegerProducts: _product(),
        SumResiduals: _norm(),
        Simplify: graph("y = Relu(x)", unread=np.ones(3, np.float32)),
    }


def test_every_pass_of_a_pipeline_is_tested() -> None:
    assert set(_examples()) == PASSES


@pytest.mark.parametrize("step", sorted(PASSES, key=lambda step: step.__name__))
def test_a_pass_promises_what_does_not_hold_before_it_and_has_nothing_left_to_do_after(step: Any) -> None:
    model = _examples()[step]
    with pytest.raises(ir.passes.PostconditionError):
        step().ensures(model)
    assert step()(model).modified
    step().ensures(model)
    text = ir.to_onnx_text(model)
    again = step()(model)
    assert ir.to_onnx_text(model) == text
    assert not again.modified or step is Simplify
    ir.to_proto(model)
