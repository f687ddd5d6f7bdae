"""Packed batches: no token sees another sequence, and everything is what it is with padding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from sparse_accel.compress.attention import packed_attention
from sparse_accel.compress.plan import install, set_phase
from sparse_accel.compress.ranges import Phase, begin_step, end_step, observe_tokens, quantizers
from sparse_accel.folders.packed_pooling import pools_by_sequence
from sparse_accel.folders.packing_support import first_position, obstacle_to_packing
from sparse_accel.packing import by_feature, model_inputs, padded_inputs, places
from sparse_accel.runtime.setup import accepted_inputs
from sparse_accel.tasks import resolve_task
from sparse_accel.tasks.collating import Collator, PackedCollator
from sparse_accel.tasks.features import Features
from tests.unit.qat_bert import alone, bert, tutorial_plan

LENGTHS = (11, 3, 20, 1, 7)
KEYS = ("start_logits", "end_logits")
TASK = resolve_task("question_answering")


def features(lengths: tuple[int, ...] = LENGTHS, vocabulary: int = 50, seed: int = 0) -> Features:
    generator = np.random.default_rng(seed)
    total = sum(lengths)
    return Features(
        tokens={
            "input_ids": generator.integers(3, vocabulary, total).astype(np.int32),
            "token_type_ids": generator.integers(0, 2, total).astype(np.uint8),
        },
        bounds=np.cumsum([0, *lengths]),
        labels={name: np.array([generator.integers(0, n) for n in lengths], np.int32) for name in TASK.label_keys},
        facts={},
        extra={},
    )


PADS = {"input_ids": 0, "token_type_ids": 0}


def both(of: Features, **settings: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same features padded and packed."""
    everything = np.arange(len(of))
    return Collator(PADS, 20, False)(of, everything), PackedCollator(PADS, **settings)(of, everything)


def outputs(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    accepts = accepted_inputs(model) - set(TASK.label_keys)
    return by_feature(model(**model_inputs(batch, accepts)), batch)


def gradients(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = TASK.loss(outputs(model, batch), batch)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def apart(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference between gradients of a parameter, relative to it; those that are 0 but for rounding (a key's
    bias) relative to all."""
    whole = torch.cat([gradient.flatten() for gradient in theirs.values()]).norm()
    return max(float((ours[name] - g).norm() / (g.norm() + 1e-2 * whole)) for name, g in theirs.items())


def test_a_packed_batch_says_where_everything_is() -> None:
    packed = PackedCollator(PADS, first_position=2)(features((3, 1, 2)), np.array([2, 0]))
    assert packed["cu_seq_lens_q"].tolist() == [0, 2, 5] and packed["cu_seq_lens_q"].dtype == torch.int32
    assert packed["position_ids"].tolist() == [[2, 3, 2, 3, 4]]
    assert packed["rows"].tolist() == [[0, 1, 0], [2, 3, 4]]
    assert packed["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert packed["input_ids"].shape == (1, 5) and packed["start_positions"].shape == (2,)


def test_loss_and_gradients_are_those_of_padded_batches() -> None:
    model = bert(layers=2).eval()
    padded, packed = both(features())
    (loss, expected), (packed_loss, found) = gradients(model, padded), gradients(model, packed)
    assert packed_loss.item() == pytest.approx(loss.item(), rel=1e-6)
    assert found.keys() == expected.keys()
    assert apart(found, expected) < 1e-5


def test_no_token_sees_another_sequence() -> None:
    """Every other sequence may be replaced without one bit moving in this one, forward and backward."""
    model, one = bert(layers=2).eval(), features()
    other = features(seed=1)
    for kept in range(len(LENGTHS)):
        ids = other.tokens["input_ids"].copy()
        own = slice(one.bounds[kept], one.bounds[kept + 1])
        ids[own] = one.tokens["input_ids"][own]
        mixed = Features({**one.tokens, "input_ids": ids}, one.bounds, one.labels, {}, {})
        first, second = (both(of)[1] for of in (one, mixed))
        for key in KEYS:
            size = LENGTHS[kept]
            assert torch.equal(outputs(model, first)[key][kept, :size], outputs(model, second)[key][kept, :size])


def test_transformers_own_attention_would_mix_them() -> None:
    """Why bounds are needed: positions alone do not keep sequences apart under torch's fused attention."""
    model = bert(layers=2, attention="sdpa").eval()
    padded, packed = both(features())
    found = by_feature(model(input_ids=packed["input_ids"], position_ids=packed["position_ids"]), packed)
    expected = model(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"])
    real = packed["attention_mask"].bool()
    assert (found["start_logits"] - expected["start_logits"][:, : real.shape[1]])[real].abs().max() > 1e-3


@pytest.mark.parametrize("phase", [Phase.OBSERVE, Phase.FROZEN])
def test_quantized_training_sees_the_same_ranges_and_gives_the_same_gradients(phase: Phase) -> None:
    results = []
    for batch in both(features()):
        model = bert(layers=2)
        install(model, tutorial_plan(model))
        set_phase(model, Phase.OBSERVE)
        for step in range(3):
            begin_step(model, step)
            set_phase(model, phase if step == 2 else Phase.OBSERVE)
            observe_tokens(model, True)
            loss, grads = gradients(model, batch)
            end_step(model, alone)
        ranges = {name: (q.min_val, q.max_val, q.scale) for name, q in quantizers(model).items()}
        results.append((loss, grads, ranges))
    (loss, grads, ranges), (packed_loss, packed_grads, packed_ranges) = results
    # Values within a rounding error of the middle between two steps of a grid may be rounded apart.
    assert packed_loss.item() == pytest.approx(loss.item(), rel=2e-3)
    assert apart(packed_grads, grads) < 3e-2
    for name, expected in ranges.items():
        for ours, theirs in zip(packed_ranges[name], expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_by_bounds_is_attention_of_each_sequence(is_causal: bool) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, sum(LENGTHS), 4, dtype=torch.float64).unbind()
    bounds = torch.tensor(np.cumsum([0, *LENGTHS]), dtype=torch.int32)
    found = packed_attention(query, key, value, bounds, max(LENGTHS), 0.0, 0.3, is_causal)
    for first, last in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        scores = query[0, :, first:last] @ key[0, :, first:last].mT * 0.3
        if is_causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
        expected = scores.softmax(-1) @ value[0, :, first:last]
        torch.testing.assert_close(found[0, first:last], expected.transpose(0, 1))


def test_places_lead_to_a_padded_layout_and_back() -> None:
    bounds = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    tokens, is_token, place = places(bounds, 5, 4)
    assert is_token.sum(1).tolist() == [2, 0, 3]
    assert tokens[is_token].tolist() == [0, 1, 2, 3, 4]
    assert tokens.flatten()[place].tolist() == [0, 1, 2, 3, 4]


def test_a_packed_batch_can_be_given_to_a_model_that_wants_padding() -> None:
    model = bert(layers=2).eval()
    padded, packed = both(features())
    accepts = accepted_inputs(model) - set(TASK.label_keys)
    found = model(**model_inputs(padded_inputs(packed), accepts))["start_logits"]
    expected = model(**model_inputs(padded, accepts))["start_logits"]
    real = packed["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[:, : real.shape[1]][real], rtol=1e-5, atol=1e-6)


SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 60,
    "max_position_embeddings": 40,
}


def models() -> Iterator[tuple[str, Any]]:
    for family in ("Bert", "Roberta", "Electra", "Albert", "MPNet"):
        extra = {"embedding_size": 8} if family == "Albert" else {}
        config = getattr(transformers, f"{family}Config")(**SHAPE, **extra)
        yield family, getattr(transformers, f"{family}ForQuestionAnswering")(config).eval()
    config = transformers.DistilBertConfig(dim=16, hidden_dim=24, n_layers=2, n_heads=2, vocab_size=60)
    yield "DistilBert", transformers.DistilBertForQuestionAnswering(config).eval()


@pytest.mark.parametrize(("family", "model"), [pytest.param(*entry, id=entry[0]) for entry in models()])
def test_every_family_is_packed_exactly_or_not_at_all(family: str, model: Any) -> None:
    attention = model.config._attn_implementation
    obstacle = obstacle_to_packing(model, KEYS)
    if family == "MPNet":
        assert obstacle is not None and "attention interface" in obstacle
        assert model.config._attn_implementation == attention
        return
    assert obstacle is None
    of = features(vocabulary=60)
    padded, packed = both(of, first_position=first_position(model))
    found, expected = outputs(model, packed), outputs(model, padded)
    real = packed["attention_mask"].bool()
    for key in KEYS:
        torch.testing.assert_close(found[key][real], expected[key][:, : real.shape[1]][real], rtol=1e-4, atol=1e-6)


def test_a_model_whose_sequences_see_each_other_is_not_packed() -> None:
    config = transformers.MobileBertConfig(vocab_size=60, num_hidden_layers=2)
    obstacle = obstacle_to_packing(transformers.MobileBertForQuestionAnswering(config), KEYS)
    assert obstacle is not None and "see each other" in obstacle


@pytest.mark.parametrize("family", ["Bert", "Roberta", "Electra", "Albert", "DistilBert"])
def test_a_classifier_pools_the_first_token_of_each_sequence_or_is_not_packed(family: str) -> None:
    if family == "DistilBert":
        config = transformers.DistilBertConfig(
            dim=16, hidden_dim=24, n_layers=2, n_heads=2, vocab_size=60, num_labels=3
        )
    else:
        extra = {"embedding_size": 8} if family == "Albert" else {}
        config = getattr(transformers, f"{family}Config")(**SHAPE, **extra, num_labels=3)
    model = getattr(transformers, f"{family}ForSequenceClassification")(config).eval()
    obstacle = obstacle_to_packing(model, ("logits",))
    if family in ("Albert", "DistilBert"):  # which pool inside their forward
        assert obstacle is not None and "nor by sequence" in obstacle
        assert not pools_by_sequence(model)
        return
    assert obstacle is None and pools_by_sequence(model)
    padded, packed = both(features(vocabulary=60), first_position=first_position(model))
    found, expected = (outputs(model, batch)["logits"] for batch in (packed, padded))
    assert found.shape == (len(padded["input_ids"]), 3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
