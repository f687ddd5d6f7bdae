"""Policies as tests: who may import whom, safe names, and a few habits that are easily lost."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import sparse_accel

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sparse_accel"


@dataclass(frozen=True)
class Part:
    """A module or folder at the top of the package: its layer, the third-party packages that it may import, and the
    parts of its own layer that it may import. Parts of lower layers are open to all."""

    layer: int
    third_party: frozenset[str] = frozenset()
    neighbours: frozenset[str] = frozenset()


def _part(layer: int, third_party: str = "", neighbours: str = "") -> Part:
    return Part(layer, frozenset(third_party.split()), frozenset(neighbours.split()))


PARTS: dict[str, Part] = {
    "__init__": _part(6),  # for type checkers alone: at run time it imports lazily
    "errors": _part(0),
    "timeline": _part(0),
    "schedules": _part(0, neighbours="errors"),
    "targets": _part(0, neighbours="errors"),
    "zoo": _part(0, "yaml", neighbours="errors"),
    "demo_corpus": _part(0, neighbours="errors"),
    "packing": _part(1, "torch"),
    "compress": _part(1, "torch triton", neighbours="packing"),
    "session": _part(2, "torch"),
    "modifiers": _part(2, "torch pydantic", neighbours="session"),
    "recipe": _part(3, "torch pydantic yaml matplotlib"),
    "tasks": _part(3, "torch numpy transformers datasets evaluate pyarrow tokenizers scipy sklearn"),
    "folders": _part(3, "torch numpy transformers safetensors huggingface_hub", neighbours="tasks"),
    "reports": _part(3, "safetensors", neighbours="recipe folders"),
    "runtime": _part(4, "torch numpy transformers datasets accelerate deepspeed psutil safetensors rich yaml"),
    "benchmarking": _part(
        4, "torch numpy transformers datasets tokenizers rich matplotlib nncf modelopt", neighbours="runtime"
    ),
    "serving": _part(4, "torch numpy onnxruntime openvino rich matplotlib"),
    "onnx_export": _part(4, "torch numpy transformers onnx onnx_ir onnxscript onnxruntime rich", neighbours="serving"),
    "cli": _part(5, "torch safetensors typer rich"),
    "python_api": _part(5, neighbours="cli"),
    "__main__": _part(6),
}

# Packages that have one home among the parts.
ONLY_IN: dict[str, frozenset[str]] = {
    "accelerate": frozenset({"runtime"}),
    "pyarrow": frozenset({"tasks"}),
    "typer": frozenset({"cli"}),
}

SOURCES = sorted(PACKAGE.rglob("*.py"))


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of all that a file imports, also inside functions and for type checking only."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{_name(path)}:{node.lineno}: a relative import fails in `python sparse_accel`"
            assert node.module is not None
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def test_every_part_of_the_package_has_a_row_in_the_table() -> None:
    assert {_part_of(path) for path in SOURCES} <= set(PARTS)


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_imports_point_down(path: Path) -> None:
    importer = _part_of(path)
    part = PARTS[importer]
    for line, imported in _imports(path):
        top, _, rest = imported.partition(".")
        if top == "__future__" or top in sys.stdlib_module_names:
            continue
        where = f"{_name(path)}:{line}"
        if top != "sparse_accel":
            assert top in part.third_party, f"{where}: {importer} may not import {top}"
            assert importer in ONLY_IN.get(top, {importer}), f"{where}: {top} is for {set(ONLY_IN[top])} alone"
            continue
        target = rest.partition(".")[0]
        if target not in PARTS:  # a name of the package itself, such as its version
            continue
        allowed = target == importer or PARTS[target].layer < part.layer or target in part.neighbours
        assert allowed, (
            f"{where}: {importer} (layer {part.layer}) may not import {target} (layer {PARTS[target].layer})"
        )


def test_importing_the_package_imports_nothing_but_the_standard_library() -> None:
    code = "import sys; before = set(sys.modules); import sparse_accel; print(*(set(sys.modules) - before))"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tops = {name.partition(".")[0] for name in shown.split()}
    assert {name for name in shown.split() if name.startswith("sparse_accel")} == {"sparse_accel"}
    assert tops - {"sparse_accel"} <= sys.stdlib_module_names


def test_the_public_names_are_there_and_sorted() -> None:
    assert sparse_accel.__all__ == sorted(sparse_accel.__all__)
    for name in sparse_accel.__all__:
        assert getattr(sparse_accel, name)
    with pytest.raises(AttributeError, match="has no attribute 'Predicter'"):
        _ = sparse_accel.Predicter


def test_top_level_names_shadow_nothing_when_the_folder_is_run() -> None:
    # `python sparse_accel` puts the folder itself first on sys.path, before __main__ can take it away again.
    names = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.name != "_data"} - {
        "__init__",
        "__main__",
    }
    later_standard_library = {"annotationlib", "compression"}
    installed = set(importlib.metadata.packages_distributions()) - {"sparse_accel", "tests"}
    assert not names & (sys.stdlib_module_names | later_standard_library | installed)


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_a_module_says_what_it_is_for(path: Path) -> None:
    docstring = ast.get_docstring(_tree(path))
    assert docstring, f"{_name(path)} has no docstring"
    assert len(docstring.splitlines()[0]) <= 120


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_no_file_can_run_a_users_text(path: Path) -> None:
    for line, imported in _imports(path):
        assert imported.partition(".")[0] not in {"pickle", "dill", "marshal", "shelve"}, f"{_name(path)}:{line}"
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            where = f"{_name(path)}:{node.lineno}: {called}"
            assert called not in {"eval", "exec", "yaml.load", "yaml.unsafe_load"}, where
            if called == "torch.load":
                assert any(
                    word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in node.keywords
                ), where


def test_every_error_class_is_used() -> None:
    classes = {node.name for node in _tree(PACKAGE / "errors.py").body if isinstance(node, ast.ClassDef)}
    used = {
        imported.removeprefix("sparse_accel.errors.")
        for path in SOURCES
        for _, imported in _imports(path)
        if imported.startswith("sparse_accel.errors.")
    }
    assert classes - used == set()


def test_the_error_tree_in_the_docstring_is_the_real_one() -> None:
    tree = _tree(PACKAGE / "errors.py")
    drawn = set(re.findall(r"\b\w+Error\b", ast.get_docstring(tree) or ""))
    assert drawn == {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


def test_the_version_has_one_home() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert "version" not in project["project"]
    assert project["tool"]["hatch"]["version"]["path"] == "sparse_accel/__init__.py"
    homes = [_name(path) for path in SOURCES if re.search(r"^__version__\s*=", path.read_text("utf-8"), re.MULTILINE)]
    assert homes == ["sparse_accel/__init__.py"]
