"""`zoo:` stubs among the arguments of commands that take a model: what they stand for, with a note that says so."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Final

import typer

from sparse_accel.errors import OptionError, ZooError
from sparse_accel.recipe import shipped
from sparse_accel.zoo.resolving import open_zoo, resolve
from sparse_accel.zoo.stubs import is_stub

ZooOption = Annotated[
    str | None,
    typer.Option(
        "--zoo",
        help="Your own catalogue of zoo: stubs, a YAML file or a folder. [dim](default: what SPARSE_ACCEL_ZOO names)[/dim]",
        metavar="CATALOGUE",
        show_default=False,
    ),
]
NO_STUB: Final = "--zoo: has no effect: there is no zoo: stub"


def model_source(source: str, where: str, zoo: str | None) -> str:
    """The folder or hub id that a model argument names. Raises ZooError for a stub that stands for none, OptionError for
    a catalogue that is not needed."""
    if not is_stub(source):
        if zoo is not None:
            raise OptionError(NO_STUB)
        return source
    try:
        found = resolve(source, "model", open_zoo(zoo, shipped.names(), os.environ))
    except ZooError as error:
        raise ZooError(f"{where}: {error}") from None
    print(f"note: {found.note}", file=sys.stderr, flush=True)
    return found.value


def model_folder(folder: Path, where: str, zoo: str | None) -> Path:
    """The same for a command that reads files: a stub that stands for a model on the hub becomes its copy here, which is
    downloaded where it may be. Also raises ModelError."""
    source = model_source(str(folder), where, zoo)
    if not is_stub(str(folder)):
        return folder
    if Path(source).is_dir():
        return Path(source)
    from sparse_accel.folders.hub_copies import local_copy

    return local_copy(source, where)


def model_folders(folders: list[Path], where: str, zoo: str | None) -> list[Path]:
    """The same for several folders, of which some may be stubs."""
    if zoo is not None and not any(is_stub(str(folder)) for folder in folders):
        raise OptionError(NO_STUB)
    return [model_folder(folder, where, zoo) if is_stub(str(folder)) else folder for folder in folders]
