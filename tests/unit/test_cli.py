"""The command line: spellings that people use, what `--help` costs, and how errors end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import sparse_accel
from sparse_accel.cli import main
from sparse_accel.cli.arguments import CommandLine, Flag, normalise, unknown_option
from sparse_accel.cli.program import parse
from sparse_accel.errors import OptionError
from sparse_accel.runtime.options import flag_fields

ROOT = Path(__file__).resolve().parents[2]
FLAGS = {
    "do_train": Flag("do_train", is_switch=True),
    "no_cuda": Flag("use_cpu", is_switch=True),
    "eval_strategy": Flag("eval_strategy"),
    "evaluation_strategy": Flag("eval_strategy"),
    "recipe": Flag("recipe"),
    "max_steps": Flag("max_steps"),
    "report_to": Flag("report_to", choices=("none", "wandb", "tensorboard")),
}
LINE = CommandLine(FLAGS, unknown_option(FLAGS))
RECIPE = "---\nversion: 1.1.0\n---\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--do_train"], ["--do_train=true"]),
        (["--do-train", "args.json"], ["--do_train=true", "args.json"]),
        (["--do_train", "False", "args.json"], ["--do_train=False", "args.json"]),
        (["--do_train=0"], ["--do_train=0"]),
        (["--no_do_train"], ["--do_train=false"]),
        (["--no-do-train", "args.json"], ["--do_train=false", "args.json"]),
        (["--no_cuda"], ["--use_cpu=true"]),
        (["--evaluation-strategy", "epoch"], ["--eval_strategy=epoch"]),
        (["--eval_strategy=epoch"], ["--eval_strategy=epoch"]),
        (["--max_steps", "-1"], ["--max_steps=-1"]),
        (["--recipe", RECIPE], [f"--recipe={RECIPE}"]),
        (["--recipe", "a=b"], ["--recipe=a=b"]),
        (["--recipe", "-x"], ["--recipe=-x"]),
        (["--report_to", "wandb", "tensorboard", "args.json"], ["--report_to=wandb,tensorboard", "args.json"]),
        (["args.json", "--", "--do_train"], ["args.json", "--", "--do_train"]),
        (["-h"], ["--help"]),
    ],
)
def test_every_spelling_becomes_the_parsers(words: list[str], expected: list[str]) -> None:
    assert normalise(words, LINE) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recipe"], "--recipe: needs a value"),
        (["--recipe", "--do_train"], "--recipe: needs a value, but --do_train follows"),
        (["--recipes", "x"], "--recipes: no such option; did you mean --recipe"),
        (["--no_recipe"], "--no_recipe: no such option"),
        (["--no_do_train", "True"], "takes no value"),
        (["-o", "x"], "two dashes"),
        (["--xyzzy"], "`--help` lists them all"),
    ],
)
def test_a_word_that_makes_no_sense_is_named(words: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        normalise(words, LINE)


@pytest.mark.parametrize("task", ["question_answering", "question-answering", "qa"])
def test_a_task_has_several_names(task: str) -> None:
    assert parse(["train", task, "--do-train"]) == ["train", "question_answering", "--do_train=true"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "'trian': no such command; did you mean 'train'"),
        (["train", "question_anwering"], "no such task; did you mean 'question_answering'"),
        (["train"], "which task"),
        (["train", "--do_train", "qa"], "the task comes first"),
        (["--do_train"], "comes after a command"),
        (["train", "qa", "--deepspeed", "x.json"], "accelerate launch --config_file"),
        (["prune", "model", "--sparsty", "0.5"], "did you mean --sparsity"),
    ],
)
def test_a_wrong_command_says_what_is_right(argv: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse(argv)


def test_switches_of_other_commands_take_booleans_too() -> None:
    assert parse(["prune", "m", "--overwrite", "True", "--global"]) == ["prune", "m", "--overwrite", "--global"]
    assert parse(["prune", "m", "--overwrite=False"]) == ["prune", "m"]
    with pytest.raises(OptionError, match="--overwrite: expected True"):
        parse(["prune", "m", "--overwrite=maybe"])


def test_errors_are_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "qa", "--learning_rat", "1"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    nearest = "--learning_rate or --logging_strategy or --logging_dir"
    assert printed.err == f"error: --learning_rat: no such option; did you mean {nearest}?\n"


def test_usage_errors_of_the_parser_end_the_same_way(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", "model", "--output_dir", "x", "--sparsity", "much"]) == 2
    assert capsys.readouterr().err.startswith("error: Invalid value for '--sparsity'")
    assert main(["train", "qa", "a.json", "b.json"]) == 2
    assert "b.json" in capsys.readouterr().err


def test_a_file_of_options_reaches_the_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "args.json").write_text(json.dumps({"learnig_rate": 1}), encoding="utf-8")
    assert main(["train", "qa", str(tmp_path / "args.json")]) == 2
    assert "args.json: learnig_rate: no such option; did you mean --learning_rate" in capsys.readouterr().err


def test_a_launch_that_lost_its_processes_stops_before_anything_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert main(["train", "qa"]) == 2
    assert "MASTER_ADDR is set but WORLD_SIZE is not" in capsys.readouterr().err


def test_a_fault_of_the_program_keeps_its_traceback_and_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sparse_accel.runtime import option_parsing

    monkeypatch.delattr(option_parsing, "validate")
    assert main(["train", "qa", "--do_eval", "--output_dir", "o", "--model_name_or_path", "m"]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback")
    assert "name 'validate' is not defined" in printed


def test_only_the_first_rank_prints_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "qa", "--help"]) == 0
    assert "--distill_teacher" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    assert main(["train", "qa", "--help"]) == 0
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == ""


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"sparse_accel {sparse_accel.__version__}\n"


@pytest.mark.parametrize(
    "argv", [["--help"], ["train", "--help"], ["train", "qa", "--help"], ["prune", "--help"], ["demo", "-h"]]
)
def test_help_imports_nothing_heavy(argv: list[str]) -> None:
    script = (
        "import sys; from sparse_accel.cli import main; code = main(sys.argv[1:])\n"
        "heavy = {'torch', 'transformers', 'accelerate', 'datasets', 'numpy'} & set(sys.modules)\n"
        "sys.exit(str(sorted(heavy)) if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", script, *argv], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Usage: sparse_accel" in done.stdout


def test_help_shows_every_option_under_a_heading() -> None:
    environ = {**os.environ, "COLUMNS": "200", "TERM": "dumb"}
    done = subprocess.run(
        [sys.executable, "-m", "sparse_accel", "train", "qa", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        env=environ,
    )
    for entry in flag_fields("question_answering"):
        assert f"--{entry.name}" in done.stdout
        assert entry.metadata["group"] in done.stdout


def test_a_raw_recipe_survives_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """It gets as far as the check of the model, which comes after all options were read."""
    (tmp_path / "train.json").touch()
    argv = [
        "train",
        "qa",
        "--do_train",
        "--train_file",
        str(tmp_path / "train.json"),
        "--output_dir",
        str(tmp_path / "o"),
    ]
    assert main([*argv, "--recipe", RECIPE, "--max_steps", "-1", "--model_name_or_path", "./nowhere"]) == 2
    assert "--model_name_or_path: no such folder: ./nowhere" in capsys.readouterr().err


@pytest.mark.parametrize(("task", "scores"), [("text_classification", "matthews_correlation"), ("mlm", "perplexity")])
def test_the_help_of_a_task_names_its_own_scores(
    task: str, scores: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["train", task, "--help"]) == 0
    out = capsys.readouterr().out
    assert scores in out and "exact_match" not in out
