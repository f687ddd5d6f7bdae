"""Command lines carried out on two processes that `accelerate launch` starts with a shipped configuration."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests import running


def launch(
    config: str, commands: list[list[str]], folder: Path, *, timeout: float = 400, program: str = "on_cpu"
) -> str:
    """Carry them out one after the other in the same two processes of a program beside this file; what was printed. Fails
    with it otherwise."""
    cases = folder / "cases.json"
    cases.write_text(json.dumps(commands))
    process = running.start(
        ["cases", str(cases)],
        *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port", "0"),
        *("--config_file", f"launch_configs/{config}.yaml", f"tests/distributed/{program}.py"),
        TORCH_EXTENSIONS_DIR=str(folder / "extensions"),
        # DDP is offered without GPUs; the others need what stands for them.
        **({"ACCELERATE_USE_CPU": "1"} if config == "ddp" else {}),
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == 0, output
    return output
