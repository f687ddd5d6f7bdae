"""Copies of tensors in host memory that are made while the device goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from torch import Tensor

# Where Linux says what a container may use, and what it uses.
_CGROUP = Path("/sys/fs/cgroup")


def start_copy(tensor: Tensor) -> Tensor:
    """A contiguous copy of `tensor` in host memory of its own, of what it holds at this point of the program.

    From a GPU the copy is pinned and still under way: it may be read once `copies_started` says so.
    """
    tensor = tensor.detach()
    if tensor.device.type == "cuda":
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
    return tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)


def copies_started(device: torch.device) -> Callable[[], None]:
    """What waits for the copies that were started up to now, and for nothing that the device does later; it may be called
    from another thread."""
    if device.type != "cuda":
        return lambda: None
    # Blocking: the thread that waits sleeps, rather than take a core from the one that trains.
    event = torch.cuda.Event(blocking=True)
    event.record(torch.cuda.current_stream(device))
    return event.synchronize


def free_host_memory() -> int:
    """Bytes that this process may still take: what the machine has, or the container that it runs in."""
    free: int = psutil.virtual_memory().available
    in_container = _free_in_container(_CGROUP)
    return free if in_container is None else min(free, in_container)


def _free_in_container(cgroup: Path) -> int | None:
    """What a control group's limit leaves, with the file pages that it would give back; None without a limit."""
    try:
        limit, used = (cgroup / "memory.max").read_text(), (cgroup / "memory.current").read_text()
        facts = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        return int(limit) - int(used) + int(facts.get("inactive_file", 0))
    except (OSError, ValueError):  # no such files here, or "max"
        return None
