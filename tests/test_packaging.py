"""What an installed package carries, and what the set-up commands rest on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import sparse_accel

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], cwd=ROOT, check=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def _shipped(name: str) -> set[str]:
    return {path.relative_to(ROOT / name).as_posix() for path in (ROOT / name).rglob("*") if path.is_file()}


def test_the_wheel_is_named_after_the_one_version(wheel: Path) -> None:
    assert wheel.name == f"sparse_accel-{sparse_accel.__version__}-py3-none-any.whl"


@pytest.mark.parametrize("name", ["recipes", "launch_configs"])
def test_the_wheel_carries_recipes_and_launch_configs(installed: Path, name: str) -> None:
    data = installed / "sparse_accel" / "_data" / name
    carried = {path.relative_to(data).as_posix() for path in data.rglob("*") if path.is_file()}
    assert carried == _shipped(name)
    assert carried


def test_the_wheel_carries_the_package_and_nothing_of_the_workshop(installed: Path) -> None:
    top = {path.name for path in installed.iterdir()}
    assert top == {"sparse_accel", f"sparse_accel-{sparse_accel.__version__}.dist-info"}
    modules = {path.relative_to(installed).as_posix() for path in installed.rglob("*.py")}
    assert modules == {path.relative_to(ROOT).as_posix() for path in (ROOT / "sparse_accel").rglob("*.py")}


def test_the_wheel_says_what_it_is(installed: Path) -> None:
    (about,) = installed.glob("*.dist-info")
    metadata = (about / "METADATA").read_text("utf-8")
    assert f"Version: {sparse_accel.__version__}\n" in metadata
    assert "License-Expression: Apache-2.0\n" in metadata
    assert "Requires-Python: >=3.11\n" in metadata
    assert "sparse_accel = sparse_accel.cli:main" in (about / "entry_points.txt").read_text("utf-8")
    assert "Apache License" in (about / "licenses" / "LICENSE").read_text("utf-8")


def test_an_installed_package_finds_what_it_carries_from_any_folder(installed: Path, tmp_path: Path) -> None:
    program = (
        "from sparse_accel.recipe.shipped import find\n"
        "from sparse_accel.runtime.launch_configs import launch_config\n"
        "print(find('question_answering/dense'), launch_config('cpu'), sep='\\n')\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    data = installed / "sparse_accel" / "_data"
    assert found == [str(data / "recipes/question_answering/dense.yaml"), str(data / "launch_configs/cpu.yaml")]


def test_every_dependency_is_pinned_within_its_range() -> None:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pins = {_normal(name): version for name, version in pins.items()}
    extras = PROJECT["project"]["optional-dependencies"].values()
    wanted = [*PROJECT["project"]["dependencies"], *(line for extra in extras for line in extra)]
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(pins[_normal(requirement.name)]), requirement.name
    assert pins["torch"] == "2.13.0"


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_changelog_opens_with_this_version() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert sparse_accel.__version__ in [heading for heading in headings if heading != "Unreleased"][:1]


def _find_python(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["/bin/bash", str(ROOT / ".ci/find_python"), *arguments],
        env={"PATH": str(path)},
        capture_output=True,
        text=True,
    )


def test_an_interpreter_is_found_behind_a_shim_that_does_not_work(tmp_path: Path) -> None:
    shim = tmp_path / "python3.11"
    shim.write_text("#!/bin/sh\necho 'not installed' >&2\nexit 127\n")
    shim.chmod(0o755)
    (tmp_path / "python3").symlink_to(sys.executable)
    found = _find_python(tmp_path)
    assert found.stdout.strip() == str(tmp_path / "python3"), found.stderr


def test_a_machine_without_a_new_python_is_told_what_to_do(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\n[ \"$1\" = --version ] && echo 'Python 3.9.2' && exit 0\nexit 1\n")
    old.chmod(0o755)
    found = _find_python(tmp_path)
    assert found.returncode == 2
    assert "Python 3.11" in found.stderr
    assert "3.9.2" in found.stderr
    assert "PYTHON=" in found.stderr


def test_an_interpreter_that_was_asked_for_is_used_or_refused(tmp_path: Path) -> None:
    assert _find_python(tmp_path, sys.executable).stdout.strip() == sys.executable
    refused = _find_python(tmp_path, str(tmp_path / "python3.9"))
    assert refused.returncode == 2
    assert "python3.9" in refused.stderr
