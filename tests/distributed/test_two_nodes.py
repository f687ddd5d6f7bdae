"""Two machines with a network of their own, started through the shipped multi-node configuration: the result of one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import running
from tests.distributed.nodes import Node, two_nodes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def nodes() -> Iterator[tuple[Node, Node]]:
    with two_nodes() as made:
        yield made


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return running.tiny_world(tmp_path_factory.mktemp("world"), rows=60, dropout=0.0) | {"optim": "sgd"}


def start(nodes: tuple[Node, Node], rank: int, words: list[str], port: int) -> subprocess.Popen[str]:
    """The command on one node, as its user types it there."""
    node = nodes[rank]
    return running.start(
        words,
        *node.prefix,
        *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"),
        *("--config_file", "launch_configs/multi_node_ddp.yaml", "--num_machines", "2", "--num_processes", "2"),
        *("--machine_rank", str(rank), "--main_process_ip", nodes[0].address, "--main_process_port", str(port)),
        "sparse_accel",
        ACCELERATE_USE_CPU="1",
        GLOO_SOCKET_IFNAME=node.interface,
    )


def test_two_nodes_give_the_result_of_one(nodes: tuple[Node, Node], world: dict[str, Any], tmp_path: Path) -> None:
    recipe = {"recipe_args": running.QUANT_ARGS.replace("1e-3", "0.5")}
    one = running.run(world, tmp_path / "one", **recipe)
    words = running.command(world, tmp_path / "two", **recipe, gradient_accumulation_steps=1)
    processes = [start(nodes, rank, words, 29631) for rank in range(2)]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert "2 processes" in outputs[0] and "written to" in outputs[0]
    assert "written to" not in outputs[1], "only the first node speaks"
    assert running.largest_difference(one, tmp_path / "two") < 5e-3


def test_nodes_with_different_data_are_told_apart_before_anything_is_written(
    nodes: tuple[Node, Node], world: dict[str, Any], tmp_path: Path
) -> None:
    commands = [
        running.command(world, tmp_path / "out"),
        running.command(world, tmp_path / "out", train_file=world["validation_file"]),
    ]
    processes = [start(nodes, rank, words, 29632) for rank, words in enumerate(commands)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert all(process.returncode != 0 for process in processes)
    assert "the processes were not given the same (content of train_file:" in outputs[0]
    assert not (tmp_path / "out").exists()
