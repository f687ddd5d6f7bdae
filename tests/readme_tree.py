"""The tree in the README, made from what is there: `python tests/readme_tree.py` writes it anew."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
BLOCK = re.compile(r"(?<=<!-- tree: python tests/readme_tree.py -->\n```text\n).*?(?=```\n)", re.DOTALL)
# Files whose first line cannot say what they are for, and folders that are told of as a whole.
TOLD = {
    ".ci": "what continuous integration runs",
    ".gitignore": "what git leaves out",
    "CHANGELOG.md": "what a user would notice",
    "LICENSE": "Apache-2.0",
    "Makefile": "make demo, make test",
    "README.md": "this page",
    "benchmarks": "measurements that can be repeated",
    "constraints.txt": "the exact versions that make installs",
    "docs/training_breakdown.png": "where the time of a training step goes",
    "pyproject.toml": "dependencies and their ranges, settings of ruff, mypy and pytest",
    "tests/contracts": "run over the tables of modifiers, recipes and tasks",
    "tests/distributed": "start real processes",
    "tests/golden": "numbers that a refactoring may not move",
    "tests/unit": "mirrors the package",
}
_WHOLE = {".ci", "benchmarks", "tests/contracts", "tests/distributed", "tests/golden", "tests/unit"}


def _files() -> list[str]:
    """All files of the project, relative to its root: those that git knows or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return sorted(name for name in listed.split("\0") if name and (ROOT / name).is_file())


def _entries(files: list[str]) -> list[str]:
    """The paths that the tree shows, folders with a `/` at the end and before what they hold."""
    shown: set[str] = set()
    for name in files:
        parts = name.split("/")
        for depth in range(1, len(parts)):
            folder = "/".join(parts[:depth])
            shown.add(folder + "/")
            if folder in _WHOLE:
                break
        else:
            shown.add(name)
    return sorted(shown, key=lambda path: [(part == "", part) for part in path.rstrip("/").split("/")])


def _purpose(path: str) -> str:
    """One line on a file or folder."""
    name = path.rstrip("/")
    if name in TOLD:
        return TOLD[name]
    if path.endswith("/"):
        package = ROOT / name / "__init__.py"
        return _purpose(f"{name}/__init__.py") if package.is_file() else ""
    text = (ROOT / name).read_text("utf-8")
    if name.endswith(".py"):
        first = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    else:
        first = next((line.lstrip("# ") for line in text.splitlines() if line.startswith("# ")), "")
    return first.rstrip(".:")


def _lines(files: list[str]) -> Iterator[str]:
    for path in _entries(files):
        if path.endswith("/__init__.py"):
            continue  # told of at the folder
        depth = path.rstrip("/").count("/")
        label = "  " * depth + path.rstrip("/").rpartition("/")[2] + ("/" if path.endswith("/") else "")
        yield f"{label:<30} {_purpose(path)}".rstrip()


def tree() -> str:
    """The text between the fences."""
    return "\n".join(_lines(_files())) + "\n"


if __name__ == "__main__":
    README.write_text(BLOCK.sub(lambda _: tree(), README.read_text("utf-8")), "utf-8")
