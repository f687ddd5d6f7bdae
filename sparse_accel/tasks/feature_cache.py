"""Features that were made before: found by a name for all that they depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from sparse_accel.tasks.base import DataOptions
from sparse_accel.tasks.features import Features, load_features, save_features
from sparse_accel.tasks.files import cache_folder


def digest_of(texts: Sequence[str], *settings: object) -> str:
    """A name for what features depend on: texts in their order, and settings by their `repr`."""
    digest = hashlib.sha256(repr(settings).encode())
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()[:32]


def cached_features(options: DataOptions, name: str, make: Callable[[], Features], notes: list[str]) -> Features:
    """The features called `name` from the cache, else made and put there; a note where that cannot be."""
    path: Path = cache_folder(options.cache_dir) / f"{name}.npz"
    cached = None if options.overwrite_cache else load_features(path)
    if cached is not None:
        return cached
    features = make()
    try:
        save_features(path, features)
    except OSError as error:
        notes.append(f"the features are not cached: {path.parent}: {error.strerror or error}")
    return features
