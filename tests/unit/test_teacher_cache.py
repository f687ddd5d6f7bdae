"""A teacher's outputs on disk: written whole, read back bit by bit, and refused when anything about them is wrong."""

from __future__ import annotations

import json
import os
import pickle
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertConfig, BertForQuestionAnswering

from sparse_accel.runtime.teachers.cache_key import describe_model, features_digest, fingerprint, weights_digest
from sparse_accel.runtime.teachers.cache_store import (
    ABOUT_FILE,
    OUTPUTS_FILE,
    CachedOutputs,
    CacheWriter,
    Column,
    DamagedCacheError,
    Layout,
    bits,
    open_cache,
    remove,
)
from sparse_accel.tasks.features import Features

KEY = "0123456789abcdef"
LENGTHS = np.array([3, 1, 5, 2])
BOUNDS = np.concatenate([[0], np.cumsum(LENGTHS)])


def layout(dtype: str = "float32") -> Layout:
    """A number a token, a pair a token, and three classes a feature."""
    columns = {
        "start": Column(True, (), dtype),
        "pair": Column(True, (2,), dtype),
        "classes": Column(False, (3,), dtype),
    }
    return Layout(columns, len(LENGTHS), int(BOUNDS[-1]))


def outputs(dtype: str = "float32") -> dict[str, Tensor]:
    """Of all features, end to end."""
    generator = torch.Generator().manual_seed(0)
    shapes = {name: column.whole_shape(4, 11) for name, column in layout().columns.items()}
    return {name: torch.randn(shape, generator=generator).to(getattr(torch, dtype)) for name, shape in shapes.items()}


def write(folder: Path, dtype: str = "float32", *, key: str = KEY, change: float = 0.0) -> dict[str, Tensor]:
    """A cache filled in two parts that are in no order; what it holds."""
    writer = CacheWriter(folder, layout(dtype), BOUNDS)
    values = {name: value + change for name, value in outputs(dtype).items()}
    for indices in (np.array([2, 0]), np.array([3, 1])):
        tokens = np.concatenate([np.arange(BOUNDS[i], BOUNDS[i + 1]) for i in indices])
        part = {name: value[tokens if name != "classes" else indices] for name, value in values.items()}
        writer.put(indices, {name: bits(value.contiguous()) for name, value in part.items()})
    writer.commit(key, {"teacher": "a test's"})
    return values


def opened(folder: Path, **changes: Any) -> CachedOutputs:
    found = open_cache(folder, KEY, BOUNDS, **changes)
    assert found is not None
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_written_is_read_bit_by_bit(tmp_path: Path, dtype: str) -> None:
    values = write(tmp_path / KEY, dtype)
    columns = opened(tmp_path / KEY)(np.array([1, 2]), 8)
    assert {name: (column.dtype, tuple(column.shape)) for name, column in columns.items()} == {
        "teacher.start": (getattr(torch, dtype), (2, 8)),
        "teacher.pair": (getattr(torch, dtype), (2, 8, 2)),
        "teacher.classes": (getattr(torch, dtype), (2, 3)),
    }
    assert torch.equal(columns["teacher.pair"][0, :1], values["pair"][3:4])
    assert torch.equal(columns["teacher.start"][1, :5], values["start"][4:9])
    assert not columns["teacher.start"][1, 5:].any() and not columns["teacher.start"][0, 1:].any()
    assert torch.equal(columns["teacher.classes"], values["classes"][1:3])
    # The file is one that others can read.
    stored = load_file(tmp_path / KEY / OUTPUTS_FILE)
    assert stored.keys() == values.keys() and all(torch.equal(stored[name], values[name]) for name in values)


def test_padding_on_the_left_moves_the_tokens_to_the_right(tmp_path: Path) -> None:
    values = write(tmp_path / KEY)
    columns = opened(tmp_path / KEY, padding_side="left")(np.array([0, 2]), 6)
    assert torch.equal(columns["teacher.start"][0, 3:], values["start"][:3])
    assert not columns["teacher.start"][0, :3].any()


def test_another_process_maps_the_file_for_itself(tmp_path: Path) -> None:
    write(tmp_path / KEY)
    found = opened(tmp_path / KEY)
    sent = pickle.dumps(found)
    assert len(sent) < 2000
    there = pickle.loads(sent)
    assert isinstance(there.arrays["start"].base, np.memmap)
    for name, column in found(np.array([0, 1]), 4).items():
        assert torch.equal(there(np.array([0, 1]), 4)[name], column)


def test_no_folder_is_no_cache(tmp_path: Path) -> None:
    assert open_cache(tmp_path / KEY, KEY, BOUNDS) is None


def _flip(folder: Path) -> None:
    data = bytearray((folder / OUTPUTS_FILE).read_bytes())
    data[-5] ^= 1
    (folder / OUTPUTS_FILE).write_bytes(data)


def _truncate(folder: Path) -> None:
    os.truncate(folder / OUTPUTS_FILE, 40)


def _other_header(folder: Path) -> None:
    data = (folder / OUTPUTS_FILE).read_bytes()
    (folder / OUTPUTS_FILE).write_bytes(data.replace(b'"F32"', b'"I32"', 1))


def _about(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        about = json.loads((folder / ABOUT_FILE).read_text())
        (folder / ABOUT_FILE).write_text(json.dumps(about | changes))

    return change


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (_flip, "checksum of "),
        (_truncate, "40 bytes instead of"),
        (_other_header, "begins with something else"),
        (lambda folder: (folder / OUTPUTS_FILE).unlink(), "outputs.safetensors cannot be read"),
        (lambda folder: (folder / ABOUT_FILE).unlink(), "about.json cannot be read"),
        (lambda folder: (folder / ABOUT_FILE).write_text("{"), "not JSON"),
        (_about(sparse_accel_teacher_cache=99), "another format"),
        (_about(fingerprint="f" * 32), "made of something else"),
        (_about(outputs={"start": {}}), "malformed"),
        (_about(outputs={"start": {"by_token": True, "shape": [], "dtype": "int8", "crc32": 0}}), "dtype int8"),
        (_about(num_features=5), "5 features of 11 tokens"),
    ],
)
def test_what_is_damaged_or_foreign_is_told_apart(
    tmp_path: Path, damage: Callable[[Path], None], complaint: str
) -> None:
    write(tmp_path / KEY)
    damage(tmp_path / KEY)
    with pytest.raises(DamagedCacheError, match=complaint):
        open_cache(tmp_path / KEY, KEY, BOUNDS)


def test_a_cache_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path / KEY, layout(), BOUNDS)
    assert not (tmp_path / KEY).exists()
    writer.discard()
    assert list(tmp_path.iterdir()) == []


def test_of_two_runs_that_fill_the_same_cache_the_first_is_kept(tmp_path: Path) -> None:
    second = CacheWriter(tmp_path / KEY, layout(), BOUNDS)
    values = write(tmp_path / KEY)
    second.commit(KEY, {})
    assert [path.name for path in tmp_path.iterdir()] == [KEY]
    assert torch.equal(opened(tmp_path / KEY)(np.arange(4), 5)["teacher.classes"], values["classes"])


def test_a_damaged_cache_gives_way_to_a_whole_one(tmp_path: Path) -> None:
    write(tmp_path / KEY)
    mapped = opened(tmp_path / KEY)
    before = mapped(np.arange(4), 5)["teacher.classes"]
    second = CacheWriter(tmp_path / KEY, layout(), BOUNDS)
    (tmp_path / KEY / ABOUT_FILE).unlink()
    second.commit(KEY, {})
    assert not opened(tmp_path / KEY)(np.arange(4), 5)["teacher.classes"].any()
    assert torch.equal(mapped(np.arange(4), 5)["teacher.classes"], before), "who reads the old one goes on"
    assert [path.name for path in tmp_path.iterdir()] == [KEY]
    remove(tmp_path / KEY)
    assert list(tmp_path.iterdir()) == []


def test_what_ended_processes_left_is_swept_away_after_a_day(tmp_path: Path) -> None:
    old, new, other = (tmp_path / name for name in (f".{KEY}.old", f".{KEY}.new", ".other.old"))
    for folder in (old, new, other):
        folder.mkdir()
        (folder / OUTPUTS_FILE).write_bytes(b"x")
    for folder in (old, other):
        os.utime(folder, (time.time() - 90_000,) * 2)
    CacheWriter(tmp_path / KEY, layout(), BOUNDS).discard()
    assert not old.exists() and new.exists() and other.exists()


def small_bert() -> BertForQuestionAnswering:
    shape = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 9,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BertForQuestionAnswering(BertConfig(**shape, max_position_embeddings=8))


def features(tokens: int = 7, labels: int = 0) -> Features:
    ids = np.arange(100, 100 + tokens, dtype=np.int32)
    return Features({"input_ids": ids}, np.array([0, 3, tokens]), {"start": np.full(2, labels, np.int32)}, {}, {})


def test_the_fingerprint_follows_what_the_outputs_depend_on_and_nothing_else() -> None:
    model = small_bert()
    weights = weights_digest(model)
    assert weights == weights_digest(small_bert())
    described = describe_model(model)
    model.config._name_or_path = "elsewhere"
    assert describe_model(model) == described
    model.config.layer_norm_eps *= 2
    assert describe_model(model)["config"] != described["config"]
    with torch.no_grad():
        next(model.parameters()).view(-1)[5] += 1e-6
    assert weights_digest(model) != weights
    assert weights_digest(model.half()) != weights

    digest = features_digest(features())
    assert digest == features_digest(features(labels=1)), "labels are not what a teacher is given"
    moved = replace(features(), bounds=np.array([0, 4, 7]))
    assert len({digest, features_digest(features(8)), features_digest(moved)}) == 3
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 1, "b": 3})
