"""Fills the gaps of a text with a deployment of a masked language model; numpy alone where there is a graph."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final, overload

import numpy as np

from sparse_accel.errors import DataError, OptionError, suggestion
from sparse_accel.serving.predicting import open_to_predict, padded_batch
from sparse_accel.tasks.mlm_features import TextEncoder, text_spec
from sparse_accel.tasks.reading import kind_of

TASK: Final = "masked_language_modeling"
OUTPUTS: Final = ("logits",)
# Something in brackets that looks like another tokenizer's mask.
_BRACKETED: Final = re.compile(r"[\[<{(]\s*mask\s*[\]>})]", re.IGNORECASE)


@dataclass(frozen=True)
class Filling:
    """A token for a gap. `score` is its probability among all tokens; `text` is the token as one reads it."""

    token: str
    text: str
    token_id: int
    score: float


@dataclass(frozen=True)
class Filled:
    """The likeliest fillings of each gap of a text, best first, and the text with the best of each in place."""

    text: str
    gaps: tuple[tuple[Filling, ...], ...]


class MaskFiller:
    """Fills what is masked in texts, with a deployment folder or with a plain model folder through torch.

    `engine` is onnxruntime, openvino or torch (left out: by what the folder holds). Raises ModelError and OptionError.
    """

    def __init__(
        self,
        folder: str | Path,
        engine: str | None = None,
        *,
        threads: int | None = None,
        batch_size: int = 8,
        max_seq_length: int | None = None,
    ) -> None:
        opened = open_to_predict(
            folder, engine, threads, batch_size, TASK, "fills gaps", OUTPUTS, max_seq_length=max_seq_length
        )
        self.deployment, self.engine, self.notes = opened.deployment, opened.engine, opened.notes
        self.batch_size = batch_size
        tokenizer = self.deployment.tokenizer
        # A text that is too long is refused rather than cut, so its tokens are counted first.
        spec = text_spec(tokenizer, max_length=2**31 - 1, line_by_line=False, whole_words=False)
        self._encode = TextEncoder(spec)
        self._mask_id: int = tokenizer.mask_token_id

    @property
    def mask_token(self) -> str:
        """What stands for a gap."""
        return self._encode.token(self._mask_id)

    @overload
    def __call__(self, text: str, *, top_k: int = 5) -> Filled: ...
    @overload
    def __call__(self, text: list[str], *, top_k: int = 5) -> list[Filled]: ...
    def __call__(self, text: str | list[str], *, top_k: int = 5) -> Filled | list[Filled]:
        """The fillings of a text, or of each of a list. Raises DataError for a text that has none."""
        texts = [text] if isinstance(text, str) else text
        found = []
        for number, one in enumerate(self.fillings(texts, top_k=top_k), start=1):
            if isinstance(one, DataError):
                raise DataError(f"text {number}: {one}" if len(texts) > 1 else f"the text {one}")
            found.append(one)
        return found[0] if isinstance(text, str) else found

    def fillings(self, texts: Iterable[str], *, top_k: int = 5) -> Iterator[Filled | DataError]:
        """For each text, in order, its fillings, or the error that says why it has none."""
        if top_k < 1:
            raise OptionError(f"--top_k should be 1 or more, it is {top_k}")
        remaining = iter(texts)
        while taken := list(islice(remaining, self.batch_size)):
            yield from self._filled(taken, top_k)

    def _filled(self, texts: Sequence[Any], top_k: int) -> list[Filled | DataError]:
        problems = {index: why for index, text in enumerate(texts) if (why := self._problem(text)) is not None}
        kept = [index for index in range(len(texts)) if index not in problems]
        features = self._encode([texts[index] for index in kept])
        rows = [features[at] for at in range(len(kept))]
        longest = self.deployment.facts.max_seq_length
        problems |= {
            index: f"has {len(row['input_ids'])} tokens, and the model is given at most {longest}"
            for index, row in zip(kept, rows, strict=True)
            if len(row["input_ids"]) > longest
        }
        found: list[Filled | DataError] = [DataError(problems.get(index, "")) for index in range(len(texts))]
        fitting = [(index, row) for index, row in zip(kept, rows, strict=True) if index not in problems]
        if fitting:
            batch = padded_batch([row for _, row in fitting], self.deployment)
            logits = self.engine(batch)["logits"]
            for (index, _), ids, scores in zip(fitting, batch["input_ids"], logits, strict=True):
                found[index] = self._fillings(texts[index], scores[ids == self._mask_id], top_k)
        return found

    def _problem(self, text: Any) -> str | None:
        if not isinstance(text, str):
            return f"should be text, it is {kind_of(text)}"
        if self.mask_token in text:
            return None
        other = _BRACKETED.search(text)
        meant = suggestion(other.group(), [self.mask_token]) if other else ""
        return f"has no gap to fill: write {self.mask_token} where one is{meant}"

    def _fillings(self, text: str, logits: np.ndarray, top_k: int) -> Filled:
        """`logits` is float32 [gaps, vocabulary]."""
        shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
        shares = np.exp(shifted) / np.exp(shifted).sum(-1, keepdims=True)
        gaps = []
        for row in shares:
            best = np.argsort(-row, kind="stable")[:top_k]
            gaps.append(tuple(self._filling(int(token_id), float(row[token_id])) for token_id in best))
        for fillings in gaps:
            text = text.replace(self.mask_token, fillings[0].text, 1)
        return Filled(text, tuple(gaps))

    def _filling(self, token_id: int, score: float) -> Filling:
        token, text = self._encode.token(token_id), self._encode.text(token_id)
        return Filling(token, text or token, token_id, score)
