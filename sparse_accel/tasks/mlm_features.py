"""Texts as tokens for masked language modelling: a feature a line, or all text end to end and cut into equal chunks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from tokenizers import Encoding, Tokenizer

from sparse_accel.errors import ModelError, OptionError
from sparse_accel.tasks.features import Features, concatenate
from sparse_accel.tasks.mlm_masking import BEGINS_WORD, CONTINUES_WORD, KINDS, SPECIAL
from sparse_accel.tasks.processes import map_chunks

# Raise it when features change for the same input: cached ones of other versions are not used.
FORMAT_VERSION = 1
# Texts that are tokenized at a time; the features do not depend on it.
_CHUNK: Final = 2048


@dataclass(frozen=True)
class TextSpec:
    """How texts become tokens: plain values, so that another process needs no more than this.

    `backend` is the tokenizer in the JSON of the `tokenizers` library. Tokens in `special_ids` are special wherever they
    come from: a text may hold `[SEP]` in letters.
    """

    backend: str
    max_length: int
    line_by_line: bool
    token_types: bool
    truncation_side: str
    special_ids: tuple[int, ...]

    def digest(self) -> str:
        """A name for all that the features depend on beside the texts."""
        parts = [FORMAT_VERSION, self.backend, self.max_length, self.line_by_line, self.token_types]
        parts += [self.truncation_side, list(self.special_ids)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def vocabulary_size(tokenizer: Any) -> int:
    """How many tokens there are, added ones included."""
    size: int = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()).get_vocab_size(with_added_tokens=True)
    return size


def text_spec(tokenizer: Any, *, max_length: int, line_by_line: bool, whole_words: bool) -> TextSpec:
    """The spec for a transformers tokenizer. Raises ModelError for one that is slow, cannot mask or pad, or does not know
    words where `whole_words` asks for them, and OptionError where `max_length` leaves no room for text."""
    name = type(tokenizer).__name__
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"{name} is a slow tokenizer; masked language modeling needs a fast one (tokenizer.json)")
    if tokenizer.mask_token_id is None:
        raise ModelError(
            f"{name} has no mask token, so that there is nothing to put in a masked token's place; masked language modeling "
            "needs the tokenizer of an encoder such as BERT, RoBERTa or DistilBERT"
        )
    if tokenizer.pad_token_id is None:
        raise ModelError(f"{name} has no padding token, and batches need one")
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    if whole_words and backend.pre_tokenizer is None:
        raise ModelError(f"--whole_word_mask: {name} does not split text into words; leave it out to mask tokens")
    special_ids = {token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special}
    specials = backend.num_special_tokens_to_add(False)
    if max_length < specials + 1:
        raise OptionError(
            f"--max_seq_length {max_length} leaves no room for text: {name} adds {specials} special tokens to each line"
        )
    return TextSpec(
        backend=backend.to_str(),
        max_length=max_length,
        line_by_line=line_by_line,
        token_types="token_type_ids" in tokenizer.model_input_names,
        truncation_side=tokenizer.truncation_side,
        # An unknown word is a token like another, as in Hugging Face's script.
        special_ids=tuple(sorted(special_ids - {tokenizer.unk_token_id})),
    )


class TextEncoder:
    """Turns texts into tokens with a tokenizer of its own, whose truncation and padding settings are the spec's alone."""

    def __init__(self, spec: TextSpec) -> None:
        self.spec = spec
        self.tokenizer = Tokenizer.from_str(spec.backend)
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        if spec.line_by_line:
            # Stride 0, one window: the rest of a line is cut off, as in Hugging Face's script.
            self.tokenizer.enable_truncation(spec.max_length, direction=spec.truncation_side)

    def __call__(self, texts: Sequence[str]) -> Features:
        """A feature for each text: `input_ids` int32 (and `token_type_ids` uint8), with its special tokens, and
        extra[KINDS] uint8. facts["cut"] is 1 where a line was too long. Not yet in chunks."""
        encodings = self.tokenizer.encode_batch(list(texts))
        lengths = np.array([len(encoding) for encoding in encodings], np.int64)
        ids = _flat(encodings, "ids", np.int32)
        kinds = np.full(len(ids), CONTINUES_WORD, np.uint8)
        words = np.fromiter(
            (-1 if word is None else word for encoding in encodings for word in encoding.word_ids), np.int64, len(ids)
        )
        bounds = np.zeros(len(texts) + 1, np.int64)
        np.cumsum(lengths, out=bounds[1:])
        begins = np.ones(len(ids), bool)
        begins[1:] = words[1:] != words[:-1]
        begins[bounds[:-1][lengths > 0]] = True
        kinds[begins] = BEGINS_WORD
        is_special = _flat(encodings, "special_tokens_mask", np.uint8) > 0
        kinds[is_special | np.isin(ids, self.spec.special_ids)] = SPECIAL
        tokens = {"input_ids": ids}
        if self.spec.token_types:
            tokens["token_type_ids"] = _flat(encodings, "type_ids", np.uint8)
        cut = np.fromiter((bool(encoding.overflowing) for encoding in encodings), np.int32, len(encodings))
        return Features(tokens=tokens, bounds=bounds, labels={}, facts={"cut": cut}, extra={KINDS: kinds})

    def token(self, token_id: int) -> str:
        """A token as the vocabulary has it."""
        # A model's table of tokens may be longer than the tokenizer's.
        return str(self.tokenizer.id_to_token(token_id) or f"token {token_id}")

    def text(self, token_id: int) -> str:
        """A token as one reads it, which may be nothing."""
        return str(self.tokenizer.decode([token_id], skip_special_tokens=False)).strip()


def _flat(encodings: Sequence[Encoding], name: str, dtype: Any) -> np.ndarray:
    parts = [np.array(getattr(encoding, name), dtype) for encoding in encodings]
    return np.concatenate(parts) if parts else np.empty(0, dtype)


def encode_all(texts: Sequence[str], spec: TextSpec, num_workers: int | None) -> Features:
    """What a TextEncoder gives for all texts, whatever the number of processes (None or 1: this one, whose tokenizer has
    threads of its own)."""
    chunks = [texts[at : at + _CHUNK] for at in range(0, len(texts), _CHUNK)]
    return concatenate(list(map_chunks(TextEncoder, spec, chunks, num_workers)))


def in_chunks(features: Features, length: int) -> Features:
    """The same tokens end to end, cut every `length`: no column moves. The last feature is what is left; Hugging Face's
    script leaves it out, for it does not pad."""
    num_tokens = int(features.bounds[-1])
    bounds = np.minimum(np.arange(0, num_tokens + length, length, dtype=np.int64), num_tokens)
    return Features(tokens=features.tokens, bounds=bounds, labels={}, facts={}, extra=features.extra)


def num_maskable(features: Features) -> int:
    """How many tokens are not special."""
    return int(np.count_nonzero(features.extra[KINDS] != SPECIAL))
