"""How much memory a teacher takes under each placement, and which placement fits."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

# An estimate may fill this share of what is free: the rest is for what it leaves out (caches, buffers of collectives).
_USABLE: Final = 0.9


@dataclass(frozen=True)
class Machine:
    """What a launch has: processes in all and on one node, devices that each of them sees, and the bytes free on a rank's
    own device before model and teacher are there."""

    num_processes: int
    processes_per_node: int
    num_devices: int
    free: int


@dataclass(frozen=True)
class Sizes:
    """What an estimate is made of, in bytes: the teacher's weights, those of them that are gathered at one time, what its
    forward computes, and all that the student needs on a rank."""

    teacher: int
    largest_gather: int
    activations: int
    student: int


def estimate(sizes: Sizes, machine: Machine) -> dict[str, int]:
    """Bytes that student and teacher take on the fullest device of a rank under each placement that the launch can have,
    the quickest placement first.

    A sharded teacher is teacher / processes + 2 * largest_gather: weights arrive in a buffer and are copied out of it. With
    `device_map` the first device is left to the student if the others hold the teacher.
    """
    others = max(1, machine.num_devices - 1)
    sharded = sizes.student + sizes.activations + -(-sizes.teacher // machine.num_processes) + 2 * sizes.largest_gather
    needs = {
        "replicated": sizes.student + sizes.teacher + sizes.activations,
        "device_map": max(sizes.student, -(-sizes.teacher // others) + sizes.largest_gather) + sizes.activations,
        "fsdp2": sharded,
        "zero3": sharded,
    }
    return {placement: need for placement, need in needs.items() if obstacle(placement, machine) is None}


def obstacle(placement: str, machine: Machine) -> str | None:
    """Why a launch cannot have a placement, whatever the sizes; None if it can."""
    if placement in ("fsdp2", "zero3") and machine.num_processes == 1:
        return "spreads the teacher over processes, and there is only one; start several, or use replicated"
    if placement == "device_map" and machine.processes_per_node > 1:
        return (
            f"one process spreads the teacher over all devices of its node, and {machine.processes_per_node} processes share "
            "this one; start one process per node, or use fsdp2"
        )
    if placement == "device_map" and machine.num_devices < 2:
        return "this machine has one device, so that there is nothing to spread the teacher over; use replicated"
    return None


def choose(needs: Mapping[str, int], machine: Machine) -> str | None:
    """The first placement that fits; None when none does."""
    return next((placement for placement, need in needs.items() if fits(need, machine)), None)


def fits(need: int, machine: Machine) -> bool:
    """Whether so many bytes are free, with some to spare."""
    return need <= _USABLE * machine.free


def table(needs: Mapping[str, int], sizes: Sizes, machine: Machine) -> str:
    """The estimate for a person, a placement a line."""
    rows = [
        ("student", sizes.student),
        ("teacher, whole", sizes.teacher),
        *((f"with {n}", b) for n, b in needs.items()),
    ]
    lines = [f"  {name:<18} {gigabytes(size):>9}" for name, size in rows]
    return "\n".join([*lines, f"  {'free':<18} {gigabytes(machine.free):>9}, of which {_USABLE:.0%} are used"])


def gigabytes(size: int) -> str:
    """In GB, or in MB where that would be 0.0."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


# What each way of training spreads over the ranks.
SPREAD_BY: Final[dict[str, frozenset[str]]] = {
    "ddp": frozenset(),
    "zero1": frozenset({"moments"}),
    "zero2": frozenset({"moments", "gradients"}),
    "zero3": frozenset({"moments", "gradients", "weights"}),
    "fsdp": frozenset({"moments", "gradients", "weights"}),
}


def student_bytes(
    weights: int, trainable: int, *, num_moments: int, spread: Collection[str], num_processes: int
) -> int:
    """A rank's share of a student's weights, gradients and optimizer state in fp32."""
    parts = {"weights": weights, "gradients": trainable, "moments": num_moments * trainable}
    return sum(-(-size // num_processes) if name in spread else size for name, size in parts.items())


def layer_activations(*, hidden: int, heads: int, batch: int, length: int) -> int:
    """Bytes that one transformer layer computes for a micro-batch in fp32: 16 values per token and hidden unit (8 of them
    are the MLP's) and two `[length, length]` matrices per head."""
    return 4 * batch * length * (16 * hidden + 2 * heads * length)
