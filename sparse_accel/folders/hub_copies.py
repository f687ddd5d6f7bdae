"""A model of the hub as a folder on this machine, for what reads files rather than names."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from sparse_accel.errors import ModelError

# What a model folder holds; weights of other frameworks stay where they are.
_FILES: Final = ("*.json", "*.txt", "*.model", "*.safetensors", "*.bin")


def local_copy(name: str, where: str) -> Path:
    """The folder of a downloaded model; what is missing is downloaded first, unless HF_HUB_OFFLINE forbids it.

    Raises ModelError, which begins with `where`, when it cannot be had.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(_FILES)))
    except Exception as error:  # whatever the network and the hub raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{where}: {name} cannot be downloaded from the hub: {reason}") from error
