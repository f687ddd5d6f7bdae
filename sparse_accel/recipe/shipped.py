"""The recipes that come with the package, by name: `question_answering/dense`."""

from __future__ import annotations

from pathlib import Path

_SUFFIX = ".yaml"
_PACKAGE = Path(__file__).resolve().parents[1]
# An installed package carries the recipes inside itself; in a checkout they lie beside the package.
_FOLDERS = (_PACKAGE / "_data" / "recipes", _PACKAGE.parent / "recipes")


def _folder() -> Path | None:
    return next((folder for folder in _FOLDERS if folder.is_dir()), None)


def names() -> list[str]:
    """The names of all shipped recipes, sorted."""
    folder = _folder()
    if folder is None:
        return []
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob(f"*{_SUFFIX}"))


def purpose(name: str) -> str:
    """What a shipped recipe is for: the first line of the comment that it begins with."""
    path = find(name)
    assert path is not None, name
    return path.read_text("utf-8").partition("\n")[0].lstrip("# ").rstrip(".")


def find(name: str) -> Path | None:
    """The file of a shipped recipe, named with or without its suffix; None when there is no such recipe."""
    folder = _folder()
    stem = name.removesuffix(_SUFFIX)
    return folder / f"{stem}{_SUFFIX}" if folder is not None and stem in names() else None
