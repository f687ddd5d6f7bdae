"""Token classification as a task: what it loads and says, its loss, and what it writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from sparse_accel.errors import DataError
from sparse_accel.tasks import resolve_task
from sparse_accel.tasks.base import Split, TaskData
from sparse_accel.tasks.collating import PackedCollator
from sparse_accel.tasks.token_classification import TokenClassification
from sparse_accel.tasks.word_pieces import NO_LABEL
from tests.tiny import TINY_TAGS, TinyDataOptions, tiny_sentences, tiny_tagged, tiny_tokenizer

TASK = TokenClassification()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def options(folder: Path, **changes: Any) -> TinyDataOptions:
    changes = {"cache_dir": str(folder / "cache"), "max_seq_length": None, **changes}
    switches = {"do_train": "train_file", "do_eval": "validation_file", "do_predict": "test_file"}
    return TinyDataOptions(**{switch: file in changes for switch, file in switches.items()}, **changes)


def validation(data: TaskData) -> Split:
    assert data.validation is not None
    return data.validation


ROW = {"tokens": ["Ada", "sleeps"], "ner_tags": ["B-PER", "O"]}


def test_labels_and_head_are_those_of_all_training_rows_whatever_part_is_used(tokenizer: Any, tmp_path: Path) -> None:
    train, test = tiny_tagged(tmp_path / "train.jsonl", 20), tiny_tagged(tmp_path / "val.jsonl", 6, seed=4)
    chosen = options(tmp_path, train_file=str(train), validation_file=str(test), max_train_samples=2)
    data = TASK.load(chosen, tokenizer)
    assert data.head == {
        "num_labels": 6,
        "id2label": dict(enumerate(TINY_TAGS)),
        "label2id": {label: index for index, label in enumerate(TINY_TAGS)},
    }
    assert data.train is not None and len(data.train) == 2
    assert data.collate.max_length == 512
    assert data.notes == []
    own = TASK.load(chosen, tokenizer, model_labels=[*reversed(TINY_TAGS), "B-ORG"], max_positions=30)
    assert own.head["id2label"][0] == "O" and own.head["num_labels"] == 7
    assert own.collate.max_length == 30


def test_a_label_unseen_in_training_is_an_error_or_costs_its_row(tokenizer: Any, tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", [ROW])
    val = write(tmp_path / "val.jsonl", [ROW, {"tokens": ["x", "Oslo"], "ner_tags": ["O", "B-LOC"]}])
    chosen = options(tmp_path, train_file=train, validation_file=val)
    message = r"val\.jsonl:2: word 2 \('Oslo'\) has the label 'B-LOC', which the training data does not have"
    with pytest.raises(DataError, match=message):
        TASK.load(chosen, tokenizer)
    data = TASK.load(replace(chosen, on_bad_rows="skip"), tokenizer)
    assert len(validation(data).examples) == 1 and data.num_dropped == 1
    assert "left out 1 bad row" in data.notes[0]


def test_a_data_set_folder_with_named_classes_gives_what_the_file_gives(tokenizer: Any, tmp_path: Path) -> None:
    rows = tiny_sentences(12)
    kinds = datasets.Features(
        {
            "id": datasets.Value("string"),
            "tokens": datasets.List(datasets.Value("string")),
            "ner_tags": datasets.List(datasets.ClassLabel(names=list(TINY_TAGS))),
        }
    )
    made = datasets.Dataset.from_list(rows, features=kinds)
    datasets.DatasetDict({"train": made}).save_to_disk(str(tmp_path / "set"))
    file = TASK.load(options(tmp_path, train_file=write(tmp_path / "a.jsonl", rows)), tokenizer)
    chosen = replace(options(tmp_path), dataset_name=str(tmp_path / "set"), do_train=True)
    folder = TASK.load(chosen, tokenizer)
    assert file.train is not None and folder.train is not None
    assert file.head == folder.head
    assert file.train.extra["labels"].tolist() == folder.train.extra["labels"].tolist()


def test_numbers_as_labels_are_the_models(tokenizer: Any, tmp_path: Path) -> None:
    val = write(tmp_path / "val.jsonl", [{"tokens": ["Ada"], "ner_tags": [2]}])
    data = TASK.load(options(tmp_path, validation_file=val), tokenizer, model_labels=TINY_TAGS)
    assert validation(data).examples[0].tags == ("B-PER",)


def test_what_a_person_should_know_is_said(tokenizer: Any, tmp_path: Path) -> None:
    long = {"tokens": ["Ada", "\u200b", "q" * 30, *["blue"] * 20], "ner_tags": ["I-PER", *["O"] * 22]}
    file = write(tmp_path / "a.jsonl", [long, {"tokens": ["\x00"], "ner_tags": ["O"]}])
    data = TASK.load(options(tmp_path, validation_file=file, max_seq_length=16), tokenizer)
    assert data.notes == [
        "validation: the tags are IOB1; the same entities are written in IOB2",
        f"{file}: 1 of 2 sentences are longer than 16 tokens and cut into windows",
        f"{file}: 1 words have more tokens than a window holds: the last ones of each are left out",
        f"{file}: 2 words have no token at all (such as control characters): they are called O and not scored",
    ]
    split = validation(data)
    logits = [np.tile(np.float32([9, 0]), (size, 1)) for size in split.features.lengths]  # all B-PER
    scored = TASK.score(split, {"logits": logits}, options(tmp_path))
    assert scored.metrics["accuracy"] == 1 / 22
    written = scored.files["predictions"]
    assert [len(row["tags"]) for row in written] == [23, 1]
    assert written[0]["tags"][:3] == ["B-PER", "O", "B-PER"] and written[1] == {"words": ["\x00"], "tags": ["O"]}


def test_scores_are_by_word_also_where_all_pieces_are_labelled(tokenizer: Any, tmp_path: Path) -> None:
    file = str(tiny_tagged(tmp_path / "a.jsonl", 8))
    found = []
    for all_pieces in (False, True):
        chosen = options(tmp_path, validation_file=file, label_all_tokens=all_pieces, return_entity_level_metrics=True)
        split = validation(TASK.load(chosen, tokenizer))
        noise = np.random.default_rng(1)
        logits = [noise.standard_normal((size, 6)).astype(np.float32) for size in split.features.lengths]
        found.append((TASK.score(split, {"logits": logits}, chosen).metrics, split.features))
    (first, features), (every, all_features) = found
    assert (all_features.extra["labels"] != NO_LABEL).sum() > (features.extra["labels"] != NO_LABEL).sum()
    assert {**first, "loss": 0} == {**every, "loss": 0}
    assert first["loss"] != every["loss"]
    assert {"PER_f1", "LOC_precision", "DATE_recall", "DATE_number", "overall_f1", "overall_accuracy"} <= first.keys()


def test_without_labels_there_are_predictions_and_no_scores(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"id": 5, "tokens": ["Ada", "sleeps"]}]
    data = TASK.load(options(tmp_path, test_file=write(tmp_path / "a.jsonl", rows)), tokenizer, model_labels=TINY_TAGS)
    assert data.test is not None
    logits = [np.eye(6, dtype=np.float32)[[0, 2, 5, 0, 0, 0, 0, 0, 0, 0][:size]] for size in data.test.features.lengths]
    scored = TASK.score(data.test, {"logits": logits}, options(tmp_path))
    assert scored.metrics == {}
    assert scored.files["predictions"] == [{"id": 5, "words": ["Ada", "sleeps"], "tags": ["B-PER", "O"]}]


def test_test_data_have_labels_where_training_has_them_or_none(tokenizer: Any, tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", [{"tokens": ["Ada", "sleeps"], "tags": ["B-PER", "O"]}])
    for name, row, tags in (
        ("a.jsonl", {"tokens": ["Ada"], "pos": ["NNP"], "tags": ["B-PER"]}, ("B-PER",)),
        ("b.jsonl", {"tokens": ["Ada"], "pos": ["NNP"]}, None),
    ):
        for given in (None, "tags"):
            files = {"train_file": train, "test_file": write(tmp_path / name, [row])}
            data = TASK.load(options(tmp_path, label_column_name=given, **files), tokenizer)
            assert data.test is not None and data.test.examples[0].tags == tags


def test_the_loss_is_a_mean_over_labelled_tokens_and_zero_without_one() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 4, generator=generator, requires_grad=True)
    labels = torch.tensor([[NO_LABEL, 1, NO_LABEL, 3, NO_LABEL], [NO_LABEL, 0, 2, 1, NO_LABEL], [NO_LABEL] * 5])
    batch = {"labels": labels, "attention_mask": torch.ones(3, 5, dtype=torch.long)}
    assert TASK.num_units(batch) == 5
    loss = TASK.loss({"logits": logits}, batch)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert loss.item() == pytest.approx(expected.item())
    nothing = {**batch, "labels": torch.full((3, 5), NO_LABEL)}
    assert TASK.num_units(nothing) == 0
    empty = TASK.loss({"logits": logits}, nothing)
    empty.backward()
    assert empty.item() == 0.0
    assert logits.grad is not None and logits.grad.abs().sum() == 0


def test_the_loss_of_an_evaluation_is_that_of_training(tokenizer: Any, tmp_path: Path) -> None:
    split = validation(
        TASK.load(options(tmp_path, validation_file=str(tiny_tagged(tmp_path / "a.jsonl", 8))), tokenizer)
    )
    data = TASK.load(options(tmp_path, validation_file=str(tmp_path / "a.jsonl")), tokenizer)
    batch = data.collate(split.features, np.arange(8))
    logits = torch.randn(*batch["labels"].shape, 6, generator=torch.Generator().manual_seed(0))
    rows = TASK.for_scoring({"logits": logits}, batch)
    scored = TASK.score(split, rows, options(tmp_path)).metrics
    assert scored["loss"] == pytest.approx(TASK.loss({"logits": logits}, batch).item(), rel=1e-6)


def test_packed_batches_have_the_same_labels_by_feature(tokenizer: Any, tmp_path: Path) -> None:
    data = TASK.load(options(tmp_path, train_file=str(tiny_tagged(tmp_path / "a.jsonl", 8))), tokenizer)
    assert data.train is not None
    packed = PackedCollator(data.collate.pad_values, token_labels=data.collate.token_labels)(data.train, np.arange(8))
    padded = data.collate(data.train, np.arange(8))
    longest = packed["labels"].shape[1]
    assert torch.equal(packed["labels"], padded["labels"][:, :longest])
    assert (padded["labels"][:, longest:] == NO_LABEL).all()


def test_the_short_name_is_ner() -> None:
    assert resolve_task("ner").name == "token_classification"
