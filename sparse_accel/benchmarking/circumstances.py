"""What a result says of where it came from: versions, machine and load, without paths and names."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import time
from pathlib import Path
from typing import Any, Final

import torch

_PACKAGES: Final = ("sparse_accel", "torch", "transformers", "accelerate", "datasets", "numpy")
# Dense bf16 operations a second of a device by its datasheet, first name that is part of its own.
_DATASHEET: Final = {"H200": 989e12, "H100": 989e12, "A100": 312e12}


def versions() -> dict[str, str]:
    """Python and the packages that matter."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        if importlib.util.find_spec(name) is not None:
            found[name] = importlib.metadata.version(name)
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """The processor, its cores and threads, the device, and how busy the machine is now."""
    told: dict[str, Any] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device.type,
        "busy_cores_before": busy_cores(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        told |= {
            "device_name": properties.name,
            "device_memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
        }
    return told


def busy_cores() -> float:
    """The machine's load average over a minute."""
    return round(os.getloadavg()[0], 2)


def peaks(device: torch.device, precision: str, sizes: tuple[int, int, int]) -> dict[str, float]:
    """Operations a second to compare with: of a matrix product [m, k] @ [k, n] measured here and now, and, where the device
    is known, of its datasheet (bf16)."""
    m, k, n = sizes
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left = torch.randn(m, k, device=device, dtype=dtype)
    right = torch.randn(k, n, device=device, dtype=dtype)
    best = float("inf")
    for repeats in (1, 5, 20, 20) if device.type == "cuda" else (1, 3, 3, 3):
        _wait(device)
        begun = time.perf_counter()
        for _ in range(repeats):
            left @ right
        _wait(device)
        best = min(best, (time.perf_counter() - begun) / repeats)
    found = {"measured": 2.0 * m * k * n / best}
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = [flops for part, flops in _DATASHEET.items() if part in name]
        found |= {"datasheet": known[0]} if known else {}
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
