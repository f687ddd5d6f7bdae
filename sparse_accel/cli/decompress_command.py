"""`sparse_accel decompress`: a folder with compressed weights as a plain one again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from sparse_accel.folders.storage import StorageReport


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("decompress")(decompress_command)


def decompress_command(
    compressed_dir: Annotated[
        Path, typer.Argument(help="Folder that `export --compress` wrote.", metavar="COMPRESSED_DIR")
    ],
    output_dir: Annotated[Path, typer.Option("--output_dir", help="Folder for the plain model.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the model in an output folder that is not empty.")
    ] = False,
) -> int:
    """Unpack compressed weights: a plain model folder, as other tools read it."""
    from sparse_accel.folders.storage import decompress_folder

    print_storage_report(decompress_folder(compressed_dir, output_dir, overwrite=overwrite), "decompressed")
    return 0


def print_storage_report(report: StorageReport, title: str) -> None:
    """The table of how the tensors are stored, what the weight files take, and where the model is."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for heading in ("Stored as", "Tensors", "Plain", "Compressed"):
        table.add_column(heading, justify="left" if heading == "Stored as" else "right")
    for kind, total in report.kinds.items():
        sizes = megabytes(total.plain_bytes), megabytes(total.stored_bytes)
        table.add_row(kind.replace("_", " + "), f"{total.num_tensors:,}", *sizes)
    console = Console()
    console.print(table)
    before, after = megabytes(report.bytes_before), megabytes(report.bytes_after)
    console.print(f"weights: {before} -> {after}, written to {report.output_dir}", highlight=False, soft_wrap=True)


def megabytes(num_bytes: int) -> str:
    """Bytes as millions of them: `437.9 MB`."""
    return f"{num_bytes / 1e6:,.1f} MB"
