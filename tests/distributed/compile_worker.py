"""`on_cpu.py cases FILE`, which also notes how many graphs torch has compiled after each step, in FILE.<rank>.json: a list for
each command."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

# First: it sets the environment that accelerate reads.
from tests.distributed import on_cpu  # noqa: E402, I001

import torch  # noqa: E402
from torch._dynamo.utils import counters  # noqa: E402

from sparse_accel.runtime import preparing  # noqa: E402
from sparse_accel.runtime.pauses import Run  # noqa: E402
from tests.distributed.cases import run_cases  # noqa: E402

if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_CPU") != "1":
        on_cpu.stand_for_gpus()
    graphs: list[list[int]] = []
    after_step, build_session = Run.after_step, preparing.build_session

    def note_run(*args: Any) -> Any:
        torch.compiler.reset()
        counters.clear()
        graphs.append([])
        return build_session(*args)

    def note_step(run: Run, *args: Any) -> None:
        graphs[-1].append(counters["stats"]["unique_graphs"])
        after_step(run, *args)

    preparing.build_session, Run.after_step = note_run, note_step  # type: ignore[method-assign]
    code = run_cases(Path(sys.argv[2]))
    Path(f"{sys.argv[2]}.{os.environ['RANK']}.json").write_text(json.dumps(graphs))
    sys.exit(code)
