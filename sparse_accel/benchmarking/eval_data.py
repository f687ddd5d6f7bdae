"""What the measurement of evaluation works on: the same questions as we keep them and as Hugging Face's example does."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from sparse_accel.benchmarking import hf_question_answering as hf
from sparse_accel.demo_corpus import make_corpus
from sparse_accel.errors import DataError
from sparse_accel.tasks.features import Features
from sparse_accel.tasks.qa_windows import Question, cut_windows, window_spec
from sparse_accel.tasks.reading import read_file
from sparse_accel.tasks.rows import BadRows
from sparse_accel.tasks.squad_rows import Example, check_rows

MAX_LENGTH: Final = 384
STRIDE: Final = 128
# Questions of the corpus of our own, unless fewer are asked for.
QUESTIONS: Final = 2000
# Where the questions are in a folder of real data: the first of these that is there.
DATA_FILES: Final = ("dev-v1.1.json", "squad/dev-v1.1.json")

# `id`, `question`, `context` and `answers` (`text`), what Hugging Face's example reads of a row.
Row = dict[str, Any]


class NamedTokenizer(NamedTuple):
    """A fast tokenizer, and what a result calls it."""

    name: str
    tokenizer: Any


@dataclass(frozen=True)
class World:
    """One set of questions in both forms."""

    folder: Path
    rows: list[Row]
    tokenizer: NamedTokenizer
    # Ours.
    examples: list[Example]
    questions: list[Question]
    features: Features
    starts: list[np.ndarray]
    ends: list[np.ndarray]
    # Hugging Face's: tables on disk, as `load_dataset` and `map` leave them, and the logits padded.
    examples_table: Any
    features_table: Any
    padded: tuple[np.ndarray, np.ndarray]


def make_world(folder: Path, count: int | None, data: Path | None, tokenizer: NamedTokenizer | None = None) -> World:
    """The first `count` questions of SQuAD's file in the folder `data`, or of a corpus of our own; tables go into `folder`.

    Without a tokenizer one is made of the texts. Raises DataError for a file that is missing or cannot be read.
    """
    import datasets

    datasets.disable_progress_bars()
    rows = squad_rows(squad_file(data)) if data is not None else synthetic_rows(count or QUESTIONS)
    rows = rows[:count]
    chosen = tokenizer or tokenizer_of(rows)
    examples = [
        Example(row["id"], row["question"], row["context"], tuple(row["answers"]["text"]), (), "") for row in rows
    ]
    questions = [Question(row["question"], row["context"], None, None) for row in rows]
    spec = window_spec(chosen.tokenizer, max_length=MAX_LENGTH, stride=STRIDE, labels=False)
    features = cut_windows(questions, spec, None).features
    starts, ends = _peaked_logits(features)
    datasets.Dataset.from_list(rows).save_to_disk(str(folder / "examples"))
    table = datasets.load_from_disk(str(folder / "examples"))
    return World(
        folder,
        rows,
        chosen,
        examples,
        questions,
        features,
        starts,
        ends,
        table,
        map_windows(table, chosen.tokenizer, None),
        (hf.padded(starts), hf.padded(ends)),
    )


def map_windows(table: Any, tokenizer: Any, num_workers: int | None) -> Any:
    """Windows as Hugging Face's example makes them: `datasets.map` over the table of questions."""
    return table.map(
        hf.validation_features(tokenizer, MAX_LENGTH, STRIDE),
        batched=True,
        num_proc=num_workers,
        remove_columns=table.column_names,
        load_from_cache_file=False,
    )


def squad_file(folder: Path) -> Path:
    """SQuAD's development set in a folder of data. Raises DataError where there is none."""
    found = [folder / name for name in DATA_FILES if (folder / name).is_file()]
    if not found:
        raise DataError(f"--data: {folder} holds neither {' nor '.join(DATA_FILES)}")
    return found[0]


def squad_rows(path: Path) -> list[Row]:
    """The questions of a file, checked. Raises DataError for one that is bad."""
    bad = BadRows("skip")
    examples, _ = check_rows(read_file(path), bad, answers="required")
    if bad.messages:
        raise DataError(bad.messages[0])
    return [_row(example.id, example.question, example.context, list(example.answer_texts)) for example in examples]


def synthetic_rows(count: int) -> list[Row]:
    """Passages of the demo joined to contexts of SQuAD's lengths, about five questions each, some of several windows."""
    rng = random.Random(0)
    passages: dict[str, list[Row]] = {}
    # A third of what is asked about joined passages is kept: there is always enough.
    for row in make_corpus(1, 8 * count)[1]:
        passages.setdefault(row["context"], []).append(row)
    texts = iter(passages)
    rows: list[Row] = []
    while len(rows) < count:
        joined = [next(texts) for _ in range(rng.choice((1, 2, 2, 2, 3, 8)))]
        asked = [row for text in joined for row in passages[text]]
        for row in rng.sample(asked, min(5, len(asked))):
            rows.append(_row(row["id"], row["question"], " ".join(joined), row["answers"]["text"]))
    return rows[:count]


def _row(name: str, question: str, context: str, answers: list[str]) -> Row:
    return {"id": name, "question": question, "context": context, "answers": {"text": answers}}


def tokenizer_of(rows: Sequence[Row]) -> NamedTokenizer:
    """A WordPiece tokenizer as BERT's, made of the texts: no download."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizer

    backend = BertWordPieceTokenizer(lowercase=True)
    texts = {text: None for row in rows for text in (row["context"], row["question"])}
    backend.train_from_iterator(texts, 8000, show_progress=False)
    tokenizer = BertTokenizer(vocab=backend.get_vocab(), do_lower_case=True, model_max_length=512)
    return NamedTokenizer("WordPiece of the texts", tokenizer)


def _peaked_logits(features: Features) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Noise, and in each window a few tokens of the context that stand out, mostly in an order that makes an answer."""
    rng = np.random.default_rng(0)
    starts, ends = [], []
    firsts, lasts = features.facts["context_start"], features.facts["context_end"]
    for size, first, last in zip(features.lengths.tolist(), firsts.tolist(), lasts.tolist(), strict=True):
        start, end = (rng.normal(-4.0, 2.0, size).astype(np.float32) for _ in range(2))
        for height in (9.0, 6.0, 4.0):
            place = int(rng.integers(first, last))
            start[place] += np.float32(height)
            end[min(last - 1, place + int(rng.geometric(0.35)) - 1)] += np.float32(height)
        starts.append(start)
        ends.append(end)
    return starts, ends
