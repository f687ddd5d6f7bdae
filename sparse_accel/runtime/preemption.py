"""Preemption: a run that is told to end (SIGTERM) saves where it stands and says so, with time to spare."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

from sparse_accel.errors import SparseAccelError


class Preempted(SparseAccelError):
    """The run was told to end and has saved its state; the same command goes on."""

    # EX_TEMPFAIL: a failure that another try may not meet.
    exit_code = 75


class StopRequest:
    """Whether some rank was told to end, known to all ranks at the same step.

    Each step starts a reduction of one byte between the hosts and reads the one of the step before: nothing waits for
    the device, and a request takes effect a step after it came.
    """

    def __init__(self, num_processes: int, backend: str | None) -> None:
        self.asked = False
        self._several = num_processes > 1
        self._flag = torch.zeros(1, dtype=torch.uint8)
        self._pending: Any = None
        self._group: Any = None
        if self._several and "gloo" not in (backend or ""):
            self._group = torch.distributed.new_group(backend="gloo")

    def is_due(self) -> bool:
        """Call once after each step, on every rank."""
        if not self._several:
            return self.asked
        if self._pending is not None:
            self._pending.wait()
            if self._flag.item():
                return True
        self._flag.fill_(int(self.asked))
        self._pending = torch.distributed.all_reduce(
            self._flag, torch.distributed.ReduceOp.MAX, group=self._group, async_op=True
        )
        return False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within, SIGTERM asks for an end instead of killing the process."""

        def ask(number: int, frame: FrameType | None) -> None:
            self.asked = True

        try:
            before = signal.signal(signal.SIGTERM, ask)
        except ValueError:  # only the main thread may: a run inside somebody else's program
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
            if self._pending is not None:
                self._pending.wait()
