"""Words to pieces: labels on first pieces, windows that lose no word."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparse_accel.errors import DataError, ModelError
from sparse_accel.tasks.word_pieces import NO_LABEL, PieceSpec, Sentence, cut_pieces, piece_spec
from tests.tiny import tiny_tokenizer, tiny_words

LABELS = ("B-A", "I-A", "O")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def spec_of(tokenizer: Any, max_length: int = 64, label_all_tokens: bool = False) -> PieceSpec:
    return piece_spec(tokenizer, max_length=max_length, labels=LABELS, label_all_tokens=label_all_tokens)


def test_the_first_piece_has_the_label_or_all_have_one(tokenizer: Any) -> None:
    sentence = Sentence(("Ada", "zzz", "blue"), ("B-A", "B-A", "O"))
    features = cut_pieces([sentence], spec_of(tokenizer))
    pieces = tokenizer.convert_ids_to_tokens(features.tokens["input_ids"].tolist())
    assert pieces == ["[CLS]", "ada", "z", "##z", "##z", "blue", "[SEP]"]
    assert features.extra["labels"].tolist() == [NO_LABEL, 0, 0, NO_LABEL, NO_LABEL, 2, NO_LABEL]
    assert features.extra["word"].tolist() == [-1, 0, 1, -1, -1, 2, -1]
    all_labelled = cut_pieces([sentence], spec_of(tokenizer, label_all_tokens=True))
    assert all_labelled.extra["labels"].tolist() == [NO_LABEL, 0, 0, 1, 1, 2, NO_LABEL]
    assert all_labelled.extra["word"].tolist() == features.extra["word"].tolist()


def test_the_pieces_of_a_sentence_that_fits_are_the_tokenizers_own(tokenizer: Any) -> None:
    words = ["Ada", "bought", "a", "zebra", "in", "Oslo", "."]
    theirs = tokenizer(words, is_split_into_words=True)
    ours = cut_pieces([Sentence(tuple(words), None)], spec_of(tokenizer))
    assert ours.tokens["input_ids"].tolist() == theirs["input_ids"]
    assert ours.tokens["token_type_ids"].tolist() == theirs["token_type_ids"]
    assert set(ours.extra["labels"].tolist()) == {NO_LABEL}


def test_windows_hold_every_word_once_and_in_order(tokenizer: Any) -> None:
    rng = random.Random(0)
    words = [*tiny_words(), "zzzzz", "qqqqqqqqqqqqqqq", "\u200b"]
    sentences = []
    for _ in range(40):
        chosen = tuple(rng.choices(words, k=rng.randint(1, 40)))
        sentences.append(Sentence(chosen, tuple(rng.choices(LABELS, k=len(chosen)))))
    whole = cut_pieces(sentences, spec_of(tokenizer, 512))
    cut = cut_pieces(sentences, spec_of(tokenizer, 9))
    assert len(cut) > 2 * len(whole)
    assert whole.facts["cut_words"].sum() == 0
    assert cut.facts["cut_words"].sum() == sum(sentence.words.count("qqqqqqqqqqqqqqq") for sentence in sentences)
    assert cut.lengths.max() <= 9
    for index, sentence in enumerate(sentences):
        windows = np.flatnonzero(cut.facts["example"] == index).tolist()
        found = [
            (word, label)
            for window in windows
            for word, label in zip(
                cut.extra_of(window, "word").tolist(),
                cut.extra_of(window, "labels").tolist(),
                strict=True,
            )
            if word >= 0
        ]
        tags = sentence.tags or ()
        assert found == [
            (place, LABELS.index(tag))
            for place, (word, tag) in enumerate(zip(sentence.words, tags, strict=True))
            if word != "\u200b"
        ]
    unseen = sum(sentence.words.count("\u200b") for sentence in sentences)
    scored = [int((features.extra["word"] >= 0).sum()) for features in (whole, cut)]
    assert scored == [sum(len(sentence.words) for sentence in sentences) - unseen] * 2
    assert unseen > 0


def test_a_sentence_without_a_piece_has_no_feature(tokenizer: Any) -> None:
    pieces = cut_pieces([Sentence(("\x00", "\u200b"), ("O", "O")), Sentence(("a",), ("O",))], spec_of(tokenizer))
    assert pieces.facts["example"].tolist() == [1]


def test_each_word_of_a_byte_level_tokenizer_begins_like_one_after_a_space(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path, "roberta")
    ids = cut_pieces([Sentence(("Ada", "bought", "."), None)], spec_of(tokenizer)).tokens["input_ids"]
    assert ids.tolist() == tokenizer(" Ada bought .")["input_ids"]


@pytest.mark.exhaustive
def test_processes_change_nothing(tokenizer: Any) -> None:
    sentences = [Sentence(("Ada", "bought", str(number)), ("B-A", "O", "O")) for number in range(2500)]
    one, two = (cut_pieces(sentences, spec_of(tokenizer), workers) for workers in (None, 2))
    assert one.bounds.tolist() == two.bounds.tolist()
    for ours, theirs in ((one.tokens, two.tokens), (one.extra, two.extra), (one.facts, two.facts)):
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert one.facts["example"].tolist() == list(range(2500))


def test_a_window_needs_room_for_a_word_and_the_tokenizer_must_be_fast(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="max_seq_length 2 leaves no token for a word"):
        cut_pieces([Sentence(("a",), None)], spec_of(tokenizer, 2))

    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match=r"Slow is a slow tokenizer.*tokenizer\.json"):
        spec_of(Slow())
