"""Zoo stubs: the grammar, what each stands for and in which order, catalogues that are wrong, and the commands."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
from pathlib import Path
from typing import Any

import pytest

import sparse_accel
from sparse_accel.cli import main
from sparse_accel.errors import ModelError, OptionError, RecipeError, ZooError
from sparse_accel.recipe import shipped
from sparse_accel.recipe.reader import read
from sparse_accel.runtime.option_parsing import load_options
from sparse_accel.runtime.options import TrainOptions, describe_command
from sparse_accel.zoo.known import HUB_MODELS, KNOWN_STUBS, recipe_name
from sparse_accel.zoo.resolving import Zoo, open_zoo, resolve
from sparse_accel.zoo.stubs import is_stub, parse_stub

TEACHER = "zoo:nlp/question_answering/obert-base/pytorch/huggingface/squad/base-none"
STUDENT = "zoo:nlp/question_answering/obert-base/pytorch/huggingface/squad/pruned90_quant-none"
UPSTREAM = "zoo:nlp/masked_language_modeling/obert-base/pytorch/huggingface/wikipedia_bookcorpus/pruned90-none"
BLOCKS = "zoo:nlp/masked_language_modeling/bert-base/pytorch/huggingface/wikipedia_bookcorpus/12layer_pruned80_quant-none-vnni"
NOTHING = "zoo:nlp/token_classification/obert-base/pytorch/huggingface/conll2003/distilled-none"
WORDS = "zoo:nlp/token_classification/obert-base/pytorch/huggingface/conll2003/pruned90_quant-none"
SHORT = "zoo:obert-base-squad_wikipedia_bookcorpus-pruned90_quantized"
# As they will be called when every task has its recipes.
ALL_RECIPES = [
    *(
        f"{task}/{kind}"
        for task in ("question_answering", "text_classification", "token_classification")
        for kind in ("dense", "pruned", "quant", "pruned_quant")
    ),
    "masked_language_modeling/pruned90",
]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stubs are names: looking one up opens no socket. The environment has no catalogue of its own."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.delenv("SPARSE_ACCEL_ZOO", raising=False)


def a_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).touch()
    return folder


def a_zoo(given: str | Path | None = None, **environ: str) -> Zoo:
    return open_zoo(None if given is None else str(given), ALL_RECIPES, environ)


def catalogue(path: Path, text: str) -> Path:
    path.write_text(text, "utf-8")
    return path


def error_of(stub: str, kind: Any = "model", zoo: Zoo | None = None) -> str:
    with pytest.raises(ZooError) as caught:
        resolve(stub, kind, zoo or a_zoo())
    return str(caught.value)


# ---- the grammar


@pytest.mark.parametrize(
    ("text", "task", "dataset", "tag", "recipe_type"),
    [
        (TEACHER, "question_answering", "squad", "base-none", None),
        (TEACHER.removeprefix("zoo:"), "question_answering", "squad", "base-none", None),
        (BLOCKS, "masked_language_modeling", "wikipedia_bookcorpus", "12layer_pruned80_quant-none-vnni", None),
        (f"{UPSTREAM}?recipe_type=transfer-sst2", "masked_language_modeling", "wikipedia_bookcorpus", "pruned90-none", "transfer-sst2"),
        (f"{STUDENT}?recipe=original", "question_answering", "squad", "pruned90_quant-none", "original"),
        (f"{STUDENT}?recipe=a&recipe_type=a", "question_answering", "squad", "pruned90_quant-none", "a"),
        (SHORT, "question_answering", "squad_wikipedia_bookcorpus", "pruned90_quantized", None),
        ("zoo:cv/classification/resnet_v1-50/pytorch/sparseml/imagenet-augmented/base-none", None, "imagenet-augmented", "base-none", None),
    ],
)  # fmt: skip
def test_both_forms_of_a_stub_are_taken_apart(
    text: str, task: str | None, dataset: str, tag: str, recipe_type: str | None
) -> None:
    stub = parse_stub(text)
    assert (stub.task, stub.dataset, stub.tag, stub.recipe_type) == (task, dataset, tag, recipe_type)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{TEACHER}/training", "'/training' follows the end of the stub; leave it out"),
        (f"{TEACHER} ", "' ' follows the end"),
        (f"{TEACHER}/", "'/' follows the end"),
        (f"{TEACHER}, {STUDENT}", "', zoo:nlp/question"),
        (f"{SHORT}@main", "'@main' follows the end"),
        (f"{TEACHER}?recipe=a?recipe=b", "more than one '?'"),
        (f"{TEACHER}?recipe_typ=original", "no key 'recipe_typ'; did you mean 'recipe_type'"),
        (f"{TEACHER}?recipe=", "followed by a recipe's type"),
        (f"{TEACHER}?recipe=a&recipe=b", "recipe= is given twice"),
        (f"{TEACHER}?recipe=a&recipe_type=b", "choose different recipes, a and b"),
        (f"{TEACHER}?checkpoint=preqat", "checkpoint= chose among files"),
        ("zoo:nlp/question_answering/obert-base/pytorch/huggingface/squad", "has no tag"),
        ("zoo:nlp/question_answering/x", "has no framework and no repository and no dataset and no tag"),
        ("zoo:nlp/question_answering/o bert/pytorch/huggingface/squad/x", "the architecture, 'o bert'"),
        ("zoo:nlp/question-answering/obert/pytorch/huggingface/squad/x", "only the architecture, the data set and the tag"),
        ("zoo:../../pytorch/x/y/squad/base-none", "dots alone"),
        ("zoo:bert", "is no stub"),
        ("zoo:", "is no stub"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_stub_is_said(text: str, message: str) -> None:
    with pytest.raises(ZooError) as caught:
        parse_stub(text)
    assert str(caught.value).startswith(text) and message in str(caught.value)


def test_only_the_prefix_makes_a_stub() -> None:
    assert is_stub(TEACHER)
    assert not is_stub("bert-base-uncased")
    assert not is_stub("zoo: 1\ntraining_modifiers: []")
    assert not is_stub(None)


# ---- what is known without a catalogue


def test_the_tutorials_stubs_stand_for_their_counterparts() -> None:
    assert resolve(UPSTREAM, "model", a_zoo()).value == "neuralmagic/oBERT-12-upstream-pruned-unstructured-90-v2"
    assert resolve(TEACHER, "model", a_zoo()).value == "neuralmagic/oBERT-teacher-squadv1"
    student = resolve(STUDENT, "model", a_zoo())
    assert "finetuned-squadv1" in student.value and "not quantized" in student.note
    assert resolve(STUDENT, "recipe", a_zoo()).value == "question_answering/pruned_quant"
    assert all(resolve(f"zoo:{name}", "model", a_zoo()).value == model.name for name, model in HUB_MODELS.items())


@pytest.mark.parametrize(
    ("stub", "recipe"),
    [
        (TEACHER, "question_answering/dense"),
        (SHORT, "question_answering/pruned_quant"),
        (WORDS, "token_classification/pruned_quant"),
        (UPSTREAM, "masked_language_modeling/pruned90"),
        (f"{UPSTREAM}?recipe_type=transfer-question_answering", "question_answering/pruned"),
        (f"{BLOCKS}?recipe_type=transfer-text_classification", "text_classification/pruned_quant"),
        (f"{BLOCKS}?recipe=transfer-token_classification", "token_classification/pruned_quant"),
        (f"{STUDENT}?recipe_type=transfer-question_answering", "question_answering/pruned_quant"),
        ("zoo:nlp/sentiment_analysis/obert-base/pytorch/huggingface/sst2/base-none", "text_classification/dense"),
        (
            "zoo:nlp/text_classification/obert-base/pytorch/huggingface/mnli/base_quant-none",
            "text_classification/quant",
        ),
    ],
)
def test_a_recipes_stub_stands_for_the_shipped_one_of_its_kind(stub: str, recipe: str) -> None:
    assert resolve(stub, "recipe", a_zoo()).value == recipe


def test_every_known_stub_is_one_and_has_a_recipe_of_ours() -> None:
    for name in KNOWN_STUBS:
        assert recipe_name(parse_stub(name)) is not None


def test_a_type_that_is_another_tasks_is_refused() -> None:
    said = error_of(f"{STUDENT}?recipe_type=transfer-token_classification", "recipe")
    assert (
        "none of type 'transfer-token_classification'; types: original, transfer, transfer-question_answering" in said
    )
    assert "a recipe's type is for --recipe" in error_of(f"{STUDENT}?recipe_type=original", "model")


# ---- what cannot be had


def test_a_model_that_cannot_be_had_says_what_was_tried_and_what_to_pass() -> None:
    said = error_of(WORDS)
    assert "service has ended" in said
    assert "your catalogues (none: neither --zoo nor SPARSE_ACCEL_ZOO names one)" in said
    assert "no counterpart is known" in said
    assert "sparse_accel prune MODEL --sparsity 0.9" in said
    assert f"`sparse_accel zoo add '{WORDS}' --model" in said
    dense = error_of(WORDS.replace("pruned90_quant", "base"))
    assert "a dense model that is fine-tuned on conll2003" in dense


def test_the_closest_stub_that_can_be_had_is_named() -> None:
    assert f"closest stub that can be had: {TEACHER}" in error_of(TEACHER.replace("squad", "squad_v2"))
    assert "closest" not in error_of(WORDS)  # nothing of its task is known
    said = error_of(TEACHER.replace("base-none", "bose-none"), "recipe")
    assert "none is of this kind" in said and f"closest stub that can be had: {TEACHER}" in said


def test_a_recipe_that_does_not_ship_yet_is_named() -> None:
    zoo = open_zoo(None, ["question_answering/dense"], {})
    assert "there is no token_classification/pruned_quant" in error_of(WORDS, "recipe", zoo)


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_where_the_hub_may_not_be_called_only_downloaded_models_count(tmp_path: Path, variable: str) -> None:
    zoo = a_zoo(**{variable: "1", "HF_HOME": str(tmp_path)})
    said = error_of(TEACHER, zoo=zoo)
    assert "forbids to download it and it is not in" in said and str(tmp_path / "hub") in said
    a_model(tmp_path / "hub" / "models--neuralmagic--oBERT-teacher-squadv1" / "snapshots" / "abc")
    assert resolve(TEACHER, "model", zoo).value == "neuralmagic/oBERT-teacher-squadv1"


# ---- catalogues


def test_a_users_catalogue_comes_first_and_its_paths_are_its_own(tmp_path: Path) -> None:
    model = a_model(tmp_path / "models" / "mine")
    (tmp_path / "mine.yaml").touch()
    file = catalogue(tmp_path / "zoo.yaml", f"{TEACHER}:\n  model: models/mine\n  recipe: mine.yaml\n")
    found = resolve(TEACHER, "model", a_zoo(file))
    assert Path(found.value) == model and found.origin == f"{file}:2"
    assert resolve(TEACHER, "recipe", a_zoo(file)).value == str(tmp_path / "mine.yaml")
    assert resolve(TEACHER, "model", a_zoo(SPARSE_ACCEL_ZOO=str(file))) == found
    # What it does not name is looked for further on.
    assert resolve(STUDENT, "recipe", a_zoo(file)).value == "question_answering/pruned_quant"


def test_recipes_have_types_in_a_catalogue(tmp_path: Path) -> None:
    (tmp_path / "a.md").touch()
    text = f"{STUDENT}:\n  recipe:\n    one: a.md\n    two: question_answering/dense\n{TEACHER}:\n  recipe: {{only: a.md}}\n"
    zoo = a_zoo(catalogue(tmp_path / "zoo.yaml", text))
    assert resolve(f"{STUDENT}?recipe_type=one", "recipe", zoo).value == str(tmp_path / "a.md")
    assert resolve(f"{STUDENT}?recipe=two", "recipe", zoo).value == "question_answering/dense"
    assert resolve(TEACHER, "recipe", zoo).value == str(tmp_path / "a.md")
    assert "has several recipes for this stub; choose:" in error_of(STUDENT, "recipe", zoo)
    assert resolve(f"{STUDENT}?recipe=original", "recipe", zoo).value == "question_answering/pruned_quant"


def test_a_folder_is_a_catalogue_of_models_that_lie_as_sparsezoo_kept_them(tmp_path: Path) -> None:
    place = tmp_path / STUDENT.removeprefix("zoo:")
    a_model(place / "training")
    for name in ("recipe.md", "recipe_transfer.md"):
        (place / name).touch()
    a_model(tmp_path / SHORT.removeprefix("zoo:"))
    (tmp_path / "notes").mkdir()
    zoo = a_zoo(tmp_path)
    assert resolve(STUDENT, "model", zoo).value == str(place / "training")
    assert resolve(STUDENT, "recipe", zoo).value == str(place / "recipe.md")
    assert resolve(f"{STUDENT}?recipe_type=transfer", "recipe", zoo).value == str(place / "recipe_transfer.md")
    assert resolve(SHORT, "model", zoo).value == str(tmp_path / SHORT.removeprefix("zoo:"))


def test_a_hub_id_in_a_catalogue_is_only_a_name(tmp_path: Path) -> None:
    file = catalogue(tmp_path / "zoo.yaml", f"{WORDS}:\n  model: hf:me/mine\n")
    assert resolve(WORDS, "model", a_zoo(file)).value == "me/mine"
    offline = a_zoo(file, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert f"{file}:2" in error_of(WORDS, zoo=offline) and "forbids to call" in error_of(WORDS, zoo=offline)


def test_two_catalogues_that_disagree_are_both_named(tmp_path: Path) -> None:
    a_model(tmp_path / "a")
    a_model(tmp_path / "b")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    one = catalogue(tmp_path / "one.yaml", f"{TEACHER}:\n  model: a\n")
    two = catalogue(tmp_path / "two.yaml", f"# other\n{TEACHER}:\n  model: b\n")
    same = catalogue(tmp_path / "same.yaml", f"{TEACHER}:\n  model: link\n  recipe: question_answering/dense\n")
    said = error_of(TEACHER, zoo=a_zoo(one, SPARSE_ACCEL_ZOO=str(two)))
    assert "two catalogues disagree" in said and f"{one}:2" in said and f"{two}:3" in said
    assert "disagree" in error_of(TEACHER, zoo=a_zoo(os.pathsep.join([str(one), str(two)])))
    assert resolve(TEACHER, "model", a_zoo(one, SPARSE_ACCEL_ZOO=str(same))).value == str(tmp_path / "a")
    assert resolve(TEACHER, "recipe", a_zoo(one, SPARSE_ACCEL_ZOO=str(same))).origin == f"{same}:3"


@pytest.mark.parametrize(
    ("kind", "entry", "message"),
    [
        ("model", "model: models/mine", "points nowhere: there is no model folder"),
        ("model", "model: me/mine", "written hf:me/mine"),
        ("model", "model: moddel", "did you mean '"),
        ("model", "model: empty", "has no config.json"),
        ("model", "model: 'hf:a/b/c'", "is no hub id"),
        ("recipe", "recipe: r.yaml", "points nowhere: there is no recipe"),
        ("recipe", "recipe: question_answering/dens", "did you mean 'question_answering/dense'"),
    ],
)
def test_an_entry_that_points_nowhere_is_named_with_its_line(
    tmp_path: Path, kind: Any, entry: str, message: str
) -> None:
    a_model(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    file = catalogue(tmp_path / "zoo.yaml", f"{TEACHER}:\n  {entry}\n")
    said = error_of(TEACHER, kind, a_zoo(file))
    assert said.startswith(f"{file}:2: {TEACHER}: ") and message in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", ":2: is not YAML"),
        ("- a", ":1: a catalogue is a mapping"),
        (f"{TEACHER}/x:\n  model: a", ":1: " + f"{TEACHER}/x: '/x' follows"),
        (f"{TEACHER}?recipe=x:\n  model: a", ":1: "),
        (f"{TEACHER}: a", ":1: below"),
        (f"{TEACHER}:\n  modell: a", ":2: " + f"{TEACHER} has no 'modell'; did you mean 'model'"),
        (f"{TEACHER}:\n  model: a\n  model: b", ":3: model is given twice"),
        (f"{TEACHER}:\n  recipe: {{a: x, a: y}}", ":2: the recipe 'a' is given twice"),
        (f"{TEACHER}:\n  model: [a]", ":2: expected a path"),
        (f"{TEACHER}:\n  model: 3", ":2: expected a path"),
        (f"{TEACHER}: {{}}", ":1: " + f"{TEACHER} names neither"),
        (f"{TEACHER}: {{model: a}}\n{TEACHER.removeprefix('zoo:')}: {{model: a}}", ":2: "),
    ],
)
def test_a_catalogue_that_is_wrong_is_refused_with_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    file = catalogue(tmp_path / "zoo.yaml", text + "\n")
    with pytest.raises(ZooError) as caught:
        a_zoo(file)
    assert str(caught.value).startswith(f"{file}{message}")


def test_a_catalogue_that_is_not_there_is_named(tmp_path: Path) -> None:
    catalogue(tmp_path / "zoo.yaml", "")
    with pytest.raises(ZooError, match=r"--zoo: there is no catalogue .*did you mean '.*zoo\.yaml'"):
        a_zoo(tmp_path / "zo.yaml")
    with pytest.raises(ZooError, match="SPARSE_ACCEL_ZOO: there is no catalogue"):
        a_zoo(SPARSE_ACCEL_ZOO=str(tmp_path / "nowhere.yaml"))
    with pytest.raises(ZooError, match=r"ends in \.yaml or \.yml"):
        a_zoo(catalogue(tmp_path / "zoo.json", "{}"))
    assert a_zoo(tmp_path / "zoo.yaml").catalogues[0].entries == {}


# ---- options


@pytest.fixture
def command(tmp_path: Path) -> dict[str, str]:
    """A training command all of whose models are stubs, and the catalogue that knows them."""
    a_model(tmp_path / "student")
    a_model(tmp_path / "teacher")
    (tmp_path / "train.json").touch()
    text = f"{UPSTREAM}:\n  model: student\n{TEACHER}:\n  model: teacher\n"
    catalogue(tmp_path / "zoo.yaml", text)
    return {
        "do_train": "true",
        "train_file": str(tmp_path / "train.json"),
        "output_dir": str(tmp_path / "out"),
        "model_name_or_path": UPSTREAM,
        "tokenizer_name": TEACHER,
        "config_name": UPSTREAM,
        "distill_teacher": TEACHER,
        "recipe": STUDENT,
        "zoo": str(tmp_path / "zoo.yaml"),
    }


def load(command: dict[str, str]) -> TrainOptions:
    return load_options("question_answering", command)


def test_every_option_that_takes_a_path_takes_a_stub(command: dict[str, str], tmp_path: Path) -> None:
    options = load(command)
    assert options.model_name_or_path == options.config_name == str(tmp_path / "student")
    assert options.tokenizer_name == options.distill_teacher == str(tmp_path / "teacher")
    assert options.recipe == "question_answering/pruned_quant"
    assert options.stubs["distill_teacher"].note == f"{TEACHER} stands for {tmp_path / 'teacher'} ({command['zoo']}:4)"


def test_a_run_keeps_the_stub_as_it_was_typed(command: dict[str, str]) -> None:
    options = load(command)
    assert {name: options.to_json()[name] for name in options.stubs} == {name: command[name] for name in options.stubs}
    assert f"--distill_teacher {TEACHER}" in describe_command(options)
    assert options.identity()["distill_teacher"] == TEACHER
    again = load({name: value for name, value in options.to_json().items() if value is not None and name != "task"})
    assert again.identity() == options.identity()


def test_a_stub_that_has_come_to_stand_for_another_model_makes_another_run(
    command: dict[str, str], tmp_path: Path
) -> None:
    before = load(command).identity()
    a_model(tmp_path / "other")
    catalogue(tmp_path / "zoo.yaml", f"{UPSTREAM}:\n  model: student\n{TEACHER}:\n  model: other\n")
    after = load(command).identity()
    assert {name for name in after if after[name] != before[name]} == {"zoo stubs stand for"}


def test_an_option_whose_stub_stands_for_nothing_is_named(command: dict[str, str]) -> None:
    with pytest.raises(ZooError, match=rf"--distill_teacher: {WORDS}: SparseZoo's service has ended"):
        load(command | {"distill_teacher": WORDS})
    with pytest.raises(OptionError, match="--zoo: has no effect"):
        plain = {"model_name_or_path": "bert", "recipe": "r.yaml", "distill_teacher": "self"}
        load({name: value for name, value in command.items() if name not in ("tokenizer_name", "config_name")} | plain)


def test_a_recipe_is_read_by_its_stub() -> None:
    assert read(STUDENT).where == read("question_answering/pruned_quant").where
    assert read(WORDS).where == read("token_classification/pruned_quant").where
    assert read(WORDS.replace("token_classification", "sentiment_analysis").replace("conll2003", "sst2")).where == (
        read("text_classification/pruned_quant").where
    )
    with pytest.raises(RecipeError, match="nothing else is known to stand for this recipe"):
        read(NOTHING)


def test_a_model_is_opened_by_its_stub(tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = catalogue(tmp_path / "zoo.yaml", f"{TEACHER}:\n  model: {tiny_student}\n")
    monkeypatch.setenv("SPARSE_ACCEL_ZOO", str(file))
    assert sparse_accel.load(TEACHER).config.name_or_path == str(tiny_student)


# ---- commands


def run(*words: str) -> int:
    return main(["zoo", *words])


def test_a_stub_is_added_listed_and_resolved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, file = a_model(tmp_path / "my model"), tmp_path / "zoo.yaml"
    catalogue(file, "# mine\n")
    (tmp_path / "r.md").touch()
    words = ["--model", str(model), "--recipe", "question_answering/dense", "--recipe", f"transfer={tmp_path / 'r.md'}"]
    assert run("add", WORDS, *words, "--zoo", str(file)) == 0
    assert file.read_text("utf-8").startswith(f'# mine\n{WORDS}:\n  model: "./my model"\n')
    capsys.readouterr()
    assert run("resolve", WORDS, "--zoo", str(file)) == 0
    printed = capsys.readouterr().out
    assert f"model   {model}  ({file}:3)" in printed and "recipe  question_answering/dense" in printed
    assert run("resolve", f"{WORDS}?recipe_type=transfer", "--zoo", str(file), "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"recipe": {"value": str(tmp_path / "r.md"), "origin": f"{file}:6"}}
    assert run("list", "--zoo", str(file)) == 0
    listed = capsys.readouterr().out
    assert listed.startswith(f"{WORDS}\n") and TEACHER in listed
    assert run("list", "--zoo", str(file), "--json") == 0
    assert json.loads(capsys.readouterr().out)[WORDS]["model"]["value"] == str(model)
    assert run("add", WORDS, "--model", str(model), "--zoo", str(file)) == 2
    assert f"{file}:2: {WORDS} is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "zoo: what? `sparse_accel zoo list|resolve|add`"),
        ([TEACHER], "`sparse_accel zoo resolve zoo:nlp/"),
        (["resove", TEACHER], "'resove': no such action; did you mean 'resolve'"),
        (["resolve", NOTHING], "SparseZoo's service has ended"),
        (["resolve", TEACHER, "--kind", "modell"], "--kind: 'modell' is not offered"),
        (["add", WORDS, "--model", "x"], "to which catalogue? pass --zoo FILE.yaml"),
        (["add", WORDS, "--zoo", "x.yaml"], "pass --model FOLDER, --recipe FILE or both"),
        (["add", WORDS, "--model", "x", "--zoo", "x.json"], "ends in .yaml or .yml"),
        (["add", WORDS, "--model", "me/mine", "--zoo", "x.yaml"], "there is no folder me/mine; a model on the hub is written hf:"),
        (["add", WORDS, "--recipe", "r.yaml", "--zoo", "x.yaml"], "r.yaml is neither a recipe's file"),
        (["add", f"{WORDS}?recipe=x", "--model", "x", "--zoo", "x.yaml"], "--recipe TYPE=FILE"),
    ],
)  # fmt: skip
def test_a_zoo_command_that_is_wrong_says_what_is_right(
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*words) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_other_commands_look_stubs_up_before_anything_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A catalogue's entry that points nowhere is reached, and nothing heavy had to be imported for it."""
    file = catalogue(tmp_path / "zoo.yaml", f"{TEACHER}:\n  model: nowhere\n")
    for words in (
        ["prune", TEACHER, "--sparsity", "0.5", "--output_dir", str(tmp_path / "out")],
        ["evaluate", TEACHER, "--validation_file", "v.json"],
        ["export", TEACHER],
        ["export_onnx", "--model_path", TEACHER],
        ["predict", TEACHER, "--question", "q", "--context", "c"],
    ):
        assert main([*words, "--zoo", str(file)]) == 2
        assert f"{file}:2: {TEACHER}: points nowhere" in capsys.readouterr().err
        assert main([*(word if word != TEACHER else "folder" for word in words), "--zoo", str(file)]) == 2
        assert "--zoo: has no effect: there is no zoo: stub" in capsys.readouterr().err


def test_a_downloaded_model_is_a_folder_for_commands_that_read_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    from sparse_accel.folders.hub_copies import local_copy

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    stored = tmp_path / "models--me--mine"
    commit = "0" * 40
    a_model(stored / "snapshots" / commit)
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text(commit)
    assert local_copy("me/mine", "FOLDER") == stored / "snapshots" / commit
    with pytest.raises(ModelError, match="FOLDER: me/other cannot be downloaded from the hub"):
        local_copy("me/other", "FOLDER")


DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "from-sparseml.md").read_text("utf-8")


def test_the_documentations_commands_run_and_its_catalogue_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    a_model(tmp_path / "MODEL_DIR")
    (tmp_path / "recipe.yaml").touch()
    commands = [line for block in _fenced("bash") for line in block.splitlines() if line.startswith("sparse_accel zoo")]
    assert len(commands) == 4
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0, command
    assert "question_answering/dense" in capsys.readouterr().out
    (shown,) = _fenced("yaml")
    zoo = a_zoo(catalogue(tmp_path / "shown.yaml", shown), SPARSE_ACCEL_ZOO="zoo.yaml")
    assert resolve(STUDENT, "model", zoo).value == str(tmp_path / "MODEL_DIR")
    typed = "zoo:bert-base-wikipedia_bookcorpus-pruned80?recipe_type=transfer-question_answering"
    assert resolve(typed, "recipe", zoo).value == "question_answering/pruned_quant"


def _fenced(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCUMENT, re.DOTALL | re.MULTILINE)


def test_the_shipped_recipes_are_those_that_stubs_are_looked_up_in() -> None:
    assert resolve(TEACHER, "recipe", open_zoo(None, shipped.names(), {})).value in shipped.names()
