"""Which launch configuration a model fits in: an estimate of the memory that each way of sharing it out takes per GPU.

The numbers are what parameters, gradients and AdamW take by their count, and a rule of thumb for activations; they choose
between configurations that differ severalfold and do not replace a trial.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from sparse_accel.errors import LaunchError, ModelError, OptionError

_SUFFIXES: Final = {"K": 1e3, "M": 1e6, "B": 1e9}
# The share of a GPU's memory that an estimate may fill: the rest is for the driver, NCCL and fragmentation.
USABLE: Final = 0.9
_GB: Final = 1e9

# How configurations of model families spell the three numbers that activations depend on.
_NUM_LAYERS: Final = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
_HIDDEN: Final = ("hidden_size", "dim", "n_embd", "d_model")
_NUM_HEADS: Final = ("num_attention_heads", "n_heads", "n_head", "num_heads")


@dataclass(frozen=True)
class ModelSize:
    """How large a model is. `num_prunable` parameters are matrices of its layers, the others embeddings, biases, norms."""

    num_parameters: int
    num_prunable: int
    num_layers: int
    hidden_size: int
    num_heads: int

    @property
    def num_gathered(self) -> int:
        """Parameters that are whole at a time where weights are shared out: two layers, and what is in no layer."""
        return self.num_parameters - self.num_prunable + 2 * self.num_prunable // self.num_layers


@dataclass(frozen=True)
class Machine:
    """The machines that a training runs on, each with as many GPUs of `gpu_bytes` as the others."""

    num_gpus: int
    gpu_bytes: float
    num_nodes: int = 1

    @property
    def num_processes(self) -> int:
        """One process per GPU; without GPUs, one."""
        return max(1, self.num_gpus) * self.num_nodes


@dataclass(frozen=True)
class Workload:
    """What is trained, and on how much at a time. `sparsity` is the share of zeros in the model's prunable weights."""

    student: ModelSize
    num_teacher_parameters: int = 0
    precision: str = "no"
    sparsity: float = 0.0
    batch_size: int = 8
    sequence_length: int = 384


@dataclass(frozen=True)
class Strategy:
    """A way to share a training out among GPUs: what each holds whole and what only its share of."""

    name: str
    # Shipped launch configurations for one machine and for several, None where there is none.
    config: str | None
    multi_node_config: str | None = None
    shares_weights: bool = False
    shares_gradients: bool = False
    shares_optimizer: bool = False
    # Bytes per parameter besides weight, gradient and Adam's two moments of 4 each.
    gradient_buckets: int = 0
    masters: int = 0
    offloads_optimizer: bool = False
    min_processes: int = 2
    # Whether it is chosen unless asked for.
    is_offered: bool = True


# In the order of preference: the simplest first. DDP's buckets hold a second copy of the gradients; DeepSpeed keeps float32
# masters beside the weights, float32 ones too. ZeRO-1, 2 and 3 are for those who ask for them: FSDP2 takes no more memory
# than any of them and needs nothing but torch.
STRATEGIES: Final = {
    strategy.name: strategy
    for strategy in (
        Strategy("cpu", "cpu", min_processes=1, is_offered=False),
        Strategy("single_gpu", "single_gpu", min_processes=1),
        Strategy("ddp", "ddp", "multi_node_ddp", gradient_buckets=4),
        Strategy(
            "fsdp2", "fsdp2", "multi_node_fsdp2", shares_weights=True, shares_gradients=True, shares_optimizer=True
        ),
        Strategy("zero1", "zero1", shares_optimizer=True, masters=4, is_offered=False),
        Strategy("zero2", "zero2", shares_gradients=True, shares_optimizer=True, masters=4, is_offered=False),
        Strategy(
            "zero3",
            "zero3",
            "multi_node_zero3",
            shares_weights=True,
            shares_gradients=True,
            shares_optimizer=True,
            masters=4,
            is_offered=False,
        ),
        Strategy(
            "zero3_offload",
            "zero3_offload",
            shares_weights=True,
            shares_gradients=True,
            shares_optimizer=True,
            masters=4,
            offloads_optimizer=True,
            min_processes=1,
        ),
    )
}


@dataclass(frozen=True)
class Estimate:
    """Bytes that one GPU holds under a strategy, and `host` bytes of its machine's own memory."""

    strategy: Strategy
    weights: float
    gradients: float
    optimizer: float
    activations: float
    teacher: float
    host: float = 0.0

    @property
    def total(self) -> float:
        """All that lies on the GPU."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.teacher


@dataclass(frozen=True)
class Advice:
    """The strategy that was taken, the machines that it uses, its configuration by name, why it was taken, and the estimates
    that it was taken from."""

    strategy: Strategy
    machine: Machine
    config: str
    reason: str
    estimates: tuple[Estimate, ...] = ()


def parameter_count(text: str, option: str) -> int:
    """`110M` -> 110000000. Raises OptionError."""
    number, factor = text.strip(), 1.0
    if number and number[-1].upper() in _SUFFIXES:
        number, factor = number[:-1], _SUFFIXES[number[-1].upper()]
    try:
        count = float(number) * factor
    except ValueError:
        count = 0.0
    if not 1 <= count < 1e15:
        raise OptionError(f"{option}: expected a number of parameters such as 110M or 1.3B, got {text!r}")
    return round(count)


def typical_size(num_parameters: int) -> ModelSize:
    """A model of which only the size is known, as a transformer whose width is 64 times its depth L: it has about
    12 L (64 L)^2 parameters, all of them in its layers."""
    num_layers = max(1, round((num_parameters / (12 * 64**2)) ** (1 / 3)))
    return ModelSize(num_parameters, num_parameters, num_layers, 64 * num_layers, num_layers)


def model_size(folder: Path, option: str) -> ModelSize:
    """The size of the model in a folder, from its config.json and the headers of its safetensors files: no weight is
    read. Raises ModelError."""
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(
            f"{option} {folder}: no safetensors file is there; say how large the model is: --parameters 110M"
        )
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{option} {folder}: its config.json cannot be read: {error}") from None
    total = prunable = 0
    for file in files:
        try:
            with safe_open(file, framework="numpy") as tensors:
                shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{option} {file}: cannot be read: {error}") from None
        for name, shape in shapes.items():
            count = 1
            for length in shape:
                count *= length
            total += count
            prunable += count if len(shape) == 2 and "embed" not in name else 0
    return sized(config, total, prunable)


def sized(config: Any, num_parameters: int, num_prunable: int) -> ModelSize:
    """The size of a model of which the config (a mapping) and the counts are known."""
    typical = typical_size(max(1, num_parameters))
    return ModelSize(
        num_parameters=num_parameters,
        num_prunable=num_prunable,
        num_layers=_number(config, _NUM_LAYERS, typical.num_layers),
        hidden_size=_number(config, _HIDDEN, typical.hidden_size),
        num_heads=_number(config, _NUM_HEADS, typical.num_heads),
    )


def _number(config: Any, names: Sequence[str], otherwise: int) -> int:
    return next((config[name] for name in names if isinstance(config.get(name), int)), otherwise)


def activation_bytes(size: ModelSize, workload: Workload) -> float:
    """What forward keeps for backward: s b h L (34 + 5 a s / h) bytes in half precision for sequences of s tokens, b of
    them, L layers of width h with a heads (Korthikanti et al. 2022, equation 2, without recomputation), twice that in
    float32."""
    s, b, h, a = workload.sequence_length, workload.batch_size, size.hidden_size, size.num_heads
    half = s * b * h * size.num_layers * (34 + 5 * a * s / h)
    return half if workload.precision != "no" else 2 * half


def estimate(strategy: Strategy, machine: Machine, workload: Workload) -> Estimate:
    """The bytes per GPU of N processes that train P parameters with AdamW:

        weights     4 P, a share of 1/N where they are shared out, then with those that are gathered at a time (4 bytes);
                    and 4 bytes (2 in half precision) per prunable weight, since a masked or fake-quantized layer keeps
                    the weight that it multiplies with until backward, in every process
        gradients   4 P, or its share; DDP 4 P more for the buckets in which it reduces them
        optimizer   8 P for Adam's two moments, DeepSpeed 4 P more for its masters, or the share; nothing where they lie
                    in the machine's own memory
        teacher     4 per parameter, whole in every process

    P leaves pruned weights out, which takes them to be stored compactly (by their surviving values): then gradients,
    moments and masters shrink to the kept share too. With weights that are stored with their zeros, give no sparsity.
    """
    size, count = workload.student, machine.num_processes
    trained = size.num_parameters - workload.sparsity * size.num_prunable
    share = {True: trained / count, False: trained}
    multiplied = (4 if workload.precision == "no" else 2) * size.num_prunable
    gathered = 4 * size.num_gathered if strategy.shares_weights else 0
    gradients = 4 * share[strategy.shares_gradients]
    optimizer = (8 + strategy.masters) * share[strategy.shares_optimizer]
    return Estimate(
        strategy=strategy,
        weights=4 * share[strategy.shares_weights] + gathered + multiplied,
        gradients=gradients + strategy.gradient_buckets * trained,
        optimizer=0.0 if strategy.offloads_optimizer else optimizer,
        activations=activation_bytes(size, workload),
        teacher=4.0 * workload.num_teacher_parameters,
        host=(optimizer + gradients) * max(1, machine.num_gpus) if strategy.offloads_optimizer else 0.0,
    )


def possible(machine: Machine) -> list[Strategy]:
    """The strategies that there is a configuration for on these machines, the simplest first."""
    if machine.num_gpus == 0:
        return [STRATEGIES["cpu"]] if machine.num_nodes == 1 else []
    return [
        strategy
        for strategy in STRATEGIES.values()
        if strategy.name != "cpu"
        and _config(strategy, machine) is not None
        and strategy.min_processes <= machine.num_processes
        and not (strategy.name == "single_gpu" and machine.num_processes > 1)
    ]


def _config(strategy: Strategy, machine: Machine) -> str | None:
    return strategy.config if machine.num_nodes == 1 else strategy.multi_node_config


def advise(machine: Machine, workload: Workload | None, wanted: str | None = None) -> Advice:
    """The simplest strategy whose estimate fits into the GPUs, or the `wanted` one. Raises LaunchError where there is
    none."""
    if wanted == "cpu":
        machine = replace(machine, num_gpus=0)
    elif wanted == "single_gpu":
        machine = replace(machine, num_gpus=min(1, machine.num_gpus))
    strategies = possible(machine)
    if not strategies:
        raise LaunchError("several machines without GPUs: there is no launch configuration for them; use --nodes 1")
    estimates = tuple(estimate(strategy, machine, workload) for strategy in strategies) if workload else ()
    if wanted is not None:
        strategy = _wanted(wanted, machine, strategies)
        reason = "asked for"
        for entry in estimates:
            if entry.strategy is strategy and machine.num_gpus and not _fits(entry, machine):
                reason += ", though by this estimate it does not fit"
    elif machine.num_gpus == 0:
        strategy, reason = strategies[0], "there is no GPU"
    elif workload is None:
        strategy = strategies[0]
        reason = "the simplest; whether the model fits was not looked at (--model or --parameters)"
    else:
        fitting = [entry for entry in estimates if entry.strategy.is_offered and _fits(entry, machine)]
        if not fitting:
            raise LaunchError(
                "by this estimate nothing fits; use more GPUs, a smaller batch (--per_device_train_batch_size), shorter"
                f" sequences (--max_seq_length) or half precision (--precision bf16)\n{table(estimates, machine, None)}"
            )
        strategy, reason = fitting[0].strategy, "the simplest that fits"
    config = _config(strategy, machine)
    assert config is not None  # `possible` has looked
    return Advice(strategy, machine, config, reason, estimates if machine.num_gpus else ())


def _wanted(name: str, machine: Machine, strategies: Sequence[Strategy]) -> Strategy:
    for strategy in strategies:
        if strategy.name == name:
            return strategy
    raise LaunchError(
        f"--strategy {name} is not for {machine.num_nodes} {'machine' if machine.num_nodes == 1 else 'machines'} with"
        f" {machine.num_gpus} {'GPU' if machine.num_gpus == 1 else 'GPUs'}; these are:"
        f" {', '.join(strategy.name for strategy in strategies)}"
    )


def _fits(entry: Estimate, machine: Machine) -> bool:
    return entry.total <= USABLE * machine.gpu_bytes


def table(estimates: Sequence[Estimate], machine: Machine, chosen: Strategy | None) -> str:
    """The estimates side by side, in GB per GPU."""
    headings = ("", "weights", "gradients", "optimizer", "activations", "teacher", "total", "")
    rows: list[tuple[str, ...]] = [headings]
    for entry in estimates:
        parts = (entry.weights, entry.gradients, entry.optimizer, entry.activations, entry.teacher, entry.total)
        verdict = "fits" if _fits(entry, machine) else "too large"
        if entry.host:
            verdict += f", and {_gigabytes(entry.host)} GB of each machine's memory"
        verdict += "  <- this one" if entry.strategy is chosen else ""
        rows.append((entry.strategy.name, *map(_gigabytes, parts), verdict))
    widths = [max(len(row[column]) for row in rows) for column in range(len(headings) - 1)]
    lines = [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:], strict=True)),
                row[-1],
            ]
        ).rstrip()
        for row in rows
    ]
    usable = USABLE * machine.gpu_bytes
    title = f"GB per GPU, of {_gigabytes(usable)} usable ({USABLE:.0%} of {_gigabytes(machine.gpu_bytes)})"
    return "\n".join([f"{title}, {machine.num_processes} processes:", *lines])


def _gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / _GB:.1f}" if num_bytes >= 10 * _GB else f"{num_bytes / _GB:.2f}"


def detect_gpus() -> tuple[int, float]:
    """How many GPUs this machine has, and the bytes of the smallest."""
    import torch

    count = torch.cuda.device_count()
    return count, min((float(torch.cuda.get_device_properties(i).total_memory) for i in range(count)), default=0.0)
