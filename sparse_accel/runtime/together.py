"""What the main process finds out, known to all: nodes may see other disks than the first one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from sparse_accel.errors import SparseAccelError

T = TypeVar("T")


def on_main(accelerator: Any, action: Callable[[], T]) -> T:
    """What `action` gives on the main process, on every rank; every rank calls this. A SparseAccelError of the main process
    is raised on all of them."""
    if accelerator.num_processes == 1:
        return action()
    shared: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            shared[0] = action()
        except SparseAccelError as error:
            shared[1] = error
    torch.distributed.broadcast_object_list(shared, src=0)
    if shared[1] is not None:
        raise shared[1]
    result: T = shared[0]
    return result


def on_all(accelerator: Any, holds: bool) -> bool:
    """Whether something holds on every rank."""
    return all(from_all(accelerator, holds))


def from_all(accelerator: Any, value: T) -> list[T]:
    """What each rank gives, by rank; every rank calls this."""
    if accelerator.num_processes == 1:
        return [value]
    gathered: list[Any] = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(gathered, value)
    return gathered
