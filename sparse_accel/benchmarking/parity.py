"""What must hold before anything is timed: a faster step that computes something else is worth nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from sparse_accel.benchmarking.baselines import Loop, build_b1
from sparse_accel.benchmarking.lengths import workload_features
from sparse_accel.benchmarking.models import encoder_matrices
from sparse_accel.benchmarking.other_tools import Tool, build_tool
from sparse_accel.benchmarking.own import OWN_ARMS, Bench, OwnTraining, build_own, padding_collator
from sparse_accel.errors import InvariantError
from sparse_accel.tasks import resolve_task

# Of the fp32 gradient of a step, and of its loss.
TOLERANCE: Final = 1e-5


@dataclass(frozen=True)
class Gate:
    """Something that was compared: the difference found, and the largest that lets the run go on."""

    what: str
    found: float
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether the run may go on; not for what is no number."""
        return self.found <= self.allowed

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"what": self.what, "found": self.found, "allowed": self.allowed}


@dataclass(frozen=True)
class Step:
    """The loss of one step and its gradient, by parameter name."""

    loss: float
    gradient: dict[str, Tensor]


def parity_gates(bench: Bench) -> list[Gate]:
    """Compare, in fp32 and without dropout, one step of the run's batching with the padded one, and of the padded one with
    Hugging Face's own loss on features that have no padding. `bench` is one whose launch is in fp32."""
    one_step = one_step_of(bench)
    settings, workload = one_step.settings, one_step.settings.workload
    gates = []
    for name in ("dense", "kd_live"):
        for batching in (settings.batching,) if settings.batching != "padded" else ():
            ours = own_step(name, one_step, batching)
            padded = own_step(name, one_step, "padded")
            gates += _compared(f"{name}, {batching} against padded", ours, padded)
    if any(name in OWN_ARMS and OWN_ARMS[name].teacher == "cached" for name in settings.arms):
        cached, live = (own_step(name, one_step, settings.batching) for name in ("kd_cached", "kd_live"))
        gates += _compared("cached against live teacher", cached, live)
    full = replace(workload, lengths=None, max_length=min(64, workload.max_length))
    features = workload_features(full, full.features, settings.seed)
    whole = replace(one_step, features=features, settings=replace(settings, workload=full))
    gates += _compared(
        "dense against Hugging Face's own loss, features without padding",
        own_step("dense", whole, settings.batching),
        hugging_face_step(whole),
    )
    return gates


def one_step_of(bench: Bench) -> Bench:
    """The bench with the features of one step, in fp32."""
    settings = bench.settings
    workload = replace(settings.workload, features=settings.features_per_step)
    features = workload_features(workload, workload.features, settings.seed)
    return replace(bench, settings=replace(settings, workload=workload, precision="fp32"), features=features)


def tool_gates(name: str, tool: Tool, bench: Bench) -> list[Gate]:
    """Compare a step of a tool's model, its quantizers off, with one of B1 from the same weights: what it adds is its quantization
    alone. The gradients are those of the parameters that it left as they were: NNCF scales weights against their inputs. Of a
    tool that holds zeros, also whether it holds those of the weights."""
    bench = one_step_of(bench)
    sparsity = bench.settings.workload.sparsity if tool.is_sparse else 0.0
    loop, plain = build_tool(tool, bench, dropout=0.0), build_b1(bench, dropout=0.0, sparsity=sparsity)
    tool.disable(loop.module)
    before = dict(plain.module.named_parameters())
    kept = {
        key
        for key, value in loop.module.named_parameters()
        if key in before and torch.equal(value, before[key].to(value.device))
    }
    masks = loop.masks or {}
    held = encoder_matrices(loop.module) if tool.is_sparse else {}
    wrong = sum(int((masks[key] != (weight != 0)).sum()) for key, weight in held.items() if key in masks)
    theirs, ours = _loop_step(loop), _loop_step(plain)
    moving = sum(int(theirs.gradient[key][~mask].count_nonzero()) for key, mask in masks.items())
    gates = [
        Gate(f"{name}: matrices without a mask, or masks of something else", len(masks.keys() ^ held.keys()), 0),
        Gate(f"{name}: weights whose mask is not that of the zeros", wrong, 0),
        Gate(f"{name}: zeros with a gradient", moving, 0),
    ]
    return [
        *(gates if tool.is_sparse else ()),
        *_compared(f"{name}, quantizers off, against b1", *(_part(step, kept) for step in (theirs, ours))),
    ]


def _part(step: Step, names: set[str]) -> Step:
    return Step(step.loss, {name: value for name, value in step.gradient.items() if name in names})


def require(gates: list[Gate]) -> None:
    """Raise InvariantError for the gates that do not hold."""
    failed = [gate for gate in gates if not gate.holds]
    if failed:
        told = "; ".join(f"{gate.what}: {gate.found:.3g}, allowed {gate.allowed:.3g}" for gate in failed)
        raise InvariantError(f"nothing was measured, for the arms do not compute the same ({told})")


def own_step(name: str, bench: Bench, batching: str) -> Step:
    """One step of an arm of ours, unclipped."""
    arm = replace(OWN_ARMS[name], batching=batching)
    training = build_own(arm, bench, dropout=0.0, max_grad_norm=0.0)
    gradient = _take_gradient(training, training.session.module, training.session.optimizer)
    assert training.state.total_loss is not None
    return Step(float(training.state.total_loss), gradient)


def hugging_face_step(bench: Bench) -> Step:
    """One step of B1. Where tokens are masked anew in every epoch, it is given those that ours masks in its first, and the whole
    step at once: its loss is a mean over the masked tokens of a batch, and two batches have not as many."""
    loop, settings = build_b1(bench, dropout=0.0), bench.settings
    task = resolve_task(settings.workload.task)
    if not task.features_are_fixed:
        collate = padding_collator(settings, task, pads_to_max_length=True)
        loop.batches, loop.micro_batches = [collate(bench.features, np.arange(len(bench.features)), 0)], 1
    return _loop_step(loop)


def _loop_step(loop: Loop) -> Step:
    losses: list[Tensor] = []
    loss_of = loop.loss

    def recorded(batch: dict[str, Tensor]) -> Tensor:
        loss = loss_of(batch)
        losses.append(loss.detach())
        return loss

    loop.loss = recorded
    gradient = _take_gradient(loop, loop.module, loop.optimizer)
    return Step(float(torch.stack(losses).mean()), gradient)


def _take_gradient(arm: OwnTraining | Loop, module: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    taken: dict[str, Tensor] = {}

    def keep(*_: Any) -> None:
        named = module.named_parameters()
        taken.update({name: value.grad.detach().clone() for name, value in named if value.grad is not None})

    inner = getattr(optimizer, "optimizer", optimizer)
    handle = inner.register_step_pre_hook(keep)
    arm.turn()
    handle.remove()
    return taken


def _compared(what: str, one: Step, other: Step) -> list[Gate]:
    """The relative difference of two losses, and of two gradients as vectors."""
    if one.gradient.keys() != other.gradient.keys():
        return [Gate(f"{what}: the gradient's parameters", float("nan"), TOLERANCE)]
    difference = sum(
        float((one.gradient[name] - value).double().square().sum()) for name, value in other.gradient.items()
    )
    whole = sum(float(value.double().square().sum()) for value in other.gradient.values())
    return [
        Gate(f"{what}: loss", abs(one.loss - other.loss) / abs(other.loss), TOLERANCE),
        Gate(f"{what}: gradient", (difference / whole) ** 0.5, TOLERANCE),
    ]
