"""Single texts and pairs of them as features: one each, cut to the longest that is allowed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from tokenizers import Tokenizer

from sparse_accel.errors import DataError, ModelError
from sparse_accel.tasks.features import Features, concatenate
from sparse_accel.tasks.processes import map_chunks

# Texts that are tokenized at a time; the features do not depend on it.
CHUNK: Final = 1024
# Raise it when features change for the same input: cached ones of other versions are not used.
FORMAT_VERSION: Final = 1

# A text, or two of them.
Texts = tuple[str, str | None]


@dataclass(frozen=True)
class TextSpec:
    """How texts become tokens: plain values, so that a worker process needs no more than this. `backend` is the tokenizer in
    the JSON of the `tokenizers` library."""

    backend: str
    max_length: int
    truncation_side: str
    token_types: bool

    def digest(self) -> str:
        """A name for all that the features depend on beside the texts."""
        parts = [FORMAT_VERSION, self.backend, self.max_length, self.truncation_side, self.token_types]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def text_spec(tokenizer: Any, max_length: int) -> TextSpec:
    """The spec for a transformers tokenizer (or a ServedTokenizer). Raises ModelError for one that is slow or cannot pad."""
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{type(tokenizer).__name__} is a slow tokenizer; a fast one (a folder with tokenizer.json) is needed"
        )
    if tokenizer.pad_token_id is None:
        raise ModelError(f"{type(tokenizer).__name__} has no padding token, and batches need one")
    return TextSpec(
        backend=tokenizer.backend_tokenizer.to_str(),
        max_length=max_length,
        truncation_side=tokenizer.truncation_side,
        token_types="token_type_ids" in tokenizer.model_input_names,
    )


class Encoder:
    """Tokenizes with a tokenizer of its own, whose truncation and padding settings are the spec's alone: what transformers
    gives for `tokenizer(first, second, truncation=True)`, which shortens the longer of two first."""

    def __init__(self, spec: TextSpec) -> None:
        self.spec = spec
        self.backend = Tokenizer.from_str(spec.backend)
        self.backend.no_padding()
        special = self.backend.num_special_tokens_to_add(True)
        if spec.max_length <= special:
            raise DataError(
                f"max_seq_length {spec.max_length} leaves no token for the text: {special} of them are special ones"
            )
        self.backend.enable_truncation(spec.max_length, strategy="longest_first", direction=spec.truncation_side)

    def __call__(self, texts: Sequence[Texts]) -> Features:
        """A feature for each; `facts["truncated"]` is 1 where some of the text was left out."""
        pairs: list[Any] = [first if second is None else (first, second) for first, second in texts]
        encodings = self.backend.encode_batch_fast(pairs)
        sizes = np.array([len(encoding) for encoding in encodings], dtype=np.int64)
        ids: list[int] = []
        types: list[int] = []
        for encoding in encodings:
            ids.extend(encoding.ids)
            if self.spec.token_types:
                types.extend(encoding.type_ids)
        tokens = {"input_ids": np.array(ids, dtype=np.int32)}
        if self.spec.token_types:
            tokens["token_type_ids"] = np.array(types, dtype=np.uint8)
        truncated = np.array([bool(encoding.overflowing) for encoding in encodings], dtype=np.int32)
        bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
        return Features(tokens=tokens, bounds=bounds, labels={}, facts={"truncated": truncated}, extra={})


def encode_texts(texts: Sequence[Texts], spec: TextSpec, num_workers: int | None) -> Features:
    """The features of all texts, in order; they do not depend on `num_workers` (None or 1: this process)."""
    chunks = [texts[start : start + CHUNK] for start in range(0, len(texts), CHUNK)]
    return concatenate(list(map_chunks(Encoder, spec, chunks, num_workers)))
