"""A SparseML recipe from the command to the folder, on the tiny world."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sparse_accel.compress.plan import CompressionPlan
from sparse_accel.errors import OutputError
from sparse_accel.reports.run_page import number
from sparse_accel.runtime import finishing
from tests import running
from tests.report_files import Page


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return running.tiny_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def finished(world: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return running.run(world, tmp_path_factory.mktemp("run") / "out", evaluation_strategy="epoch", weight_decay=0.0)


def test_the_model_is_exactly_as_sparse_as_the_one_it_started_from(world: dict[str, Any], finished: Path) -> None:
    before = load_file(Path(world["model_name_or_path"]) / "model.safetensors")
    after = load_file(finished / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if ".layer." in name and tensor.dim() == 2:
            assert torch.equal(tensor == 0, after[name] == 0), name
            assert not torch.equal(tensor, after[name]), f"{name} was not trained"


def test_the_folder_opens_with_plain_transformers(finished: Path) -> None:
    from transformers import AutoModelForQuestionAnswering, AutoTokenizer

    model, info = AutoModelForQuestionAnswering.from_pretrained(finished, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(model.qa_outputs) is torch.nn.Linear
    assert model.config._attn_implementation in ("sdpa", "eager")
    assert AutoTokenizer.from_pretrained(finished)("what colour").input_ids


def test_the_folder_holds_what_sparseml_left_there(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names >= {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "compression_plan.json",
        "quantization.safetensors", "recipe.yaml", "all_results.json", "train_results.json", "eval_results.json",
        "eval_predictions.json", "eval_nbest_predictions.json", "trainer_state.json", "train_log.jsonl", "README.md", "run.json",
    }  # fmt: skip
    results = json.loads((finished / "all_results.json").read_text())
    assert results.keys() >= {
        "epoch", "eval_exact_match", "eval_f1", "eval_samples", "train_loss", "train_runtime", "train_samples",
        "train_samples_per_second", "train_steps_per_second",
    }  # fmt: skip
    assert not list(finished.glob("*.bin")) and not list(finished.glob("**/*.pt"))


def test_the_report_tells_the_whole_run(world: dict[str, Any], finished: Path) -> None:
    page = Page((finished / "report.html").read_text("utf-8"))
    page.check_self_contained()
    assert {"report.html", "report.json"} <= set(json.loads((finished / "run.json").read_text())["files"])
    evaluations = [
        line for line in json.loads((finished / "trainer_state.json").read_text())["log_history"] if "eval_f1" in line
    ]
    assert len(evaluations) == 3
    for line in evaluations:
        assert number(line["eval_f1"]) in page.text and f"{line['eval_samples_per_second']:,.1f}" in page.text
    facts = json.loads((finished / "report.json").read_text())
    for key, folder in (("zeros_before", Path(world["model_name_or_path"])), ("zeros", finished)):
        zeros = {
            name: int((t == 0).sum()) for name, t in load_file(folder / "model.safetensors").items() if t.dim() > 1
        }
        assert {entry["name"]: entry[key] for entry in facts["matrices"]} == zeros
    assert facts["steps"] == {"done": 12, "last": 12, "per_epoch": 4, "features": 16}
    assert facts["command"] in page.text and (finished / "recipe.yaml").read_text("utf-8").strip() in page.text
    for module in CompressionPlan.load(finished / "compression_plan.json").modules:
        assert module in page.text
    for text in ("ranges move", "ranges fixed", "held 59.8%", "hardness 1, T 5", facts["versions"]["torch"], "fp32"):
        assert text in page.text, text


def test_a_report_that_fails_costs_the_report_alone(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "report.html").write_text("an earlier run's")

    def fail(folder: Path) -> str:
        raise KeyError("no such part")

    monkeypatch.setattr(finishing, "render_report", fail)
    assert finishing._publish_report(tmp_path) == "the model is written, but no report.html: KeyError: 'no such part'"
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    assert finishing._publish_report(tmp_path) is None
    assert (tmp_path / "report.html").read_bytes() == (finished / "report.html").read_bytes()


def test_learning_rate_of_each_step_is_sparsemls(finished: Path) -> None:
    lines = running.log(finished)
    assert [line["step"] for line in lines] == list(range(1, 13))
    # The line after step k (counted from 1) shows the rate of step k-1 counted from 0: value at epoch (k-1)/4 of 3.
    for line in lines:
        epoch = (line["step"] - 1) / 4
        assert line["learning_rate"] == pytest.approx(1e-3 * (1 - epoch / 3), rel=1e-12)


def test_quantization_holds_from_the_step_of_its_epoch_and_freezes_at_the_observers_epoch(finished: Path) -> None:
    assert [line["phase"] for line in running.log(finished)] == ["float"] * 4 + ["observing"] * 4 + ["frozen"] * 4


def test_hardness_one_leaves_the_task_loss_out(finished: Path) -> None:
    assert all(line["loss"] == pytest.approx(line["distillation_loss"], rel=1e-12) for line in running.log(finished))


def test_model_card_states_sparsity_scores_and_command(finished: Path) -> None:
    card = (finished / "README.md").read_text()
    results = json.loads((finished / "all_results.json").read_text())
    assert f"{results['eval_f1']:.4f}" in card
    assert "sparse_accel train question_answering" in card and "!QuantizationModifier" in card


def test_a_trained_folder_is_evaluated_as_it_was_trained(world: dict[str, Any], finished: Path, tmp_path: Path) -> None:
    options = {"model_name_or_path": str(finished), "validation_file": world["validation_file"], "do_eval": True}
    again = running.run({**options, "max_seq_length": 128, "doc_stride": 32}, tmp_path / "eval")
    trained, evaluated = (json.loads((folder / "all_results.json").read_text()) for folder in (finished, again))
    assert evaluated["eval_f1"] == trained["eval_f1"]
    assert (again / "eval_predictions.json").read_text() == (finished / "eval_predictions.json").read_text()
    assert not (again / "model.safetensors").exists()
    nbest = [json.loads((folder / "eval_nbest_predictions.json").read_text()) for folder in (finished, again)]
    assert nbest[0] == nbest[1]


def test_scores_that_join_a_training_run_take_nothing_of_it_away(
    world: dict[str, Any], finished: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    names, before = {path.name for path in out.iterdir()}, running.results(out)
    evaluation = {
        name: world[name] for name in ("validation_file", "do_eval", "max_seq_length", "doc_stride", "cache_dir")
    } | {"model_name_or_path": str(out), "max_eval_samples": 8}
    with pytest.raises(
        OutputError, match=r"holds a training run; .* or give --overwrite_output_dir to put these scores"
    ):
        running.run(evaluation, out)
    running.run(evaluation, out, overwrite_output_dir=True)
    after = running.results(out)
    assert {path.name for path in out.iterdir()} == names
    assert running.differing(out, finished) == []
    assert (after["eval_samples"], after["train_loss"]) == (8, before["train_loss"])
    assert after.keys() == before.keys()


def test_a_damaged_list_of_a_runs_files_is_refused_with_a_way_out(world: dict[str, Any], tmp_path: Path) -> None:
    evaluation = {
        name: value
        for name, value in world.items()
        if name not in ("do_train", "recipe", "recipe_args", "distill_teacher")
    }
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "run.json").write_text("{")
    for options in (world, evaluation):
        with pytest.raises(OutputError, match=r"run\.json is damaged .*; name another folder, or remove this one"):
            running.run(options, folder, overwrite_output_dir=True)
    assert [file.name for file in folder.iterdir()] == ["run.json"]


@pytest.mark.parametrize(("micro", "accumulation"), [pytest.param(4, 4, marks=pytest.mark.exhaustive), (1, 16)])
def test_a_step_gives_the_same_result_however_its_batch_is_split(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, micro: int, accumulation: int
) -> None:
    """Dropout off; 60 rows, so that the last step of an epoch is short and its micro-batches unequal. SGD, because Adam
    turns the rounding noise in gradients that are zero (a bias before a softmax has none) into steps of full size."""
    world = running.tiny_world(tmp_path_factory.mktemp("still"), rows=60, dropout=0.0)
    world |= {"recipe_args": running.QUANT_ARGS.replace("1e-3", "0.5"), "optim": "sgd"}
    whole = running.run(world, tmp_path / "whole", per_device_train_batch_size=16, gradient_accumulation_steps=1)
    split = running.run(
        world, tmp_path / "split", per_device_train_batch_size=micro, gradient_accumulation_steps=accumulation
    )
    for step, (one, other) in enumerate(zip(running.log(whole), running.log(split), strict=True)):
        # Once tensors are rounded to a grid, noise of 1e-7 now and then decides which point of the grid they go to.
        assert one["loss"] == pytest.approx(other["loss"], rel=3e-5 if step < 4 else 2e-3)
    assert running.largest_difference(whole, split) < 5e-3
    float_recipe = {"recipe": "question_answering/pruned", "recipe_args": '{"num_epochs": 3, "init_lr": 0.5}'}
    whole = running.run(
        world, tmp_path / "w", **float_recipe, per_device_train_batch_size=16, gradient_accumulation_steps=1
    )
    split = running.run(
        world,
        tmp_path / "s",
        **float_recipe,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
    )
    assert running.largest_difference(whole, split) < 1e-5


def test_bf16_trains_through_every_phase(world: dict[str, Any], tmp_path: Path) -> None:
    out = running.run(world, tmp_path / "out", bf16=True)
    plain = running.run(world, tmp_path / "plain")
    for one, other in zip(running.log(out), running.log(plain), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.05)
    assert all(tensor.dtype != torch.bfloat16 for tensor in load_file(out / "model.safetensors").values())


def test_the_teacher_may_be_the_student_itself(world: dict[str, Any], tmp_path: Path) -> None:
    out = running.run(world, tmp_path / "out", distill_teacher="self", max_steps=2)
    first = running.log(out)[0]
    # Step 0: student and frozen copy differ by dropout alone.
    assert 0 <= first["distillation_loss"] < 0.5 * first["task_loss"]


def test_without_a_teacher_the_task_loss_counts_alone(world: dict[str, Any], tmp_path: Path) -> None:
    out = running.run(world, tmp_path / "out", distill_teacher="disable", max_steps=2)
    assert all("distillation_loss" not in line and line["loss"] == line["task_loss"] for line in running.log(out))


def test_max_steps_ends_early_without_bending_the_schedule(
    world: dict[str, Any], tmp_path: Path, finished: Path
) -> None:
    out = running.run(world, tmp_path / "out", max_steps=5)
    rates = [line["learning_rate"] for line in running.log(out)]
    assert rates == [line["learning_rate"] for line in running.log(finished)][:5]


def test_flags_set_rate_and_epochs_where_no_recipe_does(world: dict[str, Any], tmp_path: Path) -> None:
    """Against transformers' own schedule."""
    changes = {"recipe": None, "recipe_args": None, "distill_teacher": None}
    out = running.run(
        world,
        tmp_path / "out",
        **changes,
        learning_rate=1e-3,
        num_train_epochs=2,
        warmup_steps=2,
        lr_scheduler_type="cosine",
    )
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    schedule = get_cosine_schedule_with_warmup(optimizer, 2, 8)
    expected = []
    for _ in range(8):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert [line["learning_rate"] for line in running.log(out)] == pytest.approx(expected)


def test_one_shot_quantizes_on_calibration_batches_and_trains_nothing(world: dict[str, Any], tmp_path: Path) -> None:
    out = running.run(world, tmp_path / "out", one_shot=True, num_calibration_steps=3, distill_teacher="disable")
    before = load_file(Path(world["model_name_or_path"]) / "model.safetensors")
    after = load_file(out / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    ranges = load_file(out / "quantization.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in ranges.values())


def test_the_best_checkpoint_is_the_one_that_is_kept(world: dict[str, Any], tmp_path: Path) -> None:
    out = running.run(
        world, tmp_path / "out", evaluation_strategy="steps", eval_steps=3, save_steps=3, load_best_model_at_end=True,
        metric_for_best_model="f1", save_total_limit=1, recipe=None, recipe_args=None, distill_teacher=None,
        learning_rate=3e-3, num_train_epochs=3,
    )  # fmt: skip
    state = json.loads((out / "trainer_state.json").read_text())
    scores = {line["step"]: line["eval_f1"] for line in state["log_history"] if "eval_f1" in line}
    best = max(scores, key=lambda step: scores[step])
    assert state["best_metric"] == scores[best]
    assert json.loads((out / "all_results.json").read_text())["eval_f1"] == scores[best]
    assert (out / state["best_model_checkpoint"]).is_dir()


def test_a_run_that_ends_before_quantization_leaves_a_float_model(world: dict[str, Any], tmp_path: Path) -> None:
    out = running.run(world, tmp_path / "out", max_steps=3)
    assert not (out / "quantization.safetensors").exists()
    again = {"validation_file": world["validation_file"], "do_eval": True, "max_seq_length": 128, "doc_stride": 32}
    scored = running.run({**again, "model_name_or_path": str(out)}, tmp_path / "again")
    assert running.results(scored)["eval_f1"] == running.results(out)["eval_f1"]


def test_a_best_checkpoint_from_before_quantization_ends_as_a_float_model(
    world: dict[str, Any], tmp_path: Path
) -> None:
    """The first evaluation is made the best one by asking for the smallest loss-like score."""
    out = running.run(
        world, tmp_path / "out", evaluation_strategy="epoch", save_strategy="epoch",
        save_steps=None, load_best_model_at_end=True, metric_for_best_model="exact_match", greater_is_better=True,
    )  # fmt: skip
    state = json.loads((out / "trainer_state.json").read_text())
    scores = [line for line in state["log_history"] if "eval_f1" in line]
    assert state["best_model_checkpoint"] == "checkpoint-4", "all scores are equal: the first is kept"
    assert running.results(out)["eval_f1"] == scores[0]["eval_f1"]
    assert not (out / "quantization.safetensors").exists()
    assert not any(
        "weight" in entry for entry in json.loads((out / "compression_plan.json").read_text())["modules"].values()
    )
    card = (out / "README.md").read_text()
    assert "quantization-aware" not in card and "| quantized modules | 0 (0 tensors) |" in card
    assert len(scores) == 3, "the best is not scored a second time under the last step"


def test_a_run_that_is_no_sparse_transfer_says_so(
    world: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    running.run(world, tmp_path / "lost", max_steps=1, recipe=None, recipe_args=None, distill_teacher=None)
    assert "nothing holds its zeros" in capfd.readouterr().out
    running.run(world, tmp_path / "swapped", max_steps=1, model_name_or_path=world["distill_teacher"])
    assert "the recipe holds the model's zeros, but the model is dense" in capfd.readouterr().out


def test_an_interval_without_its_strategy_is_warned_of(
    world: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    running.run(world, tmp_path / "out", max_steps=1, save_strategy="epoch", save_steps=1000)
    assert "--save_steps has no effect with --save_strategy epoch" in capfd.readouterr().out


def test_a_narrow_terminal_keeps_count_and_time_left() -> None:
    import io

    from rich.console import Console

    from sparse_accel.runtime.tracking import Screen

    console = Console(file=io.StringIO(), force_terminal=True, width=70, color_system=None)
    screen = Screen(console, is_shown=True, use_bar=True)
    screen.start_training(150, 0)
    screen.step(143, "epoch 5.72  frozen  lr 9.33e-06  loss 0.0806  (distillation 0.0806  task 4.2778)")
    assert screen.progress is not None
    screen.progress.refresh()
    screen.stop_training()
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "143/150" in shown and "ETA" in shown and "epoch 5.72" in shown


def test_a_distilbert_trains_with_its_own_submodules(tmp_path: Path, world: dict[str, Any]) -> None:
    from tests.tiny import tiny_bert

    recipe = (running.ROOT / "recipes/question_answering/pruned_quant.yaml").read_text()
    recipe = recipe.replace("bert.embeddings", "distilbert.embeddings").replace(
        "bert.encoder", "distilbert.transformer"
    )
    for name, seed in (("student", 3), ("teacher", 4)):
        tiny_bert(tmp_path / name, seed=seed, kind="distilbert")
    out = running.run(
        world,
        tmp_path / "out",
        recipe=recipe,
        model_name_or_path=str(tmp_path / "student"),
        distill_teacher=str(tmp_path / "teacher"),
    )
    plan = json.loads((out / "compression_plan.json").read_text())["modules"]
    assert "distilbert.transformer.layer.0.attention.attention_scores_matmul" in plan
