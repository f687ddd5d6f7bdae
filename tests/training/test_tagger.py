"""A tagger from its training command to its deployment: pruned, distilled, quantized, exported, scored, asked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from sparse_accel.cli import main
from sparse_accel.errors import DataError
from sparse_accel.tasks.entity_metrics import entity_metrics
from tests import running
from tests.tiny import TINY_TAGS

TASK = "token_classification"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return running.tiny_token_world(tmp_path_factory.mktemp("tagger"))


@pytest.fixture(scope="module")
def trained(world: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    args = '{"num_epochs": 3, "qat_start_epoch": 1.0, "observer_epoch": 2.0, "init_lr": 5e-3, "distill_hardness": 0.5}'
    out = tmp_path_factory.mktemp("out") / "tagger"
    return running.run(world, out, TASK, recipe_args=args, return_entity_level_metrics=True)


def test_training_scores_what_its_predictions_say(trained: Path, world: dict[str, Any]) -> None:
    results = running.results(trained)
    truth = [json.loads(line)["ner_tags"] for line in Path(world["validation_file"]).read_text().splitlines()]
    predictions = json.loads((trained / "eval_predictions.json").read_text())
    metrics = entity_metrics(truth, [row["tags"] for row in predictions], by_type=True)
    assert {name: results[f"eval_{name}"] for name in metrics} == metrics
    assert 0 < results["eval_accuracy"] < 1 and results["eval_loss"] > 0
    log = running.log(trained)
    assert log[-1]["phase"] == "frozen" and log[-1]["distillation_loss"] > 0 and log[-1]["task_loss"] > 0


@pytest.mark.exhaustive
def test_an_export_scores_as_training_did_and_finds_what_it_found(
    trained: Path, world: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deployment, scored = tmp_path / "deployment", tmp_path / "scored"
    assert main(["export", str(trained), "--deployment_dir", str(deployment), "--num_check_features", "8"]) == 0
    words = [
        "--validation_file",
        world["validation_file"],
        "--output_dir",
        str(scored),
        "--return_entity_level_metrics",
    ]
    assert main(["evaluate", str(deployment), *words, "--cache_dir", str(tmp_path / "cache")]) == 0
    results, found = running.results(trained), json.loads((scored / "eval_results.json").read_text())
    for name, value in results.items():
        if name.startswith("eval_") and not name.endswith(("_runtime", "_per_second")):
            assert found[name] == pytest.approx(value, rel=1e-4), name
    predictions = json.loads((trained / "eval_predictions.json").read_text())
    capsys.readouterr()
    assert main(["predict", str(deployment), "--file", world["validation_file"], "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["words"], row["tags"]) for row in rows] == [(row["words"], row["tags"]) for row in predictions]


def test_a_model_whose_labels_are_others_gets_a_head_of_its_own(world: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "pos.jsonl"
    file.write_text('{"tokens": ["Ada", "sleeps"], "pos_tags": ["NOUN", "VERB"]}\n' * 8)
    changes: dict[str, Any] = {"train_file": file, "validation_file": file, "task_name": "pos", "recipe": None}
    changes |= {"recipe_args": None, "distill_teacher": None, "max_steps": 2}
    out = running.run(world, tmp_path / "out", TASK, **changes)
    assert json.loads((out / "config.json").read_text())["id2label"] == {"0": "NOUN", "1": "VERB"}


def test_a_teacher_that_has_its_labels_in_another_order_says_the_same(world: dict[str, Any], tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(world["distill_teacher"], teacher)
    weights = load_file(teacher / "model.safetensors")
    # The same teacher, with its labels turned round.
    for name in ("classifier.weight", "classifier.bias"):
        weights[name] = weights[name].flip(0)
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((teacher / "config.json").read_text())
    names = list(reversed(TINY_TAGS))
    config |= {"id2label": dict(enumerate(names)), "label2id": {name: place for place, name in enumerate(names)}}
    (teacher / "config.json").write_text(json.dumps(config))
    changes: dict[str, Any] = {"recipe": "token_classification/pruned", "recipe_args": '{"num_epochs": 1}'}
    changes |= {"max_steps": 2, "do_eval": None, "validation_file": None}
    losses = []
    for name, chosen in (("own", world["distill_teacher"]), ("turned", teacher)):
        out = running.run(world, tmp_path / name, TASK, **changes, distill_teacher=chosen)
        losses.append([line["distillation_loss"] for line in running.log(out)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_bad_row_ends_the_run_before_anything_is_written(world: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "train.conll"
    file.write_text("Ada\tB-PER\nsleeps\tO\n\nOslo\n")
    with pytest.raises(DataError, match=r"train\.conll:4: 'Oslo' has 1 column"):
        running.run(world, tmp_path / "out", TASK, train_file=file)
    assert not (tmp_path / "out").exists()
