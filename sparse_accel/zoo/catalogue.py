"""A user's own catalogue of stubs: a YAML file, or a folder in which models lie under their stubs.

    zoo:nlp/question_answering/obert-base/pytorch/huggingface/squad/pruned90_quant-none:
      model: ./models/squad_pruned90            # a folder, or hf:OWNER/NAME
      recipe: ./recipes/squad.yaml              # a file, or a shipped recipe's name
    zoo:bert-base-wikipedia_bookcorpus-pruned80:
      recipe:
        transfer-question_answering: question_answering/pruned_quant

Paths are relative to the file. A folder may hold such a file, `zoo.yaml`, and below it folders as SparseZoo kept them:
`nlp/question_answering/.../pruned90_quant-none/` with a model (also in `training/` or `deployment/`) and `recipe*.md`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import yaml

from sparse_accel.errors import ZooError, suggestion
from sparse_accel.zoo.stubs import PREFIX, parse_stub

HUB_PREFIX: Final = "hf:"
FOLDER_FILE: Final = "zoo.yaml"
DEFAULT_RECIPE: Final = ""

_KEYS: Final = ("model", "recipe")
_FILE_SUFFIXES: Final = (".yaml", ".yml")
RECIPE_SUFFIXES: Final = (".yaml", ".yml", ".md")
_LONG_STUB_PARTS: Final = 7


@dataclass(frozen=True)
class Place:
    """What an entry names, as it is written there, and where: `file:line`, or a folder. `base` is what relative paths
    are relative to."""

    written: str
    where: str
    base: Path

    @property
    def path(self) -> Path:
        """The written path, relative to its catalogue."""
        return self.base / Path(self.written).expanduser()


@dataclass(frozen=True)
class Entry:
    """One stub of a catalogue. Recipes by type; `DEFAULT_RECIPE` is the one without."""

    stub: str
    where: str
    model: Place | None = None
    recipes: Mapping[str, Place] = field(default_factory=dict)


@dataclass(frozen=True)
class Catalogue:
    """Entries by stub (without `zoo:`), and the file or folder that they come from."""

    path: Path
    entries: Mapping[str, Entry]


def read_catalogues(path: Path) -> list[Catalogue]:
    """The catalogues at a path: one for a file; for a folder its `zoo.yaml` and the models in it. Raises ZooError."""
    if path.is_dir():
        file = path / FOLDER_FILE
        return [*([_read_file(file)] if file.is_file() else []), _read_folder(path)]
    return [_read_file(path)]


def catalogue_file(path: Path) -> Path:
    """The file of a catalogue that `zoo add` writes to: the path, or a folder's `zoo.yaml`. Raises ZooError."""
    if path.is_dir():
        return path / FOLDER_FILE
    if path.suffix.lower() not in _FILE_SUFFIXES:
        raise ZooError(f"{path}: a catalogue is a folder or a file whose name ends in .yaml or .yml")
    return path


def _read_file(path: Path) -> Catalogue:
    catalogue_file(path)
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ZooError(f"{path}: is not a text file in UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise ZooError(f"{path}: the catalogue cannot be read: {error.strerror}") from None
    return Catalogue(path, parse_catalogue(text, path))


def parse_catalogue(text: str, path: Path) -> dict[str, Entry]:
    """The entries in a catalogue's text; `path` is for errors and relative paths. Raises ZooError with file:line."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark is not None else ""
        raise ZooError(f"{path}{line}: is not YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ZooError(f"{path}: is not YAML: {' '.join(str(error).split())}") from None
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise ZooError(f"{_at(path, root)}: a catalogue is a mapping, `zoo:...:` and below it `model:` and `recipe:`")
    entries: dict[str, Entry] = {}
    for key, value in root.value:
        entry = _entry(key, value, path)
        if entry.stub in entries:
            raise ZooError(f"{entry.where}: {PREFIX}{entry.stub} stands at {entries[entry.stub].where} already")
        entries[entry.stub] = entry
    return entries


def _entry(key: yaml.Node, value: yaml.Node, path: Path) -> Entry:
    where = _at(path, key)
    try:
        stub = parse_stub(str(key.value))
    except ZooError as error:
        raise ZooError(f"{where}: {error}") from None
    if stub.query:
        raise ZooError(
            f"{where}: {key.value}: a catalogue names stubs without '?'; recipes have their types below `recipe:`"
        )
    if not isinstance(value, yaml.MappingNode):
        raise ZooError(f"{_at(path, value)}: below {stub.text}: expected `model:` or `recipe:`")
    model, recipes = None, None
    for name, inner in value.value:
        if name.value not in _KEYS:
            raise ZooError(f"{_at(path, name)}: {stub.text} has no {name.value!r}{suggestion(str(name.value), _KEYS)}")
        if (model if name.value == "model" else recipes) is not None:
            raise ZooError(f"{_at(path, name)}: {name.value} is given twice for {stub.text}")
        if name.value == "model":
            model = _place(inner, path)
        else:
            recipes = _recipes(inner, path)
    if model is None and not recipes:
        raise ZooError(f"{where}: {stub.text} names neither a model nor a recipe")
    return Entry(stub.name, where, model, recipes or {})


def _recipes(node: yaml.Node, path: Path) -> dict[str, Place]:
    if not isinstance(node, yaml.MappingNode):
        return {DEFAULT_RECIPE: _place(node, path)}
    recipes: dict[str, Place] = {}
    for key, value in node.value:
        if key.value in recipes:
            raise ZooError(f"{_at(path, key)}: the recipe {key.value!r} is given twice")
        recipes[str(key.value)] = _place(value, path)
    return recipes


def _place(node: yaml.Node, path: Path) -> Place:
    if not isinstance(node, yaml.ScalarNode) or node.tag != "tag:yaml.org,2002:str" or not node.value.strip():
        raise ZooError(f"{_at(path, node)}: expected a path")
    return Place(node.value, _at(path, node), path.absolute().parent)


def _at(path: Path, node: yaml.Node) -> str:
    return f"{path}:{node.start_mark.line + 1}"


def _read_folder(folder: Path) -> Catalogue:
    """The folders below `folder` whose place in it is a stub and that hold a model or a recipe."""
    entries: dict[str, Entry] = {}
    for place in _stub_folders(folder):
        name = place.relative_to(folder).as_posix()
        try:
            stub = parse_stub(name).name
        except ZooError:
            continue  # whatever else lies there
        base = place.absolute()
        recipes = {
            file.stem.removeprefix("recipe").lstrip("_-"): Place(file.name, str(file), base)
            # Of recipe.md and recipe.yaml the first counts, as it did in SparseZoo.
            for file in sorted(place.glob("recipe*"), reverse=True)
            if file.suffix.lower() in RECIPE_SUFFIXES
        }
        model = Place(".", str(place), base) if model_folder(place) is not None else None
        if model is not None or recipes:
            entries[stub] = Entry(stub, str(place), model, recipes)
    return Catalogue(folder, entries)


def _stub_folders(folder: Path) -> Iterator[Path]:
    for pattern in ("*", "/".join("*" * _LONG_STUB_PARTS)):
        yield from (path for path in sorted(folder.glob(pattern)) if path.is_dir())


def model_folder(folder: Path) -> Path | None:
    """The folder itself, or the one in it, that holds a model as SparseZoo laid it out; None where there is none."""
    inner = (folder, folder / "training", folder / "deployment")
    return next((path for path in inner if (path / "config.json").is_file()), None)


def with_entry(text: str, path: Path, stub: str, model: str | None, recipes: Mapping[str, str]) -> str:
    """A catalogue's text with an entry more at its end; what stands there stays as it is. Raises ZooError where the stub
    is there already."""
    present = parse_catalogue(text, path).get(stub)
    if present is not None:
        raise ZooError(f"{present.where}: {PREFIX}{stub} is there already; change it there")
    lines = [f"{PREFIX}{stub}:"]
    if model is not None:
        lines.append(f"  model: {json.dumps(model, ensure_ascii=False)}")
    if set(recipes) == {DEFAULT_RECIPE}:
        lines.append(f"  recipe: {json.dumps(recipes[DEFAULT_RECIPE], ensure_ascii=False)}")
    elif recipes:
        lines.append("  recipe:")
        lines += [f"    {json.dumps(kind)}: {json.dumps(file, ensure_ascii=False)}" for kind, file in recipes.items()]
    extended = text + ("\n" if text and not text.endswith("\n") else "") + "\n".join(lines) + "\n"
    if stub not in parse_catalogue(extended, path):
        raise ZooError(f"{path}: an entry cannot be added at the end of this file; write it by hand")
    return extended
