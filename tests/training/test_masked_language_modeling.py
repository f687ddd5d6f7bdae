"""Masked language models through the real command: how a run goes on, what is streamed, and what bad input is told."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from sparse_accel.cli import main
from sparse_accel.errors import DataError, ModelError, OptionError, SparseAccelError
from sparse_accel.runtime import setup
from sparse_accel.runtime.option_parsing import load_options
from sparse_accel.runtime.run import train
from sparse_accel.serving.mlm_predicting import MaskFiller
from sparse_accel.tasks import resolve_task
from sparse_accel.tasks.data_settings import DataSettings
from tests import running
from tests.tiny import tiny_bert, tiny_rows, tiny_tokenizer

TASK = "masked_language_modeling"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("mlm")
    tiny_bert(folder / "student", head="MaskedLM", dropout=0.0)
    contexts = [row["context"] for row in tiny_rows(256)[::4]]
    (folder / "train.txt").write_text("\n".join(contexts[:48]), "utf-8")
    (folder / "validation.txt").write_text("\n".join(contexts[48:]), "utf-8")
    return {
        "model_name_or_path": folder / "student",
        "train_file": folder / "train.txt",
        "validation_file": folder / "validation.txt",
        "do_train": True,
        "max_seq_length": 32,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "num_train_epochs": 1,
        "max_steps": 6,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "cache_dir": folder / "cache",
    }


def run(options: dict[str, Any], output_dir: Path, **changes: Any) -> Path:
    flags = {**options, **changes, "output_dir": output_dir}
    try:
        train(load_options(TASK, {name: str(value) for name, value in flags.items() if value is not None}))
    finally:
        AcceleratorState._reset_state(True)
    return output_dir


from_files_and_from_a_stream = pytest.mark.parametrize(
    "streaming", [True, pytest.param(None, marks=pytest.mark.exhaustive)]
)


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in running.log(folder)]


@from_files_and_from_a_stream
def test_a_continued_run_is_the_uninterrupted_one(
    streaming: bool | None, world: dict[str, Any], tmp_path: Path
) -> None:
    """Masks and text are those of the step, not of what was done before."""
    steps = {"streaming": streaming, "save_strategy": "steps", "save_steps": 4}
    whole = run(world, tmp_path / "whole", **steps)
    run(world, tmp_path / "parts", **steps)
    for name in ("model.safetensors", "all_results.json"):
        (tmp_path / "parts" / name).unlink()
    run(world, tmp_path / "parts", **steps, resume_from_checkpoint=tmp_path / "parts/checkpoint-4")
    assert running.differing(whole, tmp_path / "parts") == []
    assert losses(tmp_path / "parts") == losses(whole) and len(losses(whole)) == 6


@from_files_and_from_a_stream
def test_a_step_is_the_same_however_it_is_cut(streaming: bool | None, world: dict[str, Any], tmp_path: Path) -> None:
    one = run(world, tmp_path / "one", streaming=streaming, max_steps=3)
    other = run(
        world,
        tmp_path / "other",
        streaming=streaming,
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        batching="padded" if streaming else "packed",
    )
    assert losses(other) == pytest.approx(losses(one), rel=2e-6)


@pytest.mark.parametrize(
    ("kind", "batching"),
    [
        ("bert", "packed"),
        ("distilbert", "padded"),
        *(
            pytest.param(kind, batching, marks=pytest.mark.exhaustive)
            for kind in ("bert", "roberta", "electra", "albert")
            for batching in ("packed", "padded")
            if (kind, batching) != ("bert", "packed")
        ),
    ],
)
def test_a_head_that_computes_masked_tokens_alone_learns_the_same(
    kind: str, batching: str, world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_bert(tmp_path / "student", kind=kind, head="MaskedLM", dropout=0.0)
    options = {"model_name_or_path": tmp_path / "student", "batching": batching, "max_steps": 2, "do_eval": True}
    chosen = []
    real = setup.choose_head_rows
    monkeypatch.setattr(setup, "choose_head_rows", lambda *a, **k: chosen.append(real(*a, **k)) or chosen[-1])
    one = run(world, tmp_path / "one", **options)
    assert chosen[0][1], "the head was not able to"
    monkeypatch.setattr(setup, "choose_head_rows", lambda task, model, collate, *a, **k: (collate, frozenset()))
    other = run(world, tmp_path / "other", **options)
    assert losses(one) == pytest.approx(losses(other), rel=2e-6)
    ours, theirs = running.results(one), running.results(other)
    assert ours == pytest.approx(theirs, rel=1e-5)


DISTILLED = """
training_modifiers:
  - !EpochRangeModifier
    start_epoch: 0.0
    end_epoch: 1.0
distillation_modifiers:
  - !DistillationModifier
    hardness: 0.5
"""


@pytest.mark.parametrize("top_k", [8, pytest.param(0, marks=pytest.mark.exhaustive)])
def test_a_distilled_step_is_the_same_however_it_is_cut(top_k: int, world: dict[str, Any], tmp_path: Path) -> None:
    """Lines of many lengths: a micro-batch's share of the masked tokens is not its share of all tokens."""
    tiny_bert(tmp_path / "teacher", head="MaskedLM", seed=3)
    (tmp_path / "recipe.yaml").write_text(DISTILLED)
    text = "\n".join(row["context"][: 20 + 17 * (at % 7)] for at, row in enumerate(tiny_rows(64)))
    (tmp_path / "train.txt").write_text(text)
    options = {"train_file": tmp_path / "train.txt", "line_by_line": True, "max_seq_length": 64, "max_steps": 2}
    options |= {"recipe": tmp_path / "recipe.yaml", "distill_teacher": tmp_path / "teacher", "batching": "padded"}
    options["distill_top_k"] = top_k or None
    one = run(world, tmp_path / "one", **options)
    cut = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    other = run(world, tmp_path / "other", **options, **cut)
    for term in ("loss", "task_loss", "distillation_loss"):
        ours, theirs = ([line[term] for line in running.log(out)] for out in (one, other))
        assert ours == pytest.approx(theirs, rel=2e-6), term


def test_a_stream_read_ahead_is_the_same_stream_and_says_what_it_left_out(
    world: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"".join(b"caf\xe9 %d\n" % n for n in range(6)) + world["train_file"].read_bytes())
    options = {"streaming": True, "line_by_line": True, "max_steps": 3, "train_file": bad, "on_bad_rows": "skip"}
    one = run(world, tmp_path / "one", **options)
    other = run(world, tmp_path / "other", **options, dataloader_num_workers=1)
    assert losses(one) == losses(other)
    said = f"of the rows that were read, training left out 6 bad rows: {bad}: the line at byte 0 is not UTF-8 (byte 0xe9); "
    assert capsys.readouterr().out.count(said) == 2


@pytest.mark.exhaustive
def test_an_evaluation_has_the_same_masks_every_time(world: dict[str, Any], tmp_path: Path) -> None:
    """Without a step between them, and whatever the seed, the scores are equal; perplexity is exp of the loss."""
    scored = [
        running.results(run(world, tmp_path / str(seed), do_train=None, do_eval=True, seed=seed, batching=batching))
        for seed, batching in ((1, None), (2, "padded"))
    ]
    assert scored[0] == pytest.approx(scored[1], rel=1e-5)
    assert scored[0]["eval_perplexity"] == pytest.approx(math.exp(scored[0]["eval_loss"]))
    assert 0 <= scored[0]["eval_accuracy"] < 1


def test_lines_are_held_out_where_there_is_no_validation_data(world: dict[str, Any], tmp_path: Path) -> None:
    options = {"validation_file": None, "do_eval": True, "line_by_line": True, "max_seq_length": 512, "max_steps": 1}
    found = running.results(run(world, tmp_path, **options, validation_split_percentage=25))
    assert (found["train_samples"], found["eval_samples"]) == (36, 12)


@pytest.mark.exhaustive
def test_tied_weights_are_pruned_and_quantized_and_what_is_written_scores_as_in_training(
    world: dict[str, Any], tmp_path: Path
) -> None:
    recipe = """
training_modifiers:
  - !EpochRangeModifier
    start_epoch: 0.0
    end_epoch: 2.0
constant_modifiers:
  - !ConstantPruningModifier
    start_epoch: 0.0
    params: __ALL_PRUNABLE__
quantization_modifiers:
  - !QuantizationModifier
    start_epoch: 1.0
    submodules: [bert.embeddings, bert.encoder, cls]
distillation_modifiers:
  - !DistillationModifier
    start_epoch: 0.0
    hardness: 0.5
"""
    (tmp_path / "recipe.yaml").write_text(recipe)
    options = {"recipe": tmp_path / "recipe.yaml", "do_eval": True, "max_train_samples": 12, "max_steps": -1}
    out = run(world, tmp_path / "out", **options, distill_teacher="self", distill_top_k=5)
    again = run(world, tmp_path / "again", model_name_or_path=out, do_train=None, do_eval=True, max_steps=-1)
    ours, theirs = running.results(out), running.results(again)
    assert {name: ours[name] for name in theirs if name.startswith("eval_")} == pytest.approx(theirs, rel=1e-4)
    assert "distillation_loss" in running.log(out)[-1]
    deployment = out / "deployment"
    assert main(["export", str(out)]) == 0
    words = ["evaluate", str(deployment), "--validation_file", str(world["validation_file"])]
    assert main([*words, "--output_dir", str(tmp_path / "scores"), "--cache_dir", str(world["cache_dir"])]) == 0
    exported = json.loads((tmp_path / "scores/eval_results.json").read_text())
    assert exported["eval_perplexity"] == pytest.approx(ours["eval_perplexity"], rel=0.01)
    found = MaskFiller(deployment)("Ada bought a [MASK] lamp in [MASK].", top_k=2)
    assert [len(gap) for gap in found.gaps] == [2, 2]


def test_a_new_model_starts_from_random_weights(world: dict[str, Any], tmp_path: Path) -> None:
    shape = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=32,max_position_embeddings=40"
    options = {"model_name_or_path": None, "model_type": "bert", "tokenizer_name": world["model_name_or_path"]}
    options |= {"max_seq_length": None, "max_steps": 2, "config_overrides": shape}
    out = run(world, tmp_path / "out", **options)
    config = json.loads((out / "config.json").read_text())
    tokenizer = json.loads((world["model_name_or_path"] / "config.json").read_text())["vocab_size"]
    assert (config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]) == (16, 1, tokenizer)
    assert (
        "model_name_or_path" not in (out / "README.md").read_text()
        and "a new bert model" in (out / "README.md").read_text()
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_two_data_sets_are_one_behind_the_other(streaming: bool, world: dict[str, Any], tmp_path: Path) -> None:
    lines = world["train_file"].read_text().splitlines()
    parts = {"train": datasets.Dataset.from_dict({"text": lines[:20]}), "validation": lines[40:]}
    parts["validation"] = datasets.Dataset.from_dict({"text": parts["validation"]})
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "first")
    datasets.Dataset.from_dict({"text": lines[20:40]}).save_to_disk(tmp_path / "second")
    options = DataSettings(
        dataset_name=str(tmp_path / "first"),
        dataset_name_2=str(tmp_path / "second"),
        streaming=streaming,
        line_by_line=True,
        max_seq_length=512,
        cache_dir=str(tmp_path / "cache"),
        do_train=True,
        do_eval=True,
    )
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    data = resolve_task(TASK).load(options, tokenizer)
    if data.stream is not None:
        lanes = data.stream.lanes(np.arange(1), 1)
        found = [lanes.take()[0]["input_ids"].tolist() for _ in range(40)]
    else:
        assert data.train is not None
        found = [data.train[at]["input_ids"].tolist() for at in range(len(data.train))]
    assert (data.stream is not None) == streaming
    assert found == tokenizer(lines[:40])["input_ids"]
    assert data.validation is not None and len(data.validation.features) == 8
    assert any("second: has no validation split" in note for note in data.notes)


BAD = [
    ({"dataset_name_2": "wiki"}, OptionError, "--dataset_name_2: is put behind --dataset_name"),
    ({"config_overrides": "hidden_size=8"}, OptionError, "--config_overrides: needs --model_type"),
    ({"model_type": "bert"}, OptionError, "--model_type and --model_name_or_path: .* not both"),
    ({"model_type": "bert", "model_name_or_path": None}, OptionError, "name one with --tokenizer_name"),
    ({"mlm_probability": "1.5"}, OptionError, "mlm_probability"),
    ({"text_column_name": "txt"}, DataError, "train.txt: there is no column 'txt' .*did you mean 'text'"),
    ({"distill_top_k": 3}, OptionError, "--distill_top_k: needs a --distill_teacher"),
    ({"streaming": True, "max_steps": -1}, OptionError, "--streaming: nobody has counted the data"),
    ({"streaming": True, "num_train_epochs": 4}, OptionError, "--max_steps 6: .* 4 or 8 steps would be"),
    ({"streaming": True, "num_train_epochs": 0.7}, OptionError, "--max_steps 6: .* 0.7 epochs, .*; 7 steps would be"),
    ({"streaming": True, "do_eval": True, "validation_file": None}, OptionError, "--do_eval: needs --validation_file"),
    ({"streaming": True, "batching": "grouped"}, OptionError, "--batching grouped: has no effect with --streaming"),
]


@pytest.mark.parametrize(("changes", "kind", "message"), BAD)
def test_bad_options_are_told(
    changes: dict[str, Any], kind: type[SparseAccelError], message: str, world: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(kind, match=message):
        run(world, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("streaming", [None, True])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "empty.txt: is empty"),
        ("blank.txt", b"\n \n\n", "blank.txt: (is empty|holds no text)"),
        ("utf16.txt", "a lamp\n".encode("utf-16"), "utf16.txt: (is UTF-16|the line at byte 0 is not UTF-8)"),
        ("binary.txt", b"a lamp\n\0\1\2\n", "binary.txt:.* holds a NUL character"),
        ("columns.jsonl", b'{"txt": 3}\n', "columns.jsonl.*: 'txt' should be text, it is a number"),
        ("half.jsonl", b'{"text": "a \\ud800"}\n', "half.jsonl.*: 'text' has half of a surrogate pair at character 2"),
        ("words.xyz", b"a lamp\n", "words.xyz: (cannot tell the format|lines of text .* can be read)"),
    ],
)
def test_bad_files_are_told(
    name: str, content: bytes, message: str, streaming: bool | None, world: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises((DataError, OptionError), match=message):
        run(world, tmp_path / "out", train_file=tmp_path / name, streaming=streaming)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model_type", "overrides", "message"),
    [
        ("brt", None, "--model_type brt: there is no such architecture; did you mean 'bert'"),
        ("gpt2", None, "--model_type gpt2: has no model for masked language modeling"),
        ("bert", "hiden_size=8", "a bert config has no 'hiden_size'; did you mean 'hidden_size'"),
        ("bert", "hidden_size=big", r"hidden_size is 768 \(int\) by default, got 'big'"),
        ("bert", "hidden_size=10", "no bert model can be made so"),
        ("bert", "hidden_act=rlu", "hidden_act: there is no activation 'rlu'; did you mean 'relu'"),
        ("distilbert", "activation=glu", "activation: there is no activation 'glu'; did you mean 'gelu'"),
    ],
)
def test_new_models_that_cannot_be_are_told(
    model_type: str, overrides: str | None, message: str, world: dict[str, Any], tmp_path: Path
) -> None:
    options = {"model_name_or_path": None, "tokenizer_name": world["model_name_or_path"], "model_type": model_type}
    with pytest.raises(OptionError, match=message):
        run(world, tmp_path / "out", **options, config_overrides=overrides)


def test_a_tokenizer_without_a_mask_is_told(world: dict[str, Any], tmp_path: Path) -> None:
    tiny_bert(tmp_path / "student", head="MaskedLM")
    path = tmp_path / "student/tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "mask_token": None}))
    with pytest.raises(ModelError, match="has no mask token"):
        run(world, tmp_path / "out", model_name_or_path=tmp_path / "student")
    assert load_file(tmp_path / "student/model.safetensors")
