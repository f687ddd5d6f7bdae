"""One benchmark from its settings to a document of raw samples: gates, turns, breakdown, counts."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

import torch

from sparse_accel.benchmarking import circumstances
from sparse_accel.benchmarking.arms import ARMS
from sparse_accel.benchmarking.baselines import Trained
from sparse_accel.benchmarking.counting import count_launches, count_operations
from sparse_accel.benchmarking.inputs import measure_collating
from sparse_accel.benchmarking.lengths import workload_features
from sparse_accel.benchmarking.models import Load, random_teacher, shape_size
from sparse_accel.benchmarking.other_tools import TOOLS
from sparse_accel.benchmarking.own import OWN_ARMS, Bench, train_options
from sparse_accel.benchmarking.parity import Gate, parity_gates, require, tool_gates
from sparse_accel.benchmarking.stopwatch import Stopwatch
from sparse_accel.benchmarking.turns import Progress, clock_of, take_turns
from sparse_accel.benchmarking.workloads import Settings
from sparse_accel.runtime import setup
from sparse_accel.runtime.allocation import keep_freed_memory

FORMAT: Final = 1
# Turns before those that count: of the first, quantizers take their ranges; on a GPU, compiled and captured steps settle.
_WARM_UP: Final = {"cpu": 1, "cuda": 2}
# What is raised where something that a baseline needs is not there: a package, a compiler (OSError), an operation.
_DOES_NOT_WORK: Final = (ImportError, OSError, RuntimeError)


def run_benchmark(settings: Settings, command: str, progress: Progress | None = None) -> dict[str, Any]:
    """Measure, and tell everything as plain values. Raises InvariantError, and measures nothing, where a gate does not hold.
    The arms are ones that `check_arms` let pass."""
    torch.set_num_threads(settings.threads)
    told = circumstances.machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    _say(progress, "comparing what the arms compute")
    skipped: dict[str, str] = {}  # tools that do not work here -> why
    gates = check_parity(settings, skipped)
    working = replace(settings, arms=tuple(name for name in settings.arms if name not in skipped))
    if settings.workload.processes > 1:
        from sparse_accel.benchmarking.scaling import measure_processes

        document = measure_processes(working, progress)
    else:
        with open_bench(working) as bench:
            document = measure(bench, progress)
    workload = settings.workload
    size = shape_size(workload.shape)
    _say(progress, "measuring a matrix product and the collators")
    tokens = max(1024, workload.micro_batch_size * workload.max_length // 2)
    device = torch.device(told["device"])
    return {
        "format": FORMAT,
        "command": command,
        "versions": circumstances.versions(),
        "machine": {**told, "busy_cores_after": circumstances.busy_cores()},
        "workload": asdict(workload),
        "settings": {
            "arms": list(settings.arms),
            "rounds": settings.rounds,
            "precision": settings.precision,
            "batching": settings.batching,
            "threads": settings.threads,
            "seed": settings.seed,
        },
        "clock": clock_of(device.type),
        "size": asdict(size),
        **document,
        "skipped": {**skipped, **document["skipped"]},
        "gates": [*(gate.to_json() for gate in gates), *document["gates"]],
        "peaks": circumstances.peaks(device, settings.precision, (tokens, size.width, 4 * size.width)),
        "collating": measure_collating(settings.rounds, settings.seed),
    }


def measure(bench: Bench, progress: Progress | None = None) -> dict[str, Any]:
    """Build the arms, let them take turns, and look into each. Raises InvariantError where pruned weights of ours are off
    zero before anything is timed."""
    settings, device = bench.settings, bench.device
    arms: dict[str, Trained] = {}
    skipped: dict[str, str] = {}  # baselines that do not work here -> why
    for name in settings.arms:
        _say(progress, f"building {name}")
        try:
            arms[name] = ARMS[name].build(bench)
        except _DOES_NOT_WORK as error:
            _skip_or_raise(name, error, skipped)
    warm_up = warm_up_turns(arms, device, skipped, progress)
    gates = [
        Gate(f"{name}: pruned weights off zero", arm.violations(), 0) for name, arm in arms.items() if name in OWN_ARMS
    ]
    require(gates)
    seconds, _ = take_turns(
        {name: arm.turn for name, arm in arms.items()}, settings.rounds, warm_up=0, device=device, progress=progress
    )
    found = {}
    for name, arm in arms.items():
        _say(progress, f"looking into {name}")
        found[name] = {
            "what": ARMS[name].what,
            "numerics": ARMS[name].numerics,
            "has_teacher": ARMS[name].has_teacher,
            "is_compiled": ARMS[name].is_compiled,
            "steps": arm.steps,
            "seconds": seconds[name],
            "warm_up_wall_seconds": warm_up[name],
            **look_into(arm, bench, is_compiled=ARMS[name].is_compiled),
        }
    return {
        "gates": [gate.to_json() for gate in gates],
        "turn": {"features": len(bench.features), **asdict(Load.of(bench.features.lengths))},
        "arms": found,
        "skipped": skipped,
    }


def check_parity(settings: Settings, skipped: dict[str, str]) -> list[Gate]:
    """The gates, in this process and in fp32 whatever the run's precision; why a tool does not work goes into `skipped`. Raises
    InvariantError for a gate that does not hold."""
    with open_bench(replace(settings, precision="fp32")) as bench:
        gates = parity_gates(bench) + check_tools(bench, skipped)
    require(gates)
    # accelerate keeps the precision for the whole process, unless it forgets everything.
    type(bench.accelerator.state)._reset_state(reset_partial_state=True)
    return gates


def check_tools(bench: Bench, skipped: dict[str, str]) -> list[Gate]:
    """The gates of the tools among the arms; why one does not work goes into `skipped`."""
    gates: list[Gate] = []
    for name in bench.settings.arms:
        tool = TOOLS.get(name)
        if tool is None:
            continue
        if tool.missing:
            skipped[name] = tool.missing
            continue
        try:
            gates += tool_gates(name, tool, bench)
        except _DOES_NOT_WORK as error:
            _skip_or_raise(name, error, skipped)
    return gates


@contextmanager
def open_bench(settings: Settings) -> Iterator[Bench]:
    """The launch, the features of all its processes and the teacher's model; the folder of what is cached goes at the end."""
    workload = settings.workload
    accelerator, backend = setup.start_accelerator(train_options(settings))
    if accelerator.device.type == "cpu":
        keep_freed_memory()  # as the program does; the other arms gain by it too
    count = workload.features * accelerator.num_processes
    with tempfile.TemporaryDirectory(prefix="sparse_accel-") as scratch:
        yield Bench(
            settings,
            workload_features(workload, count, settings.seed),
            accelerator,
            backend,
            Stopwatch(accelerator.device),
            random_teacher(workload.shape, settings.seed + 1, workload.task),
            Path(scratch),
        )


def warm_up_turns(
    arms: dict[str, Trained], device: torch.device, skipped: dict[str, str], progress: Progress | None
) -> dict[str, list[float]]:
    """Wall seconds of the turns that do not count. A baseline that fails in them is taken out of `arms`."""
    seconds: dict[str, list[float]] = {}
    for name in list(arms):
        try:
            turns = _WARM_UP[device.type]
            _, before = take_turns({name: arms[name].turn}, 0, warm_up=turns, device=device, progress=progress)
            seconds[name] = before[name]
        except _DOES_NOT_WORK as error:
            _skip_or_raise(name, error, skipped)
            del arms[name]
    return seconds


def look_into(arm: Trained, bench: Bench, *, is_compiled: bool) -> dict[str, Any]:
    """What is seen of an arm in turns that are not timed: phases, operations, memory, what the model computed with."""
    on_gpu = bench.device.type == "cuda"
    found: dict[str, Any] = {}
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        arm.turn()
        found["peak_bytes_above_state"] = torch.cuda.max_memory_allocated() - before
        found["reserved_bytes_of_all_arms"] = torch.cuda.max_memory_reserved()
    with arm.watched():
        bench.stopwatch.start()
        arm.turn()
        found["phases_seconds"] = {phase: round(value, 6) for phase, value in bench.stopwatch.stop().items()}
        found["computed"] = asdict(arm.load)
    if on_gpu:
        found["counts"] = count_launches(arm.turn)
    elif is_compiled:
        found["counts"] = None  # what watches the dispatcher sees the steps as they were before they were compiled
    else:
        with arm.watched():
            found["counts"] = count_operations(arm.turn, bench.stopwatch)
    return {**found, "state_bytes": arm.state_bytes(), "violations": arm.violations()}


def _skip_or_raise(name: str, error: Exception, skipped: dict[str, str]) -> None:
    """A baseline that does not work here is told of; an arm of ours that does not is an error."""
    if name in OWN_ARMS:
        raise error
    skipped[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _say(progress: Progress | None, what: str) -> None:
    if progress is not None:
        progress(what, 0, 0)
