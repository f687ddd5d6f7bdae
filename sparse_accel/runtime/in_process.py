"""A training inside a larger program: what it sets for the whole process is as it was before, once it is over."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from accelerate.state import AcceleratorState, GradientState, PartialState

from sparse_accel.folders.libraries import libraries_quiet
from sparse_accel.runtime.launch import check_environment, check_installed
from sparse_accel.runtime.options import TrainOptions
from sparse_accel.runtime.run import TrainResult, train

# accelerate knows one launch per process and keeps what it knows in these classes.
_STATES: Final[tuple[Any, ...]] = (AcceleratorState, PartialState, GradientState)


def train_in_process(options: TrainOptions) -> TrainResult:
    """Carry out a `train` command as a function, as often as wanted: in a notebook, or in each process of a launch. The
    process group, if there is one, is the caller's. Raises SparseAccelError for everything that the user can put right."""
    check_environment(os.environ)
    check_installed(os.environ)
    with libraries_quiet(), accelerate_untouched():
        return train(options)


@contextmanager
def accelerate_untouched() -> Iterator[None]:
    """Within, accelerate finds out about the launch anew; afterwards its state and the environment, to which it adds, are
    what they were. A process group that there is already is used, not made."""
    environ, states = dict(os.environ), [dict(state._shared_state) for state in _STATES]
    for state in _STATES:
        state._shared_state.clear()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environ)
        for state, before in zip(_STATES, states, strict=True):
            state._shared_state.clear()
            state._shared_state.update(before)
