"""Real batches of several shapes for checking an exported graph, and sample files of what goes in and comes out."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from sparse_accel.demo_corpus import make_corpus
from sparse_accel.errors import DataError, OutputError
from sparse_accel.tasks.base import Split, Task, TaskData
from sparse_accel.tasks.collating import Collator
from sparse_accel.tasks.data_settings import DataSettings
from sparse_accel.tasks.text_features import encode_texts, text_spec

# Features that a check runs at least, so that an agreement of spans can be told apart from chance.
MIN_FEATURES: Final = 64
# Rows of a check's larger batches.
_BATCH_SIZE: Final = 8
# One demo context in so many is long: enough to use every position, few enough to keep the check short.
_LONG_EVERY: Final = 32
# Written by training; `argv` names the validation file, `command` the training file.
_RUN_FILE: Final = "run.json"


@dataclass(frozen=True)
class Samples:
    """Batches to run a model on: int64 `input_ids`, `attention_mask` and, where the tokenizer gives them,
    `token_type_ids`, [B, S] each. `source` says where the text is from; `notes` are sentences for the person."""

    batches: tuple[dict[str, np.ndarray], ...]
    source: str
    notes: tuple[str, ...] = ()

    @property
    def num_features(self) -> int:
        """Rows of all batches."""
        return sum(len(batch["input_ids"]) for batch in self.batches)


def check_batches(
    task: Task,
    tokenizer: Any,
    source: str | Path | None = None,
    *,
    max_length: int,
    model_dir: str | Path | None = None,
    num: int = MIN_FEATURES,
    doc_stride: int = 128,
    sequence_length: int | None = None,
    labels: Sequence[str] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Samples:
    """Features of real text, cut as in training, in batches of different shapes.

    The text is that of `source`, a data file; left out, of the validation or training file that `model_dir` was trained
    with, if it is still there and long enough, else of the demo corpus. About `num` features at most, in one short row,
    one row at `max_length`, several rows of very different lengths, several of a middle length, then the others in order
    of their length. `sequence_length` pads all to that length; `labels` and `settings` are what the model's folder says of its labels and
    its data. Raises DataError when `source` cannot be used.
    """
    if sequence_length is not None:
        max_length = min(max_length, sequence_length)
    # A window that is shorter than those of training needs a shorter stride, or a question leaves it no room.
    stride = doc_stride if 2 * doc_stride < max_length - 8 else max_length // 8

    def samples_of(file: Path, name: str) -> Samples:
        data = _read(task, tokenizer, file, max_length, stride, num, labels, settings or {})
        return _samples(data, task, max_length, sequence_length, name)

    if source is not None:
        return samples_of(Path(source), str(source))
    notes: tuple[str, ...] = ()
    trained_on = None if model_dir is None else _file_of_run(Path(model_dir))
    if trained_on is not None:
        try:
            samples = samples_of(trained_on, str(trained_on))
            if samples.num_features >= min(num, MIN_FEATURES):
                return samples
            notes = (f"{trained_on}, which the model was trained with, has {samples.num_features} windows only",)
        except DataError as error:
            # Nobody asked for this file: one that changed since is no reason to give up.
            notes = (f"{trained_on}, which the model was trained with, cannot be used for the check: {error}",)
    if task.name != "question_answering":
        samples = _samples(
            _plain_data(tokenizer, max_length, num), task, max_length, sequence_length, "the built-in demo corpus"
        )
        return replace(samples, notes=notes)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "demo_corpus.json"
        file.write_text(json.dumps({"data": _demo_rows(tokenizer, max_length, num)}), encoding="utf-8")
        return replace(samples_of(file, "the built-in demo corpus"), notes=notes)


def write_samples(
    folder: str | Path,
    batches: Sequence[Mapping[str, np.ndarray]],
    outputs: Sequence[Mapping[str, np.ndarray]],
    num: int,
) -> int:
    """Write the first `num` rows as `sample-inputs/inp-0000.npz` and `sample-outputs/out-0000.npz` below `folder`.

    `outputs` holds what a model gave for each batch. One file a row, one array a name, without the batch dimension:
    int64 [S] inputs and float32 [S] (or [C]) outputs, padding included. Returns how many were written, which is less
    than `num` when there are no more. Raises OutputError when the folder cannot be written.
    """
    rows = [
        ({name: column[row] for name, column in batch.items()}, {name: column[row] for name, column in given.items()})
        for batch, given in zip(batches, outputs, strict=True)
        for row in range(len(batch["input_ids"]))
    ][:num]
    try:
        for name in ("sample-inputs", "sample-outputs"):
            (Path(folder) / name).mkdir(parents=True, exist_ok=True)
        for index, (inputs, given) in enumerate(rows):
            np.savez(Path(folder) / "sample-inputs" / f"inp-{index:04d}.npz", allow_pickle=False, **inputs)
            np.savez(Path(folder) / "sample-outputs" / f"out-{index:04d}.npz", allow_pickle=False, **given)
    except OSError as error:
        raise OutputError(f"{folder}: the samples cannot be written: {error.strerror or error}") from error
    return len(rows)


def _read(
    task: Task,
    tokenizer: Any,
    file: Path,
    max_length: int,
    stride: int,
    num: int,
    labels: Sequence[str] | None,
    settings: Mapping[str, Any],
) -> TaskData:
    # A folder of its own for the features: the user's cache is for data sets that are read again.
    with tempfile.TemporaryDirectory() as cache:
        # Test data: answers may be missing, and unusable rows are left out.
        options = DataSettings(
            test_file=str(file),
            max_seq_length=max_length,
            doc_stride=stride,
            cache_dir=cache,
            max_predict_samples=num,
            pad_to_max_length=False,
            on_bad_rows="skip",
            do_predict=True,
            **settings,
        )
        return task.load(options, tokenizer, model_labels=labels)


def _plain_data(tokenizer: Any, max_length: int, num: int) -> TaskData:
    """Texts of the demo corpus as they are, of all lengths, for a model that reads one text at a time."""
    texts = [row["context"] for row in _demo_rows(tokenizer, max_length, num)]
    features = encode_texts([(text, None) for text in texts[:num]], text_spec(tokenizer, max_length), None)
    pad_values = {"input_ids": tokenizer.pad_token_id}
    if "token_type_ids" in features.tokens:
        pad_values["token_type_ids"] = tokenizer.pad_token_type_id
    collate = Collator(pad_values, max_length, False, tokenizer.padding_side)
    return TaskData(collate, test=Split(features, texts))


def _file_of_run(model_dir: Path) -> Path | None:
    """The data file that the training run of a folder names and that still exists; validation comes first."""
    try:
        document = json.loads((model_dir / _RUN_FILE).read_text("utf-8"))
        words, command = [str(word) for word in document["argv"]], dict(document["command"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    named = [_option(words, "validation_file"), command.get("train_file")]
    return next((Path(name) for name in named if isinstance(name, str) and Path(name).is_file()), None)


def _option(words: Sequence[str], name: str) -> str | None:
    """The value of `--name value` or `--name=value` in a command line."""
    for word, following in zip(words, [*words, ""][1:], strict=True):
        flag, equals, value = word.partition("=")
        if flag.startswith("--") and flag[2:].replace("-", "_") == name:
            return value if equals else following
    return None


def _demo_rows(tokenizer: Any, max_length: int, num: int) -> list[dict[str, Any]]:
    """Questions of the demo corpus. Some contexts are made long enough to fill a window, one is cut to a word; questions
    are cut to a quarter of a window, which leaves room in short ones and where a vocabulary splits words into letters."""
    rows: list[dict[str, Any]] = [dict(row) for row in make_corpus(1, max(num, MIN_FEATURES))[1]]
    contexts = [row["context"] for row in rows]
    for index, row in enumerate(rows):
        offsets = tokenizer(row["question"], add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        row["question"] = row["question"][: offsets[: max(1, max_length // 4)][-1][1]]
        del row["answers"]
        following = index
        # A word is one token or more, so that such a context fills a window with any tokenizer.
        while index % _LONG_EVERY == 0 and len(row["context"].split()) < max_length:
            following += 1
            row["context"] += " " + contexts[following % len(contexts)]
    rows[1]["context"] = contexts[1].split()[0]
    return rows


def _samples(data: TaskData, task: Task, max_length: int, sequence_length: int | None, source: str) -> Samples:
    assert data.test is not None, "the test split was asked for"
    batches = []
    for indices, length in _shapes(data.test, max_length):
        collate = replace(
            data.collate,
            max_length=sequence_length or length or max_length,
            pad_to_max_length=bool(sequence_length or length),
        )
        batch = collate(data.test.features, indices)
        batches.append({name: tensor.numpy() for name, tensor in batch.items() if name not in task.label_keys})
    return Samples(tuple(batches), source)


def _shapes(split: Split, max_length: int) -> list[tuple[np.ndarray, int | None]]:
    """The features of each batch and the length they are padded to, None for that of the longest."""
    order = np.argsort(split.features.lengths, kind="stable").tolist()
    count = len(order)
    spread = [order[index * count // _BATCH_SIZE] for index in range(min(_BATCH_SIZE, count))]
    middle = order[count // 2 : count // 2 + _BATCH_SIZE // 2]
    chosen: list[tuple[list[int], int | None]] = [
        ([order[0]], int(split.features.lengths[order[0]])),
        ([order[-1]], max_length),
        (spread, None),
        (middle, None),
    ]
    used = {index for indices, _ in chosen for index in indices}
    others = [index for index in order if index not in used]
    chosen += [(others[start : start + _BATCH_SIZE], None) for start in range(0, len(others), _BATCH_SIZE)]
    return [(np.array(indices), length) for indices, length in chosen]
