"""The commands as functions: the same bits as the command, as often as wanted, and errors that can be caught."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from transformers.utils import logging

from sparse_accel import Recipe, SparseAccelError, evaluate, export, prune, train
from sparse_accel.errors import OptionError, RecipeError
from tests import running

ARGS = {"num_epochs": 2, "init_lr": 1e-3}
RECIPE = "question_answering/pruned"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    made = running.tiny_world(tmp_path_factory.mktemp("world"), rows=16)
    return made | {"do_eval": None, "recipe": RECIPE, "recipe_args": None, "teacher_cache": "off"}


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def test_the_function_does_what_the_command_does_and_leaves_the_program_as_it_was(
    world: dict[str, Any], tmp_path: Path
) -> None:
    theirs = running.run(world, tmp_path / "command", recipe_args=json.dumps(ARGS))
    mine = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=3)
    environment, verbosity = dict(os.environ), logging.get_verbosity()
    values: dict[str, Any] = {**world, "train_file": Path(world["train_file"]), "report_to": ("none",)}
    first = train("qa", **{**values, "output_dir": tmp_path / "first", "recipe_args": ARGS})
    second = train(
        "question-answering", **{**values, "output_dir": tmp_path / "second", "recipe": Recipe.load(RECIPE, ARGS)}
    )
    for result in (first, second):
        assert running.differing(theirs, result.output_dir) == []
        assert (result.steps, result.epoch, result.best_checkpoint) == (2, 2.0, None)
        assert result.metrics == json.loads((result.output_dir / "all_results.json").read_text())
    commands = [
        json.loads((folder / "run.json").read_text())["command"]
        for folder in (theirs, first.output_dir, second.output_dir)
    ]
    assert commands[0] == commands[1] == commands[2], "each of the three would continue the others"
    assert (mine.mixed_precision, mine.gradient_accumulation_steps) == ("bf16", 3)
    assert dict(os.environ) == environment
    assert logging.get_verbosity() == verbosity


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"lerning_rate": 1e-3}, OptionError, "did you mean --learning_rate"),
        ({"learning_rate": -1}, OptionError, "--learning_rate: must be at least 0, got -1"),
        ({"num_train_epochs": object()}, OptionError, "--num_train_epochs: expected a finite number"),
        ({"recipe_args": {"num_epochs": object()}}, OptionError, "recipe_args: Object of type object"),
        ({"recipe": Recipe.empty(), "recipe_args": ARGS}, OptionError, r"give them to Recipe\.load"),
        ({"recipe": "question_answering/prunned"}, RecipeError, "did you mean 'question_answering/pruned"),
        ({"output_dir": None}, OptionError, "missing: --output_dir"),
    ],
)
def test_bad_input_is_raised(
    world: dict[str, Any], tmp_path: Path, changes: dict[str, Any], error: type[SparseAccelError], message: str
) -> None:
    with pytest.raises(error, match=message):
        train("question_answering", **{**world, "output_dir": tmp_path / "out", **changes})
    assert not (tmp_path / "out").exists()


def test_a_task_that_is_none_is_told_with_the_nearest() -> None:
    with pytest.raises(OptionError, match="did you mean 'question_answering'"):
        train("question_answring", output_dir="out", model_name_or_path="model")


def test_help_shows_the_flags() -> None:
    shown = inspect.signature(train).parameters
    assert {"task", "recipe", "recipe_args", "args_file", "per_device_train_batch_size"} <= set(shown)
    assert shown["per_device_train_batch_size"].default == 8
    assert shown["output_dir"].default is inspect.Parameter.empty
    assert "format" in inspect.signature(export).parameters
    assert "validation_file" in inspect.signature(evaluate).parameters
    assert not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in shown.values())


def test_a_model_is_pruned_and_bad_keywords_are_told(world: dict[str, Any], tmp_path: Path) -> None:
    report = prune(world["distill_teacher"], tmp_path / "pruned", 0.5)
    assert report.pruned.sparsity == pytest.approx(0.5, abs=1e-3)
    with pytest.raises(OptionError, match="evaluate: on what"):
        evaluate(tmp_path / "pruned")
    with pytest.raises(OptionError, match="there is no keyword 'validation_fil'; did you mean 'validation_file'"):
        evaluate(tmp_path / "pruned", validation_fil="x.json")
    with pytest.raises(OptionError, match="--format: 'onnx'"):
        export(tmp_path / "pruned", format="onnx")


@pytest.mark.exhaustive
def test_a_model_is_exported_and_scored(world: dict[str, Any], tmp_path: Path) -> None:
    report = export(world["model_name_or_path"], deployment_dir=str(tmp_path / "deployment"), format="float")
    assert report.passed
    assert (report.folder / "model.onnx").is_file()
    score = evaluate(report.folder, validation_file=world["validation_file"], output_dir=tmp_path / "scores")
    assert score.results["eval_f1"] == json.loads((tmp_path / "scores" / "eval_results.json").read_text())["eval_f1"]
