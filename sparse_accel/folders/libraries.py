"""Keeps the libraries' own chatter off the screen: our messages say what theirs would."""

from __future__ import annotations

import os


def quiet_libraries() -> None:
    """No load reports, no progress bars of their own, no DeepSpeed notices on a machine without a GPU."""
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not torch.accelerator.is_available():
        # accelerate imports DeepSpeed wherever it is installed, and DeepSpeed then reports that it found no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
