"""Gaps of texts filled by a masked language model: what the logits say, from Python and from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sparse_accel.cli import main
from sparse_accel.errors import DataError, OptionError
from sparse_accel.serving.mlm_predicting import Filled, MaskFiller
from tests.tiny import tiny_bert

TEXT = "Ada bought a [MASK] lamp in [MASK]."


@pytest.fixture(scope="module", params=["bert", "roberta"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp(request.param), kind=request.param, head="MaskedLM")


def test_fillings_are_the_likeliest_tokens_at_each_gap(folder: Path) -> None:
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    model, tokenizer = AutoModelForMaskedLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    text = TEXT.replace("[MASK]", tokenizer.mask_token)
    filler = MaskFiller(folder, batch_size=2)
    found = list(filler.fillings(["Oslo " + tokenizer.mask_token, "no gap", text], top_k=3))
    assert isinstance(found[0], Filled) and isinstance(found[1], DataError) and isinstance(found[2], Filled)
    batch = tokenizer(text, return_tensors="pt")
    logits = model(**batch).logits[0][batch["input_ids"][0] == tokenizer.mask_token_id]
    for gap, row in zip(found[2].gaps, torch.softmax(logits, -1), strict=True):
        best = row.topk(3)
        assert [filling.token_id for filling in gap] == best.indices.tolist()
        assert [filling.score for filling in gap] == pytest.approx(best.values.tolist(), rel=1e-4)
        assert gap[0].token == tokenizer.convert_ids_to_tokens(gap[0].token_id)
    assert filler(text, top_k=3) == filler([text], top_k=3)[0] == found[2]
    assert tokenizer.mask_token not in found[2].text and found[2].gaps[0][0].text in found[2].text


def test_what_cannot_be_filled_says_why(folder: Path) -> None:
    filler = MaskFiller(folder, max_seq_length=8)
    mask = filler.mask_token
    long, other, number = filler.fillings([mask + " lamp" * 9, "a [mask] or <Mask>", 3])  # type: ignore[list-item]
    assert "tokens, and the model is given at most 8" in str(long)
    assert f"has no gap to fill: write {mask} where one is" in str(other)
    assert "should be text, it is a number" in str(number)
    with pytest.raises(OptionError, match="--top_k should be 1 or more"):
        filler(mask, top_k=0)
    with pytest.raises(DataError, match="text 2: has no gap to fill"):
        filler([mask, "a lamp"])


def test_the_command_fills_texts(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mask = MaskFiller(folder).mask_token
    out = tmp_path / "found.jsonl"
    words = ["predict", str(folder), "--text", f"a {mask} lamp", "--top_k", "2", "--output", str(out), "--json"]
    assert main(words) == 0
    (row,) = map(json.loads, out.read_text("utf-8").splitlines())
    assert row["text"] == f"a {mask} lamp" and [len(gap) for gap in row["masks"]] == [2]
    (tmp_path / "lines.txt").write_text(f"a {mask} lamp\n\nno gap\n", "utf-8")
    assert main(["predict", str(folder), "--file", str(tmp_path / "lines.txt"), "--on_bad_rows", "skip"]) == 0
    shown = capsys.readouterr()
    assert "  1. " in shown.out and "left out: text 2: has no gap to fill" in shown.err
    assert main(["predict", str(folder), "--question", "who?", "--context", "Ada"]) == 2
    assert "is a model for masked language modeling, which has no such option" in capsys.readouterr().err
