"""Data files in every layout that people have, and what they are told when one is bad."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from sparse_accel.errors import DataError
from sparse_accel.tasks.reading import read_data_set, read_file
from sparse_accel.tasks.squad_rows import BadRows, Example, check_rows
from tests.tiny import nested, tiny_rows

ROWS = tiny_rows(8, seed=5)


def examples_of(path: Path, answers: str = "optional", policy: str = "error") -> list[Example]:
    return check_rows(read_file(path), BadRows(policy), answers=answers)[0]


def contents(examples: list[Example]) -> list[tuple[Any, ...]]:
    return [(e.id, e.question, e.context, e.answer_texts, e.answer_starts) for e in examples]


EXPECTED = [
    (r["id"], r["question"], r["context"], tuple(r["answers"]["text"]), tuple(r["answers"]["answer_start"]))
    for r in ROWS
]


def write_csv(path: Path, rows: list[dict[str, Any]], newline: str = "\n", delimiter: str = ",") -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator=newline, delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(ROWS), path)


def row_of_lists(row: dict[str, Any]) -> dict[str, Any]:
    pairs = zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
    return {**row, "answers": [{"text": text, "answer_start": start} for text, start in pairs]}


def one_answer(row: dict[str, Any]) -> dict[str, Any]:
    plain = {key: value for key, value in row.items() if key != "answers"}
    return plain | {"answer_text": row["answers"]["text"][0], "answer_start": row["answers"]["answer_start"][0]}


LAYOUTS: dict[str, Any] = {
    "nested.json": lambda path: path.write_text(json.dumps(nested(ROWS))),
    "nested_list.json": lambda path: path.write_text(json.dumps(nested(ROWS)["data"])),
    "flat.json": lambda path: path.write_text(json.dumps({"data": ROWS})),
    "flat_with_answer_lists.json": lambda path: path.write_text(json.dumps({"data": [row_of_lists(r) for r in ROWS]})),
    "list.json": lambda path: path.write_text(json.dumps(ROWS, indent=2)),
    "bom_and_crlf.json": lambda path: path.write_bytes(
        b"\xef\xbb\xbf" + json.dumps({"data": ROWS}, indent=2).replace("\n", "\r\n").encode()
    ),
    "lines.jsonl": lambda path: path.write_text("\n".join(map(json.dumps, ROWS)) + "\n"),
    "lines_with_crlf.jsonl": lambda path: path.write_bytes("\r\n".join(map(json.dumps, ROWS)).encode()),
    "lines.json": lambda path: path.write_text("\n".join(map(json.dumps, ROWS))),
    "packed.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(nested(ROWS)).encode())),
    "literals.csv": lambda path: write_csv(path, ROWS),
    "crlf.csv": lambda path: write_csv(path, ROWS, newline="\r\n"),
    "json_cells.csv": lambda path: write_csv(path, [{**r, "answers": json.dumps(r["answers"])} for r in ROWS]),
    "two_columns.csv": lambda path: write_csv(path, [one_answer(r) for r in ROWS]),
    "tabs.tsv": lambda path: write_csv(path, ROWS, delimiter="\t"),
    "table.parquet": write_parquet,
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_examples(name: str, tmp_path: Path) -> None:
    LAYOUTS[name](tmp_path / name)
    assert contents(examples_of(tmp_path / name)) == EXPECTED


def test_a_folder_saved_by_datasets_is_read_by_its_split(tmp_path: Path) -> None:
    import datasets

    datasets.DatasetDict({"validation": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "saved"))
    rows = read_data_set(str(tmp_path / "saved"), None, "validation", None)
    assert contents(check_rows(rows, BadRows("error"), answers="required")[0]) == EXPECTED
    with pytest.raises(DataError, match=r"has no split 'train'; it has 'validation'"):
        read_data_set(str(tmp_path / "saved"), None, "train", None)


def test_a_data_set_that_cannot_be_loaded_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the data set '.*nothing_here' cannot be loaded: .*--train_file"):
        read_data_set(str(tmp_path / "nothing_here"), None, "train", None)


def test_csv_answers_that_look_like_missing_values_stay_words(tmp_path: Path) -> None:
    words = ["None", "NA", "null", "nan", "007"]
    rows = [
        {"question": "which?", "context": f"it was {word}", "answer_text": word, "answer_start": 7} for word in words
    ]
    write_csv(tmp_path / "words.csv", rows)
    assert [example.answer_texts for example in examples_of(tmp_path / "words.csv")] == [(word,) for word in words]


def test_answers_as_pandas_writes_numpy_arrays(tmp_path: Path) -> None:
    cell = "{'text': array(['blue'], dtype=object), 'answer_start': array([3])}"
    write_csv(tmp_path / "a.csv", [{"question": "which?", "context": "is blue", "answers": cell}])
    assert examples_of(tmp_path / "a.csv")[0].answer_starts == (3,)


def test_a_cell_with_code_is_never_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    cell = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    write_csv(tmp_path / "a.csv", [{"question": "which?", "context": "is blue", "answers": cell}])
    with pytest.raises(DataError, match="neither JSON nor a Python literal"):
        examples_of(tmp_path / "a.csv")
    assert not marker.exists()


def test_rows_without_an_id_get_one_that_no_other_row_has(tmp_path: Path) -> None:
    rows = [{key: value for key, value in row.items() if key != "id"} for row in ROWS[:3]]
    rows[0]["id"] = "row-2"
    rows[2]["id"] = 77
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert [example.id for example in examples_of(tmp_path / "a.json")] == ["row-2", "row-2-", "77"]


def test_columns_of_other_names_are_taken_in_order_with_a_note(tmp_path: Path) -> None:
    rows = [{"frage": r["question"], "text": r["context"], "antwort": r["answers"], "id": r["id"]} for r in ROWS]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    examples, notes = check_rows(read_file(tmp_path / "a.json"), BadRows("error"), answers="required")
    assert contents(examples) == EXPECTED
    assert "the first column, 'frage', is taken for it" in notes[0]
    assert len(notes) == 3


def test_a_test_file_needs_no_answers(tmp_path: Path) -> None:
    rows = [{"id": r["id"], "question": r["question"], "context": r["context"]} for r in ROWS]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert [example.answer_texts for example in examples_of(tmp_path / "a.json", answers="ignored")] == [()] * len(ROWS)
    with pytest.raises(DataError, match="there is no column 'answers'"):
        examples_of(tmp_path / "a.json")


GOOD = {
    "id": "a",
    "question": "which?",
    "context": "it is blue, so blue",
    "answers": {"text": ["blue"], "answer_start": [6]},
}


def changed(**columns: Any) -> dict[str, Any]:
    return {**GOOD, **columns}


BAD_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "offset too far": (
        changed(answers={"text": ["blue"], "answer_start": [60]}),
        r"answer_start 60 is outside the context of 19 characters; the answer is 'blue'; the context holds it at 15",
    ),
    "negative offset": (changed(answers={"text": ["blue"], "answer_start": [-1]}), r"-1 is outside .* at 6"),
    "other text there": (
        changed(answers={"text": ["blue"], "answer_start": [7]}),
        r"at answer_start 7 the context reads 'lue,', not the answer 'blue'; the context holds it at 6",
    ),
    "text nowhere": (changed(answers={"text": ["red"], "answer_start": [6]}), r"does not hold it anywhere"),
    "second answer wrong": (changed(answers={"text": ["blue", "it"], "answer_start": [6, 3]}), r"holds it at 0"),
    "question a number": (changed(question=7), r"'question' should be text, it is a number"),
    "context null": (changed(context=None), r"'context' should be text, it is nothing \(null\)"),
    "question empty": (changed(question="  "), r"the question is empty"),
    "context empty": (changed(context="\n"), r"the context is empty"),
    "answer empty": (changed(answers={"text": [""], "answer_start": [0]}), r"an answer is empty"),
    "answer a number": (changed(answers={"text": [1], "answer_start": [0]}), r"text of an answer should be text"),
    "offset text": (changed(answers={"text": ["it"], "answer_start": ["x"]}), r"should be a whole number, it is 'x'"),
    "offset half": (changed(answers={"text": ["it"], "answer_start": [0.5]}), r"should be a whole number, it is 0.5"),
    "offset bool": (changed(answers={"text": ["it"], "answer_start": [False]}), r"whole number, it is False"),
    "unequal lists": (changed(answers={"text": ["it"], "answer_start": []}), r"1 texts and 0 offsets"),
    "misspelt key": (changed(answers={"txt": ["it"], "answer_start": [0]}), r"no 'text'; did you mean 'txt'\?"),
    "answers a word": (changed(answers="blue"), r"neither JSON nor a Python literal: 'blue'"),
    "answers a number": (changed(answers=3), r"'answers' should hold 'text' and 'answer_start', it is a number"),
    "answer not an object": (changed(answers=["blue"]), r"answer 1 should be an object .* it is text"),
    "id a list": (changed(id=[1]), r"the id should be text or a whole number, it is a list"),
    "half a surrogate": (changed(question="which \ud83d?"), r"half of a surrogate pair at character 6"),
    "impossible with answers": (changed(is_impossible=True), r"says is_impossible and has answers"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_with_its_problem(name: str, tmp_path: Path) -> None:
    row, message = BAD_ROWS[name]
    path = tmp_path / "train.json"
    path.write_text(json.dumps({"data": [changed(id="first"), row]}))
    with pytest.raises(DataError, match=rf"train\.json: row 2: .*{message}"):
        examples_of(path)


@pytest.mark.parametrize("name", BAD_ROWS)
def test_skipping_leaves_out_the_bad_row_alone(name: str, tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text(json.dumps({"data": [changed(id="first"), BAD_ROWS[name][0], changed(id="last")]}))
    bad = BadRows("skip")
    examples, _ = check_rows(read_file(path), bad, answers="required")
    assert [example.id for example in examples] == ["first", "last"]
    assert bad.note("train.json").startswith("train.json: left out 1 bad row: ")
    assert "row 2" in bad.messages[0]


def test_a_note_counts_all_and_names_the_first_few() -> None:
    bad = BadRows("skip")
    for number in range(8):
        bad.add(f"row {number}", "is bad")
    assert bad.note("a.json").startswith("a.json: left out 8 bad rows: row 0: is bad; row 1: is bad")
    assert bad.note("a.json").endswith("row 4: is bad; and 3 more")


def test_repeated_ids_name_both_rows(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text(json.dumps([GOOD, changed(id="b"), GOOD]))
    with pytest.raises(DataError, match=r"train\.json: row 3: has the id 'a', which .*train\.json: row 1 has already"):
        examples_of(path)


def test_a_bad_row_of_a_nested_file_is_named_by_its_path(tmp_path: Path) -> None:
    content = nested(ROWS)
    content["data"][1]["paragraphs"][0]["qas"][2]["answers"][0]["answer_start"] += 1
    (tmp_path / "dev.json").write_text(json.dumps(content))
    with pytest.raises(
        DataError, match=r"dev\.json: article 2 \(passage 1\), paragraph 1, question 3: at answer_start"
    ):
        examples_of(tmp_path / "dev.json")


def test_a_row_without_an_answer_cannot_be_scored_unless_version_2(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([GOOD, changed(id="b", answers={"text": [], "answer_start": []})]))
    with pytest.raises(DataError, match=r"row 2: has no answer; .*--version_2_with_negative"):
        examples_of(tmp_path / "a.json", answers="required")
    assert examples_of(tmp_path / "a.json", answers="optional")[1].answer_texts == ()


BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    "truncated": ("a.json", b'{"data": [\n {"id": "a", "question": "wh', r"a\.json:2:26: .*truncated"),
    "truncated between rows": ("a.json", b'{"data": [\n {"id": "a"},', r"a\.json:2:\d+: .*truncated"),
    "not json": ("a.json", b'{"data": oops}', r"a\.json:1:10: is not JSON"),
    "empty": ("a.json", b"", r"a\.json: is empty"),
    "blank": ("a.jsonl", b"\n \n", r"a\.jsonl: is empty"),
    "no rows": ("a.json", b'{"data": []}', r"a\.json: holds no rows"),
    "header alone": ("a.csv", b"question,context,answers\n", r"a\.csv: holds no rows"),
    "a number": ("a.json", b"3", r"a\.json: the document should be a list of rows, it is a number"),
    "data not a list": ("a.json", b'{"data": {"a": 1}}', r"'data' should be a list of rows, it is an object"),
    "key misspelt": ("a.json", b'{"dta": []}', r"its keys are 'dta'; did you mean 'dta'"),
    "row not an object": ("a.json", b"[1]", r"row 1: .*it is a number"),
    "paragraphs null": ("a.json", b'{"data": [{"paragraphs": null}]}', r"article 1: 'paragraphs' should be a list"),
    "no qas": ("a.json", b'{"data": [{"paragraphs": [{"context": "c"}]}]}', r"paragraph 1: has no 'qas'"),
    "column misspelt": (
        "a.json",
        b'[{"id": "a", "question": "q", "contxt": "c", "answers": {}}]',
        r"there is no column 'context'; did you mean 'contxt'\?",
    ),
    "broken line": ("a.jsonl", b'{"question": "q"}\n{"question": \n', r"a\.jsonl:2:14: .*truncated"),
    "line not an object": ("a.jsonl", b"[1]\n", r"a\.jsonl:1: .*it is a list"),
    "latin-1": ("a.json", '["caf\u00e9"]'.encode("latin-1"), r"a\.json:1: is not UTF-8 \(byte 0xe9"),
    "utf-16": ("a.json", "[]".encode("utf-16"), r"a\.json: is UTF-16; save it as UTF-8"),
    "cell too few": ("a.csv", b"question,context,answers\nq,c\n", r"row 1 \(line 2\): has 2 cells, .* 3 columns"),
    "open quote": ("a.csv", b'question,context,answers\nq,"c,\n', r"a\.csv:2: is not CSV"),
    "column twice": ("a.csv", b"question,question,answers\nq,c,a\n", r"names the column 'question' twice"),
    "not parquet": ("a.parquet", b"PAR1 and no more", r"a\.parquet: is not a readable parquet file"),
    "not gzip": ("a.json.gz", b"{}", r"a\.json\.gz: cannot be read"),
    "unknown suffix": ("a.txt", b"{}", r"cannot tell the format .* \.json, \.jsonl"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_clear_message(name: str, tmp_path: Path) -> None:
    file_name, content, message = BAD_FILES[name]
    (tmp_path / file_name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        examples_of(tmp_path / file_name)
    assert "\n" not in str(caught.value)


def test_missing_files_and_folders_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text("[]")
    with pytest.raises(DataError, match=r"trian\.json: there is no such file; did you mean 'train\.json'\?"):
        read_file(tmp_path / "trian.json")
    with pytest.raises(DataError, match=r"there is no folder .*nowhere either"):
        read_file(tmp_path / "nowhere" / "train.json")
    with pytest.raises(DataError, match="is a folder, and a file was expected"):
        read_file(tmp_path)
