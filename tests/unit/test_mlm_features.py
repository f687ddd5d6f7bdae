"""Text as tokens for masked language models: as Hugging Face's script cuts it, and read in lanes where it is streamed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from sparse_accel.errors import DataError, ModelError, OptionError
from sparse_accel.tasks.data_settings import DataSettings
from sparse_accel.tasks.features import Features
from sparse_accel.tasks.mlm_features import TextEncoder, TextSpec, in_chunks, text_spec
from sparse_accel.tasks.mlm_masking import BEGINS_WORD, CONTINUES_WORD, KINDS, SPECIAL
from sparse_accel.tasks.mlm_rows import read_lines, texts_of
from sparse_accel.tasks.mlm_streaming import (
    Lanes,
    LinesOfText,
    RowsOnDisk,
    SkippedRows,
    TextSource,
    check_holds_text,
    open_stream,
)
from sparse_accel.tasks.rows import BadRows
from tests.tiny import tiny_rows, tiny_tokenizer

TEXTS = [row["context"] for row in tiny_rows(40, seed=5)] + ["Zebra, 1999!"]


@pytest.fixture(scope="module", params=["bert", "roberta"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), request.param)


def spec(tokenizer: Any, length: int = 16, **changes: Any) -> TextSpec:
    return text_spec(tokenizer, max_length=length, **{"line_by_line": False, "whole_words": False, **changes})


def ids(features: Features) -> list[list[int]]:
    return [features[index]["input_ids"].tolist() for index in range(len(features))]


def test_lines_are_cut_as_the_tokenizer_cuts_them(tokenizer: Any) -> None:
    found = TextEncoder(spec(tokenizer, line_by_line=True))(TEXTS)
    expected = tokenizer(TEXTS, truncation=True, max_length=16, return_special_tokens_mask=True)
    assert ids(found) == expected["input_ids"]
    assert (found.extra[KINDS] == SPECIAL).tolist() == [bool(m) for row in expected["special_tokens_mask"] for m in row]
    long = [len(tokenizer(text)["input_ids"]) > 16 for text in TEXTS]
    assert found.facts["cut"].tolist() == long and True in long and False in long


def test_grouped_text_is_cut_as_hugging_faces_script_cuts_it(tokenizer: Any) -> None:
    """All lines with their special tokens end to end; only what the script throws away is one feature more."""
    found = in_chunks(TextEncoder(spec(tokenizer))(TEXTS), 16)
    together = [token for row in tokenizer(TEXTS)["input_ids"] for token in row]
    kept = len(together) // 16 * 16
    assert ids(found)[: kept // 16] == [together[at : at + 16] for at in range(0, kept, 16)]
    assert [token for row in ids(found) for token in row] == together
    assert in_chunks(TextEncoder(spec(tokenizer))(TEXTS[:1]), 4096).lengths.tolist() == [
        len(tokenizer(TEXTS[0])["input_ids"])
    ]


def test_each_token_knows_whether_it_begins_a_word(tokenizer: Any) -> None:
    text = "Zebra crossing, 1999!"
    found = TextEncoder(spec(tokenizer, 64, line_by_line=True))([text, text])
    encoding = tokenizer(text)
    words = encoding.word_ids()
    expected = [
        SPECIAL if word is None else CONTINUES_WORD if at and words[at - 1] == word else BEGINS_WORD
        for at, word in enumerate(words)
    ]
    assert found.extra[KINDS].tolist() == expected * 2
    assert {SPECIAL, CONTINUES_WORD, BEGINS_WORD} == set(expected)


def test_a_special_token_in_letters_is_special_all_the_same(tokenizer: Any) -> None:
    found = TextEncoder(spec(tokenizer))([f"the lamp {tokenizer.sep_token} the boat"])
    is_separator = found.tokens["input_ids"] == tokenizer.sep_token_id
    assert is_separator.sum() == 2 and (found.extra[KINDS][is_separator] == SPECIAL).all()


def test_tokenizers_that_cannot_mask_are_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    with pytest.raises(OptionError, match=r"--max_seq_length 2 leaves no room for text: .* adds 2 special tokens"):
        spec(tokenizer, 2)
    tokenizer.mask_token = None
    with pytest.raises(ModelError, match="has no mask token"):
        spec(tokenizer)


def test_a_line_that_is_no_text_is_a_bad_row_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_bytes(b"\xef\xbb\xbfa lamp\r\n\ncaf\xe9 noir\n a\0b\n a boat")
    rows, bad, notes = read_lines(path), BadRows("skip"), []
    assert texts_of(rows, None, str(path), bad, notes) == ["a lamp", " a boat"]
    assert bad.messages == [
        f"{path}:3: is not UTF-8 (byte 0xe9 at position 3 of the line)",
        f"{path}:4: holds a NUL character: is it text, and UTF-8?",
    ]
    with pytest.raises(DataError, match=r"data.txt:3: is not UTF-8 .*--on_bad_rows skip leaves such rows out"):
        texts_of(rows, None, str(path), BadRows("error"), notes)


# ---- streaming


def text_file(path: Path) -> TextSource:
    path.write_text("\n\n".join(TEXTS) + "\n", "utf-8")
    return LinesOfText(path)


def json_lines(path: Path) -> TextSource:
    path.write_text("\n".join(json.dumps({"id": n, "body": text}) for n, text in enumerate(TEXTS)), "utf-8")
    return LinesOfText(path, "body")


def on_disk(path: Path) -> TextSource:
    parts = [datasets.Dataset.from_dict({"t": part}) for part in (TEXTS[:10], ["", *TEXTS[10:]])]
    return RowsOnDisk(parts, ["t", "t"], "two sets")


every_source = pytest.mark.parametrize("make", [text_file, json_lines, on_disk])


@every_source
def test_lanes_read_every_line_once_in_a_round(
    make: Callable[[Path], TextSource], tokenizer: Any, tmp_path: Path
) -> None:
    source, line_spec = make(tmp_path / "data"), spec(tokenizer, 64, line_by_line=True)
    expected = ids(TextEncoder(line_spec)(TEXTS))
    lanes = Lanes(source, line_spec, np.arange(1), 1)
    assert [ids(lanes.take())[0] for _ in range(2 * len(TEXTS))] == expected * 2
    # Three lanes begin at three places, and each reads all.
    lanes = Lanes(source, line_spec, np.arange(3), 3)
    steps = [ids(lanes.take()) for _ in range(len(TEXTS))]
    for lane in range(3):
        read = [step[lane] for step in steps]
        assert sorted(read) == sorted(expected)
    assert len({json.dumps(row) for row in steps[0]}) == 3


@every_source
@pytest.mark.parametrize("by_line", [True, False])
def test_a_lane_gives_the_same_alone_and_from_any_step_on(
    make: Callable[[Path], TextSource], by_line: bool, tokenizer: Any, tmp_path: Path
) -> None:
    source, own_spec = make(tmp_path / "data"), spec(tokenizer, line_by_line=by_line)
    together = Lanes(source, own_spec, np.arange(4), 4)
    steps = [ids(together.take()) for _ in range(12)]
    alone = Lanes(source, own_spec, np.array([2]), 4)
    assert [ids(alone.take()) for _ in range(12)] == [[step[2]] for step in steps]
    later = Lanes(source, own_spec, np.array([1, 3]), 4)
    later.skip(7)
    assert [ids(later.take()) for _ in range(5)] == [[step[1], step[3]] for step in steps[7:]]
    if not by_line:
        assert {len(row) for step in steps for row in step} == {16}
        assert [token for step in steps for token in step[0]][:100] == [
            token for row in tokenizer(TEXTS)["input_ids"] for token in row
        ][:100]


def test_what_is_no_text_is_named_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_bytes(b"a lamp\n\xff\xfe\n a boat\n")
    with pytest.raises(DataError, match=r"data.txt: the line at byte 7 is not UTF-8 \(byte 0xff\)"):
        LinesOfText(path).read(0)
    skipped = SkippedRows()
    for _ in range(2):  # a row counts once, however often it is read
        assert LinesOfText(path, skipped=skipped).read(0) == (["a lamp", " a boat"], 0)
    assert skipped == {7: f"{path}: the line at byte 7 is not UTF-8 (byte 0xff)"}
    path.write_bytes("a lamp\n".encode("utf-16-le"))
    with pytest.raises(DataError, match="at byte 0 holds a NUL character"):
        LinesOfText(path).read(0)
    path.write_text("\n \n\n")
    with pytest.raises(DataError, match="data: holds no text"):
        check_holds_text(LinesOfText(path), "data")
    path.write_text('{"txt": "a"}\n')
    with pytest.raises(DataError, match="has no 'text'; did you mean 'txt'"):
        LinesOfText(path, "text").read(0)
    path.write_text('{"text": "a"}\n\n{"text": "\\ud800"}\n[]\n')
    with pytest.raises(DataError, match="at byte 15: 'text' has half of a surrogate pair at character 0"):
        LinesOfText(path, "text").read(0)
    assert LinesOfText(path, "text", SkippedRows()).read(0) == (["a"], 0)


@pytest.mark.parametrize(("before", "on_bad_rows"), [("\n \n", "error"), ("[]\nno row\n", "skip")])
def test_json_lines_are_known_by_their_first_row(before: str, on_bad_rows: str, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(before + '{"body": "a lamp"}\n')
    options = replace(DataSettings(), train_file=str(path), text_column_name="body", on_bad_rows=on_bad_rows)
    assert open_stream(options, spec(tokenizer), []).source.read(0) == (["a lamp"], 0)
