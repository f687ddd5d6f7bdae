"""How much a step asks of the machine: operations and waits, counted where torch dispatches or launches them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparse_accel.benchmarking.stopwatch import Stopwatch

# Where torch keeps its collectives.
_NAMESPACES = ("c10d", "_c10d_functional")

# Host calls of the CUDA runtime that wait for the device.
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
_LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")


class Census(TorchDispatchMode):
    """Within, every operation that torch dispatches is counted, by the stopwatch's phase.

    Views are left out: they launch nothing. Reads of a number on the host are counted as `reads`: each waits for the device
    if its tensor lies there. In two phases none does: batches are made on the host, and so AdamW counts its steps.
    """

    def __init__(self, stopwatch: Stopwatch) -> None:
        super().__init__()
        self.stopwatch = stopwatch
        self.operations: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count and carry out an operation."""
        phase = self.stopwatch.phase
        if func.__name__.startswith("_local_scalar_dense"):
            self.reads[phase] += phase not in ("data", "optimizer")
        elif not _is_view(func):
            self.operations[phase] += 1
        return func(*args, **(kwargs or {}))


def _is_view(func: Any) -> bool:
    returned = [value.alias_info for value in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in returned)


def count_operations(work: Callable[[], None], stopwatch: Stopwatch) -> dict[str, Any]:
    """Operations dispatched during some work on a CPU, and numbers read on the host."""
    stopwatch.start()
    with Census(stopwatch) as census:
        work()
    stopwatch.stop()
    return {
        "counted": "operations dispatched on the CPU, views left out; reads of a number on the host",
        "launches": sum(census.operations.values()),
        "launches_by_phase": dict(census.operations),
        "syncs": sum(census.reads.values()),
    }


def count_launches(work: Callable[[], None]) -> dict[str, Any]:
    """Kernels launched during some work on a GPU, and host calls that wait for it, by torch's profiler; what the profiler
    itself does is taken off."""
    calls = _profiled(work)
    calls.subtract(_profiled(lambda: None))
    return {
        "counted": "kernel launches and waiting calls of the CUDA runtime, by torch.profiler",
        "launches": sum(calls[name] for name in _LAUNCHES),
        "syncs": sum(calls[name] for name in _WAITS),
        "waiting_calls": {name: calls[name] for name in _WAITS if calls[name]},
    }


def _profiled(work: Callable[[], None]) -> Counter[str]:
    """How often each host call and operation occurred."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        work()
    return Counter({event.key: event.count for event in profile.key_averages()})


@dataclass
class Counted:
    """Bytes and calls of the collectives since the last look, by what they do: `all_reduce`, `reduce_scatter`, `all_gather`
    and so on. `scalars` are the calls that carry one number, whatever they do."""

    bytes: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)


class Wire(TorchDispatchMode):
    """Within, every collective of this thread is counted where torch hands it to its process group, those of DDP's reducer
    in C++ among them.

    The bytes of a call are those of the whole that it is about: what is summed, what is sent to all, what comes together.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counted = Counted()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Carry out an operation, and count it if it is a collective."""
        if DTensor in types:
            return NotImplemented  # it is taken apart first: its own collectives come by here
        out = func(*args, **(kwargs or {}))
        kind = _kind(func.__name__) if func.namespace in _NAMESPACES else None
        if kind is not None:
            whole = max(_num_bytes(part) for part in (*args, out))
            kind = kind if whole > 8 else "scalars"
            self.counted.bytes[kind] += whole
            self.counted.calls[kind] += 1
        return out

    def take(self) -> Counted:
        """What was counted since the last call."""
        taken, self.counted = self.counted, Counted()
        return taken


def _kind(name: str) -> str | None:
    """What a collective does, from its name in torch; None for what sends nothing."""
    plain = name.replace("_", "")
    kinds = ("reduce_scatter", "all_reduce", "all_gather", "broadcast", "reduce")
    if plain.startswith(("wait", "wrap", "barrier", "monitoredbarrier")):
        return None
    return next((kind for kind in kinds if kind.replace("_", "") in plain), name)


def _num_bytes(part: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(part) if isinstance(leaf, Tensor))
