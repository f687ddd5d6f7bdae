"""The launch configurations that come with the package: found by name, and written with other numbers in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

_SUFFIX: Final = ".yaml"
_PACKAGE: Final = Path(__file__).resolve().parents[1]
# An installed package carries them inside itself; in a checkout they lie beside the package.
_FOLDERS: Final = (_PACKAGE / "_data" / "launch_configs", _PACKAGE.parent / "launch_configs")
# What a value stands behind when the configuration has no line for it.
_ANCHOR: Final = "machine_rank"


def launch_config(name: str) -> Path:
    """The file of a shipped launch configuration, named without its suffix."""
    return next(path for folder in _FOLDERS if (path := folder / f"{name}{_SUFFIX}").is_file())


def with_numbers(text: str, numbers: Mapping[str, str]) -> str:
    """A launch configuration with other values for some of its top-level keys; comments and order stay.

    >>> print(with_numbers("# One per GPU.\\nnum_processes: 2\\nmachine_rank: 0\\n", {"num_processes": "8"}), end="")
    # One per GPU.
    num_processes: 8
    machine_rank: 0
    """
    return "".join(f"{line}\n" for line in _lines(text, dict(numbers)))


def _lines(text: str, numbers: dict[str, str]) -> Iterator[str]:
    lines = text.splitlines()
    keys = {line.partition(":")[0] for line in lines}
    added = [f"{key}: {value}" for key, value in numbers.items() if key not in keys]
    for line in lines:
        key = line.partition(":")[0]
        yield f"{key}: {numbers[key]}" if key in numbers else line
        if key == _ANCHOR:
            yield from added


def renamed(text: str, name: str, path: str) -> str:
    """A launch configuration whose comments name the file `path` instead of the shipped one."""
    return text.replace(f"launch_configs/{name}{_SUFFIX}", path)
