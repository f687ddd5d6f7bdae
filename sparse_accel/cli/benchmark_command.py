"""The commands of `benchmark`, and `inference`: latency of deployments side by side, what int8 and zeros bought."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from sparse_accel.cli.benchmark_train_command import train_command
from sparse_accel.errors import OptionError

if TYPE_CHECKING:
    from sparse_accel.serving.engines import Engine
    from sparse_accel.serving.latency import Contender, Grid, Progress, Traits

# A model with fewer zeros than this is dense as it is.
_FEW_ZEROS: Final = 0.05


def register(app: typer.Typer) -> None:
    """Add `benchmark` with its subjects, `inference` and `train`."""
    benchmark = typer.Typer(
        help="Measure: [bold]benchmark inference[/bold] or [bold]benchmark train[/bold].", rich_markup_mode="rich"
    )
    benchmark.command("inference")(inference_command)
    benchmark.command("train")(train_command)
    app.add_typer(benchmark, name="benchmark")


def inference_command(
    deployments: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Deployment folders or ONNX files; model folders for the engine torch.",
            metavar="DEPLOYMENT",
            show_default=False,
        ),
    ] = None,
    variants: Annotated[
        Path | None,
        typer.Option(
            "--variants",
            help="A trained model folder, whose float and int8, dense and sparse variants are made and measured. Dense"
            " ones"
            " have their zeros filled: they are for speed alone.",
            metavar="MODEL_DIR",
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[
        str, typer.Option("--batch_size", help="Sequences in a call; several as 1,8.", metavar="LIST")
    ] = "1",
    sequence_length: Annotated[
        str | None,
        typer.Option(
            "--sequence_length",
            help="Tokens in a sequence; several as 128,384. [dim](default: 128,384, as far as the models read)[/dim]",
            metavar="LIST",
            show_default=False,
        ),
    ] = None,
    threads: Annotated[
        str, typer.Option("--threads", help="Processor threads of an engine; several as 1,2.", metavar="LIST")
    ] = "1",
    engine: Annotated[
        str | None,
        typer.Option(
            "--engine",
            help="onnxruntime, openvino, torch; several with commas. [dim](default: ONNX Runtime and OpenVINO, where"
            " installed)[/dim]",
            metavar="LIST",
            show_default=False,
        ),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="Where engines run.", metavar="cpu|cuda")] = "cpu",
    seconds: Annotated[
        float | None,
        typer.Option(
            "--seconds",
            help="Seconds of calls per row of the table, on average. [dim](default: 5)[/dim]",
            show_default=False,
        ),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option("--rounds", help="Turns of each row, in place of --seconds.", show_default=False)
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline",
            help="The model that speed-ups are over. [dim](default: the first)[/dim]",
            metavar="NAME",
            show_default=False,
        ),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            "--output_dir",
            help="Folder for results.json, results.md, latency.png and the variants. Left out: nothing is kept.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier benchmark in the output folder.")
    ] = False,
) -> int:
    """Measure latency and throughput of models that take turns, and say what int8 and zeros bought on this machine."""
    from sparse_accel.serving import latency, latency_report

    given = list(deployments or [])
    if not given and variants is None:
        raise OptionError("benchmark inference: of what? name deployment folders, or pass --variants MODEL_DIR")
    if device not in latency.DEVICES:
        raise OptionError(f"--device: cpu or cuda, got {device!r}")
    if seconds is not None and rounds is not None:
        raise OptionError("--seconds and --rounds both say how long to measure; give one of them")
    if seconds is not None and not 0 < seconds < float("inf"):
        raise OptionError(f"--seconds: more than 0, got {seconds:g}")
    if rounds is not None and rounds < 1:
        raise OptionError(f"--rounds: 1 or more, got {rounds}")
    subjects = [*([] if variants is None else [variants]), *given]
    grid = latency.Grid(
        engines=latency.installed_engines() if engine is None else tuple(_words("--engine", engine)),
        threads=_numbers("--threads", threads),
        batch_sizes=_numbers("--batch_size", batch_size),
        sequence_lengths=_numbers("--sequence_length", sequence_length)
        if sequence_length is not None
        else latency.default_lengths(subjects),
    )
    if not grid.engines:
        raise OptionError("no engine is installed; run `python -m pip install onnxruntime`")
    latency.check_grid(grid, subjects)
    planned = [] if variants is None else [Path(latency_report.VARIANTS, name) for name in _VARIANTS]
    names = latency.short_names([*planned, *given])
    latency_report.check_baseline(baseline, names)
    if output_dir is not None:
        latency_report.check_output(output_dir, overwrite)
    if variants is not None or "torch" in grid.engines:
        from sparse_accel.folders.libraries import quiet_libraries

        quiet_libraries()
    if variants is not None:
        _check_variants(variants)
    machine = latency.machine_facts(grid.engines)
    with _working_folder(output_dir) as folder:
        contenders: list[Contender] = []
        notes: list[str] = []
        if variants is not None:
            made, notes = _make_variants(variants, folder / latency_report.VARIANTS)
            contenders = [
                latency.Contender(shown, made[name], _traits(made[name]))
                for name, shown in zip(_VARIANTS, names, strict=False)
                if name in made
            ]
        contenders += [
            latency.Contender(name, path, _traits(path))
            for name, path in zip(names[len(planned) :], given, strict=True)
        ]
        chosen = latency_report.check_baseline(baseline, [contender.name for contender in contenders])
        with _progress() as progress:
            measured = latency.measure(
                contenders, grid, _opener(device), seconds=seconds or 5.0, rounds=rounds, progress=progress
            )
        if output_dir is not None and not latency_report.can_plot():
            notes.append("latency.png needs matplotlib: `python -m pip install matplotlib`")
        report = latency_report.LatencyReport(
            measured=measured,
            contenders=tuple(contenders),
            baseline=chosen,
            grid=grid,
            machine=machine,
            command=_command(given, variants, grid, device, seconds, rounds, baseline),
            device=device,
            notes=tuple(notes),
        )
        if output_dir is not None:
            latency_report.write_report(report, folder)
        latency_report.print_report(report)
    if output_dir is not None:
        typer.echo(f"saved to {output_dir}")
    return 0


def _words(option: str, text: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise OptionError(f"{option}: expected values with commas between them, got {text!r}")
    return words


def _numbers(option: str, text: str) -> tuple[int, ...]:
    words = _words(option, text)
    wrong = [word for word in words if not word.isdecimal()]
    if wrong:
        raise OptionError(f"{option}: expected whole numbers with commas between them, got {wrong[0]!r}")
    return tuple(map(int, words))


def _command(
    given: list[Path],
    variants: Path | None,
    grid: Grid,
    device: str,
    seconds: float | None,
    rounds: int | None,
    baseline: str | None,
) -> str:
    """The command line that repeats the benchmark, with what was left out spelled out."""
    words = ["sparse_accel", "benchmark", "inference", *map(str, given)]
    options: dict[str, object] = {
        "variants": variants,
        "engine": ",".join(grid.engines),
        "threads": ",".join(map(str, grid.threads)),
        "batch_size": ",".join(map(str, grid.batch_sizes)),
        "sequence_length": ",".join(map(str, grid.sequence_lengths)),
        "device": None if device == "cpu" else device,
        "seconds": seconds,
        "rounds": rounds,
        "baseline": baseline,
    }
    for name, value in options.items():
        if value is not None:
            words += [f"--{name}", str(value)]
    return shlex.join(words)


@contextmanager
def _working_folder(output_dir: Path | None) -> Iterator[Path]:
    """Where variants and results go: what becomes the output folder, or one that is thrown away."""
    from sparse_accel.serving.latency_report import filled_output

    if output_dir is not None:
        with filled_output(output_dir) as folder:
            yield folder
    else:
        with tempfile.TemporaryDirectory(prefix="sparse_accel-") as name:
            yield Path(name)


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on standard error, while measuring."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Drawn twice a second: drawing takes processor time from what is measured.
    with Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=2) as bar:
        task = bar.add_task("opening", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def _opener(device: str) -> Callable[[Contender, str, int], Engine]:
    """How a contender is opened by an engine; torch opens model folders."""
    from sparse_accel.serving.deployment import read_deployment
    from sparse_accel.serving.engines import open_engine, torch_engine
    from sparse_accel.tasks import resolve_task

    def opened(contender: Contender, engine: str, threads: int) -> Engine:
        if engine != "torch":
            return open_engine(contender.folder, engine, threads=threads, device=device)
        import torch

        if device == "cuda" and not torch.cuda.is_available():
            raise OptionError("torch finds no CUDA device here")
        task = resolve_task(read_deployment(contender.folder).task)
        return torch_engine(contender.folder, task, threads=threads, device=device)

    return opened


def _traits(folder: Path) -> Traits | None:
    """What the graph of a deployment holds: whether most of its matrices are integers, and their share of zeros, without
    the embeddings. None where there is no graph, or none that can be read: opening it will say why."""
    from sparse_accel.serving.engines import is_installed, model_file
    from sparse_accel.serving.latency import Traits, family_of

    graph = model_file(folder)
    if graph is None or not is_installed("onnx_ir"):
        return None
    from sparse_accel.onnx_export.graph_census import census_of

    try:
        entries = census_of(graph).initializers
    except Exception:  # the reader raises whatever protobuf does
        return None
    matrices = [entry for entry in entries if len(entry.shape) > 1 and "embed" not in entry.name]
    total = sum(entry.numel for entry in matrices)
    if total == 0:
        return None
    integers = sum(entry.numel for entry in matrices if entry.is_integer)
    return Traits(family_of(folder), 2 * integers > total, sum(entry.zeros for entry in matrices) / total)


# Variant -> graph format, and whether its zeros are filled; the first is what the others are compared with.
_VARIANTS: Final = {
    "float_dense": ("float", True),
    "float_sparse": ("float", False),
    "int8_dense": ("qdq", True),
    "int8_sparse": ("qdq", False),
}


def _check_variants(model_dir: Path) -> None:
    """Raise ModelError for a folder that is no trained model."""
    from sparse_accel.folders.sources import check_source
    from sparse_accel.serving.deployment import read_deployment
    from sparse_accel.serving.engines import is_installed

    if not is_installed("onnxscript"):
        raise OptionError('--variants exports models; run `python -m pip install "sparse_accel[onnx]"`')
    check_source(str(model_dir), "--variants", weights=True)
    read_deployment(model_dir)


def _make_variants(model_dir: Path, folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Export the variants of a trained model into folders below `folder`, as far as the model has them: those without
    quantizers have no int8, those without zeros no sparse ones. Returns the folders by name, and notes."""
    from rich.console import Console

    from sparse_accel.compress.census import Census
    from sparse_accel.folders.trained import open_trained
    from sparse_accel.onnx_export.exporting import export_graph
    from sparse_accel.serving.deployment import read_deployment
    from sparse_accel.tasks import resolve_task

    task = resolve_task(read_deployment(model_dir).task)
    trained = open_trained(model_dir, task)
    sparsity = Census.of(trained.model).sparsity
    wanted = dict(_VARIANTS)
    notes = [f"{model_dir}: {note}" for note in trained.notes]
    if not trained.plan.num_quantizers:
        wanted = {name: how for name, how in wanted.items() if how[0] == "float"}
        notes.append(f"{model_dir} has no quantizers, so there are no int8 variants")
    if sparsity < _FEW_ZEROS:
        wanted = {name: (graph_format, False) for name, (graph_format, is_filled) in wanted.items() if is_filled}
        notes.append(f"{model_dir} has {sparsity:.1%} zeros, so there are no sparse variants")
    else:
        notes.append(
            "the dense variants are the same model with its zeros filled by values drawn from the layer's other weights: "
            "they are for speed alone, their answers mean nothing"
        )
    made: dict[str, Path] = {}
    console = Console(stderr=True)
    # The sparse ones first: filling changes the model for good.
    for name, (graph_format, is_filled) in sorted(wanted.items(), key=lambda item: item[1][1]):
        if is_filled:
            fill_zeros(trained.model)
        (folder / name).mkdir(parents=True)
        with console.status(f"exporting {name} ({len(made) + 1} of {len(wanted)})"):
            export_graph(trained, task, folder / name / "model.onnx", graph_format=graph_format)
        trained.model.config.save_pretrained(folder / name)
        made[name] = folder / name
    return made, notes


def fill_zeros(model: Any) -> None:
    """Replace the zeros of each prunable weight by its other values, drawn at random: so they have its spread, and lie
    on its quantization grid. A weight of zeros alone stays."""
    import torch

    from sparse_accel.compress.plan import prunable_parameters

    generator = torch.Generator().manual_seed(0)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in prunable_parameters(model):
            weight = parameters[name]
            zeros = weight == 0
            others = weight[~zeros]
            if others.numel() and bool(zeros.any()):
                drawn = torch.randint(others.numel(), (int(zeros.sum()),), generator=generator)
                weight[zeros] = others[drawn]
