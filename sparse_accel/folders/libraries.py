"""Keeps the libraries' own chatter off the screen: our messages say what theirs would."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


def quiet_libraries() -> None:
    """No load reports, no progress bars of their own, no DeepSpeed notices on a machine without a GPU."""
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not torch.accelerator.is_available():
        # accelerate imports DeepSpeed wherever it is installed, and DeepSpeed then reports that it found no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


@contextmanager
def libraries_quiet() -> Iterator[None]:
    """The same for a while, inside somebody else's program."""
    from transformers.utils import logging

    verbosity, shows_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    quiet_libraries()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shows_bars:
            logging.enable_progress_bar()
