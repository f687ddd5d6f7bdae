"""What a teacher's outputs depend on, and the fingerprint of it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from sparse_accel.tasks.features import Features

# What a config says of where it comes from, and not of the model.
_ORIGIN: Final = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures"})


def fingerprint(made_of: Mapping[str, Any]) -> str:
    """32 hexadecimal digits for what JSON can say."""
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:32]


def describe_model(model: Any) -> dict[str, Any]:
    """A loaded model: its class, config and weights, wherever they came from."""
    config = {name: value for name, value in model.config.to_dict().items() if name not in _ORIGIN}
    return {
        "class": type(model).__name__,
        "config": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:32],
        "attention": str(getattr(model.config, "_attn_implementation", None)),
        "weights": weights_digest(model),
    }


def weights_digest(model: nn.Module) -> str:
    """Over names, dtypes, shapes and bytes of all parameters and buffers that the model would save."""
    return _digest((name, tensor_bytes(tensor)) for name, tensor in model.state_dict().items())


def features_digest(features: Features) -> str:
    """Over what a model is given of the features, in their order; labels are no part of it."""
    arrays = {**features.tokens, "bounds": features.bounds}
    return _digest((name, (array.dtype.name, array.shape, array)) for name, array in sorted(arrays.items()))


def tensor_bytes(tensor: Tensor) -> tuple[str, tuple[int, ...], np.ndarray]:
    """The dtype and shape of a tensor on the CPU, and its bytes."""
    flat = tensor.detach().contiguous().reshape(-1)
    return str(tensor.dtype), tuple(tensor.shape), flat.view(torch.uint8).numpy()


def _digest(named: Iterable[tuple[str, tuple[str, tuple[int, ...], np.ndarray]]]) -> str:
    # Hashing lets other threads run; a large model's weights are then a matter of a second.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        parts = list(pool.map(_entry, named))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _entry(named: tuple[str, tuple[str, tuple[int, ...], np.ndarray]]) -> str:
    name, (dtype, shape, array) = named
    content = hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()
    return f"{name} {dtype} {list(shape)} {content}"
