"""Everything that has to pass before a change goes in, as one command: `python tests/check.py [PYTEST ARGUMENTS]`."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

CHECKS: tuple[tuple[str, ...], ...] = (
    ("ruff", "format", "--check", "."),
    ("ruff", "check", "."),
    ("mypy",),
    # A file's tests share models, so they stay together. Files go out in conftest.py's order, the longest first; left to
    # itself, xdist begins with those that have most tests.
    ("pytest", "-n", str(min(4, len(os.sched_getaffinity(0)))), "--dist", "loadfile", "--no-loadscope-reorder"),
)


def main(pytest_arguments: list[str]) -> int:
    """Runs all checks, also after one has failed; 1 when any has. Those that use one core run side by side with the tests
    and speak after them."""
    failed = []
    with tempfile.TemporaryFile("w+") as said:
        beside = [(check, _start(check, (), stdout=said, stderr=said)) for check in CHECKS[:-1]]
        begun = time.monotonic()
        if _start(CHECKS[-1], pytest_arguments).wait() != 0:
            failed.append(CHECKS[-1][0])
        print(f"  {time.monotonic() - begun:.0f} s", flush=True)
        failed += [" ".join(check[:2]) for check, process in beside if process.wait() != 0]
        said.seek(0)
        print(said.read(), flush=True)
    print("failed: " + ", ".join(failed) if failed else "all checks passed")
    return 1 if failed else 0


def _start(check: Sequence[str], arguments: Sequence[str], **output: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", *check, *arguments]
    print("$", " ".join(["python", *command[1:]]), flush=True)
    return subprocess.Popen(command, cwd=ROOT, **output)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
