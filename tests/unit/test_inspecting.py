"""What `inspect` counts, against closed forms: model folders in every storage, ONNX files, and the command itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import helper
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparse_accel.cli import main
from sparse_accel.compress.census import Count
from sparse_accel.compress.inspection import Inspection, inspect_tensors, packed_bytes, place_of
from sparse_accel.compress.plan import CompressionPlan
from sparse_accel.errors import ModelError
from sparse_accel.folders.inspecting import inspect_folder
from sparse_accel.folders.storage import compress_folder
from sparse_accel.onnx_export.inspecting import inspect_graph
from tests.export.trained import trained_folder
from tests.report_files import Page
from tests.unit.test_graph_census import quantized_product, sparse_integers, write

QUERY, OUTPUT = "bert.encoder.layer.0.attention.self.query.weight", "bert.encoder.layer.0.output.dense.weight"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of one layer, 80% of each linear weight zero, quantized. Tests read it."""
    return trained_folder(tmp_path_factory.mktemp("trained"), sparsity=0.8, per_channel=True)


def small(state: dict[str, Tensor], **options: Any) -> Inspection:
    given: dict[str, Any] = {"source": "here", "form": "state", "model": None, "disk_bytes": 0, **options}
    return inspect_tensors(state, CompressionPlan(), {}, **given)


def test_a_matrix_is_counted_by_hand() -> None:
    weight = torch.tensor([[1.0, 2.0, 0.0, -0.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 5.0, 0.0, 6.0, 0.0]])
    found = small({QUERY: weight, "bert.bias": torch.zeros(3), "ids": torch.zeros(4, dtype=torch.int64)})
    (matrix,) = found.matrices
    assert (matrix.kind, matrix.row, matrix.column) == ("attention", "0", "query")
    assert (matrix.count.zeros, matrix.shape, matrix.plain_bytes) == (12, (2, 8), 64)
    assert matrix.packed_bytes == 2 + 4 * 4  # 16 bits, and four floats
    assert matrix.structure is not None and matrix.structure.pattern == "2:4"
    assert (matrix.structure.zero_blocks, matrix.structure.zeros_in_blocks) == (2, 8)
    assert found.census.num_parameters == 19 and found.sizes.dense_bytes == 4 * 19
    assert found.sizes.packed_bytes == 18 + 1 + 0


def test_a_tensor_with_two_names_counts_once() -> None:
    table = torch.ones(4, 2)
    found = small({"bert.embeddings.word_embeddings.weight": table, "cls.predictions.decoder.weight": table})
    assert found.census.num_parameters == 8 and len(found.matrices) == 1


def test_weights_of_gpt_2_are_turned(tmp_path: Path) -> None:
    weight = torch.zeros(8, 3)  # [inputs, outputs]: the first two inputs of every four are not zero
    weight[[0, 1, 4, 5]] = 1.0
    name = "transformer.h.0.attn.c_attn.weight"
    for model_type, pattern in (("gpt2", "2:4"), ("gpt_bigcode", "4:8")):
        save_file({name: weight}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        (matrix,) = inspect_folder(tmp_path).matrices
        assert matrix.structure is not None and matrix.structure.pattern == pattern, model_type


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("distilbert.transformer.layer.11.attention.q_lin.weight", ("11", "q_lin")),
        ("albert.encoder.albert_layer_groups.0.albert_layers.1.ffn.weight", ("0.1", "ffn")),
        ("qa_outputs.weight", ("", "qa_outputs")),
        ("weight", ("", "weight")),
    ],
)
def test_names_have_places(name: str, place: tuple[str, str]) -> None:
    assert place_of(name) == place


def test_bytes_without_zeros_are_never_more_than_with_them() -> None:
    assert packed_bytes(Count(80, 72), 4) == 10 + 8 * 4
    assert packed_bytes(Count(80, 0), 4) == 320
    assert packed_bytes(Count(80, 80), 1) == 10


def test_a_trained_folder_shows_its_zeros_and_quantizers(trained: Path) -> None:
    found = inspect_folder(trained)
    state, ranges = load_file(trained / "model.safetensors"), load_file(trained / "quantization.safetensors")
    assert found.form == "model folder" and found.model == "BertForQuestionAnswering"
    assert {matrix.name: matrix.count.zeros for matrix in found.matrices} == {
        name: int((tensor == 0).sum()) for name, tensor in state.items() if tensor.dim() > 1
    }
    assert found.sizes.disk_bytes == (trained / "model.safetensors").stat().st_size
    assert found.sizes.dense_bytes == sum(tensor.nbytes for tensor in state.values())
    plan = CompressionPlan.load(trained / "compression_plan.json")
    assert len(found.quantizers) == plan.num_quantizers
    for quantizer in found.quantizers:
        scale = ranges[f"{quantizer.module}.{quantizer.role}_quantizer.scale"]
        point = ranges[f"{quantizer.module}.{quantizer.role}_quantizer.zero_point"]
        assert quantizer.scale == (scale.min().item(), scale.max().item())
        assert quantizer.zero_point == (point.min().item(), point.max().item())
        assert quantizer.num_scales == scale.numel() and quantizer.per_channel == (scale.dim() > 0)
    weight, inputs = found.quantizers_of(QUERY)
    assert (weight.role, weight.grid, weight.symmetric, weight.num_scales) == ("weight", "int8", True, 32)
    assert (inputs.role, inputs.grid, inputs.symmetric) == ("input", "uint8", False)
    expected = sum(
        packed_bytes(Count(tensor.numel(), int((tensor == 0).sum())), 1 if tensor.dim() > 1 else 4)
        for tensor in state.values()
    )
    assert found.sizes.integer_bytes == expected


def test_compressed_weights_show_the_same(trained: Path, tmp_path: Path) -> None:
    compress_folder(trained, tmp_path / "small")
    plain, found = inspect_folder(trained), inspect_folder(tmp_path / "small")
    assert found.form == "folder with compressed weights"
    assert found.quantizers == plain.quantizers
    assert found.sizes.disk_bytes == (tmp_path / "small" / "model.compressed.safetensors").stat().st_size
    zeros = {matrix.name: matrix.count.zeros for matrix in found.matrices if matrix.structure is not None}
    for matrix in plain.matrices:  # what rounds to zero is zero there
        if matrix.structure is not None:
            assert zeros[matrix.name] >= matrix.count.zeros > 0


def test_a_plan_without_ranges_is_told_of(trained: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trained, tmp_path / "model")
    (folder / "quantization.safetensors").unlink()
    found = inspect_folder(folder)
    assert any("their scales, quantization.safetensors, are not there" in note for note in found.notes)
    assert found.quantizers and all(quantizer.scale is None for quantizer in found.quantizers)


def test_a_quantized_onnx_weight_is_seen_along_its_inputs(tmp_path: Path) -> None:
    path = quantized_product(tmp_path / "model.onnx", zeros=30)
    found = inspect_graph(path)
    (matrix,) = found.matrices
    assert (matrix.name, matrix.shape, matrix.dtype, matrix.count.zeros) == ("layer.weight", (8, 6), "int8", 30)
    assert matrix.structure is not None and matrix.structure.num_groups == 6 * 2  # 6 outputs of 8 inputs
    assert found.sizes.disk_bytes == path.stat().st_size
    weight, activation = sorted(found.quantizers, key=lambda one: one.role, reverse=True)
    assert (weight.module, weight.role, weight.num_scales, weight.per_channel) == ("layer", "weight", 6, True)
    assert weight.scale == pytest.approx((0.01, 0.01)) and weight.zero_point == (0, 0)
    assert (activation.module, activation.grid, activation.zero_point) == ("x", "uint8", (120, 120))
    assert activation.scale == pytest.approx((0.02, 0.02)) and not activation.symmetric


def test_weights_that_the_graph_renamed_go_by_the_node_that_reads_them(tmp_path: Path) -> None:
    weight = np.zeros((8, 4), np.float32)
    weight[::4] = 1.0  # one input of four
    node = helper.make_node("MatMul", ["x", "onnx::MatMul_7"], ["y"], name="/bert/encoder/layer.3/output/dense/MatMul")
    (matrix,) = inspect_graph(write(tmp_path / "m.onnx", [node], {"onnx::MatMul_7": weight}, {"x": 8})).matrices
    assert (matrix.kind, matrix.row, matrix.column) == ("feed-forward", "3", "output")
    assert matrix.structure is not None and matrix.structure.pattern == "1:4"


def test_a_gemm_that_turns_its_weight_is_turned_back(tmp_path: Path) -> None:
    weight = np.zeros((4, 8), np.float32)
    weight[:, ::4] = 1.0
    node = helper.make_node("Gemm", ["x", "head.weight"], ["y"], transB=1)
    (matrix,) = inspect_graph(write(tmp_path / "m.onnx", [node], {"head.weight": weight}, {"x": 8})).matrices
    assert matrix.structure is not None and matrix.structure.pattern == "1:4"


def test_ranges_that_are_made_at_run_time_are_told_from_others(tmp_path: Path) -> None:
    constants = {"layer.weight_quantized": sparse_integers((8, 6), 128, np.uint8, 17), "point": np.uint8(128)}
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("MatMulInteger", ["q", "layer.weight_quantized", "z", "point"], ["p"]),
        helper.make_node("Cast", ["p"], ["y"], to=1),
    ]
    found = inspect_graph(write(tmp_path / "m.onnx", nodes, constants, {"x": 8}))
    assert {(one.module, one.role, one.is_dynamic, one.zero_point) for one in found.quantizers} == {
        ("x", "activation", True, None),
        ("layer", "weight", False, (128, 128)),
    }
    assert found.matrices[0].count.zeros == 17


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_shows_tables_and_writes_json_and_a_page(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    data, html = tmp_path / "out.json", tmp_path / "out.html"
    for _ in range(2):  # its own files it writes over
        assert main(["inspect", str(trained), "--layers", "--json", str(data), "--html", str(html)]) == 0
    shown = capsys.readouterr().out
    document, found = json.loads(data.read_text()), inspect_folder(trained)
    assert document == json.loads(json.dumps(found.to_json()))
    page = Page(html.read_text("utf-8"))
    page.check_self_contained()
    for matrix in found.matrices:
        assert f"{matrix.count.sparsity:.1%}" in shown and f"{matrix.count.sparsity:.1%}" in page.text
        if matrix.structure is not None:
            assert matrix.name in page.text and f"{matrix.structure.share_zero_blocks:.1%}" in page.text
    for quantizer in found.quantizers:
        assert quantizer.module in page.text and quantizer.scale is not None
    for text in (f"{found.census.num_parameters:,}", f"{found.census.prunable.zeros:,}", "80.0%"):
        assert text in page.text, text
    for size in (found.sizes.dense_bytes, found.sizes.disk_bytes, found.sizes.packed_bytes):
        assert f"{size:,}" in shown


def test_json_alone_goes_to_the_terminal(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--json", str(trained)]) == 0
    assert json.loads(capsys.readouterr().out)["prunable_zeros"] == inspect_folder(trained).census.prunable.zeros


def test_a_deployment_folder_is_its_graph(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copyfile(trained / "config.json", tmp_path / "config.json")
    quantized_product(tmp_path / "model.onnx")
    assert main(["inspect", str(tmp_path)]) == 0
    assert "BertForQuestionAnswering" in (shown := capsys.readouterr().out) and "(ONNX file)" in shown


def missing_folder(folder: Path) -> list[str]:
    (folder / "model").mkdir()
    return [str(folder / "modle")]


def no_weights(folder: Path) -> list[str]:
    (folder / "config.json").write_text("{}")
    return [str(folder)]


def text_file(folder: Path) -> list[str]:
    (folder / "notes.txt").write_text("hello")
    return [str(folder / "notes.txt")]


def text_as_onnx(folder: Path) -> list[str]:
    (folder / "model.onnx").write_text("hello")
    return [str(folder / "model.onnx")]


def empty_onnx(folder: Path) -> list[str]:
    (folder / "model.onnx").write_bytes(b"")
    return [str(folder / "model.onnx")]


def cut_off(folder: Path) -> list[str]:
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    return [str(folder)]


def nowhere_to_write(folder: Path) -> list[str]:
    return [str(folder), "--html", str(folder / "none" / "page.html")]


def page_is_a_folder(folder: Path) -> list[str]:
    return [str(folder), "--html", str(folder)]


def page_over_the_model(folder: Path) -> list[str]:
    (folder / "model.safetensors").write_bytes(b"weights")
    return [str(folder), "--html", str(folder / "model.safetensors")]


def json_over_the_config(folder: Path) -> list[str]:
    (folder / "config.json").write_text("{}")
    return [str(folder), "--json", str(folder / "config.json")]


def one_file_for_both(folder: Path) -> list[str]:
    return [str(folder), "--json", str(folder / "new.json"), "--html", str(folder / "new.json")]


def unknown_option(folder: Path) -> list[str]:
    return [str(folder), "--layer"]


def idle_zoo(folder: Path) -> list[str]:
    return [str(folder), "--zoo", "zoo.yaml"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (missing_folder, "did you mean 'model'?"),
        (no_weights, "has no weights: expected one of model.safetensors"),
        (text_file, "notes.txt is no .onnx file"),
        (text_as_onnx, "model.onnx is no ONNX file"),
        (empty_onnx, "model.onnx is no ONNX file"),
        (cut_off, "model.safetensors cannot be read"),
        (nowhere_to_write, "there is no folder"),
        (page_is_a_folder, "is a folder; name a file"),
        (page_over_the_model, "is there already, and not from this command"),
        (json_over_the_config, "is there already, and not from this command"),
        (one_file_for_both, "name two files"),
        (unknown_option, "--layers"),
        (idle_zoo, "--zoo: has no effect"),
    ],
)
def test_what_cannot_be_inspected_is_one_line_and_exit_code_2(
    arguments: Callable[[Path], list[str]], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", *arguments(tmp_path)]) == 2
    said = capsys.readouterr().err.strip()
    assert told in said and "\n" not in said and "Traceback" not in said


def test_external_data_that_is_missing_is_named(tmp_path: Path) -> None:
    import onnx_ir as ir

    path = quantized_product(tmp_path / "model.onnx")
    ir.save(ir.load(path), tmp_path / "big.onnx", external_data="big.onnx.data", size_threshold_bytes=0)
    assert inspect_graph(tmp_path / "big.onnx").sizes.disk_bytes > (tmp_path / "big.onnx").stat().st_size
    (tmp_path / "big.onnx.data").unlink()
    with pytest.raises(ModelError, match=r"big\.onnx: its weights lie in another file, which is not there"):
        inspect_graph(tmp_path / "big.onnx")
