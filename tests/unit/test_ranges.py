"""Ranges: SparseML's moving average, whatever way a step's batch is split, without the padding."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparse_accel.compress import ranges
from sparse_accel.compress.fakequant import QuantSpec
from sparse_accel.compress.plan import CompressionPlan, install
from sparse_accel.compress.ranges import (
    ActivationQuantizer,
    ObservationContext,
    Phase,
    WeightQuantizer,
    begin_step,
    calibrating,
    end_calibration,
    end_step,
    load_quantization_state,
    moved_range,
    needs_first_range,
    observed_range,
    quantization_state,
    quantizers,
    set_phase,
    without_range,
)
from sparse_accel.errors import ModelError
from sparse_accel.runtime.backends import recompute_activations
from tests.unit.qat_bert import alone, batch, bert, tutorial_plan

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch announces that torch.ao will move; as a reference it still serves
    from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver

WEIGHT = QuantSpec(symmetric=True, signed=True)
ACTIVATION = QuantSpec()


def reference(spec: QuantSpec) -> nn.Module:
    """torch.ao's fake-quantizer with the observer that SparseML uses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return FakeQuantize(
            observer=MovingAverageMinMaxObserver,
            quant_min=spec.quant_min,
            quant_max=spec.quant_max,
            dtype=torch.qint8 if spec.signed else torch.quint8,
            qscheme=torch.per_tensor_symmetric if spec.symmetric else torch.per_tensor_affine,
            averaging_constant=spec.averaging_constant,
        )


def observing_model() -> nn.Module:
    """A tiny BERT whose quantizers observe, with their first scales taken from a first batch."""
    model = bert()
    install(model, tutorial_plan(model))
    set_phase(model, Phase.OBSERVE)
    return model


def first_scales(
    model: nn.Module, micro_batches: list[dict[str, Tensor]], reduce_max: Callable[[Tensor], Tensor] = alone
) -> None:
    model.eval()
    with torch.no_grad(), calibrating(model):
        for micro_batch in micro_batches:
            model(**micro_batch)
    end_calibration(model, reduce_max)
    model.train()


def split(whole: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    count = len(whole["input_ids"])
    return [{key: value[i : i + size] for key, value in whole.items()} for i in range(0, count, size)]


def test_weights_follow_torch_ao_over_steps_in_range_scale_value_and_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = WeightQuantizer(WEIGHT, ObservationContext()), reference(WEIGHT)
    ours.phase = Phase.OBSERVE
    for step in range(6):
        weight = torch.randn(8, 5, generator=generator) * (1 + step)
        mine, other = weight.clone().requires_grad_(), weight.clone().requires_grad_()
        ours.context.step = step
        found, expected = ours(mine), theirs(other)
        upstream = torch.randn(8, 5, generator=generator)
        found.backward(upstream)
        expected.backward(upstream)
        assert torch.equal(found, expected)
        assert mine.grad is not None
        assert torch.equal(mine.grad, other.grad)
        observer = theirs.activation_post_process
        assert (ours.min_val, ours.max_val) == (observer.min_val, observer.max_val)
        assert (ours.scale, ours.zero_point) == (theirs.scale, theirs.zero_point)


@pytest.mark.parametrize("spec", [ACTIVATION, QuantSpec(symmetric=True, signed=True), QuantSpec(4)], ids=str)
def test_activations_follow_torch_aos_ranges_and_use_them_one_step_later(spec: QuantSpec) -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(ActivationQuantizer(spec, ObservationContext()))
    observer = reference(spec).activation_post_process
    set_phase(model, Phase.OBSERVE)
    quantizer = model[0]
    for step in range(6):
        x = torch.randn(3, 4, 5, generator=generator) * (1 + step)
        expected = torch.fake_quantize_per_tensor_affine(
            x, quantizer.scale.clone(), quantizer.zero_point.clone(), spec.quant_min, spec.quant_max
        )
        assert torch.equal(quantizer(x), expected)
        end_step(model, alone)
        observer(x)
        scale, zero_point = observer.calculate_qparams()
        assert (quantizer.min_val, quantizer.max_val) == (observer.min_val, observer.max_val)
        assert (quantizer.scale.item(), quantizer.zero_point.item()) == (scale.item(), zero_point.item())


def test_a_weight_is_observed_once_in_a_step_however_often_forward_runs() -> None:
    quantizer = WeightQuantizer(WEIGHT, ObservationContext())
    quantizer.phase = Phase.OBSERVE
    quantizer(torch.ones(3))
    quantizer(torch.full((3,), 9.0))
    assert quantizer.max_val == 1.0
    quantizer.context.step += 1
    quantizer(torch.full((3,), 9.0))
    assert quantizer.max_val == pytest.approx(1.08)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_scale_per_channel_follows_each_channel(axis: int) -> None:
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    quantizer = WeightQuantizer(
        QuantSpec(symmetric=True, signed=True, channel_axis=axis), ObservationContext(), weight.shape[axis]
    )
    quantizer.phase = Phase.OBSERVE
    quantizer(weight)
    torch.testing.assert_close(quantizer.scale, weight.abs().amax(1 - axis) / 127.5)


@pytest.mark.parametrize("size", [1, 4])
def test_ranges_do_not_depend_on_how_a_step_is_split(size: int) -> None:
    whole, pieces = observing_model(), observing_model()
    for step in range(3):
        features = batch(16, padding=3, seed=step)
        for model, micro_batches in ((whole, [features]), (pieces, split(features, size))):
            begin_step(model, step)
            if needs_first_range(model):
                first_scales(model, micro_batches)
            for micro_batch in micro_batches:
                model(**micro_batch)
            end_step(model, alone)
    expected, found = quantization_state(whole), quantization_state(pieces)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert without_range(whole) == []


def test_two_ranks_that_see_half_each_get_the_ranges_of_the_whole() -> None:
    whole, *ranks = (observing_model() for _ in range(3))
    features = batch(8, seed=3)
    first_scales(whole, [features])
    whole(**features)
    end_step(whole, alone)

    halves = split(features, 4)
    packed: list[Tensor] = []
    for stage in ("first scales", "step"):
        packed.clear()
        for model, half in zip(ranks, halves, strict=True):  # what each rank would send
            model.train(stage == "step")
            if stage == "first scales":
                with torch.no_grad(), calibrating(model):
                    model(**half)
            else:
                model(**half)
        finish = end_calibration if stage == "first scales" else end_step
        for model in ranks:
            finish(copy.deepcopy(model), lambda vector: (packed.append(vector.clone()), vector)[1])
        assert len(packed) == 2
        assert packed[0].shape == packed[1].shape
        for model in ranks:
            finish(model, lambda vector: torch.maximum(*packed))
    expected = quantization_state(whole)
    for model in ranks:
        torch.testing.assert_close(quantization_state(model), expected, rtol=1e-5, atol=1e-6)


def test_a_rank_that_saw_nothing_sends_as_much_as_the_others_and_changes_nothing() -> None:
    model = observing_model()
    first_scales(model, [batch()])
    model(**batch())
    sent: list[Tensor] = []
    end_step(model, lambda vector: (sent.append(vector.clone()), vector)[1])
    before = quantization_state(model)
    end_step(model, lambda vector: (sent.append(vector.clone()), vector)[1])
    assert sent[0].shape == sent[1].shape
    assert torch.isneginf(sent[1]).all()
    torch.testing.assert_close(quantization_state(model), before, rtol=0, atol=0)


def test_tokens_that_are_padding_do_not_move_ranges_and_can_be_asked_to() -> None:
    def ranges(length: int, padding: int, observe_padding: bool) -> dict[str, Tensor]:
        model = bert()
        install(model, tutorial_plan(model), observe_padding=observe_padding)
        set_phase(model, Phase.OBSERVE)
        features = batch(4, length=6, seed=5)
        ids = torch.nn.functional.pad(features["input_ids"], (0, padding), value=0)
        mask = torch.nn.functional.pad(features["attention_mask"], (0, padding), value=0)
        features |= {"input_ids": ids, "attention_mask": mask}
        assert ids.shape[1] == length
        first_scales(model, [features])
        model(**features)
        end_step(model, alone)
        return quantization_state(model)

    torch.testing.assert_close(ranges(14, 8, False), ranges(6, 0, False), rtol=1e-5, atol=1e-6)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(ranges(14, 8, True), ranges(6, 0, True), rtol=1e-3, atol=1e-3)


def brute_force(x: Tensor, tokens: Tensor, token_dims: tuple[int, ...]) -> tuple[float, float]:
    kept = [
        float(x[index])
        for index in map(tuple, torch.ones_like(x).nonzero().tolist())
        if all(
            bool(tokens[index[0], index[dim]]) if x.shape[0] == len(tokens) else bool(tokens[:, index[dim]].any())
            for dim in token_dims
        )
    ]
    return (min(kept), max(kept)) if kept else (float("inf"), float("-inf"))


@settings(deadline=None, max_examples=40)
@given(
    layout=st.sampled_from(
        [((3, 4, 2), (1,)), ((1, 4, 2), (1,)), ((3, 2, 4, 2), (2,)), ((3, 2, 2, 4), (3,)), ((3, 2, 4, 4), (2, 3))]
    ),
    keep=st.lists(st.booleans(), min_size=12, max_size=12),
    seed=st.integers(0, 99),
)
def test_the_observed_range_is_that_of_real_tokens(
    layout: tuple[tuple[int, ...], tuple[int, ...]], keep: list[bool], seed: int
) -> None:
    shape, token_dims = layout
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    tokens = torch.tensor(keep).view(3, 4)
    low, high = observed_range(x, tokens, token_dims)
    assert (low.item(), high.item()) == brute_force(x, tokens, token_dims)


@pytest.mark.parametrize("shape", [(3, 5), (2, 4, 3), (3, 5, 3)])
def test_a_tensor_that_the_tokens_do_not_fit_is_observed_whole(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    low, high = observed_range(x, torch.zeros(3, 4, dtype=torch.bool), (1,))
    assert (low, high) == (x.min(), x.max())


def test_an_overflow_does_not_spoil_the_average() -> None:
    old, inf = torch.tensor([-1.0, 1.0]), torch.inf
    for low, high in ((-inf, 2.0), (-2.0, inf), (float("nan"), 2.0), (inf, -inf)):
        found = moved_range(old[:1], old[1:], torch.tensor([low]), torch.tensor([high]), 0.01)
        assert torch.equal(torch.cat(found), old)


def test_evaluation_observes_nothing() -> None:
    model = observing_model()
    first_scales(model, [batch()])
    model(**batch())
    end_step(model, alone)
    before = quantization_state(model)
    model.eval()
    begin_step(model, 1)
    model(**batch(seed=9))
    end_step(model, alone)
    torch.testing.assert_close(quantization_state(model), before, rtol=0, atol=0)


def test_frozen_ranges_stay_while_weights_move() -> None:
    model = observing_model()
    first_scales(model, [batch()])
    model(**batch())
    end_step(model, alone)
    before = quantization_state(model)
    set_phase(model, Phase.FROZEN)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    begin_step(model, 1)
    model(**batch(seed=9))
    end_step(model, alone)
    torch.testing.assert_close(quantization_state(model), before, rtol=0, atol=0)


def test_off_costs_and_changes_nothing() -> None:
    plain, installed = bert(), bert()
    install(installed, tutorial_plan(installed))
    assert torch.equal(plain(**batch()).start_logits, installed(**batch()).start_logits)
    end_step(installed, lambda vector: pytest.fail("nothing observes: nothing to reduce"))
    assert without_range(installed) == list(quantizers(installed))


def test_the_first_scales_leave_the_average_to_start_with_the_step_itself() -> None:
    model = observing_model()
    assert needs_first_range(model)
    first_scales(model, [batch()])
    assert not needs_first_range(model)
    activation = model.qa_outputs.input_quantizer
    assert torch.isinf(activation.min_val)
    assert activation.scale != 1.0
    model(**batch())
    end_step(model, alone)
    low, high = activation.min_val.clone(), activation.max_val.clone()
    assert torch.isfinite(low)
    assert low < high
    # The float ranges that set the scale and the quantized step's own differ by rounding only.
    assert activation.scale.item() == pytest.approx(((high - low) / 255).item())


def test_quantizers_that_are_frozen_from_the_start_keep_their_first_range() -> None:
    model = observing_model()
    set_phase(model, Phase.FROZEN)
    assert needs_first_range(model)
    first_scales(model, [batch()])
    assert without_range(model) == []
    again = copy.deepcopy(model)
    again.load_state_dict(model.state_dict())
    assert not needs_first_range(again)


def test_a_loaded_range_needs_no_first_one_and_is_not_touched_by_calibration() -> None:
    model = observing_model()
    first_scales(model, [batch()])
    model(**batch())
    end_step(model, alone)
    resumed = observing_model()
    assert needs_first_range(resumed)
    resumed.load_state_dict(model.state_dict())
    assert not needs_first_range(resumed)
    first_scales(resumed, [batch(seed=7)])
    activations = [name for name, q in quantizers(model).items() if isinstance(q, ActivationQuantizer)]
    expected, found = quantization_state(model), quantization_state(resumed)
    for name in activations:
        assert torch.equal(found[f"{name}.scale"], expected[f"{name}.scale"])


def test_one_shot_calibration_averages_over_batches_and_keeps_the_ranges() -> None:
    model = bert().eval()
    install(model, tutorial_plan(model))
    set_phase(model, Phase.FROZEN)
    seen: list[Tensor] = []
    model.qa_outputs.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad(), calibrating(model):
        for seed in range(3):
            model(**batch(seed=seed))
            end_step(model, alone)
    low = seen[0].min()
    for x in seen[1:]:
        low = low + 0.01 * (x.min() - low)
    torch.testing.assert_close(model.qa_outputs.input_quantizer.min_val, low)
    assert without_range(model) == []
    features = {key: value for key, value in batch(seed=2).items() if not key.endswith("_positions")}
    torch.testing.assert_close(seen[2], bert().eval().bert(**features)[0])


def test_half_precision_moves_ranges_without_rounding_them() -> None:
    quantizer = ActivationQuantizer(ACTIVATION, ObservationContext())
    quantizer.min_val.fill_(-1.2345678)
    model = nn.Sequential(quantizer, nn.Linear(2, 2)).bfloat16().half()
    assert quantizer.min_val.dtype is torch.float32
    assert quantizer.min_val.item() == pytest.approx(-1.2345678, abs=1e-7)
    assert model[1].weight.dtype is torch.float16


def test_a_copy_of_a_model_observes_on_its_own() -> None:
    model = observing_model()
    first_scales(model, [batch()])
    twin = copy.deepcopy(model)
    before = quantization_state(model)
    twin(**batch(padding=3))
    end_step(twin, alone)
    torch.testing.assert_close(quantization_state(model), before, rtol=0, atol=0)
    contexts = {id(q.context) for q in quantizers(twin).values()}
    assert len(contexts) == 1
    assert contexts.isdisjoint({id(q.context) for q in quantizers(model).values()})
    assert next(iter(quantizers(twin).values())).context.tokens is not None


def test_activation_recomputation_counts_a_batch_once() -> None:
    plain, recomputing = observing_model(), observing_model()
    recompute_activations(recomputing, "--gradient_checkpointing")
    for model in (plain, recomputing):
        first_scales(model, [batch()])
        for step in range(2):
            begin_step(model, step)
            model(**batch(padding=2, seed=step)).loss.backward()
            end_step(model, alone)
    torch.testing.assert_close(quantization_state(recomputing), quantization_state(plain), rtol=0, atol=0)
    for (name, a), b in zip(plain.named_parameters(), recomputing.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_bfloat16_autocast_trains_with_float32_ranges() -> None:
    model = observing_model()
    with torch.autocast("cpu", torch.bfloat16):
        first_scales(model, [batch()])
        loss = model(**batch()).loss
    loss.backward()
    end_step(model, alone)
    assert torch.isfinite(loss)
    assert without_range(model) == []
    assert {q.scale.dtype for q in quantizers(model).values()} == {torch.float32}


def test_the_numbers_of_all_quantizers_can_be_taken_out_and_put_back() -> None:
    model = observing_model()
    first_scales(model, [batch()])
    model(**batch())
    end_step(model, alone)
    state = quantization_state(model)
    assert "qa_outputs.weight_quantizer.scale" in state
    other = observing_model()
    load_quantization_state(other, state)
    torch.testing.assert_close(quantization_state(other), state, rtol=0, atol=0)
    del state["qa_outputs.weight_quantizer.scale"]
    with pytest.raises(ModelError, match=r"no 'qa_outputs.weight_quantizer.scale'"):
        load_quantization_state(other, state)


def test_a_model_without_quantizers_needs_no_attention() -> None:
    model = bert()
    install(model, CompressionPlan())
    assert quantization_state(model) == {}
    assert without_range(model) == []
    assert not needs_first_range(model)


def test_one_tensor_is_put_on_a_grid_once_for_query_key_and_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its consumers, with equal ranges, get the same bits and gradients as from tensors of their own."""
    rounded, calls = ranges.rounded, []
    monkeypatch.setattr(ranges, "rounded", lambda *given: (calls.append(given[0]), rounded(*given))[1])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, 512, generator=generator)
    upstream = torch.randn(3, *x.shape, generator=generator)
    results = []
    for shares in (True, False):
        model = nn.Sequential(*(ActivationQuantizer(ACTIVATION, ObservationContext()) for _ in range(3)))
        for quantizer in model:
            quantizer.context = model[0].context
        set_phase(model, Phase.OBSERVE)
        found = []
        for step in range(3):
            leaf = (x * (1 + step)).requires_grad_()
            calls.clear()
            outputs = [quantizer(leaf if shares else leaf * 1) for quantizer in model]
            assert len(calls) == (1 if shares else 3)
            found += [*outputs, torch.autograd.grad(outputs, leaf, list(upstream))[0]]
            end_step(model, alone)
        found += [buffer for quantizer in model for buffer in quantizer.buffers()]
        results.append(found)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_a_tensor_that_was_written_to_and_another_grid_are_not_taken_for_the_same() -> None:
    first, second = (ActivationQuantizer(ACTIVATION, ObservationContext()) for _ in range(2))
    second.context = first.context
    first.phase = second.phase = Phase.FROZEN
    second.scale.fill_(0.5)
    x = torch.full((8, 1024), 1.3)
    assert first(x).unique() == 1.0
    assert second(x).unique() == 1.5
    x.add_(1.0)
    assert second(x).unique() == 2.5
    second.scale.fill_(1.0)
    assert second(x).unique() == 2.0
