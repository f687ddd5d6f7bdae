"""OpenVINO opens what export writes, agrees with ONNX Runtime, and multiplies integers where the plan says so."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparse_accel.folders.trained import open_trained
from sparse_accel.onnx_export.exporting import export
from sparse_accel.onnx_export.graph_census import MatMuls, expected_matmuls
from sparse_accel.onnx_export.options import ExportOptions
from sparse_accel.serving.engines import OpenVinoEngine, open_engine
from sparse_accel.tasks import resolve_task
from tests.export.trained import trained_folder
from tests.tiny import tiny_rows

pytest.importorskip("openvino", reason="openvino is not installed")

KEYS = ("start_logits", "end_logits")
# Kinds of OpenVINO's nodes that multiply matrices on a CPU.
PRODUCTS = ("FullyConnected", "MatMul")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of which the plan quantizes every linear, embedding and product of attention."""
    return trained_folder(tmp_path_factory.mktemp("openvino") / "model", sparsity=0.5, per_channel=True)


@pytest.fixture(scope="module")
def graphs(folder: Path) -> dict[str, Path]:
    """Its deployments by format: the path of each graph."""
    made = {}
    for graph_format in ("float", "qdq"):
        target = folder.with_name(graph_format)
        export(folder, ExportOptions(deployment_dir=target, graph_format=graph_format, validate=False))
        made[graph_format] = target / "model.onnx"
    return made


def batches(folder: Path) -> list[dict[str, np.ndarray]]:
    """Real text of three shapes, one of them a single row."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = tiny_rows(12)
    made = []
    for few, length in ((rows[:1], 48), (rows[1:4], 64), (rows[4:], 56)):
        encoded = tokenizer(
            [row["question"] for row in few],
            [row["context"] for row in few],
            padding="max_length",
            truncation="only_second",
            max_length=length,
            return_tensors="np",
        )
        made.append({name: np.asarray(values, np.int64) for name, values in encoded.items()})
    return made


def real_logits(engine: Any, inputs: list[dict[str, np.ndarray]]) -> np.ndarray:
    """The logits of the tokens that are no padding, end to end."""
    parts = []
    for batch in inputs:
        outputs = engine(batch)
        parts += [outputs[key][batch["attention_mask"] == 1] for key in KEYS]
    return np.concatenate(parts)


def products(graph: Path) -> Counter[str]:
    """Matrix products of the graph that OpenVINO runs, by the type of their operands: u8, i8, or that of floats."""
    import openvino

    core = openvino.Core()
    # Otherwise an attention is one node of several operators, which does not say how it multiplies.
    compiled = core.compile_model(core.read_model(str(graph)), "CPU", {"SNIPPETS_MODE": "DISABLE"})
    facts = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    return Counter(fact["runtimePrecision"].astype(str) for fact in facts if fact["layerType"].astype(str) in PRODUCTS)


@pytest.mark.parametrize(("graph_format", "tolerance"), [("float", 1e-5), ("qdq", 2e-2)])
def test_openvino_gives_the_logits_of_onnx_runtime_at_several_shapes(
    folder: Path, graphs: dict[str, Path], graph_format: str, tolerance: float
) -> None:
    inputs = batches(folder)
    reference = real_logits(open_engine(graphs[graph_format], threads=1), inputs)
    logits = real_logits(OpenVinoEngine(graphs[graph_format], 1, precision="f32"), inputs)

    # Steps of a quantizer may fall to the other side; on average they may not count, as a share of the logits' spread.
    assert np.abs(logits - reference).mean() < tolerance * reference.std()


def test_every_linear_layer_that_the_plan_quantizes_multiplies_integers_in_openvino(
    folder: Path, graphs: dict[str, Path]
) -> None:
    expected = expected_matmuls(open_trained(folder, resolve_task("question_answering")))

    integers, floats = products(graphs["qdq"]), products(graphs["float"])

    # Six linears and two products of attention in its one layer, and the head.
    assert expected == MatMuls(integer=9, floating=0)
    assert integers.total() == floats.total() == expected.integer
    # Of two activations OpenVINO multiplies integers only where the left one has zero point 0: the probabilities do,
    # the queries may not.
    assert integers["u8"] + integers["i8"] >= expected.integer - 1, integers
    assert not set(floats) & {"u8", "i8"}, floats
