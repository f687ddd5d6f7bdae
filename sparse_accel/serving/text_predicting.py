"""Classifies texts with a deployment: the probability of each label; numpy alone where there is a graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Final, overload

import numpy as np

from sparse_accel.errors import DataError, ModelError
from sparse_accel.serving.predicting import open_to_predict, padded_batch
from sparse_accel.tasks.features import length_sorted_batches
from sparse_accel.tasks.glue import glue_task
from sparse_accel.tasks.text_features import Encoder, Texts, text_spec
from sparse_accel.tasks.text_labels import PROBLEM_TYPES, LabelKind
from sparse_accel.tasks.text_metrics import THRESHOLD, probabilities, softmax
from sparse_accel.tasks.text_rows import problem_of_text

TASK: Final = "text_classification"
OUTPUTS: Final = ("logits",)
# Texts that are batched together: enough to sort by length, few enough to answer soon.
_CHUNK: Final = 64


@dataclass(frozen=True)
class Classification:
    """What a text was found to be. `labels` are the ones that apply: the likeliest, or (several may apply) all that are more
    likely than 0.3, likeliest first; `scores` is the probability of every label, highest first. Of a regression there is
    the number `value` alone. `is_truncated`: the text is longer than the model reads, the rest was not looked at."""

    labels: tuple[str, ...] = ()
    scores: dict[str, float] = field(default_factory=dict)
    value: float | None = None
    is_truncated: bool = False

    @property
    def label(self) -> str | None:
        """The likeliest label that applies."""
        return self.labels[0] if self.labels else None

    @property
    def score(self) -> float | None:
        """Its probability."""
        return None if self.label is None else self.scores[self.label]


class TextPredictor:
    """Classifies texts and pairs of texts with a deployment folder, or with a plain model folder through torch.

    `engine` is onnxruntime, openvino or torch (left out: by what the folder holds). Raises ModelError, OptionError and
    DataError, all of them before the first text.
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
            folder, engine, threads, batch_size, TASK, "classifies texts", OUTPUTS, max_seq_length=max_seq_length
        )
        self.deployment, self.engine, self.notes = opened.deployment, opened.engine, opened.notes
        self.batch_size = batch_size
        spec = text_spec(self.deployment.tokenizer, self.deployment.facts.max_seq_length)
        try:
            self._encode = Encoder(spec)
        except DataError:
            raise
        except Exception as error:  # the tokenizers library raises a bare Exception
            raise ModelError(f"{folder}: the tokenizer cannot be read: {error}") from error

    @overload
    def __call__(self, text: str, text_pair: str | None = None) -> Classification: ...
    @overload
    def __call__(self, text: list[str], text_pair: list[str] | None = None) -> list[Classification]: ...
    def __call__(
        self, text: str | list[str], text_pair: str | list[str] | None = None
    ) -> Classification | list[Classification]:
        """What a text (with `text_pair`, a pair) is, or each of several. Raises DataError for empty or unequal input."""
        texts = [text] if isinstance(text, str) else text
        others: Sequence[str | None] = [None] * len(texts)
        if text_pair is not None:
            others = [text_pair] if isinstance(text_pair, str) else text_pair
        if len(texts) != len(others):
            raise DataError(f"{len(texts)} texts and {len(others)} texts beside them: pass as many of each")
        found = []
        for number, one in enumerate(self.classifications(zip(texts, others, strict=True)), start=1):
            if isinstance(one, DataError):
                raise DataError(f"text {number}: {one}" if len(texts) > 1 else str(one)) from one
            found.append(one)
        return found[0] if isinstance(text, str) else found

    def classifications(self, texts: Iterable[Texts], *, chunk: int = _CHUNK) -> Iterator[Classification | DataError]:
        """What each (text, the one beside it or None) is, in order, as they come; for one that cannot be used, the error that says
        why. `chunk` of them are read ahead, so that features of like length share a batch: 1 answers at once."""
        remaining = iter(texts)
        while taken := list(islice(remaining, chunk)):
            yield from self._classified(taken)

    def _classified(self, texts: Sequence[Texts]) -> list[Classification | DataError]:
        problems = [problem_of(*pair) for pair in texts]
        kept = [pair for pair, problem in zip(texts, problems, strict=True) if problem is None]
        found = iter(self._of_good_ones(kept))
        return [next(found) if problem is None else DataError(problem) for problem in problems]

    def _of_good_ones(self, texts: Sequence[Texts]) -> list[Classification]:
        if not texts:
            return []
        features = self._encode(texts)
        rows: list[np.ndarray] = [np.empty(0, np.float32)] * len(features)
        for indices in length_sorted_batches(features.lengths, self.batch_size):
            batch = padded_batch([features[index] for index in indices.tolist()], self.deployment)
            for index, row in zip(indices.tolist(), self.engine(batch)["logits"], strict=True):
                rows[index] = row
        logits = np.stack(rows)
        kind, names = self._kind(logits.shape[1]), self._names(logits.shape[1])
        truncated = features.facts["truncated"].astype(bool).tolist()
        return [classified(row, kind, names, is_truncated=cut) for row, cut in zip(logits, truncated, strict=True)]

    def _kind(self, num_outputs: int) -> LabelKind:
        """As the config says; a model of one output that says nothing gives a number."""
        stated = {problem: kind for kind, problem in PROBLEM_TYPES.items()}
        kind: Any = stated.get(self.deployment.problem_type or "")
        return kind or ("regression" if num_outputs == 1 else "classes")

    def _names(self, num_outputs: int) -> Sequence[str]:
        """What the outputs are called: by the config, by GLUE if that was the data, else by transformers' stand-ins."""
        if self.deployment.labels is not None and len(self.deployment.labels) == num_outputs:
            return self.deployment.labels
        name = self.deployment.facts.settings.get("task_name")
        task = glue_task(name) if name is not None else None
        if task is not None and len(task.labels) == num_outputs:
            return task.labels
        return [f"LABEL_{place}" for place in range(num_outputs)]


def classified(logits: np.ndarray, kind: LabelKind, names: Sequence[str], *, is_truncated: bool) -> Classification:
    """What the logits [C] of one text say."""
    if kind == "regression":
        return Classification(value=float(logits[0]), is_truncated=is_truncated)
    shares = softmax(logits) if kind == "classes" else probabilities(logits)
    order = np.argsort(-logits, kind="stable")
    scores = {names[place]: float(shares[place]) for place in order}
    applying = tuple(scores)[:1] if kind == "classes" else tuple(n for n, share in scores.items() if share > THRESHOLD)
    return Classification(applying, scores, is_truncated=is_truncated)


def problem_of(text: Any, text_pair: Any) -> str | None:
    """Why a text, or a pair, cannot be classified; None when it can."""
    problem = problem_of_text(text, "the text")
    if problem is not None or text_pair is None:
        return problem
    return problem_of_text(text_pair, "the second text")
