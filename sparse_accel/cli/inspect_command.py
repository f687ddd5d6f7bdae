"""`sparse_accel inspect`: the zeros, the quantizers and the size of a model, as tables, JSON or a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from sparse_accel.cli.stubs import ZooOption, model_folder
from sparse_accel.errors import ModelError, OptionError, OutputError

if TYPE_CHECKING:
    from sparse_accel.compress.inspection import Inspection

# What `--json` without a file stands for: the terminal.
TERMINAL: Final = "-"
# How a file begins that the option wrote: no other is written over, least of all a model's own.
_BEGINNINGS: Final = {"--json": '{\n  "sparse_accel_inspection"', "--html": "<!doctype html>"}


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("inspect")(inspect_command)


def inspect_command(
    model: Annotated[
        Path,
        typer.Argument(
            help="A model folder (plain, compressed or SparseML's), a deployment folder, an ONNX file, or a zoo: stub.",
            metavar="DIR|ONNX",
            show_default=False,
        ),
    ],
    layers: Annotated[bool, typer.Option("--layers", help="Show every matrix and every quantized tensor.")] = False,
    as_json: Annotated[
        str | None,
        typer.Option(
            "--json",
            help="JSON instead of tables; with a FILE.json into that file, beside them.",
            metavar="(FILE.json)",
            show_default=False,
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", help="Write a page to look at in a browser, too.", metavar="FILE", show_default=False),
    ] = None,
    zoo: ZooOption = None,
) -> int:
    """What a model is made of: zeros and their structure, quantization, size. Reads files only, and builds no model."""
    for option, target in (("--json", None if as_json == TERMINAL else as_json), ("--html", html)):
        _check_target(option, target)
    if html is not None and as_json not in (None, TERMINAL) and html.resolve() == Path(str(as_json)).resolve():
        raise OptionError(f"--json and --html: name two files, not {html} twice")
    found = inspect_model(model_folder(model, "DIR", zoo))
    if as_json is not None:
        text = json.dumps(found.to_json(), indent=2)
        if as_json == TERMINAL:
            print(text)
        else:
            _write("--json", Path(as_json), text + "\n")
    if html is not None:
        from sparse_accel.reports.inspection_page import inspection_page

        _write("--html", html, inspection_page(found))
    if as_json != TERMINAL:
        _print(found, layers)
        for option, target in (("--json", as_json), ("--html", html)):
            if target is not None:
                print(f"{option}: {target}")
    return 0


def inspect_model(path: Path) -> Inspection:
    """Inspect whatever lies there. Raises ModelError for what is no model."""
    from sparse_accel.folders.sources import WEIGHT_FILES, neighbour
    from sparse_accel.folders.storage import is_compressed
    from sparse_accel.serving.engines import model_file

    if not path.exists():
        raise ModelError(f"no such file or folder: {path}{neighbour(path)}")
    if path.is_file() and path.suffix != ".onnx":
        raise ModelError(f"{path} is no .onnx file; pass one, or the folder of a model")
    graph = model_file(path)
    has_weights = is_compressed(path) or any((path / name).is_file() for name in WEIGHT_FILES)
    if graph is not None and not has_weights:
        return _inspect_graph(graph, path)
    from sparse_accel.folders.inspecting import inspect_folder

    return inspect_folder(path)


def _inspect_graph(graph: Path, given: Path) -> Inspection:
    try:
        from sparse_accel.onnx_export.inspecting import inspect_graph
    except ImportError:
        raise OptionError(f'{graph}: to read an ONNX file run `python -m pip install "sparse_accel[onnx]"`') from None
    from sparse_accel.folders.inspecting import architecture

    folder = given if given.is_dir() else graph.parent
    return inspect_graph(graph, model=architecture(folder))


def _check_target(option: str, target: str | Path | None) -> None:
    """Refuse a file that cannot be written, before anything is read."""
    if target is None:
        return
    path = Path(target)
    if path.is_dir():
        raise OptionError(f"{option} {path}: is a folder; name a file")
    if not path.absolute().parent.is_dir():
        raise OptionError(f"{option} {path}: there is no folder {path.parent}")
    if path.is_file() and not _is_our_own(path, _BEGINNINGS[option]):
        raise OptionError(f"{option} {path}: is there already, and not from this command; name another file")


def _is_our_own(path: Path, beginning: str) -> bool:
    try:
        with open(path, "rb") as file:
            start = file.read(len(beginning))
    except OSError as error:
        raise OutputError(f"{path}: cannot be read: {error.strerror or error}") from None
    return start in (b"", beginning.encode())


def _write(option: str, path: Path, text: str) -> None:
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise OutputError(f"{option} {path}: cannot be written: {error.strerror or error}") from None


def _print(found: Inspection, layers: bool) -> None:
    from rich.console import Console

    from sparse_accel.reports.inspection_page import kind_table, matrix_table, size_rows, structure_table

    console = Console()
    console.print(
        f"{found.model or 'model'}: {found.source} ({found.form})", highlight=False, markup=False, soft_wrap=True
    )
    _print_table(console, *kind_table(found), has_total=True)
    headings, rows = structure_table(found.matrices)
    if rows:
        _print_table(console, headings, rows)
    if layers:
        _print_table(console, *matrix_table(found), num_words=2)
    if found.quantizers:
        _print_table(console, *_quantizer_table(found, layers), num_words=6 if layers else 4)
    _print_table(
        console, ["size", "bytes", ""], [[name, f"{value:,.0f}", words] for name, value, words in size_rows(found)]
    )
    for note in found.notes:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)


def _quantizer_table(found: Inspection, layers: bool) -> tuple[list[str], list[list[str]]]:
    from sparse_accel.reports.layers import quantizer_places, quantizer_sorts

    return quantizer_places(found.quantizers) if layers else quantizer_sorts(found.quantizers)


def _print_table(
    console: Any, headings: list[str], rows: list[list[str]], *, num_words: int = 1, has_total: bool = False
) -> None:
    """A table whose columns after the first `num_words` are numbers."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    shown = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for index, heading in enumerate(headings):
        shown.add_column(
            heading, justify="right" if index >= num_words else "left", overflow="fold", no_wrap=index == 1 < num_words
        )
    for index, row in enumerate(rows):
        if has_total and index == len(rows) - 1:
            shown.add_section()
        shown.add_row(*row)
    console.print(shown, highlight=False, markup=False)
