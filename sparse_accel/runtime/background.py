"""Work of the main process that goes on beside training, in a thread of its own, one piece at a time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from sparse_accel.errors import SparseAccelError
from sparse_accel.runtime.together import on_main


class Background:
    """The thread, and the piece of work that it has; every rank has one of these, the main process alone a thread.

    What a piece of work raises is kept: a SparseAccelError for `failure`, which tells it once, and for `settle`; anything
    else is raised where it is waited for.
    """

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self._pool: ThreadPoolExecutor | None = None
        self._work: Future[Any] | None = None
        # Whether the work's failure, if it is one, is still to be told.
        self._is_news = False
        self._failure: SparseAccelError | None = None

    def start(self, work: Callable[[], Any]) -> None:
        """Begin `work`; the piece before must have been settled."""
        assert self._work is None, "one piece of work at a time"
        if not self.accelerator.is_main_process:
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sparse_accel")
        self._work, self._is_news = self._pool.submit(work), True

    def failure(self) -> SparseAccelError | None:
        """Why the work failed, told once, if that is known already; waits for nothing."""
        if self._work is not None and self._work.done():
            error = self._work.exception()
            self._failure = error if isinstance(error, SparseAccelError) else None
        failure, self._failure = self._failure if self._is_news else None, None
        self._is_news = self._is_news and failure is None
        return failure

    def finish(self) -> None:
        """Let the work come to its end, whatever that is; for this process alone."""
        if self._work is not None:
            self._work.exception()

    def settle(self) -> bool:
        """Wait for the work, if there is any; whether all is well. Every rank calls this and gets the same answer."""
        return on_main(self.accelerator, self._settle)

    def _settle(self) -> bool:
        work, self._work = self._work, None
        if work is None:
            return True
        error = work.exception()
        if error is None:
            return True
        if not isinstance(error, SparseAccelError):
            raise error
        self._failure = error
        return False

    def close(self) -> None:
        """End the thread, after its work."""
        if self._pool is not None:
            self._pool.shutdown()
