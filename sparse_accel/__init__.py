"""Sparse transfer learning on today's torch: SparseML recipes, run through accelerate."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparse_accel.folders.storage import load as load
    from sparse_accel.serving.predicting import Predictor as Predictor

__version__ = "0.1.0"
__all__ = ["Predictor", "__version__", "load"]

# Public names, each with the module that has it: imported when first asked for, so that `--help` needs no torch.
_HOMES = {"Predictor": "sparse_accel.serving.predicting", "load": "sparse_accel.folders.storage"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
