"""Everything that has to pass before a change goes in, as one command: `python tests/check.py [PYTEST ARGUMENTS]`."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

CHECKS: tuple[tuple[str, ...], ...] = (
    ("ruff", "format", "--check", "."),
    ("ruff", "check", "."),
    ("mypy",),
    # A file's tests share models, so they stay together.
    ("pytest", "-n", str(min(4, len(os.sched_getaffinity(0)))), "--dist", "loadfile"),
)


def main(pytest_arguments: list[str]) -> int:
    """Runs all checks, also after one has failed; 1 when any has."""
    failed = []
    for check in CHECKS:
        command = [sys.executable, "-m", *check, *(pytest_arguments if check[0] == "pytest" else ())]
        print("$", " ".join(["python", *command[1:]]), flush=True)
        begun = time.monotonic()
        if subprocess.run(command, cwd=ROOT).returncode != 0:
            failed.append(" ".join(check[:2] if check[0] == "ruff" else check[:1]))
        print(f"  {time.monotonic() - begun:.0f} s", flush=True)
    print("failed: " + ", ".join(failed) if failed else "all checks passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
