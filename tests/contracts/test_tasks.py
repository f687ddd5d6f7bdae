"""What every task promises, for each row of TASKS: it reads the usual files, trains, and knows a perfect answer."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import AcceleratorState

from sparse_accel.errors import DataError, OptionError
from sparse_accel.folders.loading import HUB_DEFAULTS, load_model
from sparse_accel.runtime.option_parsing import load_options
from sparse_accel.runtime.options import LOWER_IS_BETTER
from sparse_accel.runtime.run import train
from sparse_accel.tasks import ALIASES, TASKS, resolve_task
from sparse_accel.tasks.base import Split, TaskData, write_predictions
from sparse_accel.tasks.features import Features
from tests import running
from tests.tiny import (
    TinyDataOptions,
    nested,
    tiny_bert,
    tiny_rows,
    tiny_sentences,
    tiny_tagged,
    tiny_tokenizer,
)
from tests.tiny_text import LABELS, tiny_text_bert, tiny_text_rows

ROWS = 24


@dataclass(frozen=True)
class World:
    """What the contracts need of a task: a tiny model, data in each of the layouts, and outputs that know the answers."""

    model: Callable[[Path], Path]
    tokenizer: Callable[[Path], Any]
    # File name -> writer of the same rows.
    layouts: Mapping[str, Callable[[Path], object]]
    # One float32 array a feature for each output key: what a model that is right would give.
    perfect: Callable[[Split], dict[str, list[np.ndarray]]]
    # The metrics of perfect outputs.
    best: Mapping[str, float]
    # What the model's config calls its labels.
    labels: Sequence[str] | None = None
    # Options of a command that trains on it, beside those of every task.
    flags: Mapping[str, str] = field(default_factory=dict)
    # What a model that is wrong would give, made of that.
    wrong: Callable[[np.ndarray], np.ndarray] = np.negative


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(
            {key: value if isinstance(value, str) else json.dumps(value) for key, value in r.items()} for r in rows
        )


def answer_spans(split: Split) -> dict[str, list[np.ndarray]]:
    """Question answering: high scores for the tokens that begin and end the answer, the first token's without one."""
    logits: dict[str, list[np.ndarray]] = {"start_logits": [], "end_logits": []}
    features = split.features
    for index, size in enumerate(features.lengths):
        example = split.examples[features.facts["example"][index]]
        context_start = features.facts["context_start"][index]
        spans = features.extra_of(index, "offsets")
        for key, column, moments in (
            ("start_logits", 0, example.answer_starts),
            ("end_logits", 1, [s + len(t) for s, t in zip(example.answer_starts, example.answer_texts, strict=True)]),
        ):
            row = np.zeros(size, np.float32)
            row[0] = 5.0
            inside = np.arange(size) >= context_start
            row[inside & np.isin(spans[:, column], moments)] = 9.0
            logits[key].append(row)
    return logits


def tags(split: Split) -> dict[str, list[np.ndarray]]:
    """Token classification: a high score for the label of each token."""
    features, names = split.features, split.context
    return {
        "logits": [
            100 * np.eye(len(names), dtype=np.float32)[features.extra_of(index, "labels").clip(0)]
            for index in range(len(features))
        ]
    }


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(list(rows)), path)


def tiny_texts() -> list[dict[str, str]]:
    """As many texts as ROWS, each longer than the longest feature of these tests."""
    contexts = [row["context"] for row in tiny_rows(16 * ROWS)[::4]]
    return [{"text": " ".join(contexts[at : at + 4])} for at in range(0, 4 * ROWS, 4)]


def all_guessed(split: Split) -> dict[str, list[np.ndarray]]:
    """Masked language modelling: of each feature the loss, the number of masked tokens, and how many are guessed."""
    return {"logits": [np.array([0.0, 3.0, 3.0])] * len(split.features)}


WORLDS: dict[str, World] = {
    "masked_language_modeling": World(
        model=lambda path: tiny_bert(path, head="MaskedLM"),
        tokenizer=tiny_tokenizer,
        layouts={
            "lines.txt": lambda path: path.write_text("\n\n".join(row["text"] for row in tiny_texts())),
            "flat.json": lambda path: path.write_text(json.dumps({"data": tiny_texts()})),
            "table.csv": lambda path: write_csv(path, tiny_texts()),
            "lines.jsonl": lambda path: path.write_text("\n".join(map(json.dumps, tiny_texts()))),
        },
        perfect=all_guessed,
        best={"accuracy": 1.0, "loss": 0.0, "perplexity": 1.0},
        wrong=lambda scores: scores * [0, 1, 0] + [6, 0, 0],
    ),
    "question_answering": World(
        model=tiny_bert,
        tokenizer=tiny_tokenizer,
        layouts={
            "flat.json": lambda path: path.write_text(json.dumps({"data": tiny_rows(ROWS)})),
            "nested.json": lambda path: path.write_text(json.dumps(nested(tiny_rows(ROWS)))),
            "table.csv": lambda path: write_csv(path, tiny_rows(ROWS)),
            "lines.jsonl": lambda path: path.write_text("\n".join(map(json.dumps, tiny_rows(ROWS)))),
        },
        perfect=answer_spans,
        best={"exact_match": 100.0, "f1": 100.0},
        flags={"doc_stride": "32"},
    ),
    "token_classification": World(
        model=lambda path: tiny_bert(path, head="TokenClassification"),
        tokenizer=tiny_tokenizer,
        layouts={
            "lines.jsonl": lambda path: tiny_tagged(path, ROWS),
            "flat.json": lambda path: path.write_text(json.dumps(tiny_sentences(ROWS))),
            "table.csv": lambda path: write_csv(path, tiny_sentences(ROWS)),
            "table.parquet": lambda path: write_parquet(path, tiny_sentences(ROWS)),
            "sentences.conll": lambda path: tiny_tagged(path, ROWS),
        },
        perfect=tags,
        best={"precision": 1.0, "recall": 1.0, "f1": 1.0, "accuracy": 1.0, "loss": 0.0},
    ),
}

WORLDS["text_classification"] = World(
    model=tiny_text_bert,
    tokenizer=tiny_tokenizer,
    layouts={
        "flat.json": lambda path: path.write_text(json.dumps({"data": tiny_text_rows(ROWS)})),
        "table.csv": lambda path: write_csv(path, tiny_text_rows(ROWS)),
        "lines.jsonl": lambda path: path.write_text("\n".join(map(json.dumps, tiny_text_rows(ROWS)))),
    },
    perfect=lambda split: {"logits": list(10 * np.eye(3, dtype=np.float32)[split.features.labels["labels"]])},
    best={"accuracy": 1.0, "f1": 1.0},
    labels=LABELS,
)

every_task = pytest.mark.parametrize("name", sorted(TASKS))


def test_every_task_has_a_world_here() -> None:
    assert sorted(WORLDS) == sorted(TASKS)


def loaded(name: str, path: Path, tokenizer: Any) -> TaskData:
    files = {"train_file": str(path), "validation_file": str(path), "cache_dir": str(path.parent / "cache")}
    return resolve_task(name).load(TinyDataOptions(**files, do_train=True, do_eval=True), tokenizer)


def columns(features: Features) -> dict[str, np.ndarray]:
    groups = (features.tokens, features.labels, features.facts, features.extra)
    return {"bounds": features.bounds, **{key: column for group in groups for key, column in group.items()}}


@every_task
def test_every_layout_gives_the_same_features(name: str, tmp_path: Path) -> None:
    world = WORLDS[name]
    tokenizer = world.tokenizer(tmp_path / "tokenizer")
    found = []
    for layout, write in world.layouts.items():
        write(tmp_path / layout)
        data = loaded(name, tmp_path / layout, tokenizer)
        assert data.train is not None and data.validation is not None and data.test is None
        assert len(data.train) >= ROWS and len(data.validation.examples) == ROWS
        assert data.notes == [] and data.num_dropped == 0
        found.append(data)
    for data in found[1:]:
        for one, other in ((found[0].train, data.train), (found[0].validation, data.validation)):
            ours, theirs = (columns(part.features if isinstance(part, Split) else part) for part in (one, other))
            assert ours.keys() == theirs.keys()
            assert all(np.array_equal(ours[key], theirs[key]) for key in ours)


@every_task
def test_a_batch_is_what_the_model_takes_and_learns_from(name: str, tmp_path: Path) -> None:
    """Four steps on one batch: each leaves a smaller loss."""
    world, task = WORLDS[name], resolve_task(name)
    layout, write = next(iter(world.layouts.items()))
    write(tmp_path / layout)
    data = loaded(name, tmp_path / layout, world.tokenizer(tmp_path / "tokenizer"))
    assert data.train is not None
    batch = data.collate(data.train, np.arange(5))
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert {len(tensor) for tensor in batch.values()} == {5}
    assert batch["attention_mask"].sum(1).tolist() == data.train.lengths[:5].tolist()
    assert set(task.label_keys) <= batch.keys()
    assert task.num_units(batch) > 0

    model, _ = load_model(str(world.model(tmp_path / "model")), task, HUB_DEFAULTS, "", head=data.head)
    model.eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        outputs = model(**{name: tensor for name, tensor in batch.items() if name not in task.label_keys})
        loss = task.loss(outputs, batch)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]

    for key in task.output_keys:
        keep = task.distillation_keep(key, outputs[key], batch)
        assert keep is None or (keep.dtype == torch.bool and keep.shape == outputs[key].shape[: keep.dim()])
        unlabelled = {name: tensor for name, tensor in batch.items() if name not in task.label_keys}
        assert model(**unlabelled)[key].shape == outputs[key].shape


@every_task
def test_a_whole_command_trains_and_scores(name: str, tmp_path: Path) -> None:
    """Four steps through the real loop, from one layout and scored on another; what is written is read back."""
    world = WORLDS[name]
    (train_layout, write_train), *_, (validation_layout, write_validation) = world.layouts.items()
    write_train(tmp_path / train_layout)
    write_validation(tmp_path / validation_layout)
    flags = {
        "model_name_or_path": str(world.model(tmp_path / "model")),
        "train_file": str(tmp_path / train_layout),
        "validation_file": str(tmp_path / validation_layout),
        "output_dir": str(tmp_path / "out"),
        "cache_dir": str(tmp_path / "cache"),
        "do_train": "True",
        "do_eval": "True",
        "max_steps": "4",
        "logging_steps": "1",
        "max_seq_length": "128",
        **world.flags,
    }
    try:
        train(load_options(name, flags))
    finally:
        AcceleratorState._reset_state(True)
    assert [line["step"] for line in running.log(tmp_path / "out")] == [1, 2, 3, 4]
    results = running.results(tmp_path / "out")
    assert {f"eval_{metric}" for metric in world.best} <= results.keys()
    assert results["eval_samples"] >= ROWS


@every_task
def test_perfect_outputs_score_as_perfect_and_others_do_not(name: str, tmp_path: Path) -> None:
    world, task = WORLDS[name], resolve_task(name)
    layout, write = next(iter(world.layouts.items()))
    write(tmp_path / layout)
    options = TinyDataOptions(validation_file=str(tmp_path / layout), cache_dir=str(tmp_path / "cache"), do_eval=True)
    split = task.load(options, world.tokenizer(tmp_path / "tokenizer"), model_labels=world.labels).validation
    assert split is not None
    outputs = world.perfect(split)
    assert set(outputs) == set(task.output_keys)
    scored = task.score(split, outputs, options)
    assert {metric: scored.metrics[metric] for metric in world.best} == pytest.approx(dict(world.best))
    written = write_predictions(tmp_path, "eval", scored)
    assert {path.name for path in written} == {f"eval_{file}.json" for file in scored.files}
    assert [json.loads(path.read_text("utf-8")) for path in written] == list(scored.files.values())

    wrong = {key: [world.wrong(row) for row in rows] for key, rows in outputs.items()}
    found = task.score(split, wrong, options).metrics
    for metric, best in world.best.items():
        assert found[metric] > best if metric in LOWER_IS_BETTER else found[metric] < best, metric


def test_questions_without_an_answer_are_perfectly_answered_by_none(tmp_path: Path) -> None:
    """Question answering, version 2: both kinds of question, and each alone, score 100."""
    rows = tiny_rows(ROWS, seed=3, unanswerable=0.4)
    (tmp_path / "v2.json").write_text(json.dumps(nested(rows, "v2.0")))
    options = TinyDataOptions(
        validation_file=str(tmp_path / "v2.json"),
        cache_dir=str(tmp_path / "cache"),
        do_eval=True,
        version_2_with_negative=True,
    )
    task = resolve_task("question_answering")
    split = task.load(options, tiny_tokenizer(tmp_path / "tokenizer")).validation
    assert split is not None
    scored = task.score(split, answer_spans(split), options)
    for metric in ("exact", "f1", "HasAns_exact", "HasAns_f1", "NoAns_exact", "NoAns_f1"):
        assert scored.metrics[metric] == 100.0, metric
    unanswered = sum(not row["answers"]["text"] for row in rows)
    assert 0 < unanswered < ROWS
    assert scored.metrics["NoAns_total"] == unanswered and scored.metrics["HasAns_total"] == ROWS - unanswered


@every_task
def test_a_task_is_found_by_each_of_its_spellings(name: str) -> None:
    spellings = [name, name.replace("_", "-"), name.replace("_", " ").upper(), f" {name} "]
    spellings += [alias for alias, meant in ALIASES.items() if meant == name]
    assert {resolve_task(spelling).name for spelling in spellings} == {name}


@every_task
def test_an_unknown_name_is_an_error_with_the_nearest(name: str) -> None:
    assert not set(ALIASES) & set(TASKS) and set(ALIASES.values()) <= set(TASKS)
    with pytest.raises(OptionError, match=f"did you mean '{name}'"):
        resolve_task(name[:-1] + "x")


# Of each task: rows whose columns are not called as usual, and, of columns in another order and under another name, the error.
GUESSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "question_answering": (
        {"ask": "where is it", "passage": "it is in Oslo", "reply": {"text": ["Oslo"], "answer_start": [9]}},
        "passage",
        "'passage', from which the context of {train} is taken; did you mean 'pasage'? (--context_column names one",
    ),
    "text_classification": (
        {"body": "a lamp", "title": "a boat", "label": "joy"},
        "title",
        "'title', from which the second texts of {train} are taken; did you mean 'tile'? (--input_column_names names one",
    ),
    "token_classification": (
        {"words": ["Ada", "sleeps"], "classes": ["B-PER", "O"]},
        "words",
        "'words', from which the words of {train} are taken; did you mean 'word'? (--text_column_name names one",
    ),
    "masked_language_modeling": (
        {"body": "a lamp stood on the table of the house in Oslo " * 40, "id": "no text at all"},
        "body",
        "'body', from which the text of {train} is taken; did you mean 'boy'? (--text_column_name names one",
    ),
}
MISSPELT = {"passage": "pasage", "title": "tile", "words": "word", "body": "boy"}


@pytest.mark.parametrize("task", GUESSED)
def test_columns_are_guessed_once_and_required_of_all_data(task: str, tmp_path: Path) -> None:
    row, name, problem = GUESSED[task]
    others = [{**row, "label": label} for label in ("joy", "fear")] if "label" in row else [row] * 2
    turned = [dict(reversed(other.items())) for other in others]
    misspelt = [
        {MISSPELT.get(key, key) if key == name else key: value for key, value in other.items()} for other in others
    ]
    files = {}
    for part, rows in (("train", others), ("turned", turned), ("misspelt", misspelt)):
        path = tmp_path / f"{part}.jsonl"
        path.write_text("".join(json.dumps(one) + "\n" for one in rows))
        files[part] = str(path)
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")

    def load(validation: str) -> TaskData:
        options = TinyDataOptions(
            train_file=files["train"],
            validation_file=files[validation],
            do_train=True,
            do_eval=True,
            cache_dir=str(tmp_path),
        )
        return resolve_task(task).load(options, tokenizer)

    same, data = load("train"), load("turned")
    assert same.validation is not None and data.validation is not None
    assert data.validation.features[0]["input_ids"].tolist() == same.validation.features[0]["input_ids"].tolist()
    with pytest.raises(DataError) as caught:
        load("misspelt")
    assert str(caught.value).startswith(files["misspelt"])
    assert problem.format(train=files["train"]) in str(caught.value)
