"""The whole command: what a deployment holds, what is refused before any work, and what a failure leaves behind."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

import sparse_accel
from sparse_accel.cli import main
from sparse_accel.cli.program import run_command
from sparse_accel.compress.plan import CompressionPlan
from sparse_accel.errors import InvariantError, ModelError, OptionError, OutputError, SparseAccelError
from sparse_accel.folders.storage import COMPRESSED_FILE
from sparse_accel.folders.trained import PLAN_FILE, RANGES_FILE
from sparse_accel.onnx_export import exporting
from sparse_accel.onnx_export.exporting import export
from sparse_accel.onnx_export.options import ExportOptions
from sparse_accel.onnx_export.parity import Tolerances
from sparse_accel.onnx_export.report import ExportReport
from sparse_accel.serving.engines import open_engine
from tests.export.trained import trained_folder
from tests.report_files import Page, write_run
from tests.tiny import tiny_bert, tiny_squad

# More than all predictions are to agree.
IMPOSSIBLE = Tolerances(mean=1.0, p99=1.0, agreement=1.1)
QUICK = ExportOptions(num_check_features=8)
COMPANIONS = {"config.json", "tokenizer.json", "tokenizer_config.json", "deployment.json", "export_report.json"}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A masked and quantized BERT. Tests read it; they do not write there."""
    folder = trained_folder(tmp_path_factory.mktemp("quantized"), sparsity=0.8)
    facts = {"max_seq_length": 96, "doc_stride": 24, "version_2_with_negative": True, "learning_rate": 1.0}
    (folder / "run.json").write_text(json.dumps({"argv": [], "command": facts}), "utf-8")
    (folder / "vocab.txt").write_text("a file that the tokenizer's library does not write\n", "utf-8")
    write_run(folder)
    return folder


@pytest.fixture(scope="module")
def unquantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense float BERT."""
    return tiny_bert(tmp_path_factory.mktemp("unquantized"), layers=1)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files(folder)}


def copied(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def earlier_deployment(folder: Path) -> dict[str, bytes]:
    """Makes `folder` what an export once wrote, and returns what must stay of it."""
    folder.mkdir()
    (folder / "deployment.json").write_text('{"sparse_accel_deployment": 1}', "utf-8")
    (folder / "model.onnx").write_bytes(b"the graph of yesterday")
    return content(folder)


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def everything(quantized: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ExportReport]:
    """A deployment with all that there is to ask for."""
    target = tmp_path_factory.mktemp("everything") / "made" / "here"
    options = replace(QUICK, deployment_dir=target, keep_float=True, compress=True, num_export_samples=3)
    return target, export(quantized, options)


def test_a_deployment_holds_what_other_programs_look_for(everything: tuple[Path, ExportReport]) -> None:
    from transformers import AutoConfig, AutoTokenizer

    target, _ = everything
    found = files(target)
    assert found >= COMPANIONS | {"model.onnx", "model_float.onnx", "vocab.txt", f"compressed/{COMPRESSED_FILE}"}
    assert {name for name in found if name.startswith("sample")} == {
        f"sample-{side}s/{side[:3]}-{index:04d}.npz" for side in ("input", "output") for index in range(3)
    }
    assert {name for name in found if "/" not in name} <= COMPANIONS | {
        "model.onnx",
        "model_float.onnx",
        "vocab.txt",
        "special_tokens_map.json",
    }
    config = json.loads((target / "config.json").read_text("utf-8"))
    assert config["architectures"] == ["BertForQuestionAnswering"]
    assert "sparse_accel" not in json.dumps(config), "others do not know our attention"
    assert AutoConfig.from_pretrained(target).model_type == "bert"
    assert len(AutoTokenizer.from_pretrained(target)) == config["vocab_size"]
    assert {path.name for path in target.parent.iterdir()} == {"here"}, "nothing of the work is left beside it"


def test_prediction_learns_how_training_cut_its_windows(everything: tuple[Path, ExportReport]) -> None:
    facts = json.loads((everything[0] / "deployment.json").read_text("utf-8"))
    assert facts == {
        "sparse_accel_deployment": 1,
        "task": "question_answering",
        "max_seq_length": 96,
        "doc_stride": 24,
        "version_2_with_negative": True,
    }


def test_the_report_on_disk_is_the_one_that_is_returned(everything: tuple[Path, ExportReport]) -> None:
    target, report = everything
    stored = json.loads((target / "export_report.json").read_text("utf-8"))
    assert stored == json.loads(json.dumps(report.to_json()))
    assert stored["passed"] and stored["failures"] == [] and stored["format"] == "qdq"
    assert stored["kernels"]["integer"] == stored["kernels"]["expected_integer"] > 0
    assert stored["kernels"]["floating"] == stored["kernels"]["expected_floating"]
    assert stored["parity"]["total"]["agreement"] == 1.0
    assert len(stored["parity"]["shapes"]) > 2
    assert stored["sizes"]["file_bytes"] == (target / "model.onnx").stat().st_size < stored["sizes"]["float_bytes"]
    assert {"load", "graph", "float graph", "compression", "check"} <= stored["seconds"].keys()


def test_the_report_of_the_training_run_tells_of_the_export(
    everything: tuple[Path, ExportReport], quantized: Path
) -> None:
    target, report = everything
    page = Page((quantized / "report.html").read_text("utf-8"))
    page.check_self_contained()
    assert "the check passed" in page.text and str(target) in page.text
    check, expected = report.check, report.expected
    assert check is not None
    for shape in check.parity.shapes:
        assert f"{shape.batch} x {shape.length}" in page.text
    assert f"{expected.integer} ({expected.integer} expected)" in page.text
    assert "79.5" in page.text  # and of the run, as before
    assert not (target / "compressed" / "report.html").exists()


def test_the_float_graph_has_no_quantizer(everything: tuple[Path, ExportReport]) -> None:
    integer, floating = (
        {node.op_type for node in onnx.load(everything[0] / name).graph.node}
        for name in ("model.onnx", "model_float.onnx")
    )
    assert {"QuantizeLinear", "DequantizeLinear"} <= integer
    assert not {"QuantizeLinear", "DequantizeLinear", "MatMulInteger"} & floating


def test_samples_are_what_the_graph_takes_and_gives(everything: tuple[Path, ExportReport]) -> None:
    target, _ = everything
    engine = open_engine(target, threads=1)
    for index in range(3):
        with np.load(target / f"sample-inputs/inp-{index:04d}.npz") as inputs:
            batch = {name: inputs[name][None] for name in inputs.files}
        assert set(batch) == set(engine.input_names) and batch["input_ids"].dtype == np.int64
        given = engine(batch)
        with np.load(target / f"sample-outputs/out-{index:04d}.npz") as outputs:
            assert set(outputs.files) == {"start_logits", "end_logits"}
            # A row alone may be rounded otherwise than in its batch, now and then and by little.
            assert all(np.abs(outputs[name] - given[name][0]).mean() < 1e-2 for name in outputs.files)


def test_the_compressed_weights_are_the_models(everything: tuple[Path, ExportReport], quantized: Path) -> None:
    loaded = sparse_accel.load(everything[0] / "compressed")
    weights = load_file(quantized / "model.safetensors")
    zeros = {name: int((tensor == 0).sum()) for name, tensor in weights.items() if tensor.dim() == 2}
    held = dict(loaded.named_parameters())
    assert sum(zeros.values()) > 1000
    assert all(int((held[name] == 0).sum()) >= count for name, count in zeros.items())


# --- an earlier deployment --------------------------------------------------------------------------------------------


def test_an_earlier_deployment_is_replaced_when_asked_and_otherwise_refused(
    unquantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The layout of transformers.js and both spellings of the switch go through the command line here."""
    target = tmp_path / "deployment"
    before = earlier_deployment(target)
    words = ["export", str(unquantized), "--deployment_dir", str(target), "--layout", "transformers.js"]
    assert main([*words, "--no-validate"]) == 2
    message = f"error: {target} holds a deployment already; name another, or pass --overwrite to replace it\n"
    assert capsys.readouterr().err == message
    assert content(target) == before
    assert main([*words, "--no_validate", "--overwrite"]) == 0
    assert files(target) >= COMPANIONS | {"onnx/model.onnx"}
    assert "model.onnx" not in files(target), "the old graph is gone"
    assert open_engine(target, threads=1).output_names == ("start_logits", "end_logits")
    report = json.loads((target / "export_report.json").read_text("utf-8"))
    assert report["passed"] and report["parity"] is None and report["format"] == "float"
    assert [path.name for path in tmp_path.iterdir()] == ["deployment"]
    printed = capsys.readouterr().out
    assert "the check was left out" in printed and str(target) in printed


def test_a_failed_check_leaves_the_earlier_deployment_and_lies_beside_it(
    quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(exporting, "INT8_TOLERANCES", IMPOSSIBLE)
    target = tmp_path / "deployment"
    before = earlier_deployment(target)
    words = ["export", str(quantized), "--deployment_dir", str(target), "--overwrite", "--num_check_features", "8"]
    assert main(words) == 3
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {quantized}: the exported graph is not what was trained: onnxruntime and torch")
    assert "at least 110.0% is wanted" in printed and f"{target}.failed" in printed and "Traceback" not in printed
    assert content(target) == before
    failed = tmp_path / "deployment.failed"
    assert files(failed) >= COMPANIONS | {"model.onnx"}
    report = json.loads((failed / "export_report.json").read_text("utf-8"))
    assert not report["passed"] and len(report["failures"]) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"deployment", "deployment.failed"}


def _fail(*args: Any, **kwargs: Any) -> None:
    raise InvariantError("a promise that was broken")


def test_a_second_failure_replaces_the_first_but_nothing_of_a_persons(
    unquantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "export_graph", _fail)
    options = replace(QUICK, deployment_dir=tmp_path / "d")
    failed = tmp_path / "d.failed"
    failed.mkdir()
    (failed / "export_report.json").touch()
    with pytest.raises(InvariantError):
        export(unquantized, options)
    assert "export_report.json" not in files(failed) and "config.json" in files(failed)
    shutil.rmtree(failed)
    failed.mkdir()
    (failed / "thesis.txt").touch()
    with pytest.raises(InvariantError):
        export(unquantized, options)
    assert files(failed) == {"thesis.txt"}
    assert [path.name for path in tmp_path.iterdir()] == ["d.failed"]


def test_a_crash_leaves_the_earlier_deployment_and_nothing_else(
    unquantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "export_graph", crash)
    target = tmp_path / "deployment"
    before = earlier_deployment(target)
    with pytest.raises(KeyboardInterrupt):
        export(unquantized, replace(QUICK, deployment_dir=target, overwrite=True))
    assert content(target) == before and [path.name for path in tmp_path.iterdir()] == ["deployment"]


def test_a_folder_of_something_else_is_never_replaced(unquantized: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(OutputError, match=r"is not empty and holds no deployment\.json"):
        export(unquantized, replace(QUICK, deployment_dir=tmp_path, overwrite=True))
    with pytest.raises(OutputError, match="is a file; name a folder"):
        export(unquantized, replace(QUICK, deployment_dir=tmp_path / "thesis.txt", overwrite=True))
    with pytest.raises(OutputError, match="is the model's own folder"):
        export(unquantized, replace(QUICK, deployment_dir=unquantized, overwrite=True))
    assert files(tmp_path) == {"thesis.txt"} and not (unquantized / "deployment").exists()


def test_a_place_that_cannot_be_written_is_refused_before_the_model_is_opened(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"--deployment_dir .*: .*file cannot be written"):
        export("nowhere", replace(QUICK, deployment_dir=tmp_path / "file" / "deployment"))
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o555)
        with pytest.raises(OutputError, match="locked cannot be written"):
            export("nowhere", replace(QUICK, deployment_dir=tmp_path / "locked" / "deployment"))


# --- models that have no deployment -----------------------------------------------------------------------------------


def test_what_is_no_model_is_refused(unquantized: Path, tmp_path: Path) -> None:
    options = replace(QUICK, deployment_dir=tmp_path / "deployment")
    with pytest.raises(ModelError, match="there is no such folder"):
        export(tmp_path / "nowhere", options)
    with pytest.raises(ModelError, match=r"has no config\.json"):
        export(tmp_path, options)
    hollow = copied(unquantized, tmp_path / "hollow")
    (hollow / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights"):
        export(hollow, options)
    assert not (tmp_path / "deployment").exists()


def test_a_deployment_is_not_a_model(everything: tuple[Path, ExportReport], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no weights|weights"):
        export(everything[0], replace(QUICK, deployment_dir=tmp_path / "deployment"))
    assert list(tmp_path.iterdir()) == []


def test_a_head_of_another_task_is_refused(unquantized: Path, tmp_path: Path) -> None:
    folder = copied(unquantized, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["architectures"] = ["BertForMultipleChoice"]
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    for task in (None, "question_answering"):
        with pytest.raises(SparseAccelError, match=r"BertForMultipleChoice"):
            export(folder, replace(QUICK, task=task))
    assert not (folder / "deployment").exists()


def test_a_quantizer_without_data_is_named_and_nothing_is_left(quantized: Path, tmp_path: Path) -> None:
    folder = copied(quantized, tmp_path / "model")
    ranges = load_file(folder / RANGES_FILE)
    name = next(name for name in ranges if name.endswith("intermediate.dense.input_quantizer.min_val"))
    quantizer = name.removesuffix(".min_val")
    ranges[name], ranges[f"{quantizer}.max_val"] = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    save_file(ranges, folder / RANGES_FILE)
    before = earlier_deployment(folder / "deployment")
    with pytest.raises(ModelError, match=rf"1 quantizers never saw data, among them {quantizer}: train or calibrate"):
        export(folder, replace(QUICK, overwrite=True))
    assert content(folder / "deployment") == before
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".") or "failed" in path.name]


@pytest.mark.parametrize(
    ("bits", "part", "why"),
    [
        (4, "inputs", "an activation of 4 bits; only weights may have fewer than 8"),
        (16, "inputs", "16 bits, and integer kernels have 8"),
        (16, "weight", "16 bits, and integer kernels have 8"),
    ],
)
def test_bits_without_an_integer_form_are_named(
    quantized: Path, tmp_path: Path, bits: int, part: str, why: str
) -> None:
    folder = copied(quantized, tmp_path / "model")
    plan = CompressionPlan.load(folder / PLAN_FILE)
    name = next(name for name in plan.modules if name.endswith("intermediate.dense"))
    held = plan.modules[name]
    assert held.weight is not None
    changes: dict[str, Any] = {
        "inputs": {"inputs": (replace(held.inputs[0], bits=bits),)},
        "weight": {"weight": replace(held.weight, bits=bits)},
    }[part]
    plan.modules[name] = replace(held, **changes)
    plan.save(folder / PLAN_FILE)
    with pytest.raises(ModelError) as caught:
        export(folder, QUICK)
    assert f"1 quantized tensors have no integer form, among them {name}." in str(caught.value)
    assert why in str(caught.value) and "pass --format float" in str(caught.value)
    assert not (folder / "deployment").exists()


def test_a_plan_without_ranges_is_refused(quantized: Path, tmp_path: Path) -> None:
    folder = copied(quantized, tmp_path / "model")
    (folder / RANGES_FILE).unlink()
    with pytest.raises(ModelError, match="are not there: quantization had not begun, or the file was left behind"):
        export(folder, QUICK)


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opset": 17}, "--opset: 18 to 23 are offered, got 17"),
        ({"opset": 24}, "--opset: 18 to 23 are offered, got 24"),
        ({"layout": "transformers"}, "--layout: 'transformers' is not offered; did you mean 'transformers.js'"),
        ({"graph_format": "int"}, "--format: 'int' is not offered; did you mean 'integer'"),
        ({"graph_format": "qdq"}, r"--format qdq: .* holds no quantized model .* or pass --format float"),
        ({"graph_format": "integer"}, r"--format integer: .* holds no quantized model"),
        ({"onnx_file_name": "model"}, r"--onnx_file_name: expected a plain name that ends in \.onnx, got 'model'"),
        ({"onnx_file_name": "../model.onnx"}, "--onnx_file_name: expected a plain name"),
        ({"sequence_length": 4}, "--sequence_length: 8 or more, got 4"),
        ({"sequence_length": 513}, "--sequence_length 513: the model reads at most 512 tokens"),
        ({"num_export_samples": -1}, "--num_export_samples: 0 or more, got -1"),
        ({"num_check_features": 0}, "--num_check_features: 1 or more, got 0"),
        ({"validation_file": "nowhere.json"}, r"--validation_file: no such file: nowhere\.json"),
        ({"task": "question_anwering"}, "question_anwering.*did you mean.*question_answering"),
    ],
    ids=str,
)
def test_a_wrong_option_is_refused_with_what_would_be_right(
    unquantized: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        export(unquantized, replace(QUICK, **options))
    assert not list(unquantized.glob("*deployment*"))


def test_the_spelling_of_sparseml_exports_with_data_of_ones_own(
    quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(quantized, tmp_path / "model")
    data = tiny_squad(tmp_path / "validation.json", rows=16, seed=4)
    words = ["export_onnx", "--model_path", str(folder), "--task", "qa", "--sequence_length", "48", "--no_convert_qat"]
    words += ["--data_args", json.dumps({"validation_file": str(data)}), "--onnx_file_name", "student.onnx"]
    assert run_command([*words, "--num_export_samples", "500"], speaks=True) == 0
    target = folder / "deployment"
    assert files(target) >= COMPANIONS | {"student.onnx"}
    facts = json.loads((target / "deployment.json").read_text("utf-8"))
    assert facts["sequence_length"] == 48
    report = json.loads((target / "export_report.json").read_text("utf-8"))
    assert report["parity"]["text"] == str(data) and report["format"] == "qdq"
    assert {shape["length"] for shape in report["parity"]["shapes"]} == {48}
    written = len(list((target / "sample-inputs").iterdir()))
    assert 0 < written < 500
    assert f"{written} samples were written of 500" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["export"], "Missing argument 'MODEL_DIR'"),
        (["export", "m", "--formt", "qdq"], "--formt: no such option; did you mean --format"),
        (["export", "m", "--opset", "new"], "Invalid value for '--opset'"),
        (["export_onnx", "--task", "qa"], "Missing option '--model_path'"),
        (["export_onnx", "--model_path", "m", "--no_convert_qat", "--format", "integer"], "contradict each other"),
        (["export_onnx", "--model_path", "m", "--data_args", "max_seq_length=4"], "max_seq_length is not used"),
        (["export_onnx", "--model_path", "m", "--data_args", "{not json"], "--data_args: not JSON"),
        (
            ["export_onnx", "--model_path", "m", "--data_args", "validation_file=a", "--validation_file", "b"],
            "both name the data",
        ),
        (["export_onnx", "--model_path", "m"], "m: there is no such folder"),
    ],
    ids=str,
)
def test_a_wrong_command_line_ends_with_one_message_and_exit_code_2(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and message in printed.err and printed.out == ""
    assert list(tmp_path.iterdir()) == []
