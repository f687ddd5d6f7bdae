"""The README is true: its commands run, its recipe loads, its tables and its tree are those of the project."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from sparse_accel.cli import main
from sparse_accel.recipe import shipped
from sparse_accel.recipe.schema import Recipe
from tests import readme_tree, running, tiny
from tests.export.trained import trained_folder
from tests.small_sets import write_small_sets

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def _fenced(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def _commands() -> list[str]:
    blocks = "".join(_fenced("bash")).replace("\\\n", " ")
    return [line for line in blocks.splitlines() if line.strip()]


DEPLOYMENT = "MODEL_DIR/deployment"
MAKE = [command for command in _commands() if command.startswith("make ")]
PROGRAM = [command for command in _commands() if not command.startswith("make ")]
WHOLE = next(command for command in PROGRAM if "--distill_teacher TEACHER_DIR" in command)
# The ways of starting, one process each and then two; all train the same.
STARTS = [command for command in PROGRAM if re.search(r"--output_dir out_\d", command)]
TWO_PROCESSES = [command for command in STARTS if command.startswith("ACCELERATE_USE_CPU=1 ")]


def test_the_tree_is_the_projects() -> None:
    found = readme_tree.BLOCK.search(README)
    assert found is not None
    assert found[0] == readme_tree.tree(), "run: python tests/readme_tree.py"


# Starts with this: run with the exhaustive ones.
LONG = "sparse_accel benchmark inference"


@pytest.mark.parametrize("command", MAKE)
def test_make_knows_the_command(command: str) -> None:
    subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("text", _fenced("yaml"))
def test_the_recipe_shown_is_a_recipe(text: str) -> None:
    recipe = Recipe.load(text)
    assert recipe.num_epochs == 13
    assert not recipe.warnings


def test_all_shipped_recipes_are_listed() -> None:
    assert re.findall(r"^\| `([a-z_]+/\w+)` \|", README, re.MULTILINE) == shipped.names()


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader's folder: a checkout, data, a teacher and a pruned model, under the names that the README uses."""
    folder = tmp_path_factory.mktemp("desk")
    for name in ("sparse_accel", "launch_configs"):
        (folder / name).symlink_to(ROOT / name)
    tiny.tiny_squad(folder / "train.json", rows=64, seed=1)
    tiny.tiny_squad(folder / "val.json", rows=16, seed=2)
    tiny.tiny_bert(folder / "TEACHER_DIR", seed=1)
    _run_here("sparse_accel prune TEACHER_DIR --sparsity 0.5 --output_dir PRUNED_DIR", folder)
    recipe = shipped.find("question_answering/pruned_quant")
    assert recipe is not None
    shutil.copy(recipe, folder / "recipe.yaml")
    trained_folder(folder / "MODEL_DIR", sparsity=0.5)
    write_small_sets(folder)
    return folder


def _run(command: str, folder: Path) -> str:
    scripts = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    finished = subprocess.run(
        ["/bin/bash", "-c", command],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert finished.returncode == 0, f"$ {command}\n{finished.stdout}"
    return finished.stdout


def _run_here(command: str, folder: Path) -> None:
    """The same in this process, which has imported all that each new one would import first."""
    program, *words = shlex.split(command)
    assert program == "sparse_accel"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        try:
            assert main(words) == 0
        finally:
            AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def trained_here(desk: Path) -> Path:
    """What the ways of starting train, trained in this process."""
    assert len(STARTS) == 6 and len(TWO_PROCESSES) == 2 and STARTS[0].startswith("sparse_accel ")
    _run_here(STARTS[0].replace("--output_dir out_1", "--output_dir here"), desk)
    return desk / "here"


@pytest.fixture(scope="module")
def whole(desk: Path) -> tuple[Path, str]:
    """The output folder of the page's first command, and what was printed."""
    shown = _run(WHOLE, desk)
    return desk / "out", shown


# Each names its own output folder and none needs another's result.
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "command",
    # One takes minutes, and what it does has tests of its own.
    [
        pytest.param(command, marks=[pytest.mark.exhaustive] if command.startswith(LONG) else [], id=command)
        for command in PROGRAM
        if command != WHOLE and command not in STARTS
    ],
)
def test_the_command_runs_as_it_stands(command: str, desk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    needs_deployment = DEPLOYMENT in command and not command.startswith("sparse_accel export")
    if needs_deployment and not (desk / DEPLOYMENT).is_dir():
        _run_here(f"sparse_accel export MODEL_DIR --deployment_dir {DEPLOYMENT} --no_validate", desk)
    _run_here(command, desk)
    shown = capfd.readouterr().out
    output = re.search(r"--output_dir (\S+)", command)
    kind = command.split()[1]
    if kind == "export":
        assert json.loads((desk / DEPLOYMENT / "export_report.json").read_text())["passed"]
        assert (desk / DEPLOYMENT / "compressed" / "model.compressed.safetensors").is_file()
    elif kind in ("evaluate", "predict"):
        assert "F1" in shown or "score" in shown.lower()
    elif kind == "benchmark":
        assert output is not None and (desk / output[1] / "results.json").is_file()
    elif kind == "recipe":
        says = {
            "list": "question_answering/dense",
            "show": "!EpochRange",
            "check": "0 errors",
            "plan": "steps an epoch",
        }
        assert says[command.split()[2]] in shown
    elif output is None:
        assert "--help" in command
    else:
        assert (desk / output[1] / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("command", [command for command in STARTS if command not in TWO_PROCESSES])
def test_every_way_of_starting_trains_what_is_trained_here(command: str, desk: Path, trained_here: Path) -> None:
    """To the last bit."""
    _run(command, desk)
    assert running.differing(trained_here, desk / command.split("--output_dir ")[1].split()[0]) == []


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("command", TWO_PROCESSES)
def test_two_processes_train_together_and_only_the_first_prints(command: str, desk: Path, trained_here: Path) -> None:
    shown = _run(command, desk)
    assert shown.count("2 processes") == 1
    assert shown.count("written to") == 1
    out = desk / command.split("--output_dir ")[1].split()[0]
    assert running.tensors(out).keys() == running.tensors(trained_here).keys()


@pytest.mark.parametrize("text", _fenced("python"))
def test_the_python_shown_runs_without_torch(text: str, desk: Path) -> None:
    if not (desk / DEPLOYMENT).is_dir():
        _run_here(f"sparse_accel export MODEL_DIR --deployment_dir {DEPLOYMENT} --no_validate", desk)
    (desk / "shown.py").write_text(f"{text}\nimport sys\nassert 'torch' not in sys.modules\n", "utf-8")
    assert re.search(r" [01]\.\d+\n$", _run("python shown.py", desk))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_first_command_runs_as_it_stands(whole: tuple[Path, str]) -> None:
    folder, shown = whole
    assert (folder / "model.safetensors").is_file()
    assert "written to" in shown


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_output_folder_holds_what_the_table_says(whole: tuple[Path, str]) -> None:
    section = README[README.index("## What you get") : README.index("## Starting it")]
    rows = re.findall(r"^\| (`.+?) \|", section, re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`(\S+?)`", row)]
    assert len(names) >= 10
    missing = [name for name in names if not list(whole[0].glob(name))]
    assert not missing
