"""What a turn's time goes to: phases within each other, on a CPU by its clock, on a GPU by events in its stream."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final

import torch

# In the order in which they are shown. What no phase covers is "other".
PHASES: Final = ("data", "teacher", "forward", "backward", "mask", "quant", "comm", "optimizer", "other")

_NOTHING: Final = nullcontext()


class Stopwatch:
    """Gives time to the innermost phase that is open. Off until `start`: then a phase costs next to nothing."""

    def __init__(self, device: torch.device) -> None:
        self._mark: Callable[[], Any] = _cuda_event if device.type == "cuda" else time.perf_counter
        self._is_on = False
        self._open: list[str] = ["other"]
        self._marks: list[tuple[str, Any]] = []

    @property
    def phase(self) -> str:
        """The innermost open phase."""
        return self._open[-1]

    def within(self, phase: str) -> AbstractContextManager[None]:
        """Time spent here is the phase's, but for that of phases opened within."""
        return self._opened(phase) if self._is_on else _NOTHING

    @contextmanager
    def _opened(self, phase: str) -> Iterator[None]:
        self._open.append(phase)
        self._marks.append((phase, self._mark()))
        try:
            yield
        finally:
            self._open.pop()
            self._marks.append((self.phase, self._mark()))

    def start(self) -> None:
        """Forget what was measured and begin."""
        self._is_on, self._open = True, ["other"]
        self._marks = [("other", self._mark())]

    def stop(self) -> dict[str, float]:
        """Seconds of each phase since `start`; waits for the device."""
        self._marks.append(("other", self._mark()))
        self._is_on = False
        seconds: Counter[str] = Counter()
        if isinstance(self._marks[0][1], torch.cuda.Event):
            torch.cuda.synchronize()
        for (phase, begun), (_, ended) in zip(self._marks, self._marks[1:], strict=False):
            seconds[phase] += begun.elapsed_time(ended) / 1000 if isinstance(begun, torch.cuda.Event) else ended - begun
        return {phase: seconds[phase] for phase in PHASES if seconds[phase]}


def _cuda_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
