"""Tagged sentences from every kind of file: their columns, their labels, and what is wrong with a bad one."""

from __future__ import annotations

import functools
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_accel.errors import DataError
from sparse_accel.tasks.conll import SUFFIXES, read_conll
from sparse_accel.tasks.entity_metrics import find_entities
from sparse_accel.tasks.reading import Row, read_file
from sparse_accel.tasks.rows import BadRows
from sparse_accel.tasks.tag_schemes import Scheme, find_scheme, inside_tag, iob2, iobes
from sparse_accel.tasks.token_labels import settle_labels
from sparse_accel.tasks.token_rows import Example, check_labels, check_rows, find_columns
from sparse_accel.tasks.words import split_words

CONLL = dict.fromkeys(SUFFIXES, functools.partial(read_conll, words="tokens", tags="ner_tags"))
TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def sentences(path: Path) -> list[tuple[list[str], list[str] | None]]:
    return [(row.values["tokens"], row.values.get("ner_tags")) for row in read_file(path, CONLL)]


def test_a_conll_file_has_a_row_a_sentence(tmp_path: Path) -> None:
    text = "-DOCSTART- -X- O O\n\nAda NNP B-NP B-PER\nsleeps VBZ B-VP O\r\n \t\nOslo NNP B-NP B-LOC\n-DOCSTART- -X- O O\nIt PRP B-NP O"
    (tmp_path / "a.conll").write_text(text)
    assert sentences(tmp_path / "a.conll") == [
        (["Ada", "sleeps"], ["B-PER", "O"]),
        (["Oslo"], ["B-LOC"]),
        (["It"], ["O"]),
    ]
    assert [row.where for row in read_file(tmp_path / "a.conll", CONLL)] == [
        f"{tmp_path}/a.conll:{line}" for line in (3, 6, 8)
    ]


def test_tabs_part_columns_where_there_are_any_and_words_keep_their_odd_spaces(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("New York\tB-LOC\na\u00a0b\u2028c\tO\n".encode()))
    assert sentences(tmp_path / "a.txt.gz") == [(["New York", "a\u00a0b\u2028c"], ["B-LOC", "O"])]
    (tmp_path / "b.txt").write_text("a\u00a0b O\nc   O\n")
    assert sentences(tmp_path / "b.txt") == [(["a\u00a0b", "c"], ["O", "O"])]


def test_a_word_that_is_not_utf8_costs_its_sentence_alone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"Ada B-PER\n\nIt O\ncaf\xe9 O\n\nOslo B-LOC\n")
    rows = read_file(tmp_path / "a.txt", CONLL)
    assert [row.problem for row in rows] == [None, "is not UTF-8 (byte 0xe9 at position 3 of the line)", None]
    assert rows[1].where == f"{tmp_path}/a.txt:4" and rows[2].values["tokens"] == ["Oslo"]


def test_one_column_is_words_alone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Ada\nsleeps\n\nIt\n")
    assert sentences(tmp_path / "a.txt") == [(["Ada", "sleeps"], None), (["It"], None)]


def test_a_malformed_line_is_named_and_costs_its_sentence_alone(tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text("Ada B-PER\n\nIt O\nsleeps\nhere O\n\nOslo B-LOC\n")
    rows = read_file(tmp_path / "a.conll", CONLL)
    with pytest.raises(DataError, match=r"a\.conll:4: 'sleeps' has 1 column, and the lines before it have 2"):
        examples(rows)
    assert [e.words for e in examples(rows, BadRows("skip"))] == [("Ada",), ("Oslo",)]


@pytest.mark.parametrize(("content", "message"), [("", "is empty"), ("-DOCSTART- O\n", "holds no sentence")])
def test_a_conll_file_without_words(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text(content)
    with pytest.raises(DataError, match=rf"a\.conll: {message}"):
        read_file(tmp_path / "a.conll", CONLL)


def test_original_files_and_prepared_ones_hold_the_same_entities(shared_data: Path) -> None:
    rows = read_file(shared_data / "wikigold" / "wikigold.conll.txt.gz", CONLL)
    tags = [row.values["ner_tags"] for row in rows]
    assert len(rows) == 1696
    assert sum(map(len, tags)) == 39007
    assert find_scheme(tags) is Scheme.IOB1
    assert [find_entities(iob2(each)) for each in tags] == [find_entities(each) for each in tags]
    assert find_scheme(map(iob2, tags)) is Scheme.IOB2


@settings(max_examples=50)
@given(st.lists(st.sampled_from(["O", "B-A", "I-A", "B-B", "I-B"])))
def test_iob2_keeps_the_entities_and_is_its_own_fixed_point(tags: list[str]) -> None:
    written = iob2(tags)
    assert find_entities(written) == find_entities(tags)
    assert iob2(written) == written
    assert find_scheme([written]) is Scheme.IOB2


@pytest.mark.parametrize(
    ("tags", "scheme"),
    [
        (["O", "B-A", "I-A", "B-A"], Scheme.IOB2),
        (["O"], Scheme.IOB2),
        (["I-A", "I-A", "B-A", "I-B"], Scheme.IOB1),
        (["B-A", "O", "I-A"], Scheme.MIXED),
        (["S-A", "B-A", "E-A"], Scheme.IOBES),
        (["U-A", "B-A", "L-A"], Scheme.BILOU),
        (["NN", "VB"], Scheme.PLAIN),
        (["U-A", "S-A"], Scheme.PLAIN),
    ],
)
def test_the_scheme_is_found_from_the_tags(tags: list[str], scheme: Scheme) -> None:
    assert find_scheme([["O"], tags]) is scheme


def test_bilou_becomes_iobes_and_further_pieces_are_inside() -> None:
    assert iobes(["B-A", "I-A", "L-A", "U-B", "O"]) == ["B-A", "I-A", "E-A", "S-B", "O"]
    assert [inside_tag(tag) for tag in ("B-A", "I-A", "O", "NN")] == ["I-A", "I-A", "O", "NN"]


# --- columns ----------------------------------------------------------------------------------------------------------


def columns_of(values: dict[str, Any], **named: str) -> tuple[str, str | None, int]:
    columns, notes = find_columns(
        [Row("a.json: row 1", values)],
        words=named.get("words"),
        labels=named.get("labels"),
        task_name="ner",
        labels_wanted=named.get("wanted", "yes") == "yes",
    )
    return columns.words, columns.labels, len(notes)


def test_columns_by_their_usual_names_by_flags_and_in_order() -> None:
    usual: dict[str, Any] = {"id": "1", "tokens": ["a"], "pos_tags": ["X"], "ner_tags": ["O"]}
    assert columns_of(usual) == ("tokens", "ner_tags", 0)
    assert columns_of(usual, labels="pos_tags") == ("tokens", "pos_tags", 0)
    assert columns_of({"id": "1", "text": "a b", "words": ["a"], "labels": ["O"]}) == ("words", "labels", 2)
    assert columns_of({"id": "1", "words": '["a"]', "labels": '["O"]'}) == ("words", "labels", 2)
    assert columns_of({"tokens": ["a"]}, wanted="no") == ("tokens", None, 0)
    # Test data without labels: named ones may be missing, and other lists are not taken for them.
    assert columns_of({"tokens": ["a"], "pos_tags": ["X"]}, wanted="no") == ("tokens", None, 0)
    assert columns_of({"tokens": ["a"]}, wanted="no", labels="tags") == ("tokens", None, 0)
    assert columns_of({"tokens": ["a"], "tags": ["X"]}, wanted="no", labels="tags") == ("tokens", "tags", 0)


@pytest.mark.parametrize(
    ("values", "named", "message"),
    [
        ({"tokens": ["a"], "ner_tag": 3}, {}, r"row 1: there is no column 'ner_tags'; did you mean 'ner_tag'\?"),
        ({"token": "a", "ner_tags": 3}, {}, r"no column 'tokens'; did you mean 'token'\?"),
        ({"tokens": ["a"], "tags": ["O"]}, {"words": "wrods"}, r"no column 'wrods' \(--text_column_name\); known"),
        ({"tokens": ["a"], "tags": ["O"]}, {"labels": "tag"}, r"'tag' \(--label_column_name\); did you mean 'tags'\?"),
        ({"tokens": ["a"]}, {"words": "tokens", "labels": "tokens"}, "'tokens' cannot hold both"),
    ],
)
def test_a_missing_column_is_named_with_the_nearest(
    values: dict[str, Any], named: dict[str, str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        columns_of(values, **named)


# --- rows -------------------------------------------------------------------------------------------------------------


def examples(
    rows: list[Row], bad: BadRows | None = None, names: list[str] | None = None, wanted: bool = True
) -> list[Example]:
    columns, _ = find_columns(rows, words=None, labels=None, task_name="ner", labels_wanted=wanted)
    return check_rows(rows, columns, bad or BadRows("error"), names=names, labels_wanted=wanted)


def row(**values: Any) -> Row:
    return Row("a.json: row 2", {"tokens": ["Ada", "sleeps"], "ner_tags": ["B-PER", "O"], **values})


GOOD = Row("a.json: row 1", {"tokens": ["Ada", "sleeps"], "ner_tags": ["B-PER", "O"], "id": 7})
NAMES = ["O", "B-PER", "I-PER"]

BAD_ROWS: dict[str, tuple[Row, str]] = {
    "a label too few": (row(ner_tags=["O"]), r"has 2 words \('tokens'\) and 1 label \('ner_tags'\)"),
    "no words": (row(tokens=[], ner_tags=[]), "'tokens' is empty"),
    "an empty word": (row(tokens=["Ada", ""]), "word 2 is empty"),
    "a number as a word": (row(tokens=["Ada", 5]), "word 2 should be text, it is a number"),
    "half a character": (row(tokens=["Ada", "a\ud800"]), "word 2 has half of a surrogate pair at character 1"),
    "an empty label": (row(ner_tags=["O", " "]), r"the label of word 2 \('sleeps'\) is empty"),
    "a truth value": (row(ner_tags=["O", True]), r"label of word 2 \('sleeps'\) should be text, it is true or false"),
    "words as text": (row(tokens="Ada sleeps"), "'tokens' should be a list, it is text that is neither JSON nor"),
    "labels not a list": (row(ner_tags=5), "'ner_tags' should be a list, it is a number"),
    "labels missing": (Row("a.json: row 2", {"tokens": ["Ada"], "ner_tag": []}), "has no 'ner_tags'; did you mean"),
    "a number too high": (row(ner_tags=[0, 3]), "is 3, and the model has 3 labels, numbered from 0 to 2"),
    "a number below 0": (row(ner_tags=[-1, 0]), r"label of word 1 \('Ada'\) is -1, and the model"),
    "no row": (Row("a.json: row 2", {}, "should be an object"), "should be an object"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_with_its_problem_or_left_out(name: str) -> None:
    bad, message = BAD_ROWS[name]
    with pytest.raises(DataError, match=rf"a\.json: row 2: .*{message}"):
        examples([GOOD, bad], names=NAMES)
    skipped = BadRows("skip")
    assert len(examples([GOOD, bad, GOOD], skipped, NAMES)) == 2
    assert len(skipped.messages) == 1


def test_numbers_are_labels_by_the_names_of_the_model_or_say_what_is_missing() -> None:
    assert examples([row(ner_tags=[1, 0])], names=NAMES)[0].tags == ("B-PER", "O")
    with pytest.raises(DataError, match=r"row 2: .* is 1, and nothing says what the numbers stand for.*id2label"):
        examples([row(ner_tags=[1, 0])])


def test_cells_of_a_table_hold_lists_as_json_or_as_python_writes_them(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        'tokens,ner_tags\n"[""Ada"", ""sleeps""]","[""B-PER"", ""O""]"\n"[\'It\']","[\'O\']"\n'
    )
    assert [e.tags for e in examples(read_file(tmp_path / "a.csv"))] == [("B-PER", "O"), ("O",)]


def test_a_test_row_may_have_no_labels() -> None:
    rows = [row(), row(ner_tags=None), Row("a.json: row 3", {"tokens": ["a"]})]
    assert [e.tags for e in examples(rows, wanted=False)] == [("B-PER", "O"), None, None]


# --- the label set ----------------------------------------------------------------------------------------------------


def tagged(*tags: str) -> list[Example]:
    return [Example(tuple("w" * len(tags)), tags, "a.json: row 1")]


def test_labels_are_those_of_the_training_data_sorted_unless_the_model_has_them_all() -> None:
    splits = {"train": tagged("O", "B-PER"), "validation": tagged("O")}
    assert settle_labels(splits, None).names == ("B-PER", "O")
    assert settle_labels(splits, TAGS).names == tuple(TAGS)
    other = settle_labels(splits, ["O", "B-DRUG"])
    assert other.names == ("B-PER", "O")
    assert "the model's own labels (O, B-DRUG) lack some" in other.notes[0]


def test_iob1_is_rewritten_unless_the_model_speaks_it() -> None:
    splits = {"train": tagged("I-PER", "O"), "validation": tagged("O", "B-PER")}
    found = settle_labels(splits, None)
    assert found.splits["train"][0].tags == ("B-PER", "O")
    assert found.names == ("B-PER", "O")
    assert found.notes == ["train: the tags are IOB1; the same entities are written in IOB2"]
    kept = settle_labels(splits, ["I-PER", "O"])
    assert kept.splits["train"][0].tags == ("I-PER", "O")
    assert kept.notes == ["train: the tags are IOB1, as the model's labels are, and stay so"]


def test_without_training_data_the_model_decides_and_data_without_labels_need_one_that_does() -> None:
    unknown = {"test": [Example(("a",), None, "a.json: row 1")]}
    assert settle_labels(unknown, ["O", "B-PER"]).names == ("O", "B-PER")
    with pytest.raises(DataError, match="the data have no labels, and neither has the model"):
        settle_labels(unknown, None)


def test_a_label_that_training_never_saw_names_its_row_and_word() -> None:
    with pytest.raises(
        DataError,
        match=r"row 1: word 2 \('w'\) has the label 'B-PRE', which the training data does not have; did you mean 'B-PER'",
    ):
        check_labels(tagged("O", "B-PRE"), TAGS, "the training data", BadRows("error"))
    bad = BadRows("skip")
    assert len(check_labels(tagged("O", "B-PRE") + tagged("O"), TAGS, "the training data", bad)) == 1
    assert len(bad.messages) == 1


# --- words of a raw text ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't pay 3,500 to Ada (U.S.)!", ["Don't", "pay", "3,500", "to", "Ada", "(", "U.S", ".", ")", "!"]),
        ("see (http://a.b/c?d). @user #tag", ["see", "(", "http://a.b/c?d", ")", ".", "@user", "#tag"]),
        ("one,two 12:30 'a' $5\u200b", ["one", ",", "two", "12:30", "'", "a", "'", "$", "5"]),
        ("\u5317\u4eac e\u0301t\u00e9", ["\u5317", "\u4eac", "e\u0301t\u00e9"]),
        (" \n\t", []),
    ],
)
def test_words_of_a_text(text: str, words: list[str]) -> None:
    assert [text[start:end] for start, end in split_words(text)] == words


@settings(max_examples=50)
@given(st.text())
def test_words_cover_all_that_is_not_space_or_control_once(text: str) -> None:
    covered = [place for start, end in split_words(text) for place in range(start, end)]
    assert covered == sorted(set(covered))
    left = "".join(character for place, character in enumerate(text) if place not in set(covered))
    assert split_words(left) == []


def test_json_lines_and_conll_of_the_same_sentences_are_the_same_examples(tmp_path: Path) -> None:
    given_rows = [(["Ada", "sleeps"], ["B-PER", "O"]), (["It"], ["O"])]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"tokens": w, "ner_tags": t}) for w, t in given_rows))
    (tmp_path / "a.conll").write_text(
        "\n\n".join("\n".join(map("\t".join, zip(w, t, strict=True))) for w, t in given_rows)
    )
    first, second = (examples(read_file(tmp_path / name, CONLL)) for name in ("a.jsonl", "a.conll"))
    assert [(e.words, e.tags) for e in first] == [(e.words, e.tags) for e in second]
