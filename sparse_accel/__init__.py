"""Sparse transfer learning on today's torch: SparseML recipes, run through accelerate."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparse_accel.errors import SparseAccelError as SparseAccelError
    from sparse_accel.folders.storage import load as load
    from sparse_accel.python_api import evaluate as evaluate
    from sparse_accel.python_api import export as export
    from sparse_accel.python_api import prune as prune
    from sparse_accel.python_api import train as train
    from sparse_accel.recipe.schema import Recipe as Recipe
    from sparse_accel.runtime.own_loop import AttachedRecipe as AttachedRecipe
    from sparse_accel.runtime.own_loop import attach as attach
    from sparse_accel.runtime.run import TrainResult as TrainResult
    from sparse_accel.serving.by_task import Predictor as Predictor

__version__ = "0.1.0"

# Public names, each with the module that has it: imported when first asked for, so that `--help` needs no torch.
_HOMES = {
    "AttachedRecipe": "sparse_accel.runtime.own_loop",
    "Predictor": "sparse_accel.serving.by_task",
    "Recipe": "sparse_accel.recipe.schema",
    "SparseAccelError": "sparse_accel.errors",
    "TrainResult": "sparse_accel.runtime.run",
    "attach": "sparse_accel.runtime.own_loop",
    "evaluate": "sparse_accel.python_api",
    "export": "sparse_accel.python_api",
    "load": "sparse_accel.folders.storage",
    "prune": "sparse_accel.python_api",
    "train": "sparse_accel.python_api",
}
__all__ = [
    "AttachedRecipe",
    "Predictor",
    "Recipe",
    "SparseAccelError",
    "TrainResult",
    "__version__",
    "attach",
    "evaluate",
    "export",
    "load",
    "prune",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
