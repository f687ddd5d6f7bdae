"""Windows of tokens against the documented algorithm, written out over transformers' tokenizer call; the cache."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from sparse_accel.errors import DataError, ModelError, OptionError
from sparse_accel.tasks import resolve_task
from sparse_accel.tasks.base import TaskData
from sparse_accel.tasks.collating import Collator
from sparse_accel.tasks.features import Features, load_features, save_features
from sparse_accel.tasks.qa_windows import CHUNK, Question, Windows, WindowSpec, cut_windows, window_spec
from tests.tiny import TinyDataOptions, tiny_rows, tiny_squad, tiny_tokenizer

TOKENIZERS = ["bert", "roberta", "left"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tokenizers")
    made = {kind: tiny_tokenizer(folder / kind, kind) for kind in ("bert", "roberta")}
    left = tiny_tokenizer(folder / "left", "bert")
    left.padding_side = "left"
    return made | {"left": left}


def reference_features(
    tokenizer: Any, rows: list[dict[str, Any]], max_length: int, stride: int
) -> list[dict[str, Any]]:
    """Every window with its label and its map from tokens to characters, token by token."""
    context_first = tokenizer.padding_side == "left"
    questions, contexts = [row["question"].lstrip() for row in rows], [row["context"] for row in rows]
    encoded = tokenizer(
        contexts if context_first else questions,
        questions if context_first else contexts,
        truncation="only_first" if context_first else "only_second",
        max_length=max_length,
        stride=stride,
        padding=False,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    features = []
    for window, row_number in enumerate(encoded["overflow_to_sample_mapping"]):
        ids, spans = encoded["input_ids"][window], encoded["offset_mapping"][window]
        owner = 0 if context_first else 1
        of_context = [position for position, owned in enumerate(encoded.sequence_ids(window)) if owned == owner]
        start = end = ids.index(tokenizer.cls_token_id)
        texts, offsets = rows[row_number]["answers"]["text"], rows[row_number]["answers"]["answer_start"]
        if texts:
            first, last = offsets[0], offsets[0] + len(texts[0])
            if spans[of_context[0]][0] <= first and last <= spans[of_context[-1]][1]:
                start = max(position for position in of_context if spans[position][0] <= first)
                end = min(position for position in of_context if spans[position][1] >= last)
        features.append(
            {
                "example": row_number,
                "input_ids": ids,
                "token_type_ids": encoded["token_type_ids"][window] if "token_type_ids" in encoded else None,
                "start_positions": start,
                "end_positions": end,
                "offsets": [spans[p] if p in set(of_context) else None for p in range(len(ids))],
            }
        )
    return features


def windows_of(tokenizer: Any, rows: list[dict[str, Any]], max_length: int, stride: int, labels: bool) -> Windows:
    spec = window_spec(tokenizer, max_length=max_length, stride=stride, labels=labels)
    return cut_windows([question_of(row) for row in rows], spec, None)


def question_of(row: dict[str, Any]) -> Question:
    if not row["answers"]["text"]:
        return Question(row["question"], row["context"], None, None)
    start = row["answers"]["answer_start"][0]
    return Question(row["question"], row["context"], start, start + len(row["answers"]["text"][0]))


def assert_equal_features(tokenizer: Any, rows: list[dict[str, Any]], max_length: int, stride: int) -> int:
    """Returns how many windows were compared."""
    expected = reference_features(tokenizer, rows, max_length, stride)
    train = windows_of(tokenizer, rows, max_length, stride, labels=True)
    scored = windows_of(tokenizer, rows, max_length, stride, labels=False)
    assert train.refused == scored.refused == {}
    assert len(train.features) == len(scored.features) == len(expected)
    for index, wanted in enumerate(expected):
        feature = train.features[index]
        assert feature["input_ids"].tolist() == wanted["input_ids"]
        if wanted["token_type_ids"] is not None:
            assert feature["token_type_ids"].tolist() == wanted["token_type_ids"]
        assert (feature["start_positions"], feature["end_positions"]) == (
            wanted["start_positions"],
            wanted["end_positions"],
        )
        assert scored.features.facts["example"][index] == wanted["example"]
        first, last = (scored.features.facts[name][index] for name in ("context_start", "context_end"))
        spans = [tuple(span) for span in scored.features.extra_of(index, "offsets").tolist()]
        assert [span if first <= p < last else None for p, span in enumerate(spans)] == wanted["offsets"]
    return len(expected)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(("max_length", "stride"), [(48, 16), (40, 0), (256, 128)])
def test_features_equal_the_documented_algorithm(
    tokenizers: dict[str, Any], kind: str, max_length: int, stride: int
) -> None:
    rows = tiny_rows(24, seed=8, unanswerable=0.2)
    rows[3]["question"] = "  \t" + rows[3]["question"]
    count = assert_equal_features(tokenizers[kind], rows, max_length, stride)
    assert count > len(rows) if max_length < 64 else count == len(rows)


@pytest.mark.parametrize("name", ["train-v1.1-subset.json.gz", "dev-v2.0-subset.json.gz"])
def test_features_of_real_questions_equal_the_documented_algorithm(
    shared_data: Path, real_tokenizer: Any, name: str
) -> None:
    document = json.loads(gzip.decompress((shared_data / "squad" / name).read_bytes()))
    rows = [
        {
            "question": question["question"],
            "context": paragraph["context"],
            "answers": {key: [answer[key] for answer in question["answers"]] for key in ("text", "answer_start")},
        }
        for article in document["data"]
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]
    assert_equal_features(real_tokenizer, rows[::10], max_length=384, stride=128)


@pytest.mark.slow
def test_dev_v1_has_the_number_of_windows_that_everyone_counts(shared_data: Path, real_tokenizer: Any) -> None:
    document = json.loads(gzip.decompress((shared_data / "squad" / "dev-v1.1.json.gz").read_bytes()))
    questions = [
        Question(question["question"], paragraph["context"], None, None)
        for article in document["data"]
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]
    spec = window_spec(real_tokenizer, max_length=384, stride=128, labels=False)
    assert (len(questions), len(cut_windows(questions, spec, None).features)) == (10570, 10784)


# The last stages that tokenizers have: they add special tokens, set segments (not in all windows alike) and move offsets.
_PAIR = processors.TemplateProcessing(
    single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
)
LAST_STAGES: dict[str, Any] = {
    "none": None,
    "bert": processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1)),
    "roberta": processors.RobertaProcessing(("[SEP]", 2), ("[CLS]", 1), trim_offsets=True, add_prefix_space=True),
    "template": _PAIR,
    "bytes": processors.ByteLevel(trim_offsets=True),
    "bytes, then template": processors.Sequence([processors.ByteLevel(trim_offsets=True), _PAIR]),
}


@pytest.mark.parametrize("prefix", ["byte", "metaspace"])
@pytest.mark.parametrize("stage", LAST_STAGES)
def test_windows_are_those_of_the_tokenizer_given_each_pair(prefix: str, stage: str) -> None:
    """Tokenizing each text once must change nothing: contexts are shared, segments are set and offsets are trimmed."""
    texts = [" the  lamp, the red\u00a0lamp  was in the hall \u2014 ", "Ünï códe 漢字 [SEP] 🙂🙂 x" * 3, "the lamp"]
    backend = Tokenizer(models.BPE(unk_token="[UNK]"))
    if prefix == "byte":
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    specials = ["[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.BpeTrainer(vocab_size=70, special_tokens=specials, show_progress=False)
    backend.train_from_iterator(texts * 2, trainer)
    if LAST_STAGES[stage] is not None:
        backend.post_processor = LAST_STAGES[stage]
    asked = ["what  was red", " who", "what  was red", "the the", "where was the red lamp in the hall", "x"]
    questions = [Question(question, texts[n % 3], None, None) for n, question in enumerate(asked)]
    for question_first, side in ((True, "right"), (False, "right"), (True, "left")):
        spec = WindowSpec(backend.to_str(), 34, 4, question_first, side, True, (1,), labels=False)
        found = cut_windows(questions, spec, None)
        assert found.refused == {}
        whole = Tokenizer.from_str(spec.backend)
        strategy = "only_second" if question_first else "only_first"
        whole.enable_truncation(34, stride=4, strategy=strategy, direction=side)
        windows = []
        for question in questions:
            pair = question.question.lstrip(), question.context
            first = whole.encode(*(pair if question_first else reversed(pair)))
            windows += [first, *first.overflowing]
        assert len(found.features) == len(windows) > len(questions)
        for index, window in enumerate(windows):
            feature = found.features[index]
            assert feature["input_ids"].tolist() == window.ids
            assert feature["token_type_ids"].tolist() == window.type_ids
            assert [tuple(span) for span in found.features.extra_of(index, "offsets").tolist()] == window.offsets
            owners, place = window.sequence_ids, 1 if question_first else 0
            first_token, last_token = (found.features.facts[name][index] for name in ("context_start", "context_end"))
            # Without special tokens, the library does not say it of every window.
            if stage not in ("none", "bytes"):
                assert [at for at, owner in enumerate(owners) if owner == place] == [*range(first_token, last_token)]


def test_an_answer_in_the_very_last_token_is_labelled_there(tokenizers: dict[str, Any]) -> None:
    """Hugging Face's example walks on to the last position of the padded window here, which no reader can want."""
    row = {"question": "which?", "context": "the lamp was red", "answers": {"text": ["red"], "answer_start": [13]}}
    feature = windows_of(tokenizers["bert"], [row], 32, 8, labels=True).features[0]
    tokens = tokenizers["bert"].convert_ids_to_tokens(feature["input_ids"].tolist())
    assert tokens[feature["start_positions"]] == tokens[feature["end_positions"]] == "red"


def test_settings_inside_tokenizer_json_have_no_say(tokenizers: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = tiny_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 10, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 128}, "direction": "Right", "pad_to_multiple_of": None}
    content["padding"] = padding | {"pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"}
    path.write_text(json.dumps(content))
    rows = tiny_rows(8)
    plain = windows_of(tokenizer, rows, 48, 16, labels=True).features
    stubborn = windows_of(AutoTokenizer.from_pretrained(tmp_path), rows, 48, 16, labels=True).features
    assert np.array_equal(plain.tokens["input_ids"], stubborn.tokens["input_ids"])
    assert np.array_equal(plain.bounds, stubborn.bounds)


def test_worker_processes_change_nothing(tokenizers: dict[str, Any]) -> None:
    rows = tiny_rows(2 * CHUNK + 10, seed=9)
    spec = window_spec(tokenizers["bert"], max_length=48, stride=16, labels=True)
    questions = [question_of(row) for row in rows]
    alone, together = cut_windows(questions, spec, None).features, cut_windows(questions, spec, 2).features
    assert np.array_equal(alone.bounds, together.bounds)
    for group in ("tokens", "labels", "facts"):
        for name, column in getattr(alone, group).items():
            assert np.array_equal(column, getattr(together, group)[name])
    assert alone.facts["example"].tolist() == sorted(alone.facts["example"].tolist())
    assert alone.facts["example"][-1] == len(rows) - 1


def test_a_question_that_leaves_no_room_is_refused_only_where_windows_must_overlap(tokenizers: dict[str, Any]) -> None:
    long_question, long_context = "where " * 20, "the lamp " * 20
    rows = [
        {"question": long_question, "context": long_context, "answers": {"text": [], "answer_start": []}},
        {"question": long_question, "context": "the lamp", "answers": {"text": [], "answer_start": []}},
        {"question": "where", "context": long_context, "answers": {"text": [], "answer_start": []}},
        {"question": "where " * 60, "context": "the", "answers": {"text": [], "answer_start": []}},
    ]
    windows = windows_of(tokenizers["bert"], rows, 35, 12, labels=True)
    assert list(windows.refused) == [0, 3]
    assert "the question has 20 tokens, which leaves 12 of max_seq_length 35" in windows.refused[0]
    assert "leaves 0 of max_seq_length 35" in windows.refused[3]
    assert set(windows.features.facts["example"].tolist()) == {1, 2}


def test_a_stride_that_no_window_can_have_is_an_error(tokenizers: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="doc_stride 61 is too large for max_seq_length 64: a window has 61 tokens"):
        windows_of(tokenizers["bert"], tiny_rows(1), 64, 61, labels=True)


def test_a_slow_tokenizer_is_refused() -> None:
    from transformers import BertJapaneseTokenizer

    slow = BertJapaneseTokenizer.__new__(BertJapaneseTokenizer)
    with pytest.raises(ModelError, match="BertJapaneseTokenizer is a slow tokenizer"):
        window_spec(slow, max_length=64, stride=16, labels=True)


# ---- the task


@pytest.fixture
def options(tmp_path: Path) -> TinyDataOptions:
    train = tiny_squad(tmp_path / "train.json", rows=32, seed=1)
    validation = tiny_squad(tmp_path / "validation.json", rows=16, nested_layout=True, seed=2)
    return TinyDataOptions(
        train_file=str(train),
        validation_file=str(validation),
        cache_dir=str(tmp_path / "cache"),
        do_train=True,
        do_eval=True,
    )


def load(options: TinyDataOptions, tokenizer: Any, **more: Any) -> TaskData:
    return resolve_task("question_answering").load(options, tokenizer, **more)


def test_a_model_trains_and_is_scored_on_what_the_task_loads(
    options: TinyDataOptions, tokenizers: dict[str, Any], tiny_student: Path
) -> None:
    task = resolve_task("qa")
    data = load(options, tokenizers["bert"])
    model = task.model_class.from_pretrained(tiny_student).eval()
    assert data.train is not None and data.validation is not None
    batch = data.collate(data.train, np.arange(4))
    loss = model(**batch).loss
    assert loss.isfinite()
    # transformers lets padding compete with the tokens
    assert task.loss(dict(model(**batch)), batch, include_padding=True).item() == pytest.approx(loss.item(), rel=1e-6)
    assert task.loss(dict(model(**batch)), batch) < loss
    assert task.num_units(batch) == 4

    outputs: dict[str, list[np.ndarray]] = {key: [] for key in task.output_keys}
    features = data.validation.features
    for first in range(0, len(features), 5):
        batch = data.collate(features, np.arange(first, min(first + 5, len(features))))
        assert task.label_keys[0] not in batch
        with torch.no_grad():
            found = task.for_scoring(dict(model(**batch)), batch)
        for key, rows in found.items():
            outputs[key].extend(rows)
    assert [len(row) for row in outputs["start_logits"]] == features.lengths.tolist()
    scored = task.score(data.validation, outputs, options)
    assert set(scored.metrics) == {"exact_match", "f1"}
    assert set(scored.files) == {"predictions", "nbest_predictions"}
    assert len(scored.files["predictions"]) == 16


def test_a_test_file_without_answers_gives_predictions_and_no_metrics(
    options: TinyDataOptions, tokenizers: dict[str, Any], tmp_path: Path
) -> None:
    rows = [{key: row[key] for key in ("question", "context")} for row in tiny_rows(4)]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    options = replace(options, do_train=False, do_eval=False, do_predict=True, test_file=str(tmp_path / "test.json"))
    data = load(options, tokenizers["bert"])
    assert data.test is not None and data.train is None and data.validation is None
    zeros = [np.zeros(size, np.float32) for size in data.test.features.lengths]
    scored = resolve_task("qa").score(data.test, {"start_logits": zeros, "end_logits": zeros}, options)
    assert scored.metrics == {}
    assert list(scored.files["predictions"]) == ["row-1", "row-2", "row-3", "row-4"]


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_is_to_the_longest_rounded_up_or_to_the_maximum(side: str) -> None:
    ids = np.concatenate([np.arange(1, n + 1) for n in (3, 9)])
    features = Features({"input_ids": ids}, np.array([0, 3, 12]), {"start_positions": np.array([2, 8])}, {}, {})
    both = np.arange(2)
    labels = ("start_positions",)
    batch = Collator({"input_ids": 0}, 64, pad_to_max_length=False, padding_side=side, position_labels=labels)(
        features, both
    )
    assert batch["input_ids"].shape == (2, 16)
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 9]
    kept = batch["input_ids"][0][batch["attention_mask"][0].bool()]
    assert kept.tolist() == [1, 2, 3]
    assert (batch["input_ids"][0, 0] == 1) == (side == "right")
    assert batch["start_positions"].tolist() == ([2, 8] if side == "right" else [15, 15])
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert Collator({"input_ids": 0}, 64, True, side)(features, both)["input_ids"].shape == (2, 64)
    assert Collator({"input_ids": 0}, 10, False, side)(features, both)["input_ids"].shape == (2, 10)


def test_padding_says_nothing_in_distillation() -> None:
    batch = {"attention_mask": torch.tensor([[1, 1, 0]])}
    keep = resolve_task("qa").distillation_keep("start_logits", torch.zeros(1, 3), batch)
    assert keep is not None and keep.tolist() == [[True, True, False]]


def test_samples_are_limited_before_and_after_windows_are_cut(
    options: TinyDataOptions, tokenizers: dict[str, Any]
) -> None:
    options = replace(options, max_seq_length=40, doc_stride=12, max_train_samples=5, max_eval_samples=3)
    data = load(options, tokenizers["bert"])
    assert data.train is not None and data.validation is not None
    assert len(data.train) == 5
    assert set(data.train.facts["example"].tolist()) < {0, 1, 2, 3, 4}
    assert (len(data.validation.examples), len(data.validation.features)) == (3, 3)


def test_lengths_beyond_tokenizer_and_model_are_capped_with_a_note(
    options: TinyDataOptions, tokenizers: dict[str, Any]
) -> None:
    data = load(replace(options, max_seq_length=2000), tokenizers["bert"], max_positions=100)
    assert data.notes == [
        "max_seq_length 2000 is more than the tokenizer's model_max_length, 512: 512 is used",
        "max_seq_length 512 is more than the model's positions, 100: 100 is used",
    ]
    assert data.collate.max_length == 100


def test_skipped_rows_are_counted_over_all_splits(options: TinyDataOptions, tokenizers: dict[str, Any]) -> None:
    assert options.train_file is not None
    content = json.loads(Path(options.train_file).read_text())
    content["data"][4]["answers"]["answer_start"] = [9999]
    content["data"][7]["question"] = "where " * 70
    Path(options.train_file).write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"train\.json: row 5: .*--on_bad_rows skip"):
        load(options, tokenizers["bert"])
    data = load(replace(options, on_bad_rows="skip"), tokenizers["bert"])
    assert data.num_dropped == 2
    assert "left out 2 bad rows" in data.notes[0]
    assert "row 8: the question has 70 tokens" in data.notes[0]
    assert data.train is not None and data.train.facts["example"].max() == 29


def test_training_on_unanswerable_questions_without_version_2_is_remarked(
    options: TinyDataOptions, tokenizers: dict[str, Any], tiny_validation_v2: Path
) -> None:
    options = replace(options, do_eval=False, train_file=str(tiny_validation_v2))
    assert "questions have no answer" in load(options, tokenizers["bert"]).notes[0]
    assert load(replace(options, version_2_with_negative=True), tokenizers["bert"]).notes == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_file": None}, "--do_train needs --train_file, or --dataset_name with a train split"),
        ({"validation_file": None}, "--do_eval needs --validation_file"),
        ({"do_predict": True}, "--do_predict needs --test_file"),
        ({"n_best_size": 0}, "--n_best_size should be 1 or more, it is 0"),
        ({"doc_stride": -1}, "--doc_stride should be 0 or more"),
        ({"max_train_samples": 0}, "--max_train_samples should be 1 or more"),
        ({"on_bad_rows": "ignore"}, "--on_bad_rows should be error or skip"),
    ],
)
def test_options_that_cannot_be_met(
    options: TinyDataOptions, tokenizers: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        load(replace(options, **change), tokenizers["bert"])


def test_task_names_have_spellings_and_suggestions() -> None:
    for name in ("question_answering", "question-answering", "qa", "QA"):
        assert resolve_task(name).name == "question_answering"
    with pytest.raises(OptionError, match="did you mean 'question_answering'"):
        resolve_task("question_answring")


# ---- the cache


def cached_files(options: TinyDataOptions) -> list[Path]:
    assert options.cache_dir is not None
    return sorted(Path(options.cache_dir).rglob("*.npz"))


def token_ids(data: TaskData) -> list[int]:
    assert data.train is not None
    return data.train.tokens["input_ids"].tolist()


def test_features_come_from_the_cache_until_it_is_overwritten(
    options: TinyDataOptions, tokenizers: dict[str, Any]
) -> None:
    options = replace(options, do_eval=False)
    honest = token_ids(load(options, tokenizers["bert"]))
    (file,) = cached_files(options)
    marked = load_features(file)
    assert marked is not None
    marked.tokens["input_ids"][:] = 7
    save_features(file, marked)
    assert set(token_ids(load(options, tokenizers["bert"]))) == {7}
    assert token_ids(load(replace(options, overwrite_cache=True), tokenizers["bert"])) == honest
    assert token_ids(load(options, tokenizers["bert"])) == honest


@pytest.mark.parametrize(
    "damage", [lambda data: data[:100], lambda data: b"", lambda data: data[:200] + b"?" + data[201:]]
)
def test_a_damaged_cache_is_made_anew(options: TinyDataOptions, tokenizers: dict[str, Any], damage: Any) -> None:
    options = replace(options, do_eval=False)
    honest = token_ids(load(options, tokenizers["bert"]))
    (file,) = cached_files(options)
    file.write_bytes(damage(file.read_bytes()))
    assert token_ids(load(options, tokenizers["bert"])) == honest
    assert load_features(file) is not None


def test_whatever_shapes_the_features_names_another_cache_file(
    options: TinyDataOptions, tokenizers: dict[str, Any]
) -> None:
    options = replace(options, do_eval=False)
    assert options.train_file is not None
    load(options, tokenizers["bert"])
    load(replace(options, doc_stride=8), tokenizers["bert"])
    load(replace(options, max_seq_length=56), tokenizers["bert"])
    load(options, tokenizers["roberta"])
    load(options, tokenizers["left"])
    tiny_squad(options.train_file, rows=32, seed=99)
    load(options, tokenizers["bert"])
    assert len(cached_files(options)) == 6
    load(replace(options, pad_to_max_length=True, n_best_size=3), tokenizers["bert"])
    assert len(cached_files(options)) == 6


def test_a_cache_that_cannot_be_written_is_only_a_note(
    options: TinyDataOptions, tokenizers: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "in_the_way").write_text("")
    data = load(replace(options, cache_dir=str(tmp_path / "in_the_way")), tokenizers["bert"])
    assert "the features are not cached" in data.notes[0]
    assert data.train is not None


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    rows = tiny_rows(8)
    renamed = [
        {
            "id": row["id"],
            "answers": "not these",
            "frage": row["question"],
            "text": row["context"],
            "antwort": row["answers"],
        }
        for row in rows
    ]
    (tmp_path / "usual.json").write_text(json.dumps({"data": rows}))
    (tmp_path / "own.json").write_text(json.dumps({"data": renamed}))
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    usual = TinyDataOptions(train_file=str(tmp_path / "usual.json"), cache_dir=str(tmp_path / "cache"), do_train=True)
    own = replace(
        usual,
        train_file=str(tmp_path / "own.json"),
        question_column="frage",
        context_column="text",
        answer_column="antwort",
    )
    expected, found = (resolve_task("qa").load(options, tokenizer) for options in (usual, own))
    assert expected.train is not None and found.train is not None and found.notes == []
    assert np.array_equal(expected.train.tokens["input_ids"], found.train.tokens["input_ids"])
    assert np.array_equal(expected.train.labels["start_positions"], found.train.labels["start_positions"])
    with pytest.raises(DataError, match=r"there is no column 'frags' \(--question_column\); did you mean 'frage'"):
        resolve_task("qa").load(replace(own, question_column="frags"), tokenizer)
