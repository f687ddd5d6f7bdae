"""GLUE's own files: every task's layout is recognised, and none of its quotation marks is taken for more than one."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from sparse_accel.errors import DataError, OptionError
from sparse_accel.tasks.glue import GLUE, glue_task, mismatched_file, read_glue_file
from sparse_accel.tasks.reading import Row
from sparse_accel.tasks.text_labels import glue_labels
from sparse_accel.tasks.text_rows import TextExample, text_columns, text_example

# Two lines of each task in the layout of its own file; the quotation mark is never closed.
FILES = {
    "cola": 'gj04\t1\t\tThe "sailors rode the breeze.\ngj04\t0\t*\tThe sailors rides breeze.\n',
    "mnli": "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse\t"
    'sentence1\tsentence2\tlabel1\tgold_label\n0\t1\t1e\tfiction\t(\t(\t(\t(\tIt "rains.\tIt is wet.\tneutral\tentailment\n'
    "1\t1\t1c\tfiction\t(\t(\t(\t(\tIt rains.\tIt is dry.\tcontradiction\tcontradiction\n",
    "mrpc": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
    '1\t70\t71\tHe "left.\tHe went.\r\n0\t72\t73\tHe left.\tShe stayed.\r\n',
    "qnli": 'index\tquestion\tsentence\tlabel\n0\tWho "?\tAda was.\tentailment\n1\tWho?\tIt rains.\tnot_entailment\n',
    "qqp": 'id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\tWho "?\tWho is it?\t1\n1\t3\t4\tWho?\tWhy?\t0\n',
    "rte": 'index\tsentence1\tsentence2\tlabel\n0\tIt "rains.\tIt is wet.\tentailment\n1\tA.\tB.\tnot_entailment\n',
    "sst2": 'sentence\tlabel\na "fine film\t1\na poor film\t0\n',
    "stsb": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
    '0\tm\tf\t2012\t1\tn\tn\tA "plane.\tA plane.\t5.000\n1\tm\tf\t2012\t2\tn\tn\tA man.\tA cat.\t0.250\n',
    "wnli": 'index\tsentence1\tsentence2\tlabel\n0\tI "stuck it.\tIt bent.\t1\n1\tA.\tB.\t0\n',
}
# The first line's label among the task's names; the second's is the other.
LABELS = {
    "cola": ("acceptable", "unacceptable"),
    "mnli": ("entailment", "contradiction"),
    "mrpc": ("equivalent", "not_equivalent"),
    "qnli": ("entailment", "not_entailment"),
    "qqp": ("duplicate", "not_duplicate"),
    "rte": ("entailment", "not_entailment"),
    "sst2": ("positive", "negative"),
    "stsb": (5.0, 0.25),
    "wnli": ("entailment", "not_entailment"),
}


def examples(rows: list[Row], name: str, *, labelled: bool = True) -> list[TextExample]:
    columns, notes = text_columns(rows, None, "label", GLUE[name], labelled=labelled)
    assert notes == []
    found = [text_example(row, columns) for row in rows]
    assert all(isinstance(example, TextExample) for example in found), found
    return [example for example in found if isinstance(example, TextExample)]


@pytest.mark.parametrize("name", sorted(GLUE))
def test_a_tasks_own_file_is_read_line_by_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / "dev.tsv"
    path.write_bytes(FILES[name].encode())
    rows = read_glue_file(path, GLUE[name])
    assert rows is not None
    first, second = examples(rows, name)
    assert '"' in first.first and '"' not in second.first
    assert (first.second is None) == (len(GLUE[name].texts) == 1)
    labels = glue_labels(GLUE[name], None)
    found = [labels.encode(example.label) for example in (first, second)]
    assert tuple(found if labels.names is None else [labels.names[place] for place in found]) == LABELS[name]


@pytest.mark.parametrize("name", sorted(GLUE))
def test_rows_as_the_hub_has_them(name: str) -> None:
    task = GLUE[name]
    texts = dict.fromkeys(task.texts, "a text")
    rows = [Row(f"glue: row {label}", {**texts, "label": label, "idx": label}) for label in (0, 1)]
    assert [glue_labels(task, None).encode(example.label) for example in examples(rows, name)] == [0, 1]


def test_test_files_have_no_labels(tmp_path: Path) -> None:
    (tmp_path / "test.tsv").write_text("index\tsentence\n0\tBill whistled.\n")
    rows = read_glue_file(tmp_path / "test.tsv", GLUE["cola"])
    assert rows is not None and examples(rows, "cola", labelled=False)[0].first == "Bill whistled."
    with pytest.raises(DataError, match=r"there is no column .label..*--label_column_name"):
        examples(rows, "cola")


def test_a_file_of_another_layout_and_a_short_line(tmp_path: Path) -> None:
    (tmp_path / "own.tsv").write_text("text\tlabel\na\t0\n")
    (tmp_path / "own.csv").write_text("question,sentence,label\na,b,entailment\n")
    assert read_glue_file(tmp_path / "own.tsv", GLUE["qnli"]) is None
    assert read_glue_file(tmp_path / "own.csv", GLUE["qnli"]) is None
    (tmp_path / "short.tsv").write_text(FILES["qnli"] + "2\tWho?\n")
    rows = read_glue_file(tmp_path / "short.tsv", GLUE["qnli"])
    assert rows is not None and rows[-1].where.endswith("short.tsv:4")
    assert rows[-1].problem == "has 2 cells, and the file has 4 columns"


def test_names_of_tasks() -> None:
    assert [glue_task(name).name for name in ("SST-2", "sts_b", "MNLI", "sst2")] == ["sst2", "stsb", "mnli", "sst2"]
    with pytest.raises(OptionError, match="did you mean 'mnli'"):
        glue_task("mnl")


def test_the_mismatched_file_lies_beside_the_matched_one(tmp_path: Path) -> None:
    assert mismatched_file(tmp_path / "dev_matched.tsv") is None
    (tmp_path / "dev_mismatched.tsv").touch()
    assert mismatched_file(tmp_path / "dev_matched.tsv") == tmp_path / "dev_mismatched.tsv"
    assert mismatched_file(tmp_path / "dev_mismatched.tsv") is None


def test_every_row_of_the_real_files_is_read(shared_data: Path, tmp_path: Path) -> None:
    for name, file, count in (("qnli", "dev.tsv", 5463), ("mnli", "kshot16-train.tsv", 48)):
        path = tmp_path / file
        path.write_bytes(gzip.decompress((shared_data / "glue" / name / f"{file}.gz").read_bytes()))
        rows = read_glue_file(path, GLUE[name])
        assert rows is not None and len(rows) == count
        labels = glue_labels(GLUE[name], None)
        places = [labels.encode(example.label) for example in examples(rows, name)]
        assert set(places) == set(range(len(GLUE[name].labels)))
