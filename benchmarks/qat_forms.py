"""What fake quantization costs on this machine, form by form: in copies of the tensor, and of a layer over the dense layer.

    python benchmarks/qat_forms.py

The forms take turns in one process, every other round backwards, and the process's CPU time counts, so that other work beside
it disturbs little. Each form is checked against the plain one, value and gradient to the bit, before it is timed. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from bert_shapes import circumstances
from torch import Tensor, nn

from sparse_accel.compress.fakequant import QuantSpec, fake_quantize, reference_fake_quantize, scale_and_zero_point
from sparse_accel.compress.plan import CompressionPlan, install, set_phase
from sparse_accel.compress.ranges import Phase, begin_step, calibrating, end_calibration, end_step, keep_weights

Work = Callable[[], object]
ACTIVATION, WEIGHT = QuantSpec(), QuantSpec(symmetric=True, signed=True)
# Of the grid's reach: all of the tensor, all but a few values of some rows, all but a tenth.
REACHES = {"on the grid": 1.0, "few clamped": 0.8, "many clamped": 0.3}


def main() -> None:
    """Measure everything and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", default="256,1024")
    parser.add_argument("--width", type=int, default=384)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    document: dict[str, Any] = {**circumstances(), "threads": arguments.threads, "copies": {}, "layer over dense": {}}
    for tokens in map(int, arguments.tokens.split(",")):
        document["copies"][tokens] = copies(tokens, arguments.width, arguments.rounds)
        document["layer over dense"][tokens] = layers(tokens, arguments.width, arguments.rounds)
    print(json.dumps(document, indent=1))


def copies(tokens: int, width: int, rounds: int) -> dict[str, float]:
    """Forward and backward of each form on [1, tokens, width], in units of one copy to a tensor that is there."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, tokens, width, generator=generator)
    x[0, ::16] *= 2  # rows that reach farther than the others
    target, upstream = torch.empty_like(x), torch.randn(x.shape, generator=generator)
    works: dict[str, Work] = {"copy": lambda: target.copy_(x), "new copy": x.clone}
    for reach, share in REACHES.items():
        grid = scale_and_zero_point(x.min() * share, x.max() * share, ACTIVATION)
        check_parity(x, grid, upstream)
        for name, form in (("plain", reference_fake_quantize), ("fast", fake_quantize)):
            works[f"{name}, {reach}"] = there_and_back(form, x, grid, upstream)
    seconds = take_turns(works, rounds)
    return {name: round(value / seconds["copy"], 2) for name, value in seconds.items()}


def there_and_back(form: Callable[..., Tensor], x: Tensor, grid: tuple[Tensor, Tensor], upstream: Tensor) -> Work:
    """One forward and backward of a form."""
    leaf = x.clone().requires_grad_()
    return lambda: torch.autograd.grad(form(leaf, *grid, ACTIVATION), leaf, upstream)


def check_parity(x: Tensor, grid: tuple[Tensor, Tensor], upstream: Tensor) -> None:
    """Raise unless the forms give the same bits: no time is worth reporting of another result."""
    found = []
    for form in (reference_fake_quantize, fake_quantize):
        leaf = x.clone().requires_grad_()
        value = form(leaf, *grid, ACTIVATION)
        found.append((value.detach(), *torch.autograd.grad(value, leaf, upstream)))
    if not all(torch.equal(one, other) for one, other in zip(*found, strict=True)):
        raise RuntimeError("the fast form of fake quantization differs from the plain one: nothing was timed")


def layers(tokens: int, width: int, rounds: int) -> dict[str, float]:
    """Forward and backward of a linear layer [width, 4 * width] on [1, tokens, width] in the second micro-batch of a step,
    over the dense layer's."""
    works = {name: layer_work(name, tokens, width) for name in ("dense", "dense again", "observing", "frozen")}
    works["observing, weight made anew"] = layer_work("observing", tokens, width, keeps=False)
    seconds = take_turns(works, rounds)
    return {name: round(value / seconds["dense"], 3) for name, value in seconds.items()}


def layer_work(arm: str, tokens: int, width: int, *, keeps: bool = True) -> Work:
    """A layer as the tutorial quantizes it, in training."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, 4 * width)).train()
    x = torch.randn(1, tokens, width).requires_grad_()
    upstream = torch.randn(1, tokens, 4 * width)
    if not arm.startswith("dense"):
        plan = CompressionPlan()
        plan.add_quantization("0", WEIGHT, (ACTIVATION,))
        install(model, plan)
        keep_weights(model, keeps)
        set_phase(model, Phase.OBSERVE)
        begin_step(model, 0)
        with torch.no_grad(), calibrating(model):
            model(x)
        end_calibration(model, lambda vector: vector)
        model(x)
        end_step(model, lambda vector: vector)
        set_phase(model, Phase.FROZEN if arm == "frozen" else Phase.OBSERVE)
        begin_step(model, 1)
    return lambda: torch.autograd.grad(model(x), [x, *model.parameters()], upstream)


def take_turns(works: dict[str, Work], rounds: int) -> dict[str, float]:
    """The median seconds of CPU of each, after two rounds that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(-2, rounds):
        for name in works if number % 2 else reversed(works):
            begin = time.process_time()
            for _ in range(5):
                works[name]()
            if number >= 0:
                seconds[name].append((time.process_time() - begin) / 5)
    return {name: statistics.median(values) for name, values in seconds.items()}


if __name__ == "__main__":
    main()
