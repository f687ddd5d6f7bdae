"""Masking for masked language models: BERT's shares, whole words, and numbers that depend on nothing but the feature."""

from __future__ import annotations

import numpy as np
import pytest

from sparse_accel.tasks.features import Features
from sparse_accel.tasks.mlm_masking import BEGINS_WORD, CONTINUES_WORD, EVALUATION, KINDS, NOT_MASKED, SPECIAL, Masking

MASK, VOCABULARY = 4, 1000


def features(lengths: list[int], seed: int = 0) -> Features:
    """Random tokens from 5 on; each feature begins and ends with a special one, and a third of the rest continue a word."""
    rng = np.random.default_rng(seed)
    bounds = np.cumsum([0, *lengths]).astype(np.int64)
    kinds = rng.choice([BEGINS_WORD, BEGINS_WORD, CONTINUES_WORD], bounds[-1]).astype(np.uint8)
    kinds[bounds[:-1]] = kinds[bounds[1:] - 1] = SPECIAL
    tokens = {
        "input_ids": rng.integers(5, VOCABULARY, bounds[-1]).astype(np.int32),
        "token_type_ids": np.zeros(bounds[-1], np.uint8),
    }
    return Features(tokens=tokens, bounds=bounds, labels={}, facts={}, extra={KINDS: kinds})


def masking(**changes: object) -> Masking:
    return Masking(mask_id=MASK, vocab_size=VOCABULARY, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("whole_words", [False, True])
def test_the_shares_are_berts(whole_words: bool) -> None:
    """15% of the tokens are to be guessed; of these 80% show the mask, 10% any token, 10% themselves."""
    given = features([500] * 400)
    found = masking(whole_words=whole_words).prepare(given, np.arange(400), 0)
    labels, seen, original = found.extra["labels"], found.tokens["input_ids"], given.tokens["input_ids"]
    chosen = labels != NOT_MASKED
    maskable = given.extra[KINDS] != SPECIAL
    assert not chosen[~maskable].any()
    assert np.array_equal(labels[chosen], original[chosen]) and np.array_equal(seen[~chosen], original[~chosen])
    count = int(chosen.sum())
    assert count / maskable.sum() == pytest.approx(0.15, abs=0.004)
    shows_mask, stays = seen[chosen] == MASK, seen[chosen] == original[chosen]
    # Four standard deviations. Any token may be the mask or the token itself, one in a thousand.
    deviation = 4 / count**0.5
    assert shows_mask.mean() == pytest.approx(0.8, abs=0.4 * deviation)
    assert stays.mean() == pytest.approx(0.1, abs=0.3 * deviation)
    others = seen[chosen & (seen != MASK) & (seen != original)]
    assert others.min() >= 0 and others.max() < VOCABULARY
    # Any token is any token: a tenth of them in each tenth of the vocabulary.
    assert np.histogram(others, 10, (0, VOCABULARY))[0] / len(others) == pytest.approx(np.full(10, 0.1), abs=0.03)


def test_pieces_of_a_word_are_guessed_together() -> None:
    given = features([60] * 200)
    labels = masking(whole_words=True).prepare(given, np.arange(200), 3).extra["labels"]
    continues = given.extra[KINDS] == CONTINUES_WORD
    # A piece behind a special token begins a word of its own.
    behind_word = np.r_[False, given.extra[KINDS][:-1] != SPECIAL]
    pieces = np.flatnonzero(continues & behind_word)
    assert np.array_equal(labels[pieces] == NOT_MASKED, labels[pieces - 1] == NOT_MASKED)
    tokens = masking().prepare(given, np.arange(200), 3).extra["labels"]
    assert not np.array_equal(tokens[pieces] == NOT_MASKED, tokens[pieces - 1] == NOT_MASKED)


@pytest.mark.parametrize("whole_words", [False, True])
def test_a_feature_is_masked_the_same_in_whatever_batch_it_comes(whole_words: bool) -> None:
    given = features([5, 40, 17, 3, 64, 8], seed=1)
    mask = masking(whole_words=whole_words, probability=0.4, seed=7)
    whole = mask.prepare(given, np.arange(6), 2)
    order = np.array([4, 1, 5, 0, 3, 2])
    for part in (order, order[:2], order[3:4]):
        found = mask.prepare(given, part, 2)
        assert found.lengths.tolist() == given.lengths[part].tolist()
        for at, index in enumerate(part):
            assert np.array_equal(found.extra_of(at, "labels"), whole.extra_of(int(index), "labels"))
            ours, theirs = found[at], whole[int(index)]
            assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_masks_are_others_in_each_epoch_for_each_seed_and_for_equal_features() -> None:
    given = features([400] * 4)
    given.tokens["input_ids"][:] = np.tile(given.tokens["input_ids"][:400], 4)
    given.extra[KINDS][:] = np.tile(given.extra[KINDS][:400], 4)
    kinds = [
        masking(seed=seed).prepare(given, np.arange(4), epoch).extra["labels"] for seed in (0, 1) for epoch in (0, 1)
    ]
    masks = [labels[at : at + 400] != NOT_MASKED for labels in kinds for at in range(0, 1600, 400)]
    # Two independent masks share 15% of 15%.
    shared = [float((one & other).mean()) for at, one in enumerate(masks) for other in masks[:at]]
    assert max(shared) < 0.06


def test_an_evaluation_has_the_same_masks_whatever_the_seed() -> None:
    given = features([30] * 20)
    found = [masking(seed=seed).prepare(given, np.arange(20), EVALUATION) for seed in (0, 5, 2**62)]
    assert all(np.array_equal(one.extra["labels"], found[0].extra["labels"]) for one in found)
    assert (found[0].extra["labels"] != NOT_MASKED).any()


def test_features_without_a_word_are_left_alone() -> None:
    given = features([2, 2, 1])
    found = masking(probability=0.99).prepare(given, np.arange(3), 0)
    assert (found.extra["labels"] == NOT_MASKED).all()
    assert np.array_equal(found.tokens["input_ids"], given.tokens["input_ids"])
