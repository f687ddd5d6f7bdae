"""What an optimizer step sends and what its optimizer holds, dense against masked against compact, on two processes.

    python benchmarks/distributed_bytes.py

A model of BERT-base's shape, random, 90% of each encoder matrix zero, takes three steps under each way of launch_configs/, on
two processes over gloo; every collective is counted where torch hands it to its process group (tests/distributed/wire.py). Bytes
depend on shapes alone. Writes benchmarks/results/distributed_bytes.json and the table in docs/distributed.md; `--table` writes the
table alone, from the results that are there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bert_shapes import circumstances, said_by, write_world

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "distributed_bytes.json"
PAGE = ROOT / "docs" / "distributed.md"
BLOCK = re.compile(r"(?<=<!-- bytes: python benchmarks/distributed_bytes.py -->\n).*?(?=<!-- /bytes -->)", re.DOTALL)

WAYS = {"DDP": "ddp", "FSDP2": "fsdp2", "ZeRO-1": "zero1", "ZeRO-2": "zero2", "ZeRO-3": "zero3"}
ARMS = ("dense", "masked", "compact", "compact, frozen embeddings")
NUM_STEPS = 3
# The most that each may be of the dense model's.
BARS = {"compact": 0.30, "compact, frozen embeddings": 0.08}


def main() -> None:
    """Count what is missing, then write the results and the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="bert_base", help="of benchmarks/bert_shapes.py")
    parser.add_argument("--sparsity", type=float, default=0.9, help="of each matrix of the encoder")
    parser.add_argument("--ways", default=",".join(WAYS), help="some of them, by commas")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="write the table only")
    arguments = parser.parse_args()
    if not arguments.table:
        document = {
            **circumstances(),
            "shape": arguments.shape,
            "sparsity": arguments.sparsity,
            "processes": 2,
            "bars": BARS,
            "ways": {},
        }
        with tempfile.TemporaryDirectory() as folder:
            write_world(Path(folder), arguments.shape, arguments.sparsity, rows=8)
            for way in arguments.ways.split(","):
                document["ways"][way] = count(way, Path(folder))
                arguments.results.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    text = table(json.loads(arguments.results.read_text("utf-8")))
    print(text)
    if arguments.results == RESULTS:
        PAGE.write_text(BLOCK.sub(lambda _: text, PAGE.read_text("utf-8")), "utf-8")


def count(way: str, world: Path) -> dict[str, Any]:
    """Every arm under one way of being spread, in one launch."""
    cases = {
        arm: said_by(arm, world)
        | {
            "train_file": str(world / "train.json"),
            "output_dir": str(world / f"{way} {arm}"),
            "cache_dir": str(world / "cache"),
            "do_train": True,
            "max_steps": NUM_STEPS,
            "per_device_train_batch_size": 1,
            "max_seq_length": 32,
            "doc_stride": 8,
            "logging_strategy": "no",
            "save_strategy": "no",
            "saves": way == "DDP",
        }
        for arm in ARMS
    }
    counted = launch(WAYS[way], cases, world)
    return {arm: summary(result) for arm, result in counted.items()}


def launch(config: str, cases: dict[str, dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Count the cases on two processes that accelerate starts with a shipped configuration."""
    out, file = folder / f"{config}.json", folder / f"{config}_cases.json"
    file.write_text(json.dumps({"out": str(out), "cases": cases}), "utf-8")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"TORCH_EXTENSIONS_DIR": str(folder / "extensions")}
    if config == "ddp":
        environment["ACCELERATE_USE_CPU"] = "1"
    command = [
        sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port", "0",
        "--config_file", str(ROOT / "launch_configs" / f"{config}.yaml"), "-m", "tests.distributed.wire", str(file),
    ]  # fmt: skip
    finished = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if finished.returncode:
        sys.exit(finished.stdout[-6000:])
    counted: dict[str, Any] = json.loads(out.read_text("utf-8"))
    return counted


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Of the steps the last: the first also arrange buckets and the order of gathering."""
    return {**{key: value for key, value in result.items() if key != "steps"}, "step": result["steps"][-1]}


def gradients(arm: dict[str, Any]) -> int:
    """Bytes of a step that are summed over processes; FSDP2 sums the gradients' norms too, a number each."""
    return sum(size for kind, size in arm["step"]["bytes"].items() if "reduce" in kind)


def table(document: dict[str, Any]) -> str:
    """Markdown from the results: MB, and the share of the dense model's."""
    lines = [f"| MB, and of dense | {' | '.join(ARMS)} |", "|---|" + "---:|" * len(ARMS)]
    for way, arms in document["ways"].items():
        lines.append(_row(f"{way}: gradients a step", [gradients(arms[arm]) for arm in ARMS]))
        gathered = [arms[arm]["step"]["bytes"].get("all_gather", 0) for arm in ARMS]
        if any(gathered):
            lines.append(_row(f"{way}: weights a step", gathered))
        lines.append(_row(f"{way}: optimizer, each process", [arms[arm]["optimizer_bytes"] for arm in ARMS]))
    ddp = document["ways"].get("DDP")
    if ddp is not None:
        lines.append(_row("a checkpoint", [sum(ddp[arm]["checkpoint_bytes"].values()) for arm in ARMS]))
        lines.append(_row("gradients of the pruned matrices alone", [matrix_bytes(ddp, arm) for arm in ARMS]))
    return "\n".join(lines) + "\n"


def matrix_bytes(arms: dict[str, Any], arm: str) -> int:
    """What was counted under DDP less the parameters that are never compact."""
    compact = arms["compact, frozen embeddings" if "frozen" in arm else "compact"]
    return gradients(arms[arm]) - (compact["trained_bytes"] - 4 * compact["compact"]["values"])


def _row(title: str, sizes: list[int]) -> str:
    shares = ["", *(f" ({size / sizes[0]:.3f}x)" for size in sizes[1:])]
    return f"| {title} | {' | '.join(f'{size / 1e6:,.1f}{share}' for size, share in zip(sizes, shares, strict=True))} |"


if __name__ == "__main__":
    main()
