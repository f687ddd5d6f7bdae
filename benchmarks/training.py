"""What training costs, and what others' training costs beside it: runs `benchmark train`, writes results, tables and a plot.

    python benchmarks/training.py                # mini-cpu in fp32 and bf16: about an hour on a quiet core
    python benchmarks/training.py --runs mini_cpu_fp32
    python benchmarks/training.py --table        # the tables and the plot anew, from the results that there are

Writes benchmarks/results/training_*.json, the tables of docs/performance.md and README.md, and docs/training_breakdown.png.
Every file of that name counts, so that one from another machine (see benchmarks/on_gpu.sh) is put into the tables by --table.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparse_accel.benchmarking.bars import verdicts
from sparse_accel.benchmarking.eval_report import for_bars
from sparse_accel.benchmarking.report import (
    bars_table,
    can_plot,
    demands_table,
    notes,
    phases_table,
    plot,
    scaling_table,
    speed_table,
)

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
EVALUATION = RESULTS / "eval_qa.json"
PAGE = ROOT / "docs" / "performance.md"
README = ROOT / "README.md"
PLOT = ROOT / "docs" / "training_breakdown.png"
BLOCKS = {
    name: re.compile(rf"(?<=<!-- {name}: python benchmarks/training.py -->\n).*?(?=<!-- /{name} -->)", re.DOTALL)
    for name in ("bars", "runs")
}

# Result file, without "training_" -> the words after `sparse_accel benchmark train`.
RUNS = {
    "mini_cpu_fp32": ["mini-cpu", "--precision", "fp32"],
    "mini_cpu_bf16": ["mini-cpu", "--precision", "bf16"],
}


def main() -> None:
    """Run what was asked for, then write tables and plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", default=",".join(RUNS), help="with commas between them")
    parser.add_argument("--table", action="store_true", help="write the tables and the plot only")
    arguments, further = parser.parse_known_args()
    names = [] if arguments.table else arguments.runs.split(",")
    if not RUNS.keys() >= set(names):
        parser.error(f"--runs: {', '.join(RUNS)}")
    for name in names:
        run(name, [*RUNS[name], *further])
    found = documents()
    for page, names in ((PAGE, ("bars", "runs")), (README, ("bars",))):
        text = page.read_text("utf-8")
        for name in names:
            made = table(name, found)
            text = BLOCKS[name].sub(lambda _, made=made: made, text)
        page.write_text(text, "utf-8")
    if can_plot() and found:
        plot(next(iter(found.values())), PLOT)


def run(name: str, words: Sequence[str]) -> None:
    """One benchmark in a process of its own; its document becomes results/training_<name>.json."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "sparse_accel", "benchmark", "train", *words, "--output_dir", f"{folder}/out"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        subprocess.run(command, check=True, env=environment)
        text = Path(folder, "out", "results.json").read_text("utf-8")
    (RESULTS / f"training_{name}.json").write_text(text, "utf-8")


def documents() -> dict[str, Any]:
    """All results of trainings, by the names of their files, those of RUNS first."""
    files = {file.stem.removeprefix("training_"): file for file in sorted(RESULTS.glob("training_*.json"))}
    names = [*(name for name in RUNS if name in files), *(name for name in files if name not in RUNS)]
    return {name: json.loads(files[name].read_text("utf-8")) for name in names}


def evaluations() -> list[dict[str, Any]]:
    """The results of benchmarks/eval_qa.py, where there are any, as bars want to know them."""
    if not EVALUATION.is_file():
        return []
    document = json.loads(EVALUATION.read_text("utf-8"))
    return [for_bars(document)]


def table(block: str, found: dict[str, Any]) -> str:
    """The Markdown of a block: all bars, or the tables of every run."""
    if block == "bars":
        return bars_table(verdicts([*found.values(), *evaluations()])).to_markdown()
    parts = []
    for document in found.values():
        parts.append(f"### {document['workload']['name']}, {document['settings']['precision']}\n")
        parts.append(f"```text\n{document['command']}\n```\n")
        parts += [scaling_table(document).to_markdown()] if "alone" in document else []
        parts += [make(document).to_markdown() for make in (speed_table, demands_table, phases_table)]
        parts.append("\n".join(f"- {line}" for line in notes(document)) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    main()
