"""Text classification through the commands: teachers whose labels stand in another order, the cache, export and scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from sparse_accel.cli import main
from sparse_accel.errors import ModelError
from tests import running
from tests.tiny_text import tiny_text_bert, tiny_text_world

EIGHT = tuple("abcdefgh")


def write_rows(path: Path, count: int = 24) -> None:
    """Texts of more than 8 tokens with one of 8 labels: logits [N, 8] of features of 8 tokens."""
    texts = [f"{name} lamp boat clock piano kite drum violin bicycle" for name in ("ada", "bruno", "clara", "dmitri")]
    rows = [{"sentence": texts[n % 4], "label": EIGHT[n % 8]} for n in range(count)]
    path.write_text("\n".join(map(json.dumps, rows)))


def turned_around(source: Path, folder: Path) -> None:
    """The same model with its labels in the opposite order."""
    for file in source.iterdir():
        folder.mkdir(exist_ok=True)
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(source / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        weights[name] = weights[name].flip(0).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = AutoConfig.from_pretrained(source)
    names = EIGHT[::-1]
    config.id2label, config.label2id = dict(enumerate(names)), {name: place for place, name in enumerate(names)}
    config.save_pretrained(folder)


@pytest.fixture
def eight(tmp_path: Path) -> dict[str, Any]:
    """A command that distils from a teacher of 8 labels."""
    tiny_text_bert(tmp_path / "student", seed=2, labels=EIGHT, dropout=0.0)
    tiny_text_bert(tmp_path / "teacher", seed=1, labels=EIGHT)
    turned_around(tmp_path / "teacher", tmp_path / "turned")
    write_rows(tmp_path / "train.jsonl")
    return {
        "train_file": str(tmp_path / "train.jsonl"),
        "model_name_or_path": str(tmp_path / "student"),
        "recipe": "text_classification/pruned",
        "recipe_args": '{"num_epochs": 2, "init_lr": 1e-3}',
        "do_train": True,
        "max_seq_length": 8,
        "logging_steps": 1,
        "save_steps": 1000,
        "cache_dir": str(tmp_path / "cache"),
    }


def losses(options: dict[str, Any], out: Path, **changes: Any) -> list[float]:
    return [line["loss"] for line in running.log(running.run(options, out, "text_classification", **changes))]


def test_a_teachers_labels_are_found_by_name_whether_it_is_asked_or_read(eight: dict[str, Any], tmp_path: Path) -> None:
    teacher, turned = str(tmp_path / "teacher"), str(tmp_path / "turned")
    expected = losses(eight, tmp_path / "1", distill_teacher=teacher, teacher_cache="off")
    assert losses(eight, tmp_path / "2", distill_teacher=turned, teacher_cache="off") == pytest.approx(expected)
    assert losses(eight, tmp_path / "3", distill_teacher=turned, teacher_cache=str(tmp_path / "kept")) == pytest.approx(
        expected
    )
    (about,) = (tmp_path / "kept").glob("*/about.json")
    assert json.loads(about.read_text())["made_of"]["label_order"] == {"logits": [7, 6, 5, 4, 3, 2, 1, 0]}


def test_a_teacher_of_other_labels_is_refused(eight: dict[str, Any], tmp_path: Path) -> None:
    tiny_text_bert(tmp_path / "stranger", labels=(*EIGHT[:7], "x"))
    with pytest.raises(
        ModelError, match=r"(?s)other labels.*teacher: a, b, c, d, e, f, g, x\n  student: a, b, c, d, e, f, g, h"
    ):
        running.run(eight, tmp_path / "out", "text_classification", distill_teacher=str(tmp_path / "stranger"))
    tiny_text_bert(tmp_path / "smaller", labels=EIGHT[:7])
    with pytest.raises(ModelError, match="has 7 labels, the student 8"):
        running.run(eight, tmp_path / "out", "text_classification", distill_teacher=str(tmp_path / "smaller"))


@pytest.mark.exhaustive
def test_a_teacher_without_names_is_taken_as_it_stands(eight: dict[str, Any], tmp_path: Path) -> None:
    tiny_text_bert(tmp_path / "nameless", seed=1, labels=8)
    of_named = losses(eight, tmp_path / "1", distill_teacher=str(tmp_path / "teacher"))
    assert losses(eight, tmp_path / "2", distill_teacher=str(tmp_path / "nameless")) == pytest.approx(of_named)


@pytest.mark.exhaustive
def test_a_regression_learns_from_its_teachers_numbers(tmp_path: Path) -> None:
    tiny_text_bert(tmp_path / "student", seed=2, labels=1, dropout=0.0)
    tiny_text_bert(tmp_path / "teacher", seed=1, labels=1)
    rows = [{"sentence": f"lamp {n} boat", "label": n / 4} for n in range(24)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {
        "train_file": str(tmp_path / "train.jsonl"),
        "model_name_or_path": str(tmp_path / "student"),
        "distill_teacher": str(tmp_path / "teacher"),
        "recipe": "text_classification/pruned",
        "recipe_args": '{"num_epochs": 4, "init_lr": 1e-3}',
        "do_train": True,
        "logging_steps": 1,
        "max_seq_length": 16,
        "cache_dir": str(tmp_path / "cache"),
    }
    found = losses(options, tmp_path / "out")
    assert 0 < found[-1] < found[0]

    # What tells the best checkpoint is a metric that numbers have.
    del options["recipe"], options["recipe_args"], options["distill_teacher"]
    scored = {"validation_file": options["train_file"], "eval_strategy": "epoch", "save_strategy": "epoch"}
    out = running.run(
        options | scored, tmp_path / "best", "text_classification", load_best_model_at_end=True, max_steps=6
    )
    state = json.loads((out / "trainer_state.json").read_text())
    assert state["best_metric"] == running.results(out)["eval_pearson"]


@pytest.mark.exhaustive
def test_a_trained_model_is_exported_and_scored_alike_by_every_engine(tmp_path: Path) -> None:
    options = tiny_text_world(tmp_path)
    out = running.run(options, tmp_path / "out", "text_classification", max_train_samples=16)
    trained = running.results(out)
    assert {"eval_accuracy", "eval_f1", "eval_loss"} <= trained.keys()
    assert json.loads((out / "config.json").read_text())["id2label"] == {"0": "colour", "1": "place", "2": "year"}
    written = json.loads((out / "eval_predictions.json").read_text())
    assert len(written) == 24 and set(written[0]["scores"]) == {"colour", "place", "year"}

    assert main(["export", str(out)]) == 0
    words = ["--validation_file", options["validation_file"], "--cache_dir", options["cache_dir"]]
    for folder, name in ((out / "deployment", "graph"), (out, "torch")):
        assert main(["evaluate", str(folder), *words, "--output_dir", str(tmp_path / name)]) == 0
        scored = json.loads((tmp_path / name / "eval_results.json").read_text())
        assert scored["eval_loss"] == pytest.approx(trained["eval_loss"], abs=0.02)
        assert scored["eval_accuracy"] == pytest.approx(trained["eval_accuracy"], abs=1.5 / 24)
    assert torch.get_num_threads() == 1
