"""What a tagger finds in texts: words, entities, their characters and scores; from Python and from the command line."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sparse_accel
from sparse_accel.cli import main
from sparse_accel.errors import DataError, ModelError, OptionError
from sparse_accel.serving.predicting import Predictor
from sparse_accel.serving.token_predicting import FoundEntity, Tagging, TokenPredictor, entities_of
from tests.tiny_deployment import tagging_deployment

WORDS = {"ada": "B-PER", "bruno": "I-PER", "oslo": "B-LOC"}
LABELS = ("B-LOC", "B-PER", "I-PER", "O")
TEXT = "Did Ada  Bruno\nsee Oslo, or Ada?"
# One label has 10, three have 0.
SURE = float(np.exp(10) / (np.exp(10) + 3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tagging_deployment(tmp_path_factory.mktemp("tagger"), WORDS, LABELS)


@pytest.fixture(scope="module")
def predictor(folder: Path) -> TokenPredictor:
    return TokenPredictor(folder)


def test_entities_have_the_characters_of_the_text(predictor: TokenPredictor) -> None:
    found = predictor(TEXT)
    assert isinstance(found, Tagging)
    assert found.words == ("Did", "Ada", "Bruno", "see", "Oslo", ",", "or", "Ada", "?")
    assert found.tags == ("O", "B-PER", "I-PER", "O", "B-LOC", "O", "O", "B-PER", "O")
    assert [(entity.text, entity.label) for entity in found.entities] == [
        ("Ada  Bruno", "PER"),
        ("Oslo", "LOC"),
        ("Ada", "PER"),
    ]
    assert all(entity.text == TEXT[entity.start : entity.end] for entity in found.entities)
    assert [entity.score for entity in found.entities] == pytest.approx([SURE] * 3)


def test_a_list_of_words_is_labelled_word_by_word(predictor: TokenPredictor) -> None:
    (found,) = predictor.taggings([["Ada", "\u200b", "Bruno", "New York"]])
    assert isinstance(found, Tagging)
    assert found.text == "Ada \u200b Bruno New York"
    # A word without a piece is O, and parts nothing.
    assert found.tags == ("B-PER", "O", "I-PER", "O")
    assert found.entities == (FoundEntity("Ada \u200b Bruno", "PER", pytest.approx(SURE), 0, 11),)


def test_a_long_text_is_cut_and_loses_nothing(folder: Path) -> None:
    long = "Ada saw Oslo. " * 60
    found = TokenPredictor(folder, max_seq_length=16, batch_size=3)(long)
    assert isinstance(found, Tagging)
    assert len(found.words) == 240
    assert [entity.label for entity in found.entities] == ["PER", "LOC"] * 60


def test_what_cannot_be_labelled_says_why_and_stops_nothing(predictor: TokenPredictor) -> None:
    inputs: list[Any] = ["Ada", " \n", "a\ud800", [], ["a", ""], ["a", 3], 5, "Oslo"]
    first, *problems, last = predictor.taggings(inputs)
    assert isinstance(first, Tagging) and isinstance(last, Tagging)
    assert [str(problem) for problem in problems] == [
        "the text holds no word",
        "the text has half of a surrogate pair at character 1: a broken \\u escape",
        "the list of words is empty",
        "word 2 is empty",
        "word 2 should be text, it is a number",
        "a text, or a list of words, was expected, and it is a number",
    ]
    with pytest.raises(DataError, match="text 2: the text holds no word"):
        predictor(["Ada", ""])


def test_labels_without_a_scheme_are_entities_word_by_word() -> None:
    names = ["DET", "NOUN", "O"]
    assert [(e.first, e.last, e.label) for e in entities_of(["DET", "NOUN", "NOUN", "O"], names)] == [
        (0, 0, "DET"),
        (1, 1, "NOUN"),
        (2, 2, "NOUN"),
    ]
    bilou = ["U-A", "U-A", "B-A", "L-A", "O"]
    assert [(e.first, e.last) for e in entities_of(bilou, ["B-A", "I-A", "L-A", "O", "U-A"])] == [
        (0, 0),
        (1, 1),
        (2, 3),
    ]


def test_a_folder_of_another_task_is_refused(folder: Path, tmp_path: Path) -> None:
    assert isinstance(sparse_accel.Predictor(folder), TokenPredictor)
    with pytest.raises(ModelError, match="is a model for token_classification, and only question_answering"):
        Predictor(folder)
    with pytest.raises(ModelError, match="is a model for question_answering, and only token_classification"):
        from tests.tiny_deployment import pointing_deployment

        TokenPredictor(pointing_deployment(tmp_path / "pointing"))
    with pytest.raises(OptionError, match=r"--max_seq_length 600: .* reads at most 512"):
        TokenPredictor(folder, max_seq_length=600)


# --- the command ------------------------------------------------------------------------------------------------------


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_the_command_shows_entities_or_writes_them_as_json(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(folder), "--text", "See Ada [b]Bruno[/b].", "--text", "nobody"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "See Ada [b]Bruno[/b].",
        "  Ada  PER  (score 1.000, characters 4 to 7)",
        "  Bruno  PER  (score 1.000, characters 11 to 16)",
        "",
        "nobody",
        "  nothing found",
        "",
    ]
    output = tmp_path / "found.jsonl"
    assert main(["predict", str(folder), "--text", "Ada", "--json", "--output", str(output)]) == 0
    (row,) = lines(output.read_text("utf-8"))
    entity = row["entities"][0]
    assert {**row, "entities": []} == {
        "id": "row-1",
        "text": "Ada",
        "words": ["Ada"],
        "tags": ["B-PER"],
        "entities": [],
    }
    assert {**entity, "score": 0} == {"text": "Ada", "label": "PER", "score": 0, "start": 0, "end": 3}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"id": 1, "tokens": ["Ada"]}\n{"id": 2, "text": "in Oslo"}\n'),
        ("a.csv", 'id,tokens\n1,"[""Ada""]"\n2,"[""in"", ""Oslo""]"\n'),
        ("a.conll", "Ada\tO\n\nin\tO\nOslo\tO\n"),
    ],
)
def test_the_command_reads_files(
    name: str, content: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(content)
    assert main(["predict", str(folder), "--file", str(tmp_path / name), "--json"]) == 0
    assert [row["tags"] for row in lines(capsys.readouterr().out)] == [["B-PER"], ["O", "B-LOC"]]


def test_rows_with_the_words_in_trainings_column_are_read(tmp_path: Path) -> None:
    from sparse_accel.cli import predict_tokens

    row = json.dumps({"words": ["in", "Oslo"], "text": "not this"})
    (tmp_path / "a.jsonl").write_text(row)
    (from_file,) = predict_tokens.from_file(str(tmp_path / "a.jsonl"), "words", pytest.fail)
    (from_lines,) = predict_tokens.from_lines(io.BytesIO(row.encode()), "words", pytest.fail)
    assert from_file.text == from_lines.text == ["in", "Oslo"]


BAD_LINES = {
    '{"text": 5}': "'text' should be text, it is a number",
    '{"tokens": {"a": 1}}': "'tokens' should be a list of words, it is an object",
    '{"txet": "Ada"}': "has neither 'tokens' nor 'text'",
    '{"text": "Ada"': "is not JSON",
    "[1]": "should be an object with 'text' or 'tokens', it is a list",
    '{"text": " "}': "the text holds no word",
    '{"text": "Ada", "id": []}': "the id should be text or a whole number, it is a list",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_ends_the_command_or_is_left_out(
    line: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = f'{{"text": "Ada"}}\n{line}\n{{"tokens": ["Oslo"]}}\n'.encode()
    for policy, code, texts in (("error", 2, ["Ada"]), ("skip", 0, ["Ada", "Oslo"])):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        assert main(["predict", str(folder), "--json", "--on_bad_rows", policy]) == code
        shown = capsys.readouterr()
        assert [row["text"] for row in lines(shown.out)] == texts
        assert f"standard input:2: {BAD_LINES[line]}" in shown.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--question", "Who?", "--context", "Ada"], "is a model for token classification, which has no such option"),
        (["--text", "Ada", "--n_best", "2"], "--n_best: .* has no such option"),
        (["--text", "Ada", "--file", "a.jsonl"], "--file brings texts; --text does not go with it"),
        (["--file", "nowhere.jsonl"], "nowhere.jsonl: there is no such file"),
    ],
)
def test_options_that_do_not_fit_are_named(
    words: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    assert main(["predict", str(folder), *words]) == 2
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))


@pytest.mark.exhaustive
def test_a_graph_is_run_without_torch_and_transformers(folder: Path) -> None:
    code = (
        "import sys; from sparse_accel.serving.token_predicting import TokenPredictor; "
        f"print(TokenPredictor({str(folder)!r})('Ada').tags, *({{'torch', 'transformers'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["('B-PER',)"]
