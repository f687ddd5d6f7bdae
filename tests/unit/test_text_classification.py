"""The data of text classification: columns, labels of every kind, splits, bad rows, and what the model's config is told."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sparse_accel.errors import DataError, OptionError
from sparse_accel.tasks.base import TaskData, write_predictions
from sparse_accel.tasks.text_classification import TextClassification
from sparse_accel.tasks.text_labels import PROBLEM_TYPES
from tests.tiny import TinyDataOptions, tiny_tokenizer

TASK = TextClassification()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


Load = Callable[..., TaskData]


@pytest.fixture
def load(tokenizer: Any, tmp_path: Path) -> Load:
    """Load rows given as lists of (text, label), or whole files by name; further arguments are options."""

    def loaded(
        train: Sequence[Any] | Path | None = None,
        validation: Sequence[Any] | Path | None = None,
        model_labels: Sequence[str] | None = None,
        **options: Any,
    ) -> TaskData:
        files = {}
        for name, rows in (("train", train), ("validation", validation)):
            if isinstance(rows, Path):
                files[f"{name}_file"] = str(rows)
            elif rows is not None:
                path = tmp_path / f"{name}.jsonl"
                path.write_text("\n".join(json.dumps({"text": text, "label": label}) for text, label in rows))
                files[f"{name}_file"] = str(path)
        settings = {"do_train": train is not None, "do_eval": validation is not None, **files, **options}
        return TASK.load(
            TinyDataOptions(cache_dir=str(tmp_path / "cache"), **settings), tokenizer, model_labels=model_labels
        )

    return loaded


SIX = [
    ("a lamp", "joy"),
    ("a boat", "fear"),
    ("a drum", "love"),
    ("a map", "joy"),
    ("a hat", "fear"),
    ("a kite", "love"),
]


def test_features_are_those_of_transformers_cut_alike(load: Load, tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        {"question1": "lamp " * (9 * n), "question2": "boat " * (5 * n), "is_duplicate": n % 2} for n in range(1, 5)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = load(tmp_path / "pairs.jsonl", task_name="qqp", max_seq_length=40)
    assert data.train is not None
    expected = tokenizer(
        [row["question1"] for row in rows], [row["question2"] for row in rows], truncation=True, max_length=40
    )
    for index in range(4):
        feature = data.train[index]
        assert feature["input_ids"].tolist() == expected["input_ids"][index]
        assert feature["token_type_ids"].tolist() == expected["token_type_ids"][index]
    assert data.train.labels["labels"].tolist() == [1, 0, 1, 0]
    assert any("2 of 4 texts are longer than max_seq_length 40" in note for note in data.notes)
    assert data.head["id2label"] == {0: "not_duplicate", 1: "duplicate"}
    again = load(tmp_path / "pairs.jsonl", task_name="qqp", max_seq_length=40, preprocessing_num_workers=1)
    assert again.train is not None and again.notes == data.notes


def test_labels_of_the_training_data_are_those_of_the_run(load: Load) -> None:
    data = load(SIX, SIX[::-1], max_train_samples=1)
    assert data.train is not None and data.validation is not None
    assert data.head == {
        "num_labels": 3,
        "id2label": {0: "fear", 1: "joy", 2: "love"},
        "label2id": {"fear": 0, "joy": 1, "love": 2},
        "problem_type": "single_label_classification",
    }
    assert len(data.train) == 1 and data.validation.features.labels["labels"].tolist() == [2, 0, 1, 2, 0, 1]
    kept = load(SIX, model_labels=("love", "joy", "fear"))
    assert kept.train is not None and kept.head["id2label"] == {0: "love", 1: "joy", 2: "fear"}
    assert kept.train.labels["labels"].tolist() == [1, 2, 0, 1, 2, 0]


def test_numbers_make_a_regression_and_lists_several_labels(load: Load) -> None:
    numbers = load([("a lamp", 1.5), ("a boat", 2)])
    assert numbers.train is not None and numbers.train.labels["labels"].dtype == np.float32
    assert numbers.head["problem_type"] == "regression" and numbers.head["num_labels"] == 1
    several = load([("a lamp", ["joy"]), ("a boat", []), ("a drum", ["fear", "joy"])])
    assert several.train is not None and several.head["id2label"] == {0: "fear", 1: "joy"}
    assert several.train.labels["labels"].tolist() == [[0, 1], [0, 0], [1, 1]]
    for data, width in ((numbers, 1), (several, 2)):
        batch = data.collate(data.train, np.arange(2))  # type: ignore[arg-type]
        logits = torch.randn(2, width)
        of_transformers = (
            F.mse_loss(logits[:, 0], batch["labels"])
            if width == 1
            else F.binary_cross_entropy_with_logits(logits, batch["labels"])
        )
        assert batch["labels"].dtype == torch.float32 and TASK.loss({"logits": logits}, batch) == of_transformers


def test_scores_and_files_of_each_kind(load: Load, tmp_path: Path) -> None:
    numbers = load([("a", 0.0), ("b", 1.0)], [("a lamp", 1.5), ("a boat", 2.0), ("a map", 4.0)]).validation
    assert numbers is not None
    scored = TASK.score(numbers, {"logits": [np.float32([2.0]), np.float32([2.0]), np.float32([5.0])]}, None)  # type: ignore[arg-type]
    assert scored.metrics["mse"] == scored.metrics["loss"] == pytest.approx((0.25 + 0 + 1) / 3)
    assert scored.files["predictions"][2] == {"index": 2, "value": 5.0}
    rows = [("a", ["joy"]), ("b", ["fear"])]
    several = load(rows, rows).validation
    assert several is not None
    scored = TASK.score(several, {"logits": [np.float32([-9, 9]), np.float32([0, -9])]}, None)  # type: ignore[arg-type]
    assert scored.metrics["accuracy"] == scored.metrics["f1_micro"] == scored.metrics["macro_average_f1"] == 1.0
    assert [row["labels"] for row in scored.files["predictions"]] == [["joy"], ["fear"]]
    assert scored.files["label_metrics"]["joy"] == {"precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 1}
    (tmp_path / "test.tsv").write_text("index\tsentence\n0\tBill whistled.\n1\tBill.\n")
    test = load(do_predict=True, test_file=str(tmp_path / "test.tsv"), task_name="cola").test
    assert test is not None and "labels" not in test.features.labels
    scored = TASK.score(test, {"logits": [np.float32([0, 1]), np.float32([1, 0])]}, None)  # type: ignore[arg-type]
    assert scored.metrics == {}
    written = write_predictions(tmp_path, "predict", scored)
    assert sorted(path.name for path in written) == ["predict_predictions.json", "predict_results_cola.txt"]
    assert (tmp_path / "predict_results_cola.txt").read_text() == "index\tprediction\n0\tacceptable\n1\tunacceptable\n"


def test_without_labelled_data_the_models_config_says_whether_several_labels_apply(
    tokenizer: Any, tmp_path: Path
) -> None:
    (tmp_path / "test.jsonl").write_text('{"text": "a lamp"}')
    options = TinyDataOptions(
        cache_dir=str(tmp_path / "cache"),
        do_train=False,
        do_eval=False,
        do_predict=True,
        test_file=str(tmp_path / "test.jsonl"),
    )
    for problem_type, names, expected in (
        ("multi_label_classification", ["joy", "fear", "love"], {"labels": ["fear", "love"]}),
        ("multi_label_classification", None, {"labels": ["LABEL_1", "LABEL_2"]}),
        ("single_label_classification", ["joy", "fear", "love"], {"label": "fear"}),
        (None, ["joy", "fear", "love"], {"label": "fear"}),
    ):
        data = TASK.load(options, tokenizer, model_labels=names, model_problem_type=problem_type)
        assert data.test is not None and data.head.get("problem_type") == (
            names and (problem_type or PROBLEM_TYPES["classes"])
        )
        (found,) = TASK.score(data.test, {"logits": [np.float32([-9, 9, 8])]}, options).files["predictions"]
        assert expected.items() <= found.items()


def test_mnli_is_scored_on_both_parts(load: Load, tmp_path: Path) -> None:
    header = "index\tsentence1\tsentence2\tgold_label\n"
    (tmp_path / "dev_matched.tsv").write_text(header + '0\tIt "rains.\tIt is wet.\tentailment\n')
    (tmp_path / "dev_mismatched.tsv").write_text(header + "0\tA lamp.\tA cat.\tneutral\n1\tA.\tB.\tcontradiction\n")
    data = load(validation=tmp_path / "dev_matched.tsv", task_name="MNLI")
    assert data.validation is not None and len(data.validation.examples) == 1
    assert data.more_validation["mm"].features.labels["labels"].tolist() == [1, 2]
    assert data.head["id2label"] == {0: "entailment", 1: "neutral", 2: "contradiction"}


def test_a_data_set_on_disk_and_evaluation_on_its_test_data(load: Load, tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = {"text": ["a lamp", "a boat"], "label": [0, 1]}
    parts = {name: datasets.Dataset.from_dict(rows, features=features) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "set"))
    data = load(do_train=True, do_eval=True, dataset_name=str(tmp_path / "set"), eval_on_test=True)
    assert data.validation is not None and data.validation.features.labels["labels"].tolist() == [0, 1]
    assert data.head["label2id"] == {"no": 0, "yes": 1}
    with pytest.raises(DataError, match="has no split 'validation'"):
        load(do_eval=True, dataset_name=str(tmp_path / "set"))


def test_of_each_class_its_share_is_held_out_and_one_row_stays(load: Load) -> None:
    counts = {"joy": 60, "fear": 30, "calm": 9, "awe": 1}
    rows = [(f"{label} {number}", label) for label, count in counts.items() for number in range(count)]
    data = load(rows, do_eval=True, validation_ratio=0.2)
    assert data.train is not None and data.validation is not None
    names = list(data.head["label2id"])
    found = {
        part: {names[place]: int(count) for place, count in enumerate(np.bincount(labels, minlength=4))}
        for part, labels in (
            ("train", data.train.labels["labels"]),
            ("held", data.validation.features.labels["labels"]),
        )
    }
    assert found["held"] == {"joy": 12, "fear": 6, "calm": 2, "awe": 0}
    assert found["train"] == {label: count - found["held"][label] for label, count in counts.items()}
    assert (
        sum("20 of 100 rows are held out for validation, of each label its share" in note for note in data.notes) == 1
    )
    again = load(rows, do_eval=True, validation_ratio=0.2, seed=7)
    assert again.validation is not None and again.validation.examples == data.validation.examples
    with pytest.raises(OptionError, match="and 0 to score: of each of its 20 labels, one row at least stays"):
        load([(f"text {number}", str(number)) for number in range(20)], do_eval=True, validation_ratio=0.5)


def test_a_class_whose_other_rows_are_bad_may_be_held_out(load: Load) -> None:
    rows = [("a cup", "odd"), ("", "odd"), *[(f"text {number}", "usual") for number in range(10)]]
    data = load(rows, do_eval=True, validation_ratio=0.5, on_bad_rows="skip")
    assert data.head["num_labels"] == 2 and data.validation is not None and len(data.validation.examples) == 6


@pytest.mark.parametrize("label", [lambda number: number / 3, lambda number: ["joy", "fear"][: number % 3]])
def test_labels_that_are_no_classes_are_held_out_by_chance(load: Load, label: Callable[[int], Any]) -> None:
    data = load([(f"text {number}", label(number)) for number in range(20)], do_eval=True, validation_ratio=0.25)
    assert data.validation is not None and len(data.validation.examples) == 5
    assert any(note.endswith("5 of 20 rows are held out for validation") for note in data.notes)


BAD = {
    "a label that training did not have": (
        SIX,
        [("a cup", "joy"), ("a cap", "jot")],
        {},
        r"validation.jsonl:2: .*'jot' is not one of the 3 labels of the training data; did you mean 'joy'",
    ),
    "an empty text": ([*SIX, ("  ", "joy")], None, {}, r"train.jsonl:7: 'text' is empty"),
    "a text that is none": ([*SIX, (7, "joy")], None, {}, r"train.jsonl:7: 'text' should be text, it is a number"),
    "a label of another kind": (
        [*SIX, ("a cup", 3)],
        None,
        {},
        r"train.jsonl:7: the label 3 is a number, and most labels are text",
    ),
    "no label": ([*SIX, ("a cup", None)], None, {}, r"train.jsonl:7: has no label"),
    "two labels": (SIX, [("a cup", ["joy", "fear"])], {}, r"validation.jsonl:1: has 2 labels"),
    "not a number": ([("a", 0.5), ("b", float("nan"))], None, {}, r"train.jsonl:2: the label is nan"),
    "a number beyond the model's labels": (
        None,
        [("a", 1), ("b", 3)],
        {"model_labels": ("x", "y", "z")},
        r"validation.jsonl:2: the label 3 is out of range: there are 3 labels, 0 to 2",
    ),
    "a column that is missing": (
        SIX,
        None,
        {"input_column_names": "texd"},
        r"train.jsonl:1: there is no column 'texd' .*did you mean 'text'",
    ),
    "a label column that is missing": (
        SIX,
        None,
        {"label_column_name": "labels"},
        r"train.jsonl:1: there is no column 'labels'; did you mean 'label'",
    ),
    "columns of a GLUE task": (
        SIX,
        None,
        {"task_name": "rte"},
        r"there is no column 'sentence1'.*--task_name rte wants sentence1 and sentence2",
    ),
    "a length without room": (SIX, None, {"max_seq_length": 3}, r"max_seq_length 3 leaves no token for the text"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_named_with_its_place(load: Load, case: str) -> None:
    train, validation, options, problem = BAD[case]
    with pytest.raises(DataError, match=problem):
        load(train, validation, **options)


def test_bad_rows_may_be_left_out(load: Load) -> None:
    data = load([*SIX, ("", "joy"), ("a cup", 3), ("a cap", None)], on_bad_rows="skip")
    assert data.train is not None and len(data.train) == 6 and data.num_dropped == 3
    assert any("left out 3 bad rows" in note and "train.jsonl:7" in note for note in data.notes)
    with pytest.raises(DataError, match="no usable row is left"):
        load([("", "a"), ("", "b")], on_bad_rows="skip")


def test_glue_without_files_needs_the_hub_and_says_what_else_would_do(load: Load) -> None:
    with pytest.raises(
        DataError,
        match=r"(?s)--task_name qnli without files loads GLUE.*--train_file.*columns question, sentence, label",
    ):
        load(do_train=True, task_name="qnli")
    with pytest.raises(OptionError, match="one column of texts, or two"):
        load(SIX, input_column_names="a,b,c")


def test_columns_that_are_guessed_are_named(load: Load, tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("id,title,body,stars,label\n1,a lamp,a boat,5,no\n2,a,b,4,yes\n")
    data = load(tmp_path / "own.csv")
    assert any("taken from 'title' and 'body', and 'stars' is not read" in note for note in data.notes)
