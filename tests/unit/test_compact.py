"""Compact weights: the same bits as masked ones, stored in fewer bytes, and a way to and fro between the two."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparse_accel.compress.census import Census
from sparse_accel.compress.compact import CompactLinear, padded
from sparse_accel.compress.compact_state import compact_state, dense_state, fitting_state
from sparse_accel.compress.fakequant import QuantSpec
from sparse_accel.compress.layers import CompressedEmbedding, CompressedLinear, compressed_layers, effective_weight
from sparse_accel.compress.masks import magnitude_mask
from sparse_accel.compress.plan import (
    CompressionPlan,
    check_masks,
    fold,
    install,
    prunable_parameters,
    quantization_state,
    request_masks,
)
from sparse_accel.compress.positions import pack_positions
from sparse_accel.compress.ranges import Phase, begin_step, calibrating, end_calibration, end_step, set_phase
from sparse_accel.errors import ModelError
from sparse_accel.modifiers.trainable_params import TrainableParamsModifier
from sparse_accel.runtime.backends import PlainBackend
from sparse_accel.runtime.setup import build_optimizer
from tests.unit.qat_bert import alone, batch, bert, tutorial_plan

SYMMETRIC = QuantSpec(symmetric=True, signed=True)
AFFINE = QuantSpec()
CHANNELS = QuantSpec(symmetric=True, signed=True, channel_axis=0)

OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1),
    "adamw foreach": lambda model: torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1, foreach=True),
    "adamw fused": lambda model: torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1, fused=True),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=0.1),
}
WEIGHTS = {"float": None, "per tensor": SYMMETRIC, "affine": AFFINE, "per channel": CHANNELS}


def layers(sparsity: float = 0.9, seed: int = 0) -> nn.Module:
    """Two linear layers whose weights fill a processor's vectors, as those of real models do; what is kept does not."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, 29), nn.Tanh(), nn.Linear(29, 32))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.mul_(magnitude_mask(layer.weight, sparsity))
    return model


def layer_plan(
    *, compact: bool, weight: QuantSpec | None = None, inputs: tuple[QuantSpec, ...] = ()
) -> CompressionPlan:
    plan = CompressionPlan()
    for name in ("0", "2"):
        if weight is not None:
            plan.add_quantization(name, weight, inputs)
        plan.add_mask(name, "test", lasting=True)
        if compact:
            plan.make_compact(name)
    return plan


def installed(*, compact: bool, **model_and_plan: Any) -> nn.Module:
    model = layers(**{key: model_and_plan.pop(key) for key in ("sparsity", "seed") if key in model_and_plan})
    install(model, layer_plan(compact=compact, **model_and_plan))
    request_masks(model, ["0", "2"], "nonzero")
    return model


def compact_bert(**shape: Any) -> nn.Module:
    """The tutorial's quantized BERT with every linear weight that is masked stored compact."""
    model = bert(sparsity=0.8, **shape)
    install(model, bert_plan(compact=True))
    return model


def bert_plan(*, compact: bool) -> CompressionPlan:
    model = bert()
    plan = tutorial_plan(model)
    for name in prunable_parameters(model):
        plan.add_mask(name.removesuffix(".weight"), "test", lasting=True)
        if compact:
            plan.make_compact(name.removesuffix(".weight"))
    return plan


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, *, quantize_from: int = 3) -> list[Tensor]:
    """The losses; weights are fake-quantized, where they are at all, from one step on, and frozen in the last one."""
    losses = []
    for step in steps:
        phase = Phase.OFF if step < quantize_from else Phase.OBSERVE
        set_phase(model, Phase.FROZEN if step == steps[-1] else phase)
        begin_step(model, step)
        x = torch.randn(5, 32, generator=torch.Generator().manual_seed(step))
        loss = model(x).square().sum()
        loss.backward()
        losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        end_step(model, alone)
    return losses


def weights(model: nn.Module) -> dict[str, Tensor]:
    """What a plain model of the same weights holds."""
    plain = copy.deepcopy(model)
    fold(plain)
    return plain.state_dict()


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert list(one) == list(other)
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_gives_the_same_bits_as_with_masks(optimizer: str, weight: str) -> None:
    masked, compact = (installed(compact=compact, weight=WEIGHTS[weight]) for compact in (False, True))
    losses = [train(model, OPTIMIZERS[optimizer](model), range(8)) for model in (masked, compact)]
    assert torch.equal(torch.stack(losses[0]), torch.stack(losses[1]))
    assert_same(weights(masked), weights(compact))
    assert_same(quantization_state(masked), quantization_state(compact))
    for one, other in zip(compressed_layers(masked).values(), compressed_layers(compact).values(), strict=True):
        assert torch.equal(one.effective_weight(), other.effective_weight())


@pytest.mark.parametrize("optimizer", ["adamw", "adamw fused"])
def test_a_quantized_bert_trains_to_the_same_bits_as_with_masks(optimizer: str) -> None:
    results = []
    for compact in (False, True):
        model = bert(sparsity=0.8, dropout=0.1)
        plan = bert_plan(compact=compact)
        install(model, plan)
        request_masks(model, plan.masked_by("test"), "nonzero")
        steps = OPTIMIZERS[optimizer](model)
        torch.manual_seed(0)
        losses = []
        for step in range(6):
            set_phase(model, Phase.OBSERVE if step >= 2 else Phase.OFF)
            begin_step(model, step)
            if step == 2:
                with torch.no_grad(), calibrating(model):
                    model(**batch(seed=step))
                end_calibration(model, alone)
            loss = model(**batch(padding=2, seed=step)).loss
            loss.backward()
            losses.append(loss.detach())
            steps.step()
            steps.zero_grad()
            end_step(model, alone)
        results.append((torch.stack(losses), weights(model), quantization_state(model)))
    (masked_losses, *masked), (compact_losses, *compact) = results
    assert torch.equal(masked_losses, compact_losses)
    for one, other in zip(masked, compact, strict=True):
        assert_same(one, other)


def test_the_gradient_is_the_masked_ones_at_the_kept_places() -> None:
    x = torch.randn(3, 4, 32)
    masked, compact = installed(compact=False), installed(compact=True)
    for model in (masked, compact):
        model(x).square().sum().backward()
    kept = compact[0].mask
    assert torch.equal(compact[0].values.grad, padded(masked[0].weight.grad[kept]))
    assert torch.equal(compact[0].bias.grad, masked[0].bias.grad)


def test_what_fills_the_vector_up_is_no_weight_and_stays_zero() -> None:
    model = installed(compact=True, weight=SYMMETRIC)
    optimizer = OPTIMIZERS["adamw fused"](model)
    train(model, optimizer, range(6))
    assert not model[0].values[93:].any()
    assert not any(optimizer.state[model[0].values][key][93:].any() for key in ("exp_avg", "exp_avg_sq"))
    assert model[0].values[:93].all()


def test_an_input_and_an_output_are_quantized_as_with_masks() -> None:
    x = torch.randn(2, 4, 32)
    results = []
    for compact in (False, True):
        model = layers()
        plan = layer_plan(compact=compact)
        plan.add_quantization("0", SYMMETRIC, (AFFINE,), AFFINE)
        install(model, plan)
        request_masks(model, ["0", "2"], "nonzero")
        set_phase(model, Phase.OBSERVE)
        with torch.no_grad(), calibrating(model):
            model(x)
        end_calibration(model, alone)
        results.append(model(x))
    assert torch.equal(*results)


def test_a_layer_without_a_kept_weight_works_and_one_without_a_zero_too() -> None:
    x = torch.randn(4, 32)
    for sparsity in (0.0, 1.0):
        masked, compact = (installed(compact=c, sparsity=sparsity, weight=SYMMETRIC) for c in (False, True))
        losses = [train(model, OPTIMIZERS["adamw"](model), range(5)) for model in (masked, compact)]
        assert torch.equal(torch.stack(losses[0]), torch.stack(losses[1]))
        assert torch.equal(masked(x), compact(x))


def test_the_parameter_is_the_vector_of_kept_weights_before_the_bias() -> None:
    plain, model = layers(), installed(compact=True)
    kept = plain[0].weight != 0
    assert [name for name, _ in model.named_parameters()] == ["0.values", "0.bias", "2.values", "2.bias"]
    assert torch.equal(model[0].values, padded(plain[0].weight[kept]))
    assert torch.equal(model[0].mask, kept)
    assert list(model.state_dict()) == ["0.values", "0.bias", "0.positions", "2.values", "2.bias", "2.positions"]
    assert repr(model[0]) == f"CompactLinear(in_features=32, out_features=29, bias=True, kept={int(kept.sum())})"
    assert (model[0].num_kept, len(model[0].values), model[0].positions.nbytes) == (93, 96, 32 * 29 // 8)


def test_what_is_stored_shrinks_as_the_weight_does() -> None:
    def trained_bytes(model: nn.Module) -> int:
        optimizer = OPTIMIZERS["adamw"](model)
        train(model, optimizer, range(1))
        moments = sum(v.nbytes for s in optimizer.state.values() for v in s.values() if v.dim())
        return moments + sum(p.nbytes for p in model.parameters())

    masked, compact = installed(compact=False), installed(compact=True)
    assert trained_bytes(masked) == 3 * 4 * (2 * 32 * 29 + 29 + 32)
    assert trained_bytes(compact) == 3 * 4 * (2 * 96 + 29 + 32)


def test_very_sparse_layers_store_indices_and_train_to_the_same_bits() -> None:
    masked, compact = (installed(compact=c, sparsity=0.98, weight=SYMMETRIC) for c in (False, True))
    assert compact[0].positions.dtype == torch.int32
    losses = [train(model, OPTIMIZERS["adamw"](model), range(6)) for model in (masked, compact)]
    assert torch.equal(torch.stack(losses[0]), torch.stack(losses[1]))
    assert_same(weights(masked), weights(compact))


def test_folding_leaves_a_plain_model_with_exact_zeros() -> None:
    model, reference = compact_bert(), bert(sparsity=0.8)
    request_masks(model, bert_plan(compact=True).masked_by("test"), "nonzero")
    model.qa_outputs.note = "kept"
    fold(model)
    assert list(model.state_dict()) == list(reference.state_dict())
    assert [type(m) for m in model.modules()] == [type(m) for m in reference.modules()]
    assert_same(dict(model.named_parameters()), dict(reference.named_parameters()))
    assert repr(model) == repr(reference)
    assert not {"_indices", "num_kept", "positions"} & set(vars(model.qa_outputs))
    assert model.qa_outputs.note == "kept"
    install(model, bert_plan(compact=True))  # and it can begin again
    assert model(**batch()).start_logits.shape == (4, 8)


@pytest.mark.parametrize("weight", [SYMMETRIC, CHANNELS], ids=["per tensor", "per channel"])
def test_folding_can_write_the_quantized_weight(weight: QuantSpec) -> None:
    model = installed(compact=True, weight=weight)
    train(model, OPTIMIZERS["sgd"](model), range(5))
    expected = model[0].effective_weight().detach()
    fold(model, bake_quantization=True)
    assert torch.equal(model[0].weight, expected)
    assert model[0].weight.requires_grad


def test_copies_and_saved_states_are_whole() -> None:
    model = installed(compact=True, weight=SYMMETRIC)
    train(model, OPTIMIZERS["adamw"](model), range(5))
    x = torch.randn(2, 32)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    assert twin[0].values is not model[0].values
    train(twin, OPTIMIZERS["sgd"](twin), range(1))
    assert not torch.equal(twin(x), model(x))

    other = layers()
    with torch.no_grad():
        other[0].weight.mul_(3.0)  # the same zeros in other weights
    install(other, layer_plan(compact=True, weight=SYMMETRIC))
    other.load_state_dict(model.state_dict())
    set_phase(other, Phase.FROZEN)
    set_phase(model, Phase.FROZEN)
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("assign", [False, True])
def test_positions_of_another_model_are_not_loaded(assign: bool) -> None:
    model = installed(compact=True)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match=r"^0: the saved zeros are not those .* of 928 positions differ"):
        model.load_state_dict(installed(compact=True, seed=1).state_dict(), assign=assign)
    assert_same(model.state_dict(), before)
    with pytest.raises(ModelError, match=r"^0: .* do not fit a weight of \[29, 32\]"):
        model.load_state_dict({**before, "0.positions": torch.zeros(3, dtype=torch.uint8)}, assign=assign)
    in_the_other_form = model[0].mask.flatten().nonzero().flatten().int()
    model.load_state_dict({**before, "0.positions": in_the_other_form}, assign=assign)
    assert_same(model.state_dict(), before)


def test_moving_over_the_meta_device_keeps_the_positions() -> None:
    model = installed(compact=True, weight=SYMMETRIC)
    saved, x = copy.deepcopy(model.state_dict()), torch.randn(2, 32)
    expected = model(x)
    model.to("meta")
    assert model[0].values.is_meta
    model.to_empty(device="cpu").load_state_dict(saved)
    assert torch.equal(model(x), expected)
    assert model.bfloat16()[0].positions.dtype == torch.uint8
    assert model(x.bfloat16()).dtype == torch.bfloat16


def test_an_evaluation_before_the_first_step_leaves_training_possible() -> None:
    model = installed(compact=True)
    model[0]._indices = model[2]._indices = None  # as after a move to another device
    with torch.inference_mode():
        model(torch.randn(2, 32))
    model(torch.randn(2, 32)).sum().backward()
    assert model[0].values.grad is not None


@pytest.mark.parametrize("weight", WEIGHTS)
def test_autocast_computes_what_it_does_with_masks(weight: str) -> None:
    x, results = torch.randn(6, 32), []
    for compact in (False, True):
        model = installed(compact=compact, weight=WEIGHTS[weight])
        train(model, OPTIMIZERS["sgd"](model), range(4))
        set_phase(model, Phase.OBSERVE)
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        gradient = model[0].values.grad if compact else padded(model[0].weight.grad[model[0].mask])
        assert gradient.dtype == torch.float32
        results.append((y.detach(), gradient))
        assert effective_weight(model[0]).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert model.double()(x.double()).dtype == torch.float64  # which autocast leaves alone
    (masked, masked_gradient), (kept, gradient) = results
    assert torch.equal(masked, kept)
    assert torch.equal(masked_gradient, gradient)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_give_the_same_gradient(reentrant: bool) -> None:
    gradients = []
    for recomputes in (False, True):
        model = installed(compact=True, weight=SYMMETRIC)
        set_phase(model, Phase.OBSERVE)
        x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
        y = checkpoint(model, x, use_reentrant=reentrant) if recomputes else model(x)
        y.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_what_is_frozen_stays_frozen() -> None:
    model = layers()
    TrainableParamsModifier(params=["0.weight"], trainable=False).plan(CompressionPlan(), model)
    install(model, layer_plan(compact=True))
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["0.values"]
    model(torch.randn(2, 32)).sum().backward()
    assert model[0].values.grad is None
    fold(model)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["0.weight"]


def test_kept_weights_decay_as_whole_ones_do() -> None:
    options: Any = SimpleNamespace(optim="sgd", learning_rate=0.1, weight_decay=0.01)
    masked, compact = bert(sparsity=0.8), compact_bert()
    install(masked, bert_plan(compact=False))
    groups = [
        [
            {name for name, p in model.named_parameters() if any(p is member for member in group["params"])}
            for group in build_optimizer(options, model).param_groups
        ]
        for model in (masked, compact)
    ]
    for one, other in zip(*groups, strict=True):
        assert {name.replace(".values", ".weight") for name in other} == one
    assert any(name.endswith(".values") for name in groups[1][0])


def test_zeros_hold_always_and_are_not_released() -> None:
    model = installed(compact=True)
    request_masks(model, ["0"], "nonzero")
    with pytest.raises(ModelError, match="mask of '0' cannot be released: its weight is compact"):
        request_masks(model, ["0"], None)
    with pytest.raises(ModelError, match="'1' has no mask"):
        request_masks(model, ["1"], "nonzero")
    assert check_masks(model) == {"0": 0, "2": 0}
    model[0].values = nn.Parameter(torch.ones(model[0].num_values + 3))
    assert check_masks(model) == {"0": 3, "2": 0}
    model[0].values = nn.Parameter(torch.empty(0))  # as ZeRO-3 has it outside forward
    assert check_masks(model) == {"0": 0, "2": 0}


def test_the_census_counts_the_weights_that_are_there_when_whole() -> None:
    masked, compact = bert(sparsity=0.8), compact_bert()
    plan = bert_plan(compact=True)
    expected = Census.of(masked, plan)
    assert Census.of(compact, plan) == expected
    assert prunable_parameters(compact) == prunable_parameters(masked)
    with torch.no_grad():
        compact.qa_outputs.values[0] = 0.0
    assert Census.of(compact).prunable.zeros == expected.prunable.zeros + 1


def test_every_compressed_layer_is_found_and_embeddings_stay_masked() -> None:
    model = bert(sparsity=0.8)
    plan = bert_plan(compact=True)
    plan.add_mask("bert.embeddings.word_embeddings", "test")
    install(model, plan)
    kinds = {name: type(layer) for name, layer in compressed_layers(model).items()}
    assert kinds["qa_outputs"] is CompactLinear
    assert kinds["bert.embeddings.word_embeddings"] is CompressedEmbedding
    assert torch.equal(effective_weight(model.qa_outputs), bert(sparsity=0.8).qa_outputs.weight)


# --- installing where the weights are not ---------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True], ids=["masks", "packed"])
def test_a_process_without_weights_is_given_the_positions(packed: bool) -> None:
    full = layers()
    masks = {name: full.get_submodule(name).weight != 0 for name in ("0", "2")}
    positions = {name: pack_positions(mask) for name, mask in masks.items()} if packed else masks
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(32, 29), nn.Tanh(), nn.Linear(29, 32))
    install(model, layer_plan(compact=True), positions=positions)
    assert model[0].values.is_meta
    assert torch.equal(model[0].mask, masks["0"])
    install(full, layer_plan(compact=True))
    expected, saved = full(torch.ones(2, 32)), full.state_dict()
    model.to_empty(device="cpu").load_state_dict(saved)
    assert torch.equal(model(torch.ones(2, 32)), expected)


def test_given_positions_count_more_than_weights_that_may_be_rubbish() -> None:
    mask = torch.zeros(29, 32, dtype=torch.bool)
    mask[0] = True
    model = layers()
    install(model, layer_plan(compact=True), positions={"0": mask})
    assert model[0].num_kept == 32
    assert torch.equal(model[0].masked_weight()[0], layers()[0].weight[0])
    assert torch.equal(model[2].mask, layers()[2].weight != 0)


def test_weights_that_are_not_here_and_positions_that_do_not_fit_are_refused() -> None:
    with torch.device("meta"):
        absent = nn.Sequential(nn.Linear(32, 29), nn.Tanh(), nn.Linear(29, 32))
    with pytest.raises(ModelError, match=r"^0: its weight is not on this process, so that its positions must be given"):
        install(absent, layer_plan(compact=True))
    sharded = layers()
    sharded[2].weight.data = torch.empty(0)
    with pytest.raises(ModelError, match=r"^2: its weight is sharded already \(\[0\] is here of \[32, 29\]\)"):
        install(sharded, layer_plan(compact=True))
    model = layers()
    with pytest.raises(ModelError, match=r"^2: its weight is \[32, 29\], but the mask that is given \[29, 32\]"):
        install(model, layer_plan(compact=True), positions={"2": torch.ones(29, 32, dtype=torch.bool)})
    assert type(model[0]) is nn.Linear  # nothing was changed


# --- from masked to compact and back --------------------------------------------------------------------------------


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    states = dict(PlainBackend(None, "no").whole_optimizer(model, optimizer))
    return copy.deepcopy(dict(model.state_dict())), copy.deepcopy(states)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw fused", "sgd"])
@pytest.mark.parametrize("to_compact", [True, False], ids=["masked to compact", "compact to masked"])
def test_a_run_goes_on_with_the_other_storage_to_the_same_bits(to_compact: bool, optimizer: str) -> None:
    start = installed(compact=not to_compact, weight=SYMMETRIC)
    steps = OPTIMIZERS[optimizer](start)
    train(start, steps, range(5))
    model_state, optimizer_state = state_of(start, steps)
    expected = train(start, steps, range(5, 9))

    resumed = installed(compact=to_compact, weight=SYMMETRIC)
    convert = compact_state if to_compact else dense_state
    resumed.load_state_dict(convert(resumed, model_state))
    resumed_steps = OPTIMIZERS[optimizer](resumed)
    PlainBackend(None, "no").put_optimizer(resumed, resumed_steps, convert(resumed, optimizer_state))
    assert torch.equal(torch.stack(train(resumed, resumed_steps, range(5, 9))), torch.stack(expected))
    assert_same(weights(resumed), weights(start))


def test_states_come_back_from_the_way_over_the_other_storage() -> None:
    model = installed(compact=True, weight=SYMMETRIC)
    steps = OPTIMIZERS["adamw"](model)
    train(model, steps, range(4))
    for state in state_of(model, steps):
        whole = dense_state(model, state)
        assert not [key for key in whole if "values" in key or "positions" in key]
        back = compact_state(model, whole)
        assert {key: tensor.dtype for key, tensor in back.items()} == {k: t.dtype for k, t in state.items()}
        assert set(back) == set(state)
        for key in state:
            assert torch.equal(back[key], state[key]), key
        assert set(compact_state(model, state)) == set(state)  # what is compact stays so
        assert set(dense_state(model, whole)) == set(whole)


def test_a_model_of_both_kinds_loads_what_either_has_saved() -> None:
    plan = layer_plan(compact=False)
    plan.make_compact("2")
    mixed = layers()
    install(mixed, plan)
    for compact in (False, True):
        saved = installed(compact=compact)
        optimizer = OPTIMIZERS["adamw"](saved)
        train(saved, optimizer, range(3))
        model_state, optimizer_state = state_of(saved, optimizer)
        mixed.load_state_dict(fitting_state(mixed, model_state))
        assert_same(weights(mixed), weights(saved))
        moments = fitting_state(mixed, optimizer_state)
        assert {"0.weight/exp_avg", "2.values/exp_avg", "2.values/step"} < set(moments)
        assert moments["0.weight/exp_avg"].shape == (29, 32)
        assert moments["2.values/exp_avg"].shape == (96,)


def test_a_dense_state_is_that_of_a_masked_model() -> None:
    masked, compact = (installed(compact=c, weight=SYMMETRIC) for c in (False, True))
    both = [(model, OPTIMIZERS["adamw"](model)) for model in (masked, compact)]
    for model, optimizer in both:
        train(model, optimizer, range(4))
    for expected, state in zip(state_of(*both[0]), state_of(*both[1]), strict=True):
        found = dense_state(compact, state)
        assert set(found) == set(expected)
        for key, tensor in expected.items():
            assert torch.equal(found[key], tensor), key
            assert found[key].dtype == tensor.dtype
    assert found["0.weight/step"].dim() == 0


def test_saved_zeros_that_are_not_the_runs_are_refused_with_the_layers_name() -> None:
    masked, other = installed(compact=False, seed=1), installed(compact=True, seed=1)
    masked(torch.ones(1, 32))
    run = installed(compact=True)
    for convert, state in ((compact_state, masked), (compact_state, other), (dense_state, other)):
        with pytest.raises(ModelError, match=r"^0: the saved zeros are not those of this run's model"):
            convert(run, state.state_dict())
    plain = layers(seed=1).state_dict()
    with pytest.raises(ModelError, match=r"^0: the saved zeros are not those"):
        compact_state(run, plain)
    assert_same(
        {key: compact_state(run, layers().state_dict())[key] for key in ("0.values", "2.values")},
        {key: run.state_dict()[key] for key in ("0.values", "2.values")},
    )
    with pytest.raises(ModelError, match=r"0.weight is saved as \[29, 31\], and the weight of 0 is \[29, 32\]"):
        compact_state(run, {"0.weight": torch.zeros(29, 31)})


def test_states_that_do_not_fit_are_refused() -> None:
    compact, masked = installed(compact=True), installed(compact=False)
    state = compact.state_dict()
    with pytest.raises(ModelError, match=r"^0: 2 values are saved for 93 positions"):
        dense_state(masked, {**state, "0.values": torch.ones(2)})
    with pytest.raises(ModelError, match=r"^0: its positions do not fit a weight of \[29, 32\]"):
        dense_state(masked, {**state, "0.positions": torch.zeros(2, dtype=torch.uint8)})
    with pytest.raises(ModelError, match="load the state of the model before that of the optimizer"):
        dense_state(masked, {"0.values/exp_avg": torch.ones(96)})
    masked.load_state_dict(dense_state(masked, state))
    assert dense_state(masked, {"0.values/exp_avg": torch.ones(96)})["0.weight/exp_avg"].sum() == 93


def test_a_masked_layer_and_a_compact_one_agree_on_what_a_mask_is() -> None:
    masked, compact = installed(compact=False), installed(compact=True)
    x = torch.randn(2, 32)
    assert torch.equal(masked(x), compact(x))
    one, other = masked[0], compact[0]
    assert isinstance(one, CompressedLinear)
    assert torch.equal(one.mask, other.mask)
    assert (one.mask_request, one.captured) == (other.mask_request, other.captured)
    assert torch.equal(one.masked_weight(), other.masked_weight())
    assert torch.equal(F.linear(x, other.masked_weight(), other.bias), other(x))
