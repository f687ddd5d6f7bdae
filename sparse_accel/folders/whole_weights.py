"""Weights that arrive whole on every rank, also in a launch whose backend would have them arrive empty."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

# With this on, accelerate's FSDP lets transformers leave every rank but the first without weights.
_RAM_EFFICIENT: Final = "FSDP_CPU_RAM_EFFICIENT_LOADING"


@contextmanager
def whole_weights() -> Iterator[None]:
    """Inside, `from_pretrained` reads all weights on the rank that calls it. Under FSDP it would leave them empty on all
    ranks but one; with the config of a ZeRO-3 run alive it would cut them up while it makes them."""
    from transformers.integrations import deepspeed

    ram_efficient = os.environ.get(_RAM_EFFICIENT)
    # transformers offers a way to set and to clear this reference, none to read it.
    reference: weakref.ReferenceType[Any] | None = deepspeed._hf_deepspeed_config_weak_ref
    config = None if reference is None else reference()
    if ram_efficient is not None:
        os.environ[_RAM_EFFICIENT] = "false"
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if ram_efficient is not None:
            os.environ[_RAM_EFFICIENT] = ram_efficient
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)
