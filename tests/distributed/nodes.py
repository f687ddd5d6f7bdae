"""Two machines for tests: network namespaces joined by a virtual cable, or, where none may be made, the loopback."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Node:
    """One machine: what comes before a command that runs on it, its address, and the name of its network interface."""

    prefix: tuple[str, ...]
    address: str
    interface: str

    @property
    def is_real(self) -> bool:
        """Whether it has a network of its own."""
        return bool(self.prefix)


@contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Two nodes that reach each other; what was made for them is taken away at the end."""
    names = [f"sparse-accel-{os.getpid()}-{index}" for index in range(2)]
    cables = [f"sa{os.getpid() % 100000}n{index}" for index in range(2)]
    try:
        if not _make(names, cables):
            yield Node((), "127.0.0.1", "lo"), Node((), "127.0.0.1", "lo")
            return
        first, second = (
            Node(("ip", "netns", "exec", name), f"10.213.7.{index + 1}", cable)
            for index, (name, cable) in enumerate(zip(names, cables, strict=True))
        )
        yield first, second
    finally:
        for name in names:
            _ip("netns", "delete", name)


def _make(names: list[str], cables: list[str]) -> bool:
    if not all(_ip("netns", "add", name) for name in names):
        return False
    made = _ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
    for index, (name, cable) in enumerate(zip(names, cables, strict=True)):
        made = made and _ip("link", "set", cable, "netns", name)
        made = made and _ip("-n", name, "address", "add", f"10.213.7.{index + 1}/24", "dev", cable)
        made = made and _ip("-n", name, "link", "set", cable, "up") and _ip("-n", name, "link", "set", "lo", "up")
    return made


def _ip(*words: str) -> bool:
    try:
        return subprocess.run(["ip", *words], capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
