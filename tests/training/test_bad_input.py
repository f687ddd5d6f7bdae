"""Bad input: one message before training starts, exit code 2, and nothing written over."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest

from sparse_accel.cli import main
from tests import running


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return running.tiny_world(tmp_path_factory.mktemp("world"))


def without_weights(world: dict[str, Any], folder: Path) -> dict[str, Any]:
    shutil.copytree(world["model_name_or_path"], folder / "student")
    (folder / "student/model.safetensors").unlink()
    return {"model_name_or_path": str(folder / "student")}


def with_torn_weights(world: dict[str, Any], folder: Path) -> dict[str, Any]:
    shutil.copytree(world["model_name_or_path"], folder / "student")
    weights = folder / "student/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return {"model_name_or_path": str(folder / "student")}


def teacher_with_another_vocabulary(world: dict[str, Any], folder: Path) -> dict[str, Any]:
    from tests.tiny import tiny_bert

    tiny_bert(folder / "teacher", kind="roberta")
    return {"distill_teacher": str(folder / "teacher")}


def teacher_without_a_head(world: dict[str, Any], folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file, save_file

    shutil.copytree(world["distill_teacher"], folder / "teacher")
    weights = folder / "teacher/model.safetensors"
    kept = {name: tensor for name, tensor in load_file(weights).items() if not name.startswith("qa_outputs")}
    save_file(kept, weights, metadata={"format": "pt"})
    return {"distill_teacher": str(folder / "teacher")}


def row_with(**changes: Any) -> Any:
    def write(world: dict[str, Any], folder: Path) -> dict[str, Any]:
        document = json.loads(Path(world["train_file"]).read_text())
        document["data"][7].update(changes)
        (folder / "bad.json").write_text(json.dumps(document))
        return {"train_file": str(folder / "bad.json")}

    return write


def file_holding(text: str) -> Any:
    def write(world: dict[str, Any], folder: Path) -> dict[str, Any]:
        (folder / "bad.json").write_text(text)
        return {"train_file": str(folder / "bad.json")}

    return write


def recipe_with(old: str, new: str) -> Any:
    def write(world: dict[str, Any], folder: Path) -> dict[str, Any]:
        text = Path(world["recipe"]).read_text()
        assert old in text
        (folder / "recipe.yaml").write_text(text.replace(old, new))
        return {"recipe": str(folder / "recipe.yaml")}

    return write


def options(**changes: Any) -> Any:
    return lambda world, folder: changes


CASES: dict[str, tuple[Any, str]] = {
    "missing file": (options(train_file="nowhere.json"), "nowhere.json"),
    "truncated file": (file_holding('{"data": [{"id": "a", '), "bad.json:1"),
    "empty data": (file_holding('{"data": []}'), "bad.json"),
    "answer not at its offset": (row_with(answers={"text": ["oslo"], "answer_start": [0]}), "row 8: "),
    "answer outside the context": (row_with(answers={"text": ["oslo"], "answer_start": [9999]}), "row 8: "),
    "wrong type": (row_with(context=17), "row 8: "),
    "duplicate id": (row_with(id="q0-00001"), "q0-00001"),
    "unknown modifier": (recipe_with("!ConstantPruningModifier", "!ConstantPruningModifer"), "did you mean 'ConstantPruningModifier'"),
    "unknown field": (recipe_with("lr_func: linear", "lr_fun: linear"), "did you mean 'lr_func'"),
    "cyclic variables": (recipe_with("init_lr: 1.75e-4", "init_lr: eval(final_lr)\nfinal_lr: eval(init_lr)\nx: 0"), "recipe.yaml:"),
    "target that matches nothing": (recipe_with("params: __ALL_PRUNABLE__", "params: ['re:.*nothing.*']"), "re:.*nothing.*"),
    "submodule that is not there": (recipe_with("- bert.encoder", "- bert.encodr"), "bert.encoder"),
    "quantization after the last epoch": (
        options(recipe_args='{"num_epochs": 3, "qat_start_epoch": 5, "observer_epoch": 6}'),
        "QuantizationModifier",
    ),
    "observers off before quantization": (
        options(recipe_args='{"num_epochs": 3, "qat_start_epoch": 2, "observer_epoch": 1}'),
        "QuantizationModifier",
    ),
    "unknown recipe variable": (options(recipe_args='{"num_epoch": 3}'), "num_epochs"),
    "no word about the teacher": (options(distill_teacher=None), "--distill_teacher"),
    "teacher with another vocabulary": (teacher_with_another_vocabulary, "vocabulary"),
    "teacher without a head": (teacher_without_a_head, "qa_outputs"),
    "a teacher that one process cannot spread": (options(teacher_placement="fsdp2"), "there is only one"),
    "model without weights": (without_weights, "no weights"),
    "torn weights": (with_torn_weights, "cannot be loaded"),
    "one shot without calibration": (options(one_shot=True, distill_teacher="disable"), "--num_calibration_steps"),
    "zoo stub": (options(model_name_or_path="zoo:nlp/question_answering/x"), "has no framework"),
    "zoo stub of a model that is gone": (
        options(distill_teacher="zoo:nlp/question_answering/x/pytorch/huggingface/y/base-none"),
        "--distill_teacher: zoo:nlp/question_answering/x",
    ),
    "unknown option": (options(learning_rat=1.0), "learning_rate"),
    "fp16 on a CPU": (options(fp16=True), "bf16"),
    "output is a file": (lambda world, folder: {"output_dir": str(Path(world["train_file"]))}, "train.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bad_input_ends_with_one_message_and_no_harm(
    name: str, world: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make, expected = CASES[name]
    out = tmp_path / "out"
    out.mkdir()
    (out / "kept.txt").write_text("mine")
    (tmp_path / "work").mkdir()
    changes = make(world, tmp_path / "work")
    target = Path(changes.pop("output_dir", tmp_path / "new"))
    code = main(running.command(world, target, **changes))
    printed = capfd.readouterr()
    assert code == 2, printed
    assert expected in printed.err
    assert printed.err.startswith("error: ") and "Traceback" not in printed.err
    assert not (tmp_path / "new").exists()


def test_bad_rows_can_be_skipped_and_are_named(
    world: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    changes = row_with(context=17)(world, tmp_path)
    running.run(world, tmp_path / "out", **changes, on_bad_rows="skip", max_steps=1)
    printed = capfd.readouterr().out
    assert "row 8: " in printed and "left out 1 bad row" in printed


def test_flags_that_the_recipe_overrules_are_named_once(
    world: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    running.run(world, tmp_path / "out", learning_rate=1e-5, num_train_epochs=7, max_steps=1)
    printed = capfd.readouterr().out
    assert printed.count("takes the place of --learning_rate 1e-05") == 1
    assert printed.count("take the place of --num_train_epochs 7") == 1


def test_a_disk_that_is_too_small_is_seen_before_training(
    world: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert main(running.command(world, tmp_path / "out")) == 2
    assert "this run needs at least" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.timeout(200)
def test_a_disk_that_fills_up_during_a_save_loses_nothing(world: dict[str, Any], tmp_path: Path) -> None:
    """The operating system refuses files over 150 kB from the third step on: the checkpoint of step 2 survives whole."""
    out = tmp_path / "out"
    running.run(world, out, max_steps=2)
    kept = {path.name: path.read_bytes() for path in (out / "checkpoint-2").iterdir()}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, limit[1]))
    try:
        from sparse_accel.errors import OutputError

        with pytest.raises(OutputError, match="checkpoints are untouched"):
            running.run(world, out, save_steps=4, max_steps=6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert {path.name: path.read_bytes() for path in (out / "checkpoint-2").iterdir()} == kept
    assert not list(out.glob(".*partial")) and not (out / "checkpoint-4").exists()
    whole = running.run(world, tmp_path / "whole")
    running.run(world, out)
    assert running.differing(whole, out) == []
