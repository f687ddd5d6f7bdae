"""What holding zeros costs in time: an optimizer step of one process, dense against masked against compact.

    python benchmarks/step_overhead.py

A model of MiniLM's shape (6 layers, 384 wide), random, takes steps on batches of 8 questions of 128 tokens, none padded, with the
optimizer, the recipe and the storage that the program would use. The arms take turns in one process, every other round
backwards; a second dense model is among them, whose ratio to the first says what is noise. Writes
benchmarks/results/step_overhead.json and the table in docs/distributed.md; `--table` writes the table alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bert_shapes import HOLD_ZEROS, circumstances, random_model
from torch import nn

from sparse_accel.compress.plan import CompressionPlan, install, request_masks
from sparse_accel.compress.weight_storage import compact_where_it_pays, model_zeros
from sparse_accel.recipe.schema import Recipe
from sparse_accel.runtime.options import TrainOptions
from sparse_accel.runtime.setup import build_optimizer

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "step_overhead.json"
PAGE = ROOT / "docs" / "distributed.md"
BLOCK = re.compile(r"(?<=<!-- overhead: python benchmarks/step_overhead.py -->\n).*?(?=<!-- /overhead -->)", re.DOTALL)

# Arm -> the storage, None for a model without masks.
ARMS = {"dense": None, "dense again": None, "masked": "masked", "compact": "compact"}
BAR = 1.05
Step = Callable[[], None]


def main() -> None:
    """Measure, then write the results and the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="minilm", help="of benchmarks/bert_shapes.py")
    parser.add_argument("--sparsity", default="0.8,0.9", help="of each matrix of the encoder")
    parser.add_argument("--precision", default="fp32,bf16")
    parser.add_argument("--batch", default="8x128", help="questions x tokens")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="write the table only")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not arguments.table:
        document: dict[str, Any] = {
            **circumstances(),
            "shape": arguments.shape,
            "batch": arguments.batch,
            "threads": arguments.threads,
            "method": "the arms took turns, every other round backwards; ratios are those within a round, of process CPU time "
            "and of wall time: their median, lowest and highest",
            "bar": {"masked": BAR},
            "settings": [],
        }
        batch_size, length = map(int, arguments.batch.split("x"))
        for precision in arguments.precision.split(","):
            for sparsity in map(float, arguments.sparsity.split(",")):
                steps = {
                    arm: build(arguments.shape, sparsity, storage, precision, batch_size, length)
                    for arm, storage in ARMS.items()
                }
                seconds = take_turns(steps, arguments.rounds)
                document["settings"].append(
                    {"precision": precision, "sparsity": sparsity, "arms": summary(seconds), "seconds": seconds}
                )
                print(precision, sparsity, json.dumps(document["settings"][-1]["arms"]), flush=True)
        document["machine"]["busy_cores_after"] = round(os.getloadavg()[0], 2)
        arguments.results.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    text = table(json.loads(arguments.results.read_text("utf-8")))
    print(text)
    if arguments.results == RESULTS:
        PAGE.write_text(BLOCK.sub(lambda _: text, PAGE.read_text("utf-8")), "utf-8")


def build(shape: str, sparsity: float, storage: str | None, precision: str, batch_size: int, length: int) -> Step:
    """A model in training, as a function that takes one step."""
    model = random_model(shape, sparsity)
    if storage is not None:
        recipe = Recipe.load(HOLD_ZEROS)
        plan = CompressionPlan()
        recipe.plan(plan, model)
        compact_where_it_pays(plan, model_zeros(model), "auto" if storage == "compact" else storage)
        install(model, plan)
        request_masks(model, [name for name, part in plan.modules.items() if part.mask], "nonzero")
    options = TrainOptions(task="question_answering", model_name_or_path="", output_dir="")
    optimizer = build_optimizer(options, model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, model.config.vocab_size, (batch_size, length), generator=generator)
    answers = torch.randint(0, length, (batch_size,), generator=generator)
    model.train()

    def step() -> None:
        autocast = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
        with autocast:
            loss = model(
                input_ids=ids, attention_mask=torch.ones_like(ids), start_positions=answers, end_positions=answers
            ).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), options.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def take_turns(steps: dict[str, Step], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each arm in each round, after two that do not count."""
    seconds: dict[str, dict[str, list[float]]] = {arm: {"cpu": [], "wall": []} for arm in steps}
    for number in range(-2, rounds):
        for arm in steps if number % 2 else reversed(steps):
            cpu, wall = time.process_time(), time.perf_counter()
            steps[arm]()
            if number >= 0:
                seconds[arm]["cpu"].append(round(time.process_time() - cpu, 5))
                seconds[arm]["wall"].append(round(time.perf_counter() - wall, 5))
    return seconds


def summary(seconds: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """The ratio of each arm to the dense one, round by round."""
    found = {}
    for arm, clocks in seconds.items():
        found[arm] = {
            clock: {
                "median_seconds": round(statistics.median(values), 4),
                **ratios(values, seconds["dense"][clock]),
            }
            for clock, values in clocks.items()
        }
    return found


def ratios(values: list[float], baseline: list[float]) -> dict[str, float]:
    """Median, lowest and highest of the ratios within rounds."""
    found = sorted(value / other for value, other in zip(values, baseline, strict=True))
    named = {"ratio": statistics.median(found), "low": found[0], "high": found[-1]}
    return {name: round(value, 3) for name, value in named.items()}


def table(document: dict[str, Any]) -> str:
    """Markdown from the results."""
    lines = ["| precision | zeros | dense, ms | dense again | masked | compact |", "|---|---:|---:|---:|---:|---:|"]
    for setting in document["settings"]:
        arms = {arm: clocks["cpu"] for arm, clocks in setting["arms"].items()}
        cells = [
            f"{arms[arm]['ratio']:.2f}x ({arms[arm]['low']:.2f} to {arms[arm]['high']:.2f})"
            for arm in arms
            if arm != "dense"
        ]
        lines.append(
            f"| {setting['precision']} | {setting['sparsity']:.0%} | {1000 * arms['dense']['median_seconds']:.0f} | {' | '.join(cells)} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
