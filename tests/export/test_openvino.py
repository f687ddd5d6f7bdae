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
# Kinds of OpenVINO's nodes that multiply matrices on a CPU; a Subgraph is the whole of an attention's arithmetic, with
# two products in it.
PRODUCTS = {"FullyConnected": 1, "MatMul": 1, "Subgraph": 2}


def deployment(folder: Path, graph_format: str) -> Path:
    """A tiny quantized model, its linears, embeddings and products of attention, as a deployment."""
    trained = trained_folder(folder / "model", sparsity=0.5, per_channel=True, layers=2)
    options = ExportOptions(deployment_dir=folder / graph_format, graph_format=graph_format, validate=False)
    return Path(export(trained, options).folder)


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


def products(engine: OpenVinoEngine) -> Counter[str]:
    """Matrix products of the graph that OpenVINO runs, by the type of their operands."""
    counts: Counter[str] = Counter()
    for node in engine.model.get_runtime_model().get_ops():
        facts = node.get_rt_info()
        kind = facts["layerType"].astype(str)
        if kind in PRODUCTS:
            counts[facts["runtimePrecision"].astype(str)] += PRODUCTS[kind]
    return counts


@pytest.mark.parametrize(("graph_format", "tolerance"), [("float", 1e-5), ("qdq", 2e-2)])
def test_openvino_gives_the_logits_of_onnx_runtime_at_several_shapes(
    tmp_path: Path, graph_format: str, tolerance: float
) -> None:
    folder = deployment(tmp_path, graph_format)
    inputs = batches(folder)
    reference = real_logits(open_engine(folder, threads=1), inputs)
    logits = real_logits(OpenVinoEngine(folder / "model.onnx", 1, precision="f32"), inputs)

    # Steps of a quantizer may fall to the other side; on average they may not count, as a share of the logits' spread.
    assert np.abs(logits - reference).mean() < tolerance * reference.std()


def test_every_product_that_the_plan_quantizes_is_one_of_integers_in_openvino(tmp_path: Path) -> None:
    folder = deployment(tmp_path, "qdq")
    expected = expected_matmuls(open_trained(tmp_path / "model", resolve_task("question_answering")))

    counts = products(OpenVinoEngine(folder / "model.onnx", 1))

    assert expected == MatMuls(integer=2 * 8 + 1, floating=0)
    assert set(counts) <= {"u8", "i8"}, counts
    assert counts.total() == expected.integer
