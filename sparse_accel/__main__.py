"""Starts the program, also when this folder itself is what Python runs (`accelerate launch sparse_accel train ...`)."""

import sys
from pathlib import Path


def _import_from_outside() -> None:
    """Put the folder that holds the package on the path instead of the package's own, where `cli` or `runtime` would be
    importable under two names and a module could hide one of the standard library. Spawned workers inherit the path."""
    package = Path(__file__).resolve().parent
    if sys.path and Path(sys.path[0]).resolve() == package:
        sys.path[0] = str(package.parent)


_import_from_outside()

from sparse_accel.cli import main  # noqa: E402  (importable only now)

if __name__ == "__main__":
    sys.exit(main())
