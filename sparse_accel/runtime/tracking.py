"""What a person and a machine see of a run while it goes on; trackers observe and never alter."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from sparse_accel.runtime.checkpoint import write_text

LOG_FILE = "train_log.jsonl"
# Where trackers write unless --logging_dir says otherwise.
TRACKERS_FOLDER = "runs"


class Tracker(Protocol):
    """Sees each logged line; only the main process has trackers."""

    def log(self, step: int, values: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """Appends each line to `train_log.jsonl`. A resumed run's file begins with the lines that its checkpoint knows, so
    that it ends as if the run had never stopped."""

    def __init__(self, folder: Path, history: Sequence[Mapping[str, Any]], warn: Callable[[str], None]) -> None:
        self.path = folder / LOG_FILE
        self.warn: Callable[[str], None] | None = warn
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in history))
        self.file = open(self.path, "a", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """One JSON object a line, with its step. A disk that is full costs lines of the log, not the run."""
        try:
            self.file.write(json.dumps({"step": step, **values}) + "\n")
            self.file.flush()
        except OSError as error:
            if self.warn is not None:
                self.warn(f"{self.path} cannot be written ({error}); training goes on without its log")
                self.warn = None

    def close(self) -> None:
        """Done writing; what cannot be flushed is lost, and was warned of."""
        with contextlib.suppress(OSError):
            self.file.close()


class AccelerateTrackers:
    """TensorBoard, W&B and the others that accelerate knows, by `--report_to`."""

    def __init__(self, accelerator: Any, project: str, config: Mapping[str, Any]) -> None:
        self.accelerator = accelerator
        plain = {key: value for key, value in config.items() if isinstance(value, str | int | float | bool)}
        accelerator.init_trackers(project, config=plain)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Numbers only."""
        self.accelerator.log({k: v for k, v in values.items() if isinstance(v, int | float)}, step=step)

    def close(self) -> None:
        """Finish every tracker's run. Not `end_training`, which would take the process group down with them."""
        for tracker in self.accelerator.trackers:
            tracker.finish()


class Screen:
    """The terminal of the main process: a progress bar where there is one, plain lines where there is none."""

    def __init__(self, console: Console, *, is_shown: bool, use_bar: bool) -> None:
        self.console = console
        self.is_shown = is_shown
        self.progress = _progress(console) if is_shown and use_bar and console.is_terminal else None
        self.task: TaskID | None = None
        self.started = time.perf_counter()
        self.done_before = 0
        self.total = 0

    @property
    def has_bar(self) -> bool:
        """Whether there is a bar to move."""
        return self.progress is not None

    def say(self, text: str) -> None:
        """One plain line."""
        if self.is_shown:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """One warning line."""
        if self.is_shown:
            self.console.print(f"warning: {text}", style="yellow", markup=False, highlight=False, soft_wrap=True)

    def start_training(self, total: int, done: int) -> None:
        """Training of `total` steps begins, `done` of them earlier."""
        self.started, self.done_before, self.total = time.perf_counter(), done, total
        if self.progress is not None:
            self.progress.start()
            self.task = self.progress.add_task("training", total=total, completed=done, status="")

    def step(self, done: int, status: str) -> None:
        """One more step; moves the bar only."""
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, completed=done, status=status)

    def line(self, done: int, text: str) -> None:
        """A logged line, with the time that is left."""
        if self.progress is None:
            self.say(f"step {done}/{self.total}  {text}  ETA {self.eta(done)}")

    def eta(self, done: int) -> str:
        """Time left at the mean speed since the start, h:mm:ss."""
        fresh = done - self.done_before
        if fresh <= 0:
            return "-:--:--"
        seconds = (time.perf_counter() - self.started) / fresh * (self.total - done)
        return clock_time(seconds)

    def stop_training(self) -> None:
        """Take the bar away."""
        if self.progress is not None:
            self.progress.stop()

    def batches(self, what: str) -> Any:
        """A callback `(done, total)` that shows how far an evaluation is."""
        if self.progress is None:
            return None
        progress = self.progress
        task = progress.add_task(what, total=None, status="")
        was_live = progress.live.is_started
        if not was_live:
            progress.start()

        def advance(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)
            if done == total:
                progress.remove_task(task)
                if not was_live:
                    progress.stop()

        return advance


def clock_time(seconds: float) -> str:
    """h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=16),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TextColumn("ETA", table_column=Column(no_wrap=True)),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        # The only one that gives way on a narrow screen.
        TextColumn("{task.fields[status]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
        console=console,
        transient=True,
        expand=True,
    )
