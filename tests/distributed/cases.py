"""Several commands one after the other in the same processes, which start once: `on_cpu.py cases FILE`.

FILE holds a list of command lines as JSON. Each must end with exit code 0.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch


def run_cases(file: Path) -> int:
    """Carry them out in their order; stops at the first that fails."""
    from accelerate.state import AcceleratorState

    from sparse_accel.cli import main

    # The group is that of the whole list.
    torch.distributed.destroy_process_group = lambda group=None: None
    for words in json.loads(file.read_text("utf-8")):
        code = main(words)
        if code != 0:
            print("the case that failed:", *words, flush=True)
            return code
        AcceleratorState._reset_state(True)
    sys.stdout.flush()
    return 0
