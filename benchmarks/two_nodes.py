"""Steps of two machines joined by a slow cable, dense against masked against compact.

    sudo python benchmarks/two_nodes.py

The machines are network namespaces of this one, joined by a virtual cable that is held to 1 Gbit/s each way (tc tbf) and, where
the kernel can, delayed by 5 ms (tc netem). Each trains one process of a model of BERT-base's shape, random, 90% of each encoder
matrix zero, started as a person would: `accelerate launch --config_file launch_configs/multi_node_ddp.yaml`. A step's time is
that between two lines of the training's output, its bytes are those that the cable's own counter saw. Writes
benchmarks/results/two_nodes.json and the table in docs/distributed.md; `--table` writes the table alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bert_shapes import circumstances, said_by, write_world

from tests.distributed.nodes import Node, two_nodes

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "two_nodes.json"
PAGE = ROOT / "docs" / "distributed.md"
BLOCK = re.compile(r"(?<=<!-- two nodes: python benchmarks/two_nodes.py -->\n).*?(?=<!-- /two nodes -->)", re.DOTALL)
ARMS = ("dense", "masked", "compact", "compact, frozen embeddings")
_STEP = re.compile(r"step (\d+)/\d+ ")


def main() -> None:
    """Measure each arm once, then write the results and the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="bert_base", help="of benchmarks/bert_shapes.py")
    parser.add_argument("--batch", default="2x64", help="questions x tokens, each process")
    parser.add_argument("--steps", type=int, default=7, help="of each arm; the first two are not counted")
    parser.add_argument("--rate", default="1gbit", help="of the cable, in tc's words")
    parser.add_argument("--delay", default="5ms", help="of the cable, in tc's words")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="write the table only")
    arguments = parser.parse_args()
    if not arguments.table:
        # Told to end, it still takes the machines away.
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        with tempfile.TemporaryDirectory() as folder, two_nodes() as nodes:
            if not nodes[0].is_real:
                sys.exit("two_nodes: this user may not make network namespaces (ip netns add); run it as root")
            document = measure(arguments, Path(folder), nodes)
        arguments.results.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    text = table(json.loads(arguments.results.read_text("utf-8")))
    print(text)
    if arguments.results == RESULTS:
        PAGE.write_text(BLOCK.sub(lambda _: text, PAGE.read_text("utf-8")), "utf-8")


def measure(arguments: argparse.Namespace, world: Path, nodes: tuple[Node, Node]) -> dict[str, Any]:
    """Slow the cable down, and train each arm."""
    document: dict[str, Any] = {
        **circumstances(),
        "shape": arguments.shape,
        "sparsity": 0.9,
        "batch": arguments.batch,
        "cable": slow_down(nodes, arguments.rate, arguments.delay),
        "arms": {},
    }
    write_world(world, arguments.shape, rows=64)
    for number, arm in enumerate(ARMS):
        document["arms"][arm] = train(arm, arguments, world, nodes, port=29640 + number)
        print(arm, json.dumps(document["arms"][arm]), flush=True)
    document["machine"]["busy_cores_after"] = round(os.getloadavg()[0], 2)
    return document


def slow_down(nodes: tuple[Node, Node], rate: str, delay: str) -> dict[str, Any]:
    """Hold both ends of the cable to a rate, and delay what they send where the kernel knows how; says what was done."""

    def tc(node: Node, *words: str) -> bool:
        command = [*node.prefix, "tc", "qdisc", "add", "dev", node.interface, *words]
        return subprocess.run(command, capture_output=True).returncode == 0

    shape = ("tbf", "rate", rate, "burst", "256kb", "latency", "50ms")
    is_delayed = all(tc(node, "root", "handle", "1:", "netem", "delay", delay, "limit", "100000") for node in nodes)
    place = ("parent", "1:") if is_delayed else ("root",)
    if not all(tc(node, *place, *shape) for node in nodes):
        sys.exit("two_nodes: tc cannot hold the cable to a rate (its tbf is missing), without which nothing is slow")
    return {"rate": rate, "delay": delay if is_delayed else None}


def train(arm: str, arguments: argparse.Namespace, world: Path, nodes: tuple[Node, Node], port: int) -> dict[str, Any]:
    """One arm on both machines; milliseconds and bytes of each step."""
    batch_size, length = arguments.batch.split("x")
    options = said_by(arm, world) | {
        "train_file": str(world / "train.json"),
        "output_dir": str(world / f"out {arm}"),
        "cache_dir": str(world / "cache"),
        "do_train": "True",
        "max_steps": str(arguments.steps),
        "per_device_train_batch_size": batch_size,
        "max_seq_length": length,
        "pad_to_max_length": "True",
        "doc_stride": "16",
        "logging_steps": "1",
        "save_strategy": "no",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    processes = [start(nodes, rank, words, port) for rank in range(2)]
    try:
        marks, output = watch(processes[0], nodes[0])
        codes = [process.wait(timeout=120) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:  # a launcher and what it started
                os.killpg(process.pid, signal.SIGKILL)
    if any(codes):
        sys.exit("".join(output[-60:]))
    pairs = list(itertools.pairwise(marks[1:]))  # the first two steps also arrange buckets and make the moments
    seconds = [later[0] - earlier[0] for earlier, later in pairs]
    sent = [later[1] - earlier[1] for earlier, later in pairs]
    return {
        "milliseconds": [round(1000 * value) for value in seconds],
        "median_milliseconds": round(1000 * statistics.median(seconds)),
        "sent_bytes": sent,
        "median_sent_bytes": round(statistics.median(sent)),
    }


def start(nodes: tuple[Node, Node], rank: int, words: list[str], port: int) -> subprocess.Popen[str]:
    """The command on one machine."""
    node = nodes[rank]
    command = [
        *node.prefix, sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch",
        "--config_file", "launch_configs/multi_node_ddp.yaml", "--num_machines", "2", "--num_processes", "2",
        "--machine_rank", str(rank), "--main_process_ip", nodes[0].address, "--main_process_port", str(port),
        "-m", "sparse_accel", "train", "question_answering", *words,
    ]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    environment |= {"ACCELERATE_USE_CPU": "1", "GLOO_SOCKET_IFNAME": node.interface}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def watch(process: subprocess.Popen[str], node: Node) -> tuple[list[tuple[float, int]], list[str]]:
    """When each step's line came, and how much the node had sent by then; and all lines."""
    marks, output = [], []
    assert process.stdout is not None
    for line in process.stdout:
        output.append(line)
        if _STEP.match(line):
            now = time.perf_counter()
            marks.append((now, sent_bytes(node)))
    return marks, output


def sent_bytes(node: Node) -> int:
    """By the counter of the node's interface."""
    command = [*node.prefix, "cat", f"/sys/class/net/{node.interface}/statistics/tx_bytes"]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def table(document: dict[str, Any]) -> str:
    """Markdown from the results."""
    arms = document["arms"]
    lines = ["| | ms a step | of dense | of masked | MB sent a step, each machine |", "|---|---:|---:|---:|---:|"]
    for arm, measured in arms.items():
        time_, sent = measured["median_milliseconds"], measured["median_sent_bytes"]
        shares = [f"{time_ / arms[other]['median_milliseconds']:.2f}x" for other in ("dense", "masked")]
        lines.append(f"| {arm} | {time_:,} | {' | '.join(shares)} | {sent / 1e6:,.1f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
