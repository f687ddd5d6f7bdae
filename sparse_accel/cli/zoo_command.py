"""The commands `zoo list`, `zoo resolve` and `zoo add`: what `zoo:` stubs stand for here. None of them calls the network."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from sparse_accel.cli.stubs import ZooOption
from sparse_accel.errors import OptionError, OutputError, ZooError
from sparse_accel.recipe import shipped
from sparse_accel.zoo.catalogue import (
    DEFAULT_RECIPE,
    HUB_PREFIX,
    RECIPE_SUFFIXES,
    catalogue_file,
    model_folder,
    with_entry,
)
from sparse_accel.zoo.resolving import ENVIRONMENT_VARIABLE, Kind, Resolution, Zoo, listed_stubs, open_zoo, resolve
from sparse_accel.zoo.stubs import PREFIX, parse_stub

_KINDS: Final[tuple[Kind, ...]] = ("model", "recipe")
_AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_Stub = Annotated[str, typer.Argument(help="A zoo: stub.", metavar="STUB")]

zoo_app = typer.Typer(
    help="What zoo: stubs stand for: [bold]zoo list[/bold], [bold]zoo resolve STUB[/bold], [bold]zoo add STUB[/bold].",
    rich_markup_mode="rich",
)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(zoo_app, name="zoo")


@zoo_app.command("list")
def list_command(zoo: ZooOption = None, as_json: _AsJson = False) -> int:
    """Show the stubs of your catalogues and those that are known, with what each stands for."""
    opened = open_zoo(zoo, shipped.names(), os.environ)
    stubs = {PREFIX + name: _both(PREFIX + name, opened) for name in listed_stubs(opened)}
    if as_json:
        print(json.dumps({stub: _plain(meanings) for stub, meanings in stubs.items()}, indent=2, ensure_ascii=False))
        return 0
    for stub, meanings in stubs.items():
        print(stub)
        for kind, found in meanings.items():
            # Of what cannot be had the first sentence is enough in a list.
            print(f"  {kind:7} {_line(found) if isinstance(found, Resolution) else _short(found, stub)}")
    return 0


@zoo_app.command("resolve")
def resolve_command(
    stub: _Stub,
    kind: Annotated[
        str | None,
        typer.Option("--kind", help="Only as one of these.", metavar="model|recipe", show_default=False),
    ] = None,
    zoo: ZooOption = None,
    as_json: _AsJson = False,
) -> int:
    """Show what a stub stands for, or what was tried and what to pass instead."""
    if kind not in (None, *_KINDS):
        raise OptionError(f"--kind: {kind!r} is not offered (one of {', '.join(_KINDS)})")
    opened = open_zoo(zoo, shipped.names(), os.environ)
    asks_for_recipe = parse_stub(stub).recipe_type is not None
    kinds = [one for one in _KINDS if kind in (None, one) and not (kind is None and asks_for_recipe and one == "model")]
    meanings = {one: _meaning(stub, one, opened) for one in kinds}
    if not any(isinstance(found, Resolution) for found in meanings.values()):
        raise ZooError("\n".join(str(found) for found in meanings.values()))
    if as_json:
        print(json.dumps(_plain(meanings), indent=2, ensure_ascii=False))
        return 0
    for one, found in meanings.items():
        print(f"{one:7} {_line(found) if isinstance(found, Resolution) else found}")
    return 0


@zoo_app.command("add")
def add_command(
    stub: _Stub,
    model: Annotated[
        str | None,
        typer.Option("--model", help="A model folder, or hf:OWNER/NAME for one on the hub.", show_default=False),
    ] = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            "--recipe",
            help="A recipe's file or the name of a shipped one; TYPE=FILE for one that is asked for by ?recipe_type=TYPE."
            " May be given several times.",
            show_default=False,
        ),
    ] = None,
    zoo: ZooOption = None,
) -> int:
    """Give a stub a meaning of your own: an entry at the end of your catalogue, which is made where there is none."""
    path = _own_catalogue(zoo)
    asked = parse_stub(stub)
    if asked.query:
        raise ZooError(f"{stub}: leave out what follows '?'; a recipe's type goes before its file: --recipe TYPE=FILE")
    if model is None and not recipe:
        raise OptionError("zoo add: what does the stub stand for? pass --model FOLDER, --recipe FILE or both")
    written = _model_as_written(model, path) if model is not None else None
    recipes = _recipes_as_written(recipe or [], path)
    try:
        text = path.read_text("utf-8-sig") if path.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ZooError(f"{path}: the catalogue cannot be read: {error}") from error
    extended = with_entry(text, path, asked.name, written, recipes)
    from sparse_accel.tasks.files import replacing

    try:
        with replacing(path) as file:
            file.write(extended.encode("utf-8"))
    except OSError as error:
        raise OutputError(f"--zoo: {path} cannot be written: {error.strerror or error}") from error
    print(f"added {asked.text} to {path}; commands find it by --zoo {path} or {ENVIRONMENT_VARIABLE}={path}")
    return 0


def _own_catalogue(zoo: str | None) -> Path:
    """The one file that an entry is added to. Raises OptionError and ZooError."""
    given = zoo or os.environ.get(ENVIRONMENT_VARIABLE)
    if not given:
        raise OptionError(f"zoo add: to which catalogue? pass --zoo FILE.yaml, or set {ENVIRONMENT_VARIABLE}")
    if os.pathsep in given:
        raise OptionError(f"zoo add: {given} names several catalogues; pass the one to add to with --zoo")
    return catalogue_file(Path(given).expanduser())


def _model_as_written(model: str, path: Path) -> str:
    """How an entry names a model: a hub id as it is, a folder relative to the catalogue where it lies below it."""
    if model.startswith(HUB_PREFIX):
        return model
    folder = Path(model).expanduser()
    if not folder.is_dir():
        hub = f"; a model on the hub is written {HUB_PREFIX}{model}" if model.count("/") <= 1 else ""
        raise ZooError(f"--model: there is no folder {model}{hub}")
    if model_folder(folder) is None:
        raise ZooError(f"--model: {model} is not a model folder: it has no config.json")
    return _relative(folder, path)


def _recipes_as_written(given: list[str], path: Path) -> dict[str, str]:
    recipes: dict[str, str] = {}
    for one in given:
        kind, equals, source = one.partition("=")
        if not equals:
            kind, source = DEFAULT_RECIPE, one
        if kind in recipes:
            raise OptionError(f"--recipe: {f'the type {kind!r}' if kind else 'a recipe without a type'} is given twice")
        file = Path(source).expanduser()
        if file.suffix.lower() in RECIPE_SUFFIXES and file.is_file():
            recipes[kind] = _relative(file, path)
        elif source in shipped.names():
            recipes[kind] = source
        else:
            raise ZooError(
                f"--recipe: {source} is neither a recipe's file (.yaml, .yml or .md) nor one that comes with sparse_accel:"
                f" {', '.join(shipped.names())}"
            )
    return recipes


def _relative(target: Path, catalogue: Path) -> str:
    base = catalogue.absolute().parent
    resolved = target.resolve()
    return f"./{resolved.relative_to(base.resolve())}" if resolved.is_relative_to(base.resolve()) else str(resolved)


def _both(stub: str, zoo: Zoo) -> dict[Kind, Resolution | ZooError]:
    return {kind: _meaning(stub, kind, zoo) for kind in _KINDS}


def _meaning(stub: str, kind: Kind, zoo: Zoo) -> Resolution | ZooError:
    try:
        return resolve(stub, kind, zoo)
    except ZooError as error:
        return error


def _line(found: Resolution) -> str:
    return f"{found.value}  ({found.origin})"


def _short(error: ZooError, stub: str) -> str:
    text = str(error)
    return "none: `sparse_accel zoo resolve` says what was tried" if text.startswith(f"{stub}: SparseZoo") else text


def _plain(meanings: dict[Kind, Resolution | ZooError]) -> dict[str, Any]:
    return {
        kind: {"value": found.value, "origin": found.origin} if isinstance(found, Resolution) else {"error": str(found)}
        for kind, found in meanings.items()
    }
