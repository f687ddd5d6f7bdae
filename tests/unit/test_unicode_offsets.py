"""Offsets count characters in every script: from the file through the tokens back to the answer's text."""

# ruff: noqa: RUF001 (the texts are in the scripts that they test)

from __future__ import annotations

import csv
import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparse_accel.errors import DataError
from sparse_accel.tasks import resolve_task
from sparse_accel.tasks.base import Scored, TaskData
from tests.tiny import TinyDataOptions, tiny_tokenizer

# context, answer: the answer occurs once in its context.
TEXTS: dict[str, tuple[str, str]] = {
    "astral before": ("😀😀 the lamp is red 🚀 now", "red"),
    "astral answer": ("the boat 🚤 sank", "🚤"),
    "astral letters": ("𝔸𝔹 is 𝕏𝕐 today", "𝕏𝕐"),
    "joined emoji": ("a family 👩‍👩‍👧 lives here", "here"),
    "flag": ("from 🇳🇴 to oslo", "oslo"),
    "arabic": ("ولد أحمد في القاهرة عام 1950", "القاهرة"),
    "arabic with vowels": ("قرأ الطالبُ الكِتابَ أمس", "أمس"),
    "hebrew and latin": ("שלום Ada גרה ב Oslo היום", "Oslo"),
    "direction marks": ("it is \u202bגדול\u202c red", "red"),
    "chinese": ("小明住在北京市中心", "北京市"),
    "combining": ("cafe\u0301 is in Que\u0301bec city", "Que\u0301bec"),
    "composed": ("café is in Québec city", "Québec"),
    "sharp s": ("die STRASSE und die Straße hier", "Straße"),
    "dotted capital": ("İstanbul is big and İzmir small", "İzmir"),
    "line ends": ("first\r\nsecond\rthird\nfourth", "third"),
    "odd spaces": ("a\u00a0b\u3000the\u2028red\u0085lamp", "red"),
    "zero width": ("a\u200bb \ufeffred lamp", "red"),
}


def rows_of(texts: dict[str, tuple[str, str]]) -> list[dict[str, Any]]:
    return [
        {
            "id": name,
            "question": "which one 🚀?",
            "context": context,
            "answers": {"text": [answer], "answer_start": [context.index(answer)]},
        }
        for name, (context, answer) in texts.items()
    ]


ROWS = rows_of(TEXTS)


def write_csv(path: Path, byte_order_mark: bool) -> None:
    with path.open("w", newline="", encoding="utf-8-sig" if byte_order_mark else "utf-8") as file:
        writer = csv.writer(file, lineterminator="\r\n")
        writer.writerow(["id", "question", "context", "answers"])
        writer.writerows([row["id"], row["question"], row["context"], json.dumps(row["answers"])] for row in ROWS)


def as_lines(ensure_ascii: bool) -> str:
    return "\n".join(json.dumps(row, ensure_ascii=ensure_ascii) for row in ROWS)


FILES: dict[str, Any] = {
    "escaped.json": lambda path: path.write_text(json.dumps({"data": ROWS})),
    "plain.json": lambda path: path.write_text(json.dumps({"data": ROWS}, ensure_ascii=False), encoding="utf-8"),
    "marked.json": lambda path: path.write_text(json.dumps(ROWS, ensure_ascii=False), encoding="utf-8-sig"),
    "plain.jsonl": lambda path: path.write_bytes(as_lines(ensure_ascii=False).replace("\n", "\r\n").encode()),
    "escaped.jsonl": lambda path: path.write_text(as_lines(ensure_ascii=True)),
    "plain.csv": lambda path: write_csv(path, byte_order_mark=False),
    "marked.csv": lambda path: write_csv(path, byte_order_mark=True),
}


def load(path: Path, tokenizer: Any, labels: bool) -> TaskData:
    options = TinyDataOptions(
        train_file=str(path), validation_file=str(path), do_train=labels, do_eval=not labels, overwrite_cache=True
    )
    return resolve_task("qa").load(replace(options, cache_dir=str(path.parent / "cache")), tokenizer)


def answer_of_a_perfect_model(data: TaskData) -> Scored:
    """Logits that point at the tokens of the labels' characters: what a model with the right answer gives."""
    assert data.validation is not None
    split = data.validation
    starts, ends = [], []
    for index, size in enumerate(split.features.lengths):
        example = split.examples[split.features.facts["example"][index]]
        begin, end = example.answer_starts[0], example.answer_starts[0] + len(example.answer_texts[0])
        spans = split.features.extra_of(index, "offsets")
        positions = np.arange(size)
        first, last = (split.features.facts[name][index] for name in ("context_start", "context_end"))
        inside = (positions >= first) & (positions < last)
        start_at = positions[inside & (spans[:, 0] <= begin)].max(initial=0)
        end_at = positions[inside & (spans[:, 1] >= end)].min(initial=size - 1)
        if end_at < start_at and inside[start_at]:  # the tokens of one character
            start_at, end_at = end_at, start_at
        starts.append(np.eye(size, dtype=np.float32)[start_at])
        ends.append(np.eye(size, dtype=np.float32)[end_at])
    return resolve_task("qa").score(
        split, {"start_logits": starts, "end_logits": ends}, TinyDataOptions(max_answer_length=512)
    )


@pytest.fixture(scope="module", params=["bert", "roberta"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), request.param)


@pytest.mark.parametrize("name", FILES)
def test_characters_survive_every_kind_of_file(name: str, tokenizer: Any, tmp_path: Path) -> None:
    FILES[name](tmp_path / name)
    data = load(tmp_path / name, tokenizer, labels=False)
    assert data.validation is not None
    for example, row in zip(data.validation.examples, ROWS, strict=True):
        assert (example.id, example.question, example.context) == (row["id"], row["question"], row["context"])
        assert example.context[example.answer_starts[0] :].startswith(example.answer_texts[0])


@pytest.mark.parametrize("name", TEXTS)
def test_labels_lead_back_to_the_answer(name: str, tokenizer: Any, tmp_path: Path) -> None:
    """The text comes back exactly, but for spaces that a token covers together with its word."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows_of({name: TEXTS[name]})))
    context, answer = TEXTS[name]
    train, validation = load(path, tokenizer, labels=True).train, load(path, tokenizer, labels=False).validation
    assert train is not None and validation is not None
    spans = validation.features.extra_of(0, "offsets")
    start, end = train[0]["start_positions"], train[0]["end_positions"]
    found = context[spans[start][0] : spans[end][1]]
    assert answer in found
    assert found.strip(" \u200b\ufeff\u202b\u202c\u2028\u0085") == answer


def test_a_perfect_model_scores_full_marks_in_every_script(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    texts = {name: text for name, text in TEXTS.items() if name not in ("odd spaces", "zero width")}
    path.write_text(json.dumps(rows_of(texts)))
    scored = answer_of_a_perfect_model(load(path, tokenizer, labels=False))
    found = {key: text.strip() for key, text in scored.files["predictions"].items()}
    assert found == {name: answer for name, (_, answer) in texts.items()}


def test_offsets_counted_in_utf16_units_are_told_the_right_place(tmp_path: Path, tokenizer: Any) -> None:
    row = ROWS[0]
    units = len(row["context"][: row["answers"]["answer_start"][0]].encode("utf-16-le")) // 2
    path = tmp_path / "javascript.json"
    path.write_text(json.dumps([{**row, "answers": {"text": ["red"], "answer_start": [units]}}]))
    with pytest.raises(DataError, match=rf"at answer_start {units} .*; the context holds it at {units - 2}"):
        load(path, tokenizer, labels=True)


@pytest.mark.parametrize("language", ["ar", "zh"])
def test_a_perfect_model_answers_translated_questions(
    language: str, shared_data: Path, tmp_path: Path, tokenizer: Any
) -> None:
    """A perfect model's answers on XQuAD hold the accepted answer, whatever the tokens."""
    document = json.loads(gzip.decompress((shared_data / "xquad" / f"xquad.{language}.json.gz").read_bytes()))
    document["data"] = document["data"][:6]
    path = tmp_path / "xquad.json"
    path.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    options = TinyDataOptions(
        validation_file=str(path),
        do_eval=True,
        max_seq_length=512,
        doc_stride=96,
        cache_dir=str(tmp_path),
    )
    data = resolve_task("qa").load(options, tokenizer)
    assert data.validation is not None
    for index in range(len(data.validation.features)):
        example = data.validation.examples[data.validation.features.facts["example"][index]]
        first, last = (data.validation.features.facts[name][index] for name in ("context_start", "context_end"))
        spans = data.validation.features.extra_of(index, "offsets")[first:last]
        assert np.all((spans >= 0) & (spans <= len(example.context)))
        assert np.all(np.diff(spans[:, 0]) >= 0)
    found = answer_of_a_perfect_model(data).files["predictions"]
    # Up to 40 characters, so that some window holds the whole answer: an Arabic letter is two byte-level tokens.
    answers = {e.id: e.answer_texts[0] for e in data.validation.examples if len(e.answer_texts[0]) <= 40}
    assert len(answers) > 150
    assert {key for key, answer in answers.items() if answer not in found[key]} == set()
