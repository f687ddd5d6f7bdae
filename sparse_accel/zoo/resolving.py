"""From a `zoo:` stub to a folder, hub id or recipe: by the user's catalogues, shipped recipes, known hub models, in turn.

Nothing here calls the network: a hub id is only a name, and whoever loads it downloads what it needs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from sparse_accel.errors import ZooError, nearest, suggestion
from sparse_accel.zoo.catalogue import (
    DEFAULT_RECIPE,
    HUB_PREFIX,
    RECIPE_SUFFIXES,
    Catalogue,
    Place,
    model_folder,
    read_catalogues,
)
from sparse_accel.zoo.known import HUB_MODELS, KNOWN_STUBS, recipe_name, recipe_types, sparsity_percent
from sparse_accel.zoo.stubs import PREFIX, Stub, parse_stub

ENVIRONMENT_VARIABLE: Final = "SPARSE_ACCEL_ZOO"
_OFFLINE_VARIABLES: Final = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_TRUE_WORDS: Final = frozenset({"1", "on", "yes", "true"})
_HUB_NAME: Final = re.compile(r"[\w.-]+(?:/[\w.-]+)?")

Kind = Literal["model", "recipe"]


@dataclass(frozen=True)
class Zoo:
    """All that a stub may be looked up in. `hub_cache` is where downloads are kept, `is_offline` whether none may be
    made."""

    catalogues: tuple[Catalogue, ...]
    shipped_recipes: tuple[str, ...]
    hub_cache: Path
    is_offline: bool


@dataclass(frozen=True)
class Resolution:
    """What a stub stands for. `stub` is as it was typed, `value` a path, a hub id or a shipped recipe's name, `origin`
    says in words who said so."""

    stub: str
    value: str
    origin: str

    @property
    def note(self) -> str:
        """One sentence for the person."""
        return f"{self.stub} stands for {self.value} ({self.origin})"


def open_zoo(
    given: str | None, shipped_recipes: Sequence[str], environ: Mapping[str, str], cache_dir: str | None = None
) -> Zoo:
    """The catalogues of `--zoo` and of SPARSE_ACCEL_ZOO, each one or several paths joined as in PATH, and the rest.

    Raises ZooError for a catalogue that is missing or wrong.
    """
    catalogues = []
    for paths, where in ((given, "--zoo"), (environ.get(ENVIRONMENT_VARIABLE), ENVIRONMENT_VARIABLE)):
        for path in (Path(part).expanduser() for part in (paths or "").split(os.pathsep) if part):
            if not path.exists():
                raise ZooError(f"{where}: there is no catalogue {path}{_neighbour(path)}")
            catalogues += read_catalogues(path)
    offline = any(environ.get(name, "").lower() in _TRUE_WORDS for name in _OFFLINE_VARIABLES)
    return Zoo(tuple(catalogues), tuple(shipped_recipes), _hub_cache(environ, cache_dir), offline)


def _neighbour(path: Path) -> str:
    try:
        close = nearest(path.name, [entry.name for entry in path.parent.iterdir()], count=1)
    except OSError:
        return f" (there is no folder {path.parent} either)"
    return f"; did you mean {str(path.with_name(close[0]))!r}?" if close else ""


def _hub_cache(environ: Mapping[str, str], cache_dir: str | None) -> Path:
    """The folder in which huggingface_hub keeps downloads, by the same variables."""
    named = cache_dir or environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE")
    if named:
        return Path(named).expanduser()
    home = environ.get("HF_HOME")
    cache = Path(environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return (Path(home) if home else cache).expanduser() / "hub"


def resolve(text: str, kind: Kind, zoo: Zoo) -> Resolution:
    """What a stub stands for, as a model (also a teacher, a tokenizer or a config) or as a recipe.

    Raises ZooError: the stub is malformed, catalogues disagree, an entry points nowhere, or nothing is known; the message
    then says what was tried and what to pass.
    """
    stub = parse_stub(text)
    if kind == "model" and stub.recipe_type is not None:
        raise ZooError(f"{text}: a recipe's type is for --recipe; for a model leave out what follows '?'")
    found = _in_catalogues(text, stub, kind, zoo)
    if found is not None:
        return found
    if kind == "recipe":
        name = recipe_name(stub)
        if name is not None and name in zoo.shipped_recipes:
            return Resolution(
                text, name, "the recipe of that kind that comes with sparse_accel, in our own words and numbers"
            )
    else:
        known = HUB_MODELS.get(stub.name)
        if known is not None and (not zoo.is_offline or is_cached(known.name, zoo)):
            difference = f": {known.difference}" if known.difference else ""
            return Resolution(text, known.name, f"its counterpart on the Hugging Face hub{difference}")
    raise ZooError(_cannot_be_had(text, stub, kind, zoo))


def is_cached(name: str, zoo: Zoo) -> bool:
    """Whether a model of the hub was downloaded before."""
    folder = zoo.hub_cache / f"models--{name.replace('/', '--')}" / "snapshots"
    return any(folder.glob("*/config.json"))


# --- catalogues -------------------------------------------------------------------------------------------------------


def _in_catalogues(text: str, stub: Stub, kind: Kind, zoo: Zoo) -> Resolution | None:
    """What the user's catalogues say. Raises ZooError where they disagree or what they name is not there."""
    found = [
        (place, Resolution(text, _target(place, kind, stub, zoo), place.where)) for place in _places(stub, kind, zoo)
    ]
    if not found:
        return None
    first_place, first = found[0]
    for place, other in found[1:]:
        if other.value != first.value and not _same_file(first.value, other.value):
            raise ZooError(
                f"{stub.text}: two catalogues disagree about its {kind}: {first.value} ({first_place.where}) and"
                f" {other.value} ({place.where}); take one of them out, or pass the {kind} itself"
            )
    return first


def _places(stub: Stub, kind: Kind, zoo: Zoo) -> Iterator[Place]:
    for catalogue in zoo.catalogues:
        entry = catalogue.entries.get(stub.name)
        if entry is None:
            continue
        if kind == "model":
            if entry.model is not None:
                yield entry.model
        elif entry.recipes:
            place = _chosen_recipe(stub, entry.recipes, entry.where)
            if place is not None:
                yield place


def _chosen_recipe(stub: Stub, recipes: Mapping[str, Place], where: str) -> Place | None:
    """The recipe of the asked type; without one, the plain recipe or the only one. None for a type that is not there."""
    if stub.recipe_type is not None:
        return recipes.get(stub.recipe_type)
    if DEFAULT_RECIPE in recipes:
        return recipes[DEFAULT_RECIPE]
    if len(recipes) == 1:
        return next(iter(recipes.values()))
    choices = ", ".join(f"{stub.text}?recipe_type={kind}" for kind in recipes)
    raise ZooError(f"{where}: has several recipes for this stub; choose: {choices}")


def _target(place: Place, kind: Kind, stub: Stub, zoo: Zoo) -> str:
    """The model or recipe that an entry names. Raises ZooError where it is not there."""
    said = f"{place.where}: {stub.text}"
    if kind == "recipe":
        if place.path.suffix.lower() in RECIPE_SUFFIXES:
            if not place.path.is_file():
                raise ZooError(f"{said}: points nowhere: there is no recipe {place.path}{_neighbour(place.path)}")
            return str(place.path)
        if place.written not in zoo.shipped_recipes:
            raise ZooError(
                f"{said}: {place.written!r} is neither a file (.yaml, .yml or .md) nor a recipe that comes with sparse_accel"
                f"{suggestion(place.written, zoo.shipped_recipes)}"
            )
        return place.written
    if place.written.startswith(HUB_PREFIX):
        name = place.written.removeprefix(HUB_PREFIX)
        if not _HUB_NAME.fullmatch(name):
            raise ZooError(f"{said}: {name!r} is no hub id; expected {HUB_PREFIX}OWNER/NAME")
        if zoo.is_offline and not is_cached(name, zoo):
            raise ZooError(
                f"{said}: {name} is on the Hugging Face hub, which {' or '.join(_OFFLINE_VARIABLES)} forbids to call, and it is"
                f" not in {zoo.hub_cache}; pass a model folder instead"
            )
        return name
    if not place.path.is_dir():
        hub = f"; a model on the hub is written {HUB_PREFIX}{place.written}" if place.written.count("/") <= 1 else ""
        raise ZooError(f"{said}: points nowhere: there is no model folder {place.path}{_neighbour(place.path)}{hub}")
    folder = model_folder(place.path)
    if folder is None:
        raise ZooError(f"{said}: {place.path} is not a model folder: it has no config.json")
    return str(folder)


def _same_file(one: str, other: str) -> bool:
    return Path(one).exists() and Path(other).exists() and Path(one).samefile(other)


# --- what cannot be had -----------------------------------------------------------------------------------------------


def _cannot_be_had(text: str, stub: Stub, kind: Kind, zoo: Zoo) -> str:
    sentences = [
        f"{text}: SparseZoo's service has ended, and nothing else is known to stand for this {kind}",
        "tried: " + "; ".join(_tried(stub, kind, zoo)),
        "pass instead: " + _instead(stub, kind),
    ]
    # Another task's model would be no help, however alike the names are.
    names = [name for name in _names(zoo, kind) if stub.task in (None, parse_stub(name).task)]
    close = [name for name in nearest(stub.name, names) if name != stub.name]
    if close:
        sentences.append(f"closest stub that can be had: {PREFIX}{close[0]}")
    return ".\n  ".join(sentences)


def _tried(stub: Stub, kind: Kind, zoo: Zoo) -> Iterator[str]:
    paths = list(dict.fromkeys(str(catalogue.path) for catalogue in zoo.catalogues))
    yield f"your catalogues ({', '.join(paths) or f'none: neither --zoo nor {ENVIRONMENT_VARIABLE} names one'})"
    if kind == "recipe":
        name = recipe_name(stub)
        if name is not None:
            yield f"the recipes that come with sparse_accel (there is no {name})"
        elif stub.recipe_type is not None and recipe_types(stub):
            yield (
                f"the recipes that come with sparse_accel (none of type {stub.recipe_type!r}; types: "
                f"{', '.join(recipe_types(stub))})"
            )
        else:
            yield "the recipes that come with sparse_accel (none is of this kind)"
        return
    known = HUB_MODELS.get(stub.name)
    if known is None:
        yield "models on the Hugging Face hub (no counterpart is known)"
    else:
        yield (
            f"the Hugging Face hub ({known.name} is its counterpart, but {' or '.join(_OFFLINE_VARIABLES)} forbids to download"
            f" it and it is not in {zoo.hub_cache})"
        )


def _instead(stub: Stub, kind: Kind) -> str:
    add = f"`sparse_accel zoo add '{stub.text}' --{kind} ... --zoo FILE.yaml` gives the stub a meaning of your own"
    if kind == "recipe":
        return f"a recipe's file, or the name of one that comes with sparse_accel; {add}"
    percent = sparsity_percent(stub.tag)
    if percent is not None:
        start = f"a pruned model's folder or hub id (`sparse_accel prune MODEL --sparsity {percent / 100:g}` makes one)"
    elif stub.task not in (None, "masked_language_modeling"):
        start = f"the folder or hub id of a dense model that is fine-tuned on {stub.dataset}"
    else:
        start = "a model's folder or hub id"
    return f"{start}; {add}"


def _names(zoo: Zoo, kind: Kind) -> list[str]:
    """All stubs of which something is known, for the one that is closest."""
    own = [
        name
        for catalogue in zoo.catalogues
        for name, entry in catalogue.entries.items()
        if (entry.model is not None if kind == "model" else bool(entry.recipes))
    ]
    return [*own, *(name for name in KNOWN_STUBS if _is_known(name, kind, zoo))]


def _is_known(name: str, kind: Kind, zoo: Zoo) -> bool:
    if kind == "model":
        known = HUB_MODELS.get(name)
        return known is not None and (not zoo.is_offline or is_cached(known.name, zoo))
    return recipe_name(parse_stub(name)) in zoo.shipped_recipes


def listed_stubs(zoo: Zoo) -> list[str]:
    """The stubs of the user's catalogues and those that are known, without `zoo:`, each once."""
    own = [name for catalogue in zoo.catalogues for name in catalogue.entries]
    return list(dict.fromkeys([*own, *KNOWN_STUBS]))
