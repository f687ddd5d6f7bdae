"""The zero pattern of weights in a file, read without a model: for processes that do not hold the weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparse_accel.compress.masks import nonzero_mask
from sparse_accel.compress.positions import pack_positions
from sparse_accel.errors import ModelError
from sparse_accel.folders.storage import shards


def read_positions(
    weights: Path | Sequence[Path], names: Iterable[str], *, base_model_prefix: str = ""
) -> dict[str, Tensor]:
    """Where the weights of the modules `names` are not zero, in a form of `compress.positions`, by module name.

    `weights` are safetensors files, or the index of some (`model.safetensors.index.json`); one tensor is in memory at a
    time. As transformers reads them, a file of the bare encoder lacks the `base_model_prefix` ("bert") of the names. A
    weight that is in no file, such as that of a new head, is left out. Raises ModelError for a file that cannot be read.
    """
    files = [weights] if isinstance(weights, Path) else list(weights)
    files = [file for listed in files for file in (shards(listed) if listed.suffix == ".json" else [listed])]
    wanted = list(names)
    found: dict[str, Tensor] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                keys = set(file.keys())
                for name in wanted:
                    spellings = (f"{name}.weight", f"{name.removeprefix(base_model_prefix + '.')}.weight")
                    key = next((spelling for spelling in spellings if spelling in keys), None)
                    if key is not None:
                        found[name] = pack_positions(nonzero_mask(file.get_tensor(key)))
        except (OSError, SafetensorError) as error:
            raise ModelError(f"the zeros of {path} cannot be read: {error}") from error
    return found
