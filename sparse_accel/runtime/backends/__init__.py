"""The ways in which a model is spread over ranks, and what each does differently from the others."""

from __future__ import annotations

from typing import Any

from accelerate.utils import DistributedType

from sparse_accel.runtime.backends.base import Backend, recompute_activations, run_in_bf16
from sparse_accel.runtime.backends.plain import PlainBackend

__all__ = ["Backend", "PlainBackend", "backend_of", "recompute_activations", "run_in_bf16"]


def backend_of(accelerator: Any, precision: str) -> Backend:
    """The backend that the launch asked for. Raises LaunchError for settings of it that are not offered."""
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        from sparse_accel.runtime.backends.zero import ZeroBackend

        return ZeroBackend(accelerator, precision)
    if kind == DistributedType.FSDP:
        from sparse_accel.runtime.backends.fsdp2 import Fsdp2Backend

        return Fsdp2Backend(accelerator, precision)
    return PlainBackend(accelerator, precision)
