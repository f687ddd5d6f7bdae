"""`sparse_accel recipe list|show|check|plan`, as a person calls it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sparse_accel.cli import main
from sparse_accel.compress.census import Census
from sparse_accel.recipe import shipped
from sparse_accel.recipe.schema import Recipe
from sparse_accel.runtime.prune import prune
from sparse_accel.runtime.recipe_outlook import outlook, target_problems
from tests import tiny
from tests.unit.qat_bert import bert

QUANT = "question_answering/pruned_quant"


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny.tiny_bert(folder / "dense")
    prune(str(folder / "dense"), folder / "pruned", 0.8)
    return folder / "pruned"


def test_list_has_a_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == shipped.names()
    assert all(len(line) <= 96 for line in lines)


def test_show_gives_a_recipe_that_reads_as_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "show", QUANT, "--recipe-args", "num_epochs=9"]) == 0
    out, err = capsys.readouterr()
    assert Recipe.load(out) == Recipe.load(QUANT, "num_epochs=9")
    assert (out.count("eval("), err) == (0, "")


def test_show_raw_gives_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "show", QUANT, "--raw"]) == 0
    path = shipped.find(QUANT)
    assert path is not None
    assert capsys.readouterr().out == path.read_text("utf-8")
    assert main(["recipe", "show", QUANT, "--raw", "--recipe_args", "num_epochs=9"]) == 2


def test_check_ends_with_2_where_one_of_several_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("spare: 1\nm_modifiers:\n  - !SetWeightDecayModifier {weight_decay: 0, log_types: x}\n", "utf-8")
    assert main(["recipe", "check", str(path), QUANT]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"warning: {path}:1: the variable 'spare' is not used"
    assert out[1].startswith(f"warning: {path}:3: SetWeightDecayModifier: log_types is ignored")
    assert out[2:] == [f"{QUANT}: nothing is wrong", "2 recipes: 0 errors, 2 warnings"]
    assert main(["recipe", "check", str(path), QUANT, "nowhere.yaml"]) == 2
    assert "error: nowhere.yaml: there is no such recipe" in capsys.readouterr().out


def test_check_with_a_model_finds_every_target_that_is_not_there(
    pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "m_modifiers:\n  - !ConstantPruningModifier {params: ['re:nothing']}\n"
        "  - !QuantizationModifier {submodules: [bert.encodr]}\n",
        "utf-8",
    )
    assert main(["recipe", "check", str(path)]) == 0
    capsys.readouterr()
    assert main(["recipe", "check", str(path), "--model", str(pruned)]) == 2
    out = capsys.readouterr().out
    assert f"error: {path}:2: params: 're:nothing' matched no parameter" in out
    assert f"error: {path}:3: submodules: 'bert.encodr' matched no module; nearest: 'bert.encoder'" in out


def test_looking_for_targets_leaves_the_model_as_it_was() -> None:
    model = bert()
    text = "m_modifiers:\n  - !TrainableParamsModifier {params: __ALL__, trainable: false}\n"
    (problem,) = target_problems(Recipe.load(text), model)
    assert "freezes every parameter" in str(problem)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_plan_counts_windows_and_steps_as_training_does(
    pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tiny.tiny_squad(tmp_path / "train.json", rows=20)
    words = ["recipe", "plan", QUANT, "--train_file", str(data), "--gradient_accumulation_steps", "2"]
    assert main([*words, "--per_device_train_batch_size", "4", "--num_processes", "2"]) == 0
    out, err = capsys.readouterr()
    assert "20 features, 16 a step: 2 steps an epoch, 13 epochs, 26 steps" in out
    assert "its 20 rows are taken for as many features" in err
    # Windows of 40 tokens: more of them than rows.
    words += ["--model", str(pruned), "--max_seq_length", "40", "--doc_stride", "8", "--distill_teacher", "self"]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert int(out.split(" features")[0].split()[-1]) > 20
    assert "rows are taken" not in err
    assert "held (79.7%)" in out
    assert "12 masked layers are stored compact" in out
    assert "teacher" in out.partition("memory of each process")[2]


def test_plan_with_a_model_refuses_what_training_would(pruned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "m_modifiers:\n  - !QuantizationModifier {submodules: [encodr]}\n"
    assert main(["recipe", "plan", text, "--model", str(pruned)]) == 2
    assert "<recipe>:2: submodules: 'encodr' matched no module" in capsys.readouterr().err


def test_what_is_ahead_of_a_model_is_counted() -> None:
    model = bert()
    model.bert.encoder.layer[0].output.dense.weight.data[1:] = 0.0
    before = Census.of(model)
    found = outlook(Recipe.load(QUANT), model, batch_size=1, sequence_length=8, num_teacher_parameters=1000)
    assert {row.count.kind for row in found.kinds} == {row.kind for row in before.kinds()}
    assert sum(row.masked for row in found.kinds) == sum(p.prunable for p in before.parameters)
    assert sum(row.count.quantized for row in found.kinds) == len(found.census.quantized_modules) > 0
    (share,) = found.held.values()
    assert share == pytest.approx(before.sparsity)
    assert found.compact == 1
    assert found.memory.teacher == 4000
    assert found.bytes.model == 4 * before.num_parameters
    assert found.bytes.packed < found.bytes.deployed < found.bytes.model < found.bytes.checkpoint


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["recipe"], "recipe: to do what? One of list, show, check, plan"),
        (["recipe", "chek"], "'chek': no such recipe command; did you mean 'check'"),
        (["recipe", "--recipe_args", "a=1"], "--recipe_args: comes after one of recipe's commands"),
        (["recipe", "show", "--recipe", "x"], "--recipe: no such option; did you mean --recipe_args"),
        (["recipe", "plan", QUANT, "--num_examples", "8", "--train_file", "x"], "give one of them"),
        (["recipe", "plan", QUANT, "--num_train_epochs", "0"], "--num_train_epochs: expected a number above 0"),
        (["recipe", "plan", QUANT, "--distill_teacher", "x"], "give --model as well"),
        (["recipe", "plan", QUANT, "--plot", "x.pdf"], "its name should end in .png or .svg"),
        (["recipe", "plan", QUANT, "--recipe_args", "qat_start_epoch=13"], "starts at epoch 13, and training does not"),
    ],
)
def test_what_makes_no_sense_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert said in capsys.readouterr().err


def test_a_drawing_needs_matplotlib_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["recipe", "plan", "question_answering/dense", "--plot", str(tmp_path / "new" / "plan.png")]
    assert main(words) == 0
    assert (tmp_path / "new" / "plan.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(words) == 2
    assert "--plot needs matplotlib: `python -m pip install 'sparse_accel[plot]'`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "name", "text"),
    [
        ("masked_language_modeling", "lines.txt", "a b c\n\nd e f\n"),
        ("token_classification", "words.conll", "Ada B-PER\nsat O\n\nBob B-PER\n"),
    ],
)
def test_plan_counts_what_a_recipes_task_reads(
    task: str, name: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(text, "utf-8")
    assert main(["recipe", "plan", f"{task}/dense", "--train_file", str(tmp_path / name)]) == 0
    assert f"{task}/dense: 2 features" in capsys.readouterr().out
