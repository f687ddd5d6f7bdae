"""The same benchmark in several processes.

Each is `python -m torch.distributed.run ... -m sparse_accel.benchmarking.scaling FILE`. FILE holds {"settings": ..., "out": where
the first process writes what it measured}. Gradients are exchanged by the program's own DDP; what is handed to the
collectives is counted there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from sparse_accel.benchmarking.counting import Wire
from sparse_accel.benchmarking.own import OWN_ARMS, Bench, build_own
from sparse_accel.benchmarking.turns import Progress
from sparse_accel.benchmarking.workloads import Settings, Workload
from sparse_accel.errors import LaunchError, OptionError


def measure_processes(settings: Settings, progress: Progress | None) -> dict[str, Any]:
    """What N processes measure, with `alone`: the same in one process, started the same way. Raises LaunchError where
    they fail, OptionError for arms that are measured in one process only."""
    others = [name for name in settings.arms if name not in OWN_ARMS or OWN_ARMS[name].teacher == "cached"]
    if others:
        raise OptionError(
            f"--arms: in several processes our own arms are measured, those without a cached teacher, not {', '.join(others)}"
        )
    count = settings.workload.processes
    if progress is not None:
        progress("one process", 0, 2)
    alone = launched(replace(settings, workload=replace(settings.workload, processes=1)))
    if progress is not None:
        progress(f"{count} processes", 1, 2)
    return {**launched(settings), "alone": alone}


def launched(settings: Settings) -> dict[str, Any]:
    """Start the processes, wait for them, and read what the first one wrote."""
    count = settings.workload.processes
    on_gpus = torch.cuda.is_available()
    if on_gpus and torch.cuda.device_count() < count:
        raise OptionError(f"scale-{count}: {count} GPUs are needed, there are {torch.cuda.device_count()}")
    with tempfile.TemporaryDirectory(prefix="sparse_accel-") as name:
        file, out = Path(name, "settings.json"), Path(name, "document.json")
        file.write_text(json.dumps({"settings": asdict(settings), "out": str(out)}), "utf-8")
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(settings.threads)}
        if not on_gpus:
            environment["ACCELERATE_USE_CPU"] = "1"
        done = subprocess.run([*words, "-m", __name__, str(file)], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise LaunchError(f"{count} processes were started, and failed:\n{done.stderr[-2000:]}")
        document: dict[str, Any] = json.loads(out.read_text("utf-8"))
    return document


def count_exchanges(bench: Bench) -> dict[str, Any]:
    """Bytes and calls of the collectives of each kind in a step, arm by arm, the second step of a training."""
    found = {}
    for name in bench.settings.arms:
        training = build_own(OWN_ARMS[name], bench)
        training.turn()
        with Wire() as wire:
            training.turn()
        counted, steps = wire.take(), training.steps
        found[name] = {
            "bytes_a_step": {kind: size / steps for kind, size in counted.bytes.items()},
            "calls_a_step": {kind: calls / steps for kind, calls in counted.calls.items()},
        }
    return found


def main(file: Path) -> None:
    """Measure in this process, one of several; the first writes."""
    from sparse_accel.benchmarking.runner import measure, open_bench

    given = json.loads(file.read_text("utf-8"))
    told = given["settings"]
    workload = Workload(**{**told["workload"], "arms": tuple(told["workload"]["arms"])})
    settings = Settings(**{**told, "workload": workload, "arms": tuple(told["arms"])})
    torch.set_num_threads(settings.threads)
    with open_bench(settings) as bench:
        document = measure(bench)
        document["wire"] = count_exchanges(bench)
        if bench.accelerator.is_main_process:
            Path(given["out"]).write_text(json.dumps(document), "utf-8")
        bench.accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
