"""Texts, alone or in pairs, as features: tokenized in one go, and cached."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from sparse_accel.tasks.base import DataOptions
from sparse_accel.tasks.features import Features, load_features, save_features
from sparse_accel.tasks.files import cache_folder

# Texts that the tokenizer is given at a time.
_CHUNK: Final = 1000


def tokenize(
    tokenizer: Any, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int
) -> tuple[Features, int]:
    """A feature for each text (and the one beside it in `pairs`), cut to `max_length` tokens: of a pair, the longer loses
    tokens first, as in Hugging Face's examples. Returns the features, without labels, and how many texts were cut."""
    ids: list[np.ndarray] = []
    segments: list[np.ndarray] = []
    num_cut = 0
    has_segments = "token_type_ids" in tokenizer.model_input_names
    for start in range(0, len(texts), _CHUNK):
        part = slice(start, start + _CHUNK)
        found = tokenizer(
            list(texts[part]),
            list(pairs[part]) if pairs is not None else None,
            truncation="longest_first" if pairs is not None else True,
            max_length=max_length,
            return_attention_mask=False,
            return_overflowing_tokens=False,
            return_token_type_ids=has_segments,
        )
        ids.extend(np.asarray(row, np.int32) for row in found["input_ids"])
        if has_segments:
            segments.extend(np.asarray(row, np.uint8) for row in found["token_type_ids"])
        # What was cut lies behind each encoding.
        num_cut += sum(bool(encoding.overflowing) for encoding in found.encodings)
    tokens = {"input_ids": np.concatenate(ids)}
    if has_segments:
        tokens["token_type_ids"] = np.concatenate(segments)
    bounds = np.concatenate([[0], np.cumsum([len(row) for row in ids])]).astype(np.int64)
    return Features(tokens, bounds, {}, {}, {}), num_cut


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
