"""What holding zeros costs in time: an optimizer step of one process, dense against masked against compact.

    python benchmarks/step_overhead.py

A model of MiniLM's shape (6 layers, 384 wide), random, takes steps on batches of 8 questions of 128 tokens, none padded, with the
optimizer, the recipe and the storage that the program would use. The arms take turns in one process, every other round
backwards; a second dense model is among them, whose ratio to the first says what is noise. Where that is larger than what is
looked for, the work that an arm adds is timed by itself too: making each layer's weight and its gradient. Writes
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

from sparse_accel.compress.compact import CompactLinear
from sparse_accel.compress.layers import compressed_layers
from sparse_accel.compress.plan import CompressionPlan, install, request_masks
from sparse_accel.compress.weight_storage import compact_where_it_pays, model_zeros
from sparse_accel.recipe.schema import Recipe
from sparse_accel.runtime.options import TrainOptions
from sparse_accel.runtime.setup import build_optimizer

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "step_overhead.json"
PAGE = ROOT / "docs" / "distributed.md"
BLOCK = re.compile(r"(?<=<!-- overhead: python benchmarks/step_overhead.py -->\n).*?(?=<!-- /overhead -->)", re.DOTALL)

BAR = 1.05
Work = Callable[[], None]


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
            models = {"dense": (0.0, None), "dense again": (0.0, None)}
            for storage in ("masked", "compact"):
                for sparsity in map(float, arguments.sparsity.split(",")):
                    models[f"{storage}, {sparsity:.0%}"] = sparsity, storage
            made = {arm: build(arguments.shape, *kind, precision, batch_size, length) for arm, kind in models.items()}
            seconds = take_turns({arm: work[0] for arm, work in made.items()}, arguments.rounds)
            added = take_turns({arm: work[1] for arm, work in made.items() if work[1]}, 2 * arguments.rounds)
            arms = summary(seconds)
            for arm, clocks in added.items():
                whole = arms["dense"]["cpu"]["median_seconds"]
                arms[arm]["added_alone"] = round(statistics.median(clocks["cpu"]) / whole, 4)
            document["settings"].append({"precision": precision, "arms": arms, "seconds": seconds})
            print(precision, json.dumps(arms), flush=True)
        document["machine"]["busy_cores_after"] = round(os.getloadavg()[0], 2)
        arguments.results.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    text = table(json.loads(arguments.results.read_text("utf-8")))
    print(text)
    if arguments.results == RESULTS:
        PAGE.write_text(BLOCK.sub(lambda _: text, PAGE.read_text("utf-8")), "utf-8")


def build(
    shape: str, sparsity: float, storage: str | None, precision: str, batch_size: int, length: int
) -> tuple[Work, Work | None]:
    """A model in training, as a function that takes one step, and what its masks add to the step, as another."""
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
    ids = torch.randint(100, model.config.vocab_size, (batch_size, length), generator=generator)
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

    layers = list(compressed_layers(model).values())
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    weights = [torch.zeros(layer.out_features, layer.in_features, dtype=dtype) for layer in layers]

    def hold() -> None:
        for layer, gradient in zip(layers, weights, strict=True):
            (layer._effective_weight(dtype) if isinstance(layer, CompactLinear) else layer.effective_weight()).backward(
                gradient if isinstance(layer, CompactLinear) else gradient.float()
            )
        optimizer.zero_grad()

    return step, hold if layers else None


def take_turns(steps: dict[str, Work], rounds: int) -> dict[str, dict[str, list[float]]]:
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
    lines = ["| precision | model | CPU ms a step | of dense | what masks add, alone |", "|---|---|---:|---:|---:|"]
    for setting in document["settings"]:
        for arm, measured in setting["arms"].items():
            cpu = measured["cpu"]
            share = "" if arm == "dense" else f"{cpu['ratio']:.2f}x ({cpu['low']:.2f} to {cpu['high']:.2f})"
            added = f"{measured['added_alone']:.1%}" if "added_alone" in measured else ""
            lines.append(
                f"| {setting['precision']} | {arm} | {1000 * cpu['median_seconds']:,.0f} | {share} | {added} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
