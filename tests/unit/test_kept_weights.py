"""Weights that are made once a step give the bits of weights that are made in every micro-batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_accel.compress.fakequant import QuantSpec
from sparse_accel.compress.layers import compressed_layers
from sparse_accel.compress.plan import CompressionPlan, install, request_masks
from sparse_accel.compress.ranges import (
    Phase,
    begin_step,
    calibrating,
    end_calibration,
    end_step,
    keep_weights,
    quantization_state,
    set_phase,
)
from tests.unit.qat_bert import alone, batch, bert, tutorial_plan

PER_CHANNEL = QuantSpec(symmetric=True, signed=True, channel_axis=0)
PER_TENSOR = QuantSpec(symmetric=True, signed=True)
# Narrower than what observes: some weights lie beyond it.
NARROW = QuantSpec(3, symmetric=True, signed=True)


def observed(model: nn.Module) -> Any:
    """What all layers of an installed model share."""
    return next(iter(compressed_layers(model).values())).context


def linears(storage: str, weight: QuantSpec | None) -> nn.Module:
    """Two layers, large enough for the fast form, under masks of half of their weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 64), nn.Tanh(), nn.Linear(64, 96))
    plan = CompressionPlan()
    for name in ("0", "2"):
        with torch.no_grad():
            model.get_submodule(name).weight[::2] = 0.0  # type: ignore[operator]
        if weight is not None:
            plan.add_quantization(name, weight, ())
        plan.add_mask(name, "test", lasting=True)
        if storage == "compact":
            plan.make_compact(name)
    install(model, plan)
    request_masks(model, ["0", "2"], "nonzero")
    return model


def run(model: nn.Module, splits: int, dtype: torch.dtype, keeps: bool) -> list[Tensor]:
    """Losses, gradients, ranges and weights of five steps: float, observing, frozen."""
    keep_weights(model, keeps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    found = []
    for step, phase in enumerate((Phase.OFF, Phase.OBSERVE, Phase.OBSERVE, Phase.FROZEN, Phase.FROZEN)):
        set_phase(model, phase)
        begin_step(model, step)
        for x in torch.randn(8, 5, 96, generator=torch.Generator().manual_seed(step)).chunk(splits):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
                loss = model(x).float().square().mean()
            loss.backward()
            found.append(loss.detach())
        found += [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
        end_step(model, alone)
        assert not observed(model).kept_weights
    return [*found, *model.state_dict().values()]


@pytest.mark.parametrize("splits", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight", [None, PER_TENSOR, NARROW, PER_CHANNEL], ids=str)
@pytest.mark.parametrize("storage", ["masked", "compact"])
def test_kept_weights_train_to_the_same_bits(
    storage: str, weight: QuantSpec | None, dtype: torch.dtype, splits: int
) -> None:
    with_them, without = (run(linears(storage, weight), splits, dtype, keeps) for keeps in (True, False))
    assert len(with_them) == len(without)
    for one, other in zip(with_them, without, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("splits", [1, 2])
def test_a_quantized_bert_trains_to_the_same_bits_with_kept_weights(splits: int) -> None:
    results = []
    for keeps in (True, False):
        model = bert(sparsity=0.8, layers=2)
        plan = tutorial_plan(model, masks=True)
        install(model, plan)
        request_masks(model, plan.masked_by("test"), "nonzero")
        keep_weights(model, keeps)
        set_phase(model, Phase.OBSERVE)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        losses = []
        for step in range(3):
            begin_step(model, step)
            if step == 0:
                with torch.no_grad(), calibrating(model):
                    model(**batch())
                end_calibration(model, alone)
            for seed in range(splits):
                losses.append(model(**batch(padding=2, seed=seed)).loss)
                losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
            end_step(model, alone)
        results.append(
            [torch.stack(losses).detach(), *model.state_dict().values(), *quantization_state(model).values()]
        )
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_the_second_micro_batch_makes_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    model = linears("masked", PER_TENSOR)
    keep_weights(model, True)
    set_phase(model, Phase.OBSERVE)
    begin_step(model, 0)
    model(torch.randn(5, 96))
    kept = dict(observed(model).kept_weights)
    assert set(kept) == {model[0], model[2]}
    model(torch.randn(5, 96))
    assert all(observed(model).kept_weights[layer] is weight for layer, weight in kept.items())


@pytest.mark.parametrize("change", ["weight", "loaded weight", "scale", "phase", "mask", "step"])
@pytest.mark.parametrize("storage", ["masked", "compact"])
def test_a_change_in_between_is_never_missed(storage: str, change: str) -> None:
    model, other = linears(storage, PER_TENSOR), linears(storage, PER_TENSOR)
    x = torch.randn(5, 96)
    for one, keeps in ((model, True), (other, False)):
        keep_weights(one, keeps)
        set_phase(one, Phase.OBSERVE)
        begin_step(one, 0)
        before = one(x)
        layer: Any = one[0]
        parameter = layer.values if storage == "compact" else layer.weight
        with torch.no_grad():
            if change == "weight":
                parameter.mul_(1.5)
            elif change == "loaded weight":
                state = {name: tensor.clone() for name, tensor in one.state_dict().items()}
                state["0.values" if storage == "compact" else "0.weight"] *= 1.5
                one.load_state_dict(state)
            elif change == "scale":
                layer.weight_quantizer.scale.mul_(2)
            elif change == "phase":
                set_phase(one, Phase.OFF)
            elif change == "mask" and storage == "masked":
                layer.mask_request = None
                parameter.add_(0.01)
            elif change == "step":
                begin_step(one, 1)
                parameter.data.mul_(1.5)  # which no version counts: DeepSpeed's way to write
        after = one(x)
        if change != "mask" or storage == "masked":
            assert not torch.equal(before, after)
        one.out = after.detach()
    assert torch.equal(model.out, other.out)


def test_nothing_is_kept_in_evaluation_and_nothing_unless_asked() -> None:
    model = linears("masked", PER_TENSOR)
    set_phase(model, Phase.OBSERVE)
    model(torch.randn(5, 96))
    assert not observed(model).kept_weights
    keep_weights(model, True)
    model.eval()(torch.randn(5, 96))
    with torch.no_grad():
        model.train()(torch.randn(5, 96))
    assert not observed(model).kept_weights
