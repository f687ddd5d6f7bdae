"""Answers questions with a deployment: windows, batches, spans and their characters; numpy alone where there is a graph."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Final, overload

import numpy as np

from sparse_accel.errors import DataError, ModelError, OptionError
from sparse_accel.serving.deployment import Deployment, Opened, open_deployment
from sparse_accel.serving.engines import Engine
from sparse_accel.tasks.features import Features, length_sorted_batches
from sparse_accel.tasks.qa_postprocess import postprocess
from sparse_accel.tasks.qa_windows import Cutter, Question, window_spec
from sparse_accel.tasks.reading import kind_of
from sparse_accel.tasks.squad_rows import Example

TASK: Final = "question_answering"
OUTPUTS: Final = ("start_logits", "end_logits")
# The inputs that batches have; a graph may want some of them.
_INPUTS: Final = ("input_ids", "attention_mask", "token_type_ids")
# Questions whose windows are batched together: enough to sort by length, few enough to answer soon.
_CHUNK: Final = 64

# Called with (done, total) features.
OnBatch = Callable[[int, int], None]


@dataclass(frozen=True)
class Candidate:
    """A span of the context: `text` == context[start:end], offsets in characters. `score` is its probability among the
    candidates. Without text, 0 to 0: that there is no answer."""

    text: str
    score: float
    start: int
    end: int


@dataclass(frozen=True)
class Answer:
    """The best candidate, and on request more of them, best first, each span once."""

    text: str
    score: float
    start: int
    end: int
    n_best: tuple[Candidate, ...] = ()


class Predictor:
    """Answers questions about contexts with a deployment folder, or with a plain model folder through torch.

    `engine` is onnxruntime, openvino or torch (left out: by what the folder holds); the limits override what the folder
    says. Raises ModelError, OptionError and DataError, all of them before the first question.
    """

    def __init__(
        self,
        folder: str | Path,
        engine: str | None = None,
        *,
        threads: int | None = None,
        batch_size: int = 8,
        max_seq_length: int | None = None,
        doc_stride: int | None = None,
        max_answer_length: int | None = None,
    ) -> None:
        opened = open_to_predict(
            folder,
            engine,
            threads,
            batch_size,
            TASK,
            "answers questions",
            OUTPUTS,
            max_seq_length=max_seq_length,
            doc_stride=doc_stride,
            max_answer_length=max_answer_length,
        )
        self.deployment, self.engine, self.notes = opened.deployment, opened.engine, opened.notes
        self.batch_size = batch_size
        facts, tokenizer = self.deployment.facts, self.deployment.tokenizer
        spec = window_spec(tokenizer, max_length=facts.max_seq_length, stride=facts.doc_stride, labels=False)
        try:
            self._cut = Cutter(spec)
        except DataError:
            raise
        except Exception as error:  # the tokenizers library raises a bare Exception
            raise ModelError(f"{folder}: the tokenizer cannot be read: {error}") from error

    @overload
    def __call__(self, question: str, context: str, *, n_best: int | None = None) -> Answer: ...
    @overload
    def __call__(self, question: list[str], context: str | list[str], *, n_best: int | None = None) -> list[Answer]: ...
    @overload
    def __call__(self, question: str, context: list[str], *, n_best: int | None = None) -> list[Answer]: ...
    def __call__(
        self, question: str | list[str], context: str | list[str], *, n_best: int | None = None
    ) -> Answer | list[Answer]:
        """The answer, or a list of them where either is a list: pairs, or many questions on one context, or one on
        many. `n_best` asks for that many candidates with each. Raises DataError for empty or unequal input."""
        pairs = _pairs(question, context)
        found = list(self.answers(pairs, n_best=n_best))
        for number, answer in enumerate(found, start=1):
            if isinstance(answer, DataError):
                raise DataError(f"question {number}: {answer}" if len(found) > 1 else str(answer)) from answer
        answers = [answer for answer in found if isinstance(answer, Answer)]
        return answers[0] if isinstance(question, str) and isinstance(context, str) else answers

    def answers(
        self, pairs: Iterable[tuple[str, str]], *, n_best: int | None = None, chunk: int = _CHUNK
    ) -> Iterator[Answer | DataError]:
        """An answer for each (question, context), in order, as they come; for a pair that cannot be answered, the error
        that says why. `chunk` pairs are read ahead, so that windows of like length share a batch: 1 answers at once."""
        size = self.deployment.facts.n_best_size
        if n_best is not None and not 1 <= n_best <= size:
            raise OptionError(f"--n_best should be 1 to {size}, which is how many candidates are kept; it is {n_best}")
        remaining = iter(pairs)
        while taken := list(islice(remaining, chunk)):
            yield from self._answered(taken, n_best or 0)

    def _answered(self, pairs: Sequence[tuple[str, str]], n_best: int) -> list[Answer | DataError]:
        problems = {index: why for index, pair in enumerate(pairs) if (why := problem_of(*pair)) is not None}
        kept = [index for index in range(len(pairs)) if index not in problems]
        windows = self._cut([Question(*pairs[index], None, None) for index in kept])
        problems |= {kept[index]: why for index, why in windows.refused.items()}
        features, facts = windows.features, self.deployment.facts
        logits = run_features(self.engine, self.deployment, features, self.batch_size, OUTPUTS)
        starts, ends = (logits[name] for name in OUTPUTS)
        examples = [Example(str(index), *pairs[index], (), (), "") for index in kept]
        found = postprocess(
            examples,
            features,
            starts,
            ends,
            version_2_with_negative=facts.version_2_with_negative,
            n_best_size=facts.n_best_size,
            max_answer_length=facts.max_answer_length,
            null_score_diff_threshold=facts.null_score_diff_threshold,
        )
        answers: list[Answer | DataError] = [DataError(problems.get(index, "")) for index in range(len(pairs))]
        for index in kept:
            if index in problems:
                continue
            key, context = str(index), pairs[index][1]
            candidates = [
                Candidate(entry["text"], entry["probability"], start, end)
                for entry, (start, end) in zip(found.nbest[key], found.spans[key], strict=True)
                # The stand-in that the search gives when it found no span is not in the context.
                if entry["text"] == context[start:end]
            ]
            answers[index] = _chosen(candidates, found.predictions[key], n_best)
        return answers


def _pairs(question: str | list[str], context: str | list[str]) -> list[tuple[str, str]]:
    if isinstance(question, str):
        question = [question] * (1 if isinstance(context, str) else len(context))
    if isinstance(context, str):
        context = [context] * len(question)
    if len(question) != len(context):
        raise DataError(f"{len(question)} questions and {len(context)} contexts: pass as many, or one of either")
    return list(zip(question, context, strict=True))


def problem_of(question: Any, context: Any) -> str | None:
    """Why a pair cannot be answered, None when it can."""
    for name, value in (("question", question), ("context", context)):
        if not isinstance(value, str):
            return f"the {name} should be text, it is {kind_of(value)}"
        if not value.strip():
            return f"the {name} is empty"
        half = re.search(r"[\ud800-\udfff]", value)
        if half:
            return f"the {name} has half of a surrogate pair at character {half.start()}: a broken \\u escape"
    return None


def _chosen(candidates: Sequence[Candidate], prediction: str, n_best: int) -> Answer:
    """The candidate that the search's prediction is, as evaluation counts it; the others behind it."""
    best = next((one for one in candidates if one.text == prediction), None)
    if best is None:  # the search found no span and predicts its stand-in
        best = next((one for one in candidates if not one.text), Candidate("", 0.0, 0, 0))
    # Windows overlap, so the same span may come from two of them.
    spans: dict[tuple[int, int], Candidate] = {}
    for one in candidates:
        spans.setdefault((one.start, one.end), one)
    return Answer(best.text, best.score, best.start, best.end, tuple(spans.values())[:n_best])


# --- running a model over features ------------------------------------------------------------------------------------


def open_to_predict(
    folder: str | Path,
    engine: str | None,
    threads: int | None,
    batch_size: int,
    task: str,
    does: str,
    outputs: Sequence[str],
    **facts: int | None,
) -> Opened:
    """Open a folder that must be for `task`, which alone `does` what is asked, with the facts that are not None. Raises
    ModelError and OptionError."""
    check_batch_size(batch_size, "--batch_size")
    opened = open_deployment(folder, engine, threads)
    if opened.deployment.task != task:
        raise ModelError(f"{folder}: is a model for {opened.deployment.task}, and only {task} {does}")
    check_engine(opened, outputs)
    return replace(opened, deployment=opened.deployment.with_facts(**facts))


def check_batch_size(batch_size: int, option: str) -> None:
    """Raise OptionError unless it is 1 or more."""
    if batch_size < 1:
        raise OptionError(f"{option} should be 1 or more, it is {batch_size}")


def check_engine(opened: Opened, outputs: Sequence[str]) -> None:
    """Raise ModelError for a graph that wants what batches do not have, or that does not give `outputs`."""
    engine, folder = opened.engine, opened.deployment.folder
    strange = [name for name in engine.input_names if name not in _INPUTS]
    if strange:
        raise ModelError(f"{folder}: its graph wants {', '.join(strange)}; known inputs: {', '.join(_INPUTS)}")
    missing = [name for name in outputs if name not in engine.output_names]
    if missing:
        raise ModelError(
            f"{folder}: its graph gives {', '.join(engine.output_names)}; {opened.deployment.task} needs {', '.join(missing)}"
        )


def run_features(
    engine: Engine,
    deployment: Deployment,
    features: Features,
    batch_size: int,
    outputs: Sequence[str],
    on_batch: OnBatch | None = None,
) -> dict[str, list[np.ndarray]]:
    """Logits of every feature: per output, a float32 array of its own length for each, in the order of `features`."""
    found: dict[str, list[np.ndarray]] = {name: [np.empty(0, np.float32)] * len(features) for name in outputs}
    done = 0
    for indices in length_sorted_batches(features.lengths, batch_size):
        batch = padded_batch([features[index] for index in indices.tolist()], deployment)
        results = engine(batch)
        kept = batch["attention_mask"].astype(bool)
        for name in outputs:
            for index, row, mask in zip(indices.tolist(), results[name], kept, strict=True):
                found[name][index] = row[mask]
        done += len(indices)
        if on_batch is not None:
            on_batch(done, len(features))
    return found


def padded_batch(rows: Sequence[Mapping[str, np.ndarray]], deployment: Deployment) -> dict[str, np.ndarray]:
    """int64 arrays [B, S]: tokens padded to the longest row (or to the length that the graph is made for), the mask, and
    segment ids, which are all 0 where the tokenizer gives none or the model knows one segment only."""
    tokenizer = deployment.tokenizer
    sizes = [len(row["input_ids"]) for row in rows]
    length = deployment.facts.sequence_length or max(sizes)
    has_segments = deployment.num_segments > 1 and "token_type_ids" in rows[0]
    fills = {
        "input_ids": tokenizer.pad_token_id,
        "attention_mask": 0,
        "token_type_ids": tokenizer.pad_token_type_id if has_segments else 0,
    }
    batch = {name: np.full((len(rows), length), fill, dtype=np.int64) for name, fill in fills.items()}
    for number, (row, size) in enumerate(zip(rows, sizes, strict=True)):
        place = slice(0, size) if tokenizer.padding_side == "right" else slice(length - size, length)
        batch["input_ids"][number, place] = row["input_ids"]
        batch["attention_mask"][number, place] = 1
        batch["token_type_ids"][number, place] = row["token_type_ids"] if has_segments else 0
    return batch
