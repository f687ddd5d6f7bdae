"""Write tests/golden/*.txt anew, after a change that is meant to move numbers: `python tests/contracts/regenerate_goldens.py`.

Say in the commit message why they move.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from sparse_accel.recipe import shipped  # noqa: E402
from tests import conftest  # noqa: E402, F401 - first of all: it sets one thread and no network
from tests.contracts import goldens  # noqa: E402


def main() -> None:
    """All goldens, those of recipes that are gone removed."""
    goldens.FOLDER.mkdir(exist_ok=True)
    names = shipped.names()
    with tempfile.TemporaryDirectory() as scratch:
        tasks = {goldens.task_of(name) for name in names}
        options = {task: goldens.world(Path(scratch) / task, task) for task in tasks}
        traces = {
            name: goldens.trace(name, options[goldens.task_of(name)], Path(scratch) / str(at))
            for at, name in enumerate(names)
        }
    for stale in {*goldens.FOLDER.glob("*.txt")} - {goldens.golden_file(name) for name in names}:
        stale.unlink()
    for name, lines in traces.items():
        goldens.golden_file(name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{goldens.golden_file(name).relative_to(ROOT)}: {len(lines) - 1} steps")


if __name__ == "__main__":
    main()
