"""Distillation from a cache: the live teacher's bits, once asked, and what happens when there can be none."""

from __future__ import annotations

import gc
import json
import shutil
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from accelerate.state import AcceleratorState
from rich.console import Console
from transformers import BertForQuestionAnswering

from sparse_accel.errors import ModelError, OptionError
from sparse_accel.runtime import setup
from sparse_accel.runtime.option_parsing import load_options
from sparse_accel.runtime.pauses import Run
from sparse_accel.runtime.preparing import prepare
from sparse_accel.runtime.teachers.cache_fill import length_sorted
from sparse_accel.runtime.teachers.cache_store import ABOUT_FILE, OUTPUTS_FILE
from sparse_accel.runtime.teachers.caching import CachedTeacher
from sparse_accel.runtime.teachers.placed import PlacedTeacher
from sparse_accel.runtime.tracking import Screen
from tests import running


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Three epochs of distillation, four steps each, without dropout."""
    made = running.tiny_world(tmp_path_factory.mktemp("world"), rows=60, dropout=0.0)
    return made | {"recipe": "question_answering/pruned", "recipe_args": '{"num_epochs": 3}', "do_eval": None}


@contextmanager
def prepared(world: dict[str, Any], output_dir: Path, **changes: Any) -> Iterator[Run]:
    """A run before its first step."""
    flags = {**world, **changes, "output_dir": str(output_dir)}
    options = load_options("question_answering", {k: str(v) for k, v in flags.items() if v is not None})
    try:
        accelerator, backend = setup.start_accelerator(options)
        run = prepare(options, accelerator, backend, Screen(Console(), is_shown=True, use_bar=False))
        try:
            yield run
        finally:
            run.close()
    finally:
        AcceleratorState._reset_state(True)


def models_alive() -> int:
    gc.collect()
    return sum(type(found) is BertForQuestionAnswering for found in gc.get_objects())


def cache_of(root: Path) -> Path:
    (folder,) = root.iterdir()
    return folder


@pytest.mark.parametrize(
    ("batching", "precision"),
    [
        ("packed", "bf16"),
        ("padded", "no"),
        pytest.param("packed", "no", marks=pytest.mark.exhaustive),
        pytest.param("padded", "bf16", marks=pytest.mark.exhaustive),
    ],
)
def test_a_cache_holds_the_bits_of_the_live_teacher_for_the_same_batches(
    world: dict[str, Any], tmp_path: Path, batching: str, precision: str
) -> None:
    cached = {**world, "batching": batching, "bf16": precision == "bf16", "teacher_cache": str(tmp_path / "teachers")}
    with (
        prepared(cached | {"teacher_cache": "off"}, tmp_path / "live") as run,
        prepared(cached, tmp_path / "cached") as other,
    ):
        live, batches, answers = run.session.teacher, other.session.loader.batches, other.session.teacher
        assert isinstance(live, PlacedTeacher) and isinstance(answers, CachedTeacher)
        about = json.loads((cache_of(tmp_path / "teachers") / ABOUT_FILE).read_text())
        for indices in length_sorted(batches.features.lengths, about["made_of"]["batches"]["features"]):
            batch = batches[indices]
            is_token = batch["attention_mask"].bool()
            for key, expected in live(batch).items():
                found = answers(batch)[key]
                assert found.dtype == torch.float32
                assert torch.equal(found[is_token], expected[is_token])
                assert not found[~is_token].any()
    stored = {output["dtype"] for output in about["outputs"].values()}
    assert stored == {"bfloat16" if precision == "bf16" else "float32"}, "as it was computed"


def test_the_first_run_frees_its_teacher_and_a_later_one_places_none(
    world: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, world = models_alive(), world | {"cache_dir": str(tmp_path / "cache")}
    with prepared(world, tmp_path / "live", teacher_cache="off"):
        assert models_alive() == before + 2
    with prepared(world, tmp_path / "first"):
        assert models_alive() == before + 1, "the student alone"
    assert "the teacher is asked once for all" in capsys.readouterr().out
    changes = {"seed": 7, "per_device_train_batch_size": 4, "optim": "sgd"}
    with prepared(world, tmp_path / "later", **changes) as run:
        assert models_alive() == before + 1
        assert isinstance(run.session.teacher, CachedTeacher)
    printed = capsys.readouterr().out
    assert "is read from" in printed and "replicated" not in printed


def test_a_cached_run_resumes_to_the_bits_of_one_that_was_not_interrupted(
    world: dict[str, Any], tmp_path: Path
) -> None:
    cached = {**world, "teacher_cache": str(tmp_path / "teachers"), "save_steps": 2}
    whole = running.run(cached, tmp_path / "whole")
    running.run(cached, tmp_path / "parts", max_steps=4)
    running.run(cached, tmp_path / "parts")
    assert running.differing(whole, tmp_path / "parts") == []


@pytest.mark.parametrize("damage", ["bytes", pytest.param("foreign", marks=pytest.mark.exhaustive)])
def test_a_cache_that_is_damaged_or_foreign_is_made_again(
    world: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    cached = world | {"teacher_cache": str(tmp_path / "teachers")}
    with prepared(cached, tmp_path / "first"):
        pass
    folder = cache_of(tmp_path / "teachers")
    whole = (folder / OUTPUTS_FILE).read_bytes()
    if damage == "bytes":
        (folder / OUTPUTS_FILE).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    else:
        about = json.loads((folder / ABOUT_FILE).read_text())
        (folder / ABOUT_FILE).write_text(json.dumps(about | {"fingerprint": "0" * 32}))
    capsys.readouterr()
    with prepared(cached, tmp_path / "second"):
        pass
    complaint = {"bytes": "the checksum of start_logits is wrong", "foreign": "its fingerprint is another"}[damage]
    assert capsys.readouterr().out.count(f"{complaint}; it is made again") == 1
    assert cache_of(tmp_path / "teachers") == folder and (folder / OUTPUTS_FILE).read_bytes() == whole


@pytest.mark.exhaustive
def test_what_the_teacher_or_its_batches_are_gives_another_cache(world: dict[str, Any], tmp_path: Path) -> None:
    cached = world | {"teacher_cache": str(tmp_path / "teachers")}
    others: list[dict[str, Any]] = [
        {}, {"distill_teacher": "self"}, {"batching": "padded"}, {"max_seq_length": 32, "doc_stride": 8}, {"bf16": True},
        {"max_train_samples": 50}, {"teacher_cache_dtype": "float16"},
    ]  # fmt: skip
    for number, changes in enumerate(others, start=1):
        with prepared(cached, tmp_path / f"run{number}", **changes):
            assert len(list((tmp_path / "teachers").iterdir())) == number, changes


def test_float16_takes_half_the_room_and_rounds(world: dict[str, Any], tmp_path: Path) -> None:
    sizes, answers = {}, {}
    for dtype in ("auto", "float16"):
        changes = {"teacher_cache": str(tmp_path / dtype), "teacher_cache_dtype": dtype}
        with prepared(world, tmp_path / f"run-{dtype}", **changes) as run:
            batch = next(iter(run.session.loader.steps(run.state.clock, 1)))[0].inputs
            answers[dtype] = run.session.teacher(batch)["start_logits"]
        about = json.loads((cache_of(tmp_path / dtype) / ABOUT_FILE).read_text())
        sizes[dtype] = about["num_tokens"] * {"float32": 8, "float16": 4}[about["outputs"]["start_logits"]["dtype"]]
        assert 0 < (cache_of(tmp_path / dtype) / OUTPUTS_FILE).stat().st_size - sizes[dtype] < 400
    assert sizes["float16"] * 2 == sizes["auto"]
    assert 0 < (answers["float16"] - answers["auto"]).abs().max() < 1e-3


def test_a_disk_without_room_leaves_the_teacher_live_or_ends_a_run_that_named_it(
    world: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    # Enough for the run without a checkpoint.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 400_000, 400_000))
    with prepared(world | {"cache_dir": str(tmp_path / "cache")}, tmp_path / "auto", save_strategy="no") as run:
        assert isinstance(run.session.teacher, PlacedTeacher)
    assert "none, the teacher is asked in every step: 0.4 MB are free on the disk" in capsys.readouterr().out
    full = world | {"teacher_cache": str(tmp_path / "teachers"), "save_strategy": "no"}
    with pytest.raises(OptionError, match=r"--teacher_cache .*: 0.4 MB are free"), prepared(full, tmp_path / "full"):
        pass
    assert not (tmp_path / "full").exists() and not list((tmp_path / "teachers").glob("*"))


def test_a_teacher_that_fits_only_before_the_student_is_there_fills_a_cache(
    world: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = namedtuple("memory", "available")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory(6_000_000))
    with pytest.raises(ModelError, match="does not fit"), prepared(world, tmp_path / "live", teacher_cache="off"):
        pass
    with prepared(world, tmp_path / "cached", teacher_cache=str(tmp_path / "teachers")) as run:
        assert isinstance(run.session.teacher, CachedTeacher)
    assert "replicated; alone about 4." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"max_steps": 4}, "distils in 4 steps and an epoch has 4"),
        ({"distill_include_padding": True}, "says on padding"),
        ({"recipe": "KEYS"}, "leaves attention_mask out"),
    ],
)
def test_what_a_cache_cannot_hold_or_is_not_worth_is_asked_live_and_why(
    world: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], reason: str
) -> None:
    if changes.get("recipe") == "KEYS":
        keys = "hardness: 1.0\n    teacher_input_keys: [input_ids]"
        text = f"modifiers:\n  - !DistillationModifier\n    {keys}\n    end_epoch: 3.0\n"
        changes = {"recipe": text, "recipe_args": None, "batching": "padded"}
    with prepared(world | {"cache_dir": str(tmp_path / "cache")}, tmp_path / "out", **changes) as run:
        assert isinstance(run.session.teacher, PlacedTeacher)
    assert reason in capsys.readouterr().out
    assert not (tmp_path / "cache" / "sparse_accel_features" / "teachers").exists()


def test_a_teacher_that_is_given_a_part_of_the_batch_is_cached(world: dict[str, Any], tmp_path: Path) -> None:
    keys = "hardness: 1.0\n    teacher_input_keys: [input_ids, attention_mask]"
    text = f"modifiers:\n  - !DistillationModifier\n    {keys}\n    end_epoch: 3.0\n"
    changes = {"recipe": text, "recipe_args": None, "batching": "padded", "teacher_cache": str(tmp_path / "teachers")}
    model = BertForQuestionAnswering.from_pretrained(world["distill_teacher"]).eval()
    with prepared(world, tmp_path / "out", **changes) as run, torch.no_grad():
        batch = next(iter(run.session.loader.steps(run.state.clock, 1)))[0].inputs
        expected = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).start_logits
        (modifier,) = run.session.recipe.modifiers
        found = run.session.teacher(modifier.teacher_inputs(batch))["start_logits"]
        is_token = batch["attention_mask"].bool()
        assert torch.allclose(found[is_token], expected[is_token], atol=1e-5)


@pytest.mark.exhaustive
def test_loading_workers_give_the_same_run_and_a_live_teacher_almost_the_same(
    world: dict[str, Any], tmp_path: Path
) -> None:
    cached = world | {"teacher_cache": str(tmp_path / "teachers")}
    one = running.run(cached, tmp_path / "one")
    shutil.rmtree(tmp_path / "teachers")
    assert running.differing(one, running.run(cached, tmp_path / "two", dataloader_num_workers=2)) == []
    live = running.run(cached, tmp_path / "live", teacher_cache="off")
    assert running.largest_difference(one, live) < 1e-5
