"""The command `benchmark train`: our training and others' in turns, on random models of exact shapes; and evaluation."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparse_accel.errors import OptionError, OutputError

if TYPE_CHECKING:
    from sparse_accel.benchmarking.turns import Progress
    from sparse_accel.benchmarking.workloads import Settings


def train_command(
    workload: Annotated[
        str | None, typer.Argument(help="What is trained; --list names them.", metavar="WORKLOAD", show_default=False)
    ] = None,
    list_workloads: Annotated[bool, typer.Option("--list", help="Name the workloads and arms.")] = False,
    arms: Annotated[
        str | None,
        typer.Option(
            "--arms",
            help="Ways of training that are compared, with commas. [dim](default: those of the workload)[/dim]",
            metavar="LIST",
            show_default=False,
        ),
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", help="Turns of each arm.")] = 5,
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision",
            help="What the models compute in. [dim](default: the workload's)[/dim]",
            metavar="fp32|bf16",
            show_default=False,
        ),
    ] = None,
    features: Annotated[
        int | None,
        typer.Option("--features", help="Features in a turn. [dim](default: the workload's)[/dim]", show_default=False),
    ] = None,
    micro_batch_size: Annotated[
        int | None,
        typer.Option(
            "--micro_batch_size",
            help="Features in a micro-batch. [dim](default: the workload's)[/dim]",
            show_default=False,
        ),
    ] = None,
    micro_batches: Annotated[
        int | None,
        typer.Option(
            "--micro_batches",
            help="Micro-batches in an optimizer step. [dim](default: the workload's)[/dim]",
            show_default=False,
        ),
    ] = None,
    batching: Annotated[
        str | None,
        typer.Option(
            "--batching",
            help="How our arms form batches. [dim](default: packed)[/dim]",
            metavar="packed|grouped|padded",
            show_default=False,
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option("--threads", help="Processor threads. [dim](default: 1)[/dim]", show_default=False),
    ] = None,
    questions: Annotated[
        int | None,
        typer.Option(
            "--questions",
            help="eval-qa: the first of the questions only. [dim](default: all of --data, 2000 of our own)[/dim]",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            help="eval-qa: a folder that holds SQuAD's dev-v1.1.json. [dim](default: a corpus of our own)[/dim]",
            metavar="FOLDER",
            show_default=False,
        ),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            "--output_dir",
            help="Folder for results.json, results.md and, of training, step_breakdown.png. Left out: nothing is kept.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier benchmark in the output folder.")
    ] = False,
) -> int:
    """Measure what masks, teachers, quantization and batching cost in training, and how others' training compares.

    Models are random, of exact shapes, and read sequences of real lengths: for speed, not for scores. Most workloads answer
    questions; mnli-base classifies texts, tiny-mlm and mlm-base guess masked words. The workload eval-qa trains nothing: it
    measures windows, answers and scores, and takes --rounds, --questions and --data alone."""
    if list_workloads:
        print_list()
        return 0
    if workload is None:
        raise OptionError("benchmark train: which workload? `sparse_accel benchmark train --list` names them")
    from sparse_accel.benchmarking.workloads import EVALUATION

    of_training = {
        "arms": arms,
        "precision": precision,
        "features": features,
        "micro_batch_size": micro_batch_size,
        "micro_batches": micro_batches,
        "batching": batching,
        "threads": threads,
    }
    of_evaluation = {"questions": questions, "data": data}
    if workload == EVALUATION:
        check_meaning(workload, of_training, "which trains no model")
        return measure_evaluation(rounds, questions, data, output_dir, overwrite)
    check_meaning(workload, of_evaluation, f"only to {EVALUATION}")
    settings = read_settings(
        workload,
        arms=arms,
        rounds=rounds,
        precision=precision,
        features=features,
        micro_batch_size=micro_batch_size,
        micro_batches=micro_batches,
        batching="packed" if batching is None else batching,
        threads=1 if threads is None else threads,
    )
    if output_dir is not None:
        check_output(output_dir, overwrite)
    from sparse_accel.folders.libraries import quiet_libraries

    quiet_libraries()
    from sparse_accel.benchmarking.report import can_plot, print_report, write_report
    from sparse_accel.benchmarking.runner import run_benchmark
    from sparse_accel.serving.latency_report import filled_output

    with shown_progress() as progress:
        document = run_benchmark(settings, command_line(settings), progress)
    print_report(document)
    if output_dir is not None:
        with filled_output(output_dir) as folder:
            write_report(document, folder)
        missing = "" if can_plot() else "; step_breakdown.png needs matplotlib: `python -m pip install matplotlib`"
        typer.echo(f"saved to {output_dir}{missing}")
    return 0


def check_meaning(workload: str, options: Mapping[str, object], why: str) -> None:
    """Raise OptionError where one of `options`, by their names, was given; `why` they mean nothing to the workload."""
    given = [f"--{name}" for name, value in options.items() if value is not None]
    if given:
        verb = "means" if len(given) == 1 else "mean"
        raise OptionError(f"{', '.join(given)} {verb} nothing to workload {workload}, {why}")


def measure_evaluation(
    rounds: int, questions: int | None, data: Path | None, output_dir: Path | None, overwrite: bool
) -> int:
    """Windows, answers and scores, ours and Hugging Face's. Raises OptionError for a value that cannot be, DataError for data
    that cannot be read, OutputError for an output folder that cannot be used."""
    for name, value in (("rounds", rounds), ("questions", questions)):
        if value is not None and value < 1:
            raise OptionError(f"--{name}: 1 or more, got {value}")
    if output_dir is not None:
        check_output(output_dir, overwrite)
    from sparse_accel.folders.libraries import quiet_libraries

    quiet_libraries()
    from sparse_accel.benchmarking.eval_data import squad_file
    from sparse_accel.benchmarking.eval_qa import run_evaluation
    from sparse_accel.benchmarking.eval_report import print_report, write_report
    from sparse_accel.serving.latency_report import filled_output

    if data is not None:
        squad_file(data)  # before anything is drawn
    with shown_progress() as progress:
        document = run_evaluation(evaluation_command(rounds, questions, data), rounds, questions, data, progress)
    print_report(document)
    if output_dir is not None:
        with filled_output(output_dir) as folder:
            write_report(document, folder)
        typer.echo(f"saved to {output_dir}")
    return 0


def evaluation_command(rounds: int, questions: int | None, data: Path | None) -> str:
    """The command that repeats the measurement; where the data lies is nobody's business."""
    words = ["sparse_accel", "benchmark", "train", "eval-qa", "--rounds", str(rounds)]
    words += [] if questions is None else ["--questions", str(questions)]
    words += [] if data is None else ["--data", "FOLDER"]
    return shlex.join(words)


def read_settings(
    workload: str,
    *,
    arms: str | None,
    rounds: int,
    precision: str | None,
    features: int | None,
    micro_batch_size: int | None,
    micro_batches: int | None,
    batching: str,
    threads: int,
) -> Settings:
    """The settings of a command. Raises OptionError for a value that cannot be."""
    from dataclasses import replace

    from sparse_accel.benchmarking.arms import check_arms
    from sparse_accel.benchmarking.other_tools import TOOLS
    from sparse_accel.benchmarking.workloads import BATCHINGS, PRECISIONS, Settings, find_workload

    found = find_workload(workload)
    changes = {"features": features, "micro_batch_size": micro_batch_size, "micro_batches": micro_batches}
    for name, value in {**changes, "rounds": rounds, "threads": threads}.items():
        if value is not None and value < 1:
            raise OptionError(f"--{name}: 1 or more, got {value}")
    found = replace(
        found,
        features=features or found.features,
        micro_batch_size=micro_batch_size or found.micro_batch_size,
        micro_batches=micro_batches or found.micro_batches,
    )
    step = found.micro_batch_size * found.micro_batches
    if found.features % step:
        raise OptionError(f"--features: a multiple of the {step} of a step, got {found.features}")
    if batching not in BATCHINGS:
        raise OptionError(f"--batching: {', '.join(BATCHINGS)}; got {batching!r}")
    chosen = precision or found.precision
    if chosen not in PRECISIONS:
        raise OptionError(f"--precision: {', '.join(PRECISIONS)}; got {chosen!r}")
    names = found.arms if arms is None else tuple(dict.fromkeys(word.strip() for word in arms.split(",")))
    if not all(names):
        raise OptionError(f"--arms: expected names with commas between them, got {arms!r}")
    check_arms(names, found.task)
    if arms is not None:
        for name, tool in TOOLS.items():
            if name in names and tool.missing:
                raise OptionError(f"--arms: {name}: {tool.missing} (pip install {tool.distribution})")
    return Settings(found, names, rounds, chosen, batching, threads)


def command_line(settings: Settings) -> str:
    """The command that repeats the benchmark, with what was left out spelled out."""
    workload = settings.workload
    words = ["sparse_accel", "benchmark", "train", workload.name, "--arms", ",".join(settings.arms)]
    options = {
        "rounds": settings.rounds,
        "precision": settings.precision,
        "features": workload.features,
        "micro_batch_size": workload.micro_batch_size,
        "micro_batches": workload.micro_batches,
        "batching": settings.batching,
        "threads": settings.threads,
    }
    for name, value in options.items():
        words += [f"--{name}", str(value)]
    return shlex.join(words)


def print_list() -> None:
    """The workloads and arms, a line each."""
    from rich.console import Console
    from rich.table import Table

    from sparse_accel.benchmarking.arms import ARMS
    from sparse_accel.benchmarking.workloads import listed

    console = Console()
    shown = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    shown.add_row("[bold]workloads[/bold]")
    for name, purpose in listed().items():
        shown.add_row(name, purpose)
    shown.add_row()
    shown.add_row("[bold]arms[/bold]")
    for name, arm in ARMS.items():
        shown.add_row(name, arm.what)
    console.print(shown, highlight=False)


def check_output(output: Path, overwrite: bool) -> None:
    """Raise OutputError for an output folder that is a file, or that holds a benchmark already."""
    from sparse_accel.benchmarking.report import RESULT_FILES

    if output.exists() and not output.is_dir():
        raise OutputError(f"--output_dir: is a file, not a folder: {output}")
    present = [name for name in RESULT_FILES if (output / name).exists()]
    if present and not overwrite:
        raise OutputError(f"--output_dir: {output} holds {present[0]} already; name another, or pass --overwrite")


@contextmanager
def shown_progress() -> Iterator[Progress]:
    """A bar on standard error, while measuring."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Drawn twice a second: drawing takes processor time from what is measured.
    with Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=2) as bar:
        task = bar.add_task("starting", total=None)

        def update(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total or None)

        yield update
