"""Whether B1 is what Hugging Face publishes: their unmodified script runs in this process, and its epochs and B1's take turns.

    python benchmarks/published_script.py --script FOLDER/run_qa_no_trainer.py --data ../shared/data
    python benchmarks/published_script.py --script FOLDER/run_qa_no_trainer.py --data ../shared/data --precision bf16
    python benchmarks/published_script.py --table

The script (huggingface/transformers, examples/pytorch/question-answering, with utils_qa.py beside it) is run as it is and watched
from outside: what it gives to `Accelerator.prepare`, what its model is called with, what it hands to `Accelerator.backward`, and
when. After each of its epochs B1, built by the benchmark from the same seed, trains one on the same features in the same
order; then losses, batches and weights are compared. Dropout is 0. Ends with an error where they differ. Writes
benchmarks/results/published_script.json, one run a precision, and the table in docs/performance.md.

The script is ended from outside after the epochs that are compared, before it evaluates. Where the package `evaluate` is not
installed something stands in for it; with it, the folder `squad` of its metrics beside the script makes it load the metric without
a network.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import random
import re
import runpy
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import GradientState
from bert_shapes import circumstances
from squad_transfer import flat_rows, read_squad
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BertForQuestionAnswering, default_data_collator

from sparse_accel.benchmarking.baselines import Loop, build_b1, padded_dataset
from sparse_accel.benchmarking.circumstances import busy_cores, versions
from sparse_accel.benchmarking.eval_data import synthetic_rows, tokenizer_of
from sparse_accel.benchmarking.models import SHAPES, random_model
from sparse_accel.benchmarking.own import Bench
from sparse_accel.benchmarking.parity import Gate, require
from sparse_accel.benchmarking.runner import open_bench
from sparse_accel.benchmarking.turns import ratio
from sparse_accel.benchmarking.workloads import PRECISIONS, Settings, Workload
from sparse_accel.tasks.features import Features

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "published_script.json"
PAGE = ROOT / "docs" / "performance.md"
BLOCK = re.compile(
    r"(?<=<!-- published script: python benchmarks/published_script.py -->\n).*?(?=<!-- /published script -->)",
    re.DOTALL,
)
# Tells Hugging Face that the script is used. Newer transformers lack it, and the script does not start without.
TELEMETRY = "send_example_telemetry"
SEED = 0
LENGTH = 384
# On a processor nothing differs; a GPU may add in another order.
ALLOWED = {"fp32": 1e-5, "bf16": 1e-2}


def main() -> None:
    """Run the script beside B1 and write what was found, then the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--script", type=Path, help="run_qa_no_trainer.py, unmodified")
    parser.add_argument("--data", type=Path, help="folder that holds squad/; without it passages of our own")
    parser.add_argument("--shape", default="minilm", choices=SHAPES)
    parser.add_argument("--precision", default="fp32", choices=PRECISIONS)
    parser.add_argument("--features", type=int, default=16, help="of an epoch")
    parser.add_argument("--micro_batch_size", type=int, default=4)
    parser.add_argument("--micro_batches", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="epochs that are timed; one more goes before them")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="write the table from the results, run nothing")
    arguments = parser.parse_args()
    document = json.loads(RESULTS.read_text("utf-8")) if RESULTS.is_file() else {"runs": {}}
    if not arguments.table:
        if arguments.script is None or not arguments.script.is_file():
            parser.error("--script: name the file run_qa_no_trainer.py")
        if arguments.features % (arguments.micro_batch_size * arguments.micro_batches):
            parser.error("--features: a multiple of --micro_batch_size times --micro_batches")
        document["runs"][arguments.precision] = measured(arguments)
        RESULTS.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    page = PAGE.read_text("utf-8")
    PAGE.write_text(BLOCK.sub(lambda _: table(document), page), "utf-8")


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """One run: what was compared, and the seconds of every timed epoch. Raises InvariantError where something differs."""
    torch.set_num_threads(arguments.threads)
    told = circumstances()
    workload = Workload(
        "published",
        "",
        arguments.shape,
        max_length=LENGTH,
        micro_batch_size=arguments.micro_batch_size,
        micro_batches=arguments.micro_batches,
        features=arguments.features,
    )
    settings = Settings(workload, ("b1",), arguments.rounds, arguments.precision, "padded", arguments.threads, SEED)
    script: Path = arguments.script.resolve()
    with tempfile.TemporaryDirectory(prefix="published-") as folder, open_bench(settings) as bench:
        write_world(Path(folder), settings, arguments.data)
        watch = Watch(bench)
        run_script(script, script_words(Path(folder), settings), watch, Path(folder) / "cache")
    gates = watch.gates()
    require(gates)
    found = ratio(watch.own.cpu, watch.script.cpu)
    by_wall = ratio(watch.own.wall, watch.script.wall)
    return {
        "command": command(arguments),
        "versions": versions() | ({"evaluate": version} if (version := evaluate_version()) else {}),
        "machine": {**told["machine"], "threads": arguments.threads, "busy_cores_after": busy_cores()},
        "script": {
            "git_blob": git_blob(script.read_bytes()),
            "asks_for": watch.asked_for,
            "refused_these_versions": watch.refused,
            "not_in_this_transformers": [] if hasattr(transformers.utils, TELEMETRY) else [TELEMETRY],
        },
        "data": "SQuAD v1.1, training" if arguments.data is not None else "passages of our own",
        "shape": arguments.shape,
        "batch_shape": list(watch.script.batches[0]["input_ids"].shape),
        "micro_batches": arguments.micro_batches,
        "steps_compared": len(watch.own.losses) // arguments.micro_batches,
        "losses": {"script": [float(loss) for loss in watch.script.losses[: len(watch.own.losses)]]}
        | {"b1": [float(loss) for loss in watch.own.losses]},
        "gates": [gate.to_json() for gate in gates],
        "steps_an_epoch": settings.steps,
        "seconds_an_epoch": {"script": watch.script.seconds(), "b1": watch.own.seconds()},
        "b1_over_script": {"cpu": vars(found), "wall": vars(by_wall)},
    }


def write_world(folder: Path, settings: Settings, data: Path | None) -> None:
    """The model that B1 makes of its seed, without dropout, with a tokenizer; train.json and validation.json, flat rows."""
    count = settings.workload.features
    if data is None:
        rows = [with_start(row) for row in synthetic_rows(count)]
    else:
        everything = list(flat_rows(read_squad(data / "squad", "train-v1.1-subset")))
        rows = random.Random(SEED).sample(everything, count)
    for name, part in (("train", rows), ("validation", rows[:4])):
        (folder / f"{name}.json").write_text(json.dumps({"data": part}), "utf-8")
    random_model(settings.workload.shape, SEED, dropout=0.0).save_pretrained(folder / "model")
    tokenizer = tokenizer_of(rows).tokenizer
    if len(tokenizer) > SHAPES[settings.workload.shape].get("vocab_size", 30522):
        raise SystemExit(f"--shape {settings.workload.shape}: its vocabulary is too small for the data's words")
    tokenizer.save_pretrained(folder / "model")


def with_start(row: dict[str, Any]) -> dict[str, Any]:
    """The row with the place where each of its answers first occurs."""
    texts = row["answers"]["text"]
    return {**row, "answers": {"text": texts, "answer_start": [row["context"].index(text) for text in texts]}}


def script_words(folder: Path, settings: Settings) -> list[str]:
    """The script's command line."""
    workload = settings.workload
    options = {
        "model_name_or_path": folder / "model",
        "train_file": folder / "train.json",
        "validation_file": folder / "validation.json",
        "output_dir": folder / "out",
        "max_seq_length": LENGTH,
        "per_device_train_batch_size": workload.micro_batch_size,
        "gradient_accumulation_steps": workload.micro_batches,
        # Linear over a million steps, as B1's; the run is ended from outside when enough was seen.
        "max_train_steps": 1_000_000,
        "max_train_samples": workload.features,
        "max_eval_samples": 4,
        "seed": SEED,
    }
    return ["--pad_to_max_length", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


class EnoughSeen(Exception):
    """Ends the script."""


@dataclass
class Trace:
    """What was seen of a loop: the batches and losses of all micro-batches, and the seconds of the epochs that are timed."""

    batches: list[dict[str, Tensor]] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def took(self, begun: tuple[float, float]) -> None:
        """Keep the time since then."""
        wall, cpu = clocks()
        self.wall.append(wall - begun[0])
        self.cpu.append(cpu - begun[1])

    def seconds(self) -> dict[str, list[float]]:
        """Rounded."""
        return {"wall": [round(value, 4) for value in self.wall], "cpu": [round(value, 4) for value in self.cpu]}


class Watch:
    """Stands beside the script: its methods are called where the script calls accelerate, transformers and its model."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.script, self.own = Trace(), Trace()
        self.asked_for, self.refused = "", ""
        self.model: Any = None
        self.optimizer: Any = None
        self.accelerator: Any = None
        self.loop: Loop | None = None
        self.dataset: Any = None
        self.order: list[int] = []
        self.numbers: dict[Any, int] = {}
        self.begun = (0.0, 0.0)
        self.weights_apart = [float("nan"), float("nan")]
        self.same_columns = False
        # accelerate keeps one state of accumulation for all that are called Accelerator.
        self.own_state = dict(GradientState._shared_state)

    def check_min_version(self, original: Any, wanted: str) -> None:
        """Keep what is asked for, and the refusal where there is one; do not let it end the run."""
        self.asked_for = wanted
        try:
            original(wanted)
        except ImportError as error:
            self.refused = str(error).splitlines()[0]

    def prepared(self, accelerator: Any, given: Sequence[Any]) -> None:
        """Build B1 from the features that the script is about to train on."""
        model, optimizer, loader = given[:3]
        self.accelerator, self.model, self.optimizer, self.dataset = accelerator, model, optimizer, loader.dataset
        bench = replace(self.bench, features=features_of(loader.dataset))
        with self.own_accumulation():
            loop = build_b1(bench, dropout=0.0)
        dataset = padded_dataset(bench.features, LENGTH)
        self.same_columns = dataset.features == loader.dataset.features
        loop.batches = DataLoader(
            dataset,
            sampler=self.order,
            collate_fn=default_data_collator,
            batch_size=bench.settings.workload.micro_batch_size,
        )
        loss_of = loop.loss

        def recorded(batch: dict[str, Tensor]) -> Tensor:
            loss = loss_of(batch)
            self.own.batches.append(batch)
            self.own.losses.append(loss.detach())
            return loss

        loop.loss = recorded
        self.loop = loop
        self.weights_apart[0] = apart(model, loop.module)
        self.numbers = {key(row): number for number, row in enumerate(loader.dataset)}

    def before_forward(self, inputs: dict[str, Tensor]) -> None:
        """The script's model is called in training: where an epoch ended, it is B1's turn."""
        seen, an_epoch = self.script.batches, self.bench.settings.steps * self.bench.settings.workload.micro_batches
        if seen and len(seen) % an_epoch == 0:
            # The first epoch only warms up.
            if len(seen) > an_epoch:
                self.script.took(self.begun)
            self.take_turn(seen[-an_epoch:], is_timed=len(seen) > an_epoch)
            if len(self.own.wall) == self.bench.settings.rounds:
                raise EnoughSeen
            self.begun = clocks()
        seen.append(dict(inputs))

    def take_turn(self, batches: Sequence[dict[str, Tensor]], *, is_timed: bool) -> None:
        """One epoch of B1 over the same features in the same order."""
        assert self.loop is not None
        self.order[:] = [self.numbers[key(row)] for batch in batches for row in rows_of(batch)]
        with self.own_accumulation():
            begun = clocks()
            self.loop.turn()
            if is_timed:
                self.own.took(begun)
        self.weights_apart[1] = apart(self.model, self.loop.module)

    @contextlib.contextmanager
    def own_accumulation(self) -> Iterator[None]:
        """Within, accelerate's state of accumulation is B1's."""
        shared = GradientState._shared_state
        theirs = dict(shared)
        shared.clear()
        shared.update(self.own_state)
        try:
            yield
        finally:
            shared.clear()
            shared.update(theirs)

    def gates(self) -> list[Gate]:
        """What was compared."""
        assert self.loop is not None
        allowed = ALLOWED[self.bench.settings.precision]
        count = len(self.own.losses)
        pairs = list(zip(self.script.batches[:count], self.own.batches, strict=True))
        losses = zip(self.script.losses[:count], self.own.losses, strict=True)
        theirs, ours = (inner(optimizer) for optimizer in (self.optimizer, self.loop.optimizer))
        attention = [model.config._attn_implementation for model in (self.model, self.loop.module)]
        return [
            Gate("columns of the dataset and their types", float(not self.same_columns), 0),
            Gate("weights before the first step", self.weights_apart[0], 0),
            Gate("batches of other names, shapes or types", sum(layout(a) != layout(b) for a, b in pairs), 0),
            Gate("batches of other values", sum(not equal(a, b) for a, b in pairs), 0),
            Gate("implementation of attention", float(attention[0] != attention[1]), 0),
            Gate(
                "optimizer: class, settings and sizes of its groups", float(settings_of(theirs) != settings_of(ours)), 0
            ),
            Gate("losses", max(abs(float(a) - float(b)) / abs(float(a)) for a, b in losses), allowed),
            Gate("weights after the last step compared", self.weights_apart[1], allowed),
        ]


def run_script(script: Path, words: Sequence[str], watch: Watch, cache: Path) -> None:
    """Run the file as `python FILE WORDS` would, from its folder; only what it calls is watched."""
    import datasets

    prepare, backward, forward = Accelerator.prepare, Accelerator.backward, BertForQuestionAnswering.forward
    check = transformers.utils.check_min_version

    def watched_prepare(accelerator: Any, *given: Any, **options: Any) -> Any:
        if accelerator is not watch.bench.accelerator:
            watch.prepared(accelerator, given)
        return prepare(accelerator, *given, **options)

    def watched_backward(accelerator: Any, loss: Tensor, **options: Any) -> None:
        if accelerator is watch.accelerator:
            watch.script.losses.append(loss.detach())
        backward(accelerator, loss, **options)

    @functools.wraps(forward)
    def watched_forward(model: Any, *given: Any, **inputs: Any) -> Any:
        if model is watch.model and model.training:
            watch.before_forward(inputs)
        return forward(model, *given, **inputs)

    stand_in = ModuleType("evaluate")
    stand_in.load = lambda name: SimpleNamespace(compute=lambda **_: {})  # type: ignore[attr-defined]
    modules = {} if evaluate_version() else {"evaluate": stand_in}
    with (
        contextlib.suppress(EnoughSeen),
        contextlib.chdir(script.parent),
        mock.patch.object(sys, "argv", [script.name, *words]),
        mock.patch.object(sys, "path", [str(script.parent), *sys.path]),
        mock.patch.dict(sys.modules, modules),
        mock.patch.object(datasets.config, "HF_DATASETS_CACHE", cache),
        mock.patch.object(transformers.utils, "check_min_version", functools.partial(watch.check_min_version, check)),
        mock.patch.object(transformers.utils, TELEMETRY, lambda *_: None, create=True),
        mock.patch.object(Accelerator, "prepare", watched_prepare),
        mock.patch.object(Accelerator, "backward", watched_backward),
        mock.patch.object(BertForQuestionAnswering, "forward", watched_forward),
    ):
        runpy.run_path(script.name, run_name="__main__")


def features_of(dataset: Any) -> Features:
    """The script's padded rows without their padding."""
    rows = list(dataset)
    lengths = np.array([sum(row["attention_mask"]) for row in rows], np.int64)

    def joined(name: str, kind: Any) -> np.ndarray:
        parts = [row[name][:length] for row, length in zip(rows, lengths, strict=True)]
        return np.concatenate(parts).astype(kind)

    return Features(
        tokens={"input_ids": joined("input_ids", np.int32), "token_type_ids": joined("token_type_ids", np.uint8)},
        bounds=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        labels={name: np.array([row[name] for row in rows], np.int32) for name in ("start_positions", "end_positions")},
        facts={},
        extra={},
    )


def rows_of(batch: dict[str, Tensor]) -> list[dict[str, Any]]:
    """The rows of a batch as a dataset holds them."""
    columns = {name: values.tolist() for name, values in batch.items()}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What tells a row from others; two of one key are the same."""
    return (tuple(row["input_ids"]), row["start_positions"], row["end_positions"])


def layout(batch: dict[str, Tensor]) -> dict[str, Any]:
    """Names, shapes and types."""
    return {name: (value.shape, value.dtype) for name, value in batch.items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two batches hold the same."""
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def inner(optimizer: Any) -> Any:
    """An optimizer without accelerate around it."""
    return getattr(optimizer, "optimizer", optimizer)


def settings_of(optimizer: Any) -> Any:
    """Its class, how many numbers each of its groups holds, and what else its groups say but the rate, which a schedule sets."""
    skipped = ("params", "lr")
    groups = [
        (
            sum(parameter.numel() for parameter in group["params"]),
            {name: value for name, value in group.items() if name not in skipped},
        )
        for group in optimizer.param_groups
    ]
    return type(optimizer), groups


@torch.no_grad()
def apart(one: nn.Module, other: nn.Module) -> float:
    """The relative difference of all weights as one vector; not a number where their names differ."""
    ours, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    if ours.keys() != theirs.keys():
        return float("nan")
    difference = sum(float((theirs[name] - value).double().square().sum()) for name, value in ours.items())
    whole = sum(float(value.double().square().sum()) for value in ours.values())
    return (difference / whole) ** 0.5


def clocks() -> tuple[float, float]:
    """The wall's and the process's."""
    return time.perf_counter(), time.process_time()


def evaluate_version() -> str:
    """That of the package `evaluate`, or nothing."""
    return importlib.metadata.version("evaluate") if importlib.util.find_spec("evaluate") is not None else ""


def git_blob(text: bytes) -> str:
    """The name that git gives a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(text) + text).hexdigest()


def command(arguments: argparse.Namespace) -> str:
    """The command that repeats the run; where script and data lie is nobody's business."""
    words = ["python", "benchmarks/published_script.py", "--script", "FOLDER/run_qa_no_trainer.py"]
    words += [] if arguments.data is None else ["--data", "FOLDER"]
    for name in ("shape", "precision", "features", "micro_batch_size", "micro_batches", "rounds", "threads"):
        words += [f"--{name}", str(getattr(arguments, name))]
    return " ".join(words)


def table(document: dict[str, Any]) -> str:
    """One row a precision."""
    lines = [
        "| precision | model | batches | optimizer steps compared | losses differ by | weights afterwards by | time, B1 over the script |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for precision, run in sorted(document["runs"].items(), reverse=True):
        found = {gate["what"]: gate["found"] for gate in run["gates"]}
        cost = run["b1_over_script"]["cpu"]
        spread = run["seconds_an_epoch"]["script"]["cpu"]
        shape = " x ".join(map(str, run["batch_shape"]))
        lines.append(
            f"| {precision} | {run['shape']} | {shape}, {run['micro_batches']} a step | {run['steps_compared']} "
            f"| {difference(found['losses'])} | {difference(found['weights after the last step compared'])} "
            f"| {cost['median']:.3f} ({cost['low']:.3f}-{cost['high']:.3f}); the script's own epochs differ by up to "
            f"{max(spread) / min(spread) - 1:.0%} |"
        )
    return "\n".join(lines) + "\n"


def difference(value: float) -> str:
    """A relative difference; 0 is equality to the last bit."""
    return f"{value:.1e}" if value else "0"


if __name__ == "__main__":
    main()
