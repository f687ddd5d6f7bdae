"""Classifying with a model folder: from Python and from the command, one text at a time or a file of them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import sparse_accel
from sparse_accel.cli import main
from sparse_accel.errors import DataError, ModelError, OptionError
from sparse_accel.serving.predicting import Answer
from sparse_accel.serving.text_predicting import Classification, TextPredictor, classified
from tests.tiny_text import LABELS, tiny_text_bert, tiny_text_rows

ROWS = tiny_text_rows(6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_text_bert(tmp_path_factory.mktemp("text") / "model", seed=3)


@pytest.fixture(scope="module")
def predictor(folder: Path) -> TextPredictor:
    return TextPredictor(folder, max_seq_length=32, batch_size=2)


def test_pairs_are_what_transformers_says_of_them(folder: Path, predictor: TextPredictor) -> None:
    found = predictor([row["sentence1"] for row in ROWS], [row["sentence2"] for row in ROWS])
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for row, one in zip(ROWS, found, strict=True):
        inputs = tokenizer(row["sentence1"], row["sentence2"], truncation=True, max_length=32, return_tensors="pt")
        with torch.no_grad():
            shares = model(**inputs).logits.softmax(-1)[0].numpy()
        assert one.label == LABELS[shares.argmax()] and list(one.scores) == [LABELS[n] for n in np.argsort(-shares)]
        assert [one.scores[name] for name in LABELS] == pytest.approx(shares.tolist(), abs=1e-6)
    alone = predictor(ROWS[0]["sentence1"], ROWS[0]["sentence2"])
    assert alone.labels == found[0].labels and alone.scores == pytest.approx(found[0].scores, abs=1e-6)
    assert not found[0].is_truncated and predictor("lamp " * 40).is_truncated


def test_texts_that_cannot_be_classified(predictor: TextPredictor) -> None:
    for text, pair, problem in (
        (" ", None, "the text is empty"),
        ("a", "", "the second text is empty"),
        ("a\ud800", None, "half of a surrogate pair"),
    ):
        with pytest.raises(DataError, match=problem):
            predictor(text, pair)
    with pytest.raises(DataError, match="text 2: the text is empty"):
        predictor(["a", ""])
    with pytest.raises(DataError, match="2 texts and 1 texts beside them"):
        predictor(["a", "b"], ["c"])


def test_the_three_kinds_of_answers() -> None:
    logits = np.array([1.0, -2.0, 0.0], np.float32)
    several = classified(logits, "multi", ("a", "b", "c"), is_truncated=False)
    assert several.labels == ("a", "c") and several.scores["c"] == 0.5 and several.label == "a"
    assert classified(logits - 5, "multi", ("a", "b", "c"), is_truncated=False).label is None
    number = classified(logits[:1], "regression", (), is_truncated=True)
    assert number == Classification(value=1.0, is_truncated=True) and number.score is None


def test_a_folder_is_opened_by_its_task(folder: Path, tiny_student: Path) -> None:
    assert isinstance(sparse_accel.Predictor(folder), TextPredictor)
    with pytest.raises(OptionError, match="doc_stride: is for question_answering"):
        sparse_accel.Predictor(folder, doc_stride=8)
    answer = sparse_accel.Predictor(tiny_student, doc_stride=8)("Where?", "Ada bought a lamp in Oslo.")
    assert isinstance(answer, Answer)


def test_a_model_for_another_task_is_refused(tiny_student: Path) -> None:
    with pytest.raises(ModelError, match="is a model for question_answering, and only text_classification"):
        TextPredictor(tiny_student)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["predict", *words])
    return code, *capsys.readouterr()


def test_the_command_reads_arguments_and_files(
    folder: Path, predictor: TextPredictor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = ROWS[0]["sentence1"], ROWS[0]["sentence2"]
    one = predictor(first, second)
    code, out, _ = run(capsys, str(folder), "--text", first, "--text_pair", second, "--max_seq_length", "32")
    assert code == 0 and first in out and f"{one.score:.4f}  {one.label}" in out
    file, output = tmp_path / "rows.csv", tmp_path / "found.jsonl"
    file.write_text(f'id,sentence1,sentence2\nx7,"{first}","{second}"\nx8,"{first}",\n')
    words = (str(folder), "--file", str(file), "--json", "--output", str(output), "--max_seq_length", "32")
    code, _, err = run(capsys, *words)
    assert code == 2 and "rows.csv: row 2 (line 3): 'sentence2' is empty" in err and not output.exists()
    code, _, err = run(capsys, *words, "--on_bad_rows", "skip")
    assert code == 0 and "left out" in err
    (row,) = map(json.loads, output.read_text().splitlines())
    assert row["id"] == "x7" and row["label"] == one.label and row["labels"] == [one.label]
    assert row["scores"] == pytest.approx(one.scores, abs=1e-6) and row["is_truncated"] is False


def test_the_column_of_labels_is_never_taken_for_a_text(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(folder, tmp_path / "model")
    (model / "run.json").write_text(json.dumps({"command": {"label_column_name": "mood"}}))
    (tmp_path / "rows.csv").write_text("review,mood\na lamp,joy\n")
    code, out, err = run(capsys, str(model), "--file", str(tmp_path / "rows.csv"), "--json")
    assert code == 0 and "text_pair" not in json.loads(out) and "taken from 'review' (" in err
    with (tmp_path / "rows.jsonl").open("w+") as stdin:
        stdin.write('{"review": "a lamp", "mood": "joy"}\n')
        stdin.seek(0)
        monkeypatch.setattr("sys.stdin", stdin)
        code, out, _ = run(capsys, str(model), "--json")
    assert code == 0 and "text_pair" not in json.loads(out)


def test_a_task_of_glue_is_known_however_it_was_spelt(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(folder, tmp_path / "model")
    (model / "run.json").write_text(json.dumps({"command": {"task_name": "SST-2"}}))
    (tmp_path / "test.tsv").write_text('index\tsentence\n0\tan "odd lamp\n')
    code, out, err = run(capsys, str(model), "--file", str(tmp_path / "test.tsv"), "--json")
    assert code == 0 and json.loads(out)["text"] == 'an "odd lamp', err


def test_the_command_reads_lines(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: list[Any] = [{"text": "a lamp", "id": 7}, {"text": "a lamp", "text_pair": "a boat"}, {"sentence": "a lamp"}]
    reading, writing = os.pipe()
    os.write(writing, "\n".join(map(json.dumps, lines)).encode())
    os.close(writing)
    with os.fdopen(reading) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        code, out, _ = run(capsys, str(folder), "--json")
    found = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [row["id"] for row in found] == ["7", "row-2", "row-3"]
    assert found[0]["scores"] == found[2]["scores"] != found[1]["scores"]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--text", "a", "--question", "b"), "--question: .* is a model for text classification"),
        (("--text", "a", "--file", "b.csv"), "--file brings the texts"),
        (("--text", "a", "--text", "b", "--text_pair", "c"), "2 times --text and 1 times --text_pair"),
        (("--text", "a", "--input_column_names", "b"), "--input_column_names names columns of --file"),
    ],
)
def test_the_command_refuses_what_does_not_go_together(
    folder: Path, words: tuple[str, ...], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, str(folder), *words)
    assert code == 2
    with pytest.raises(AssertionError, match=problem):
        raise AssertionError(" ".join(err.split()))
