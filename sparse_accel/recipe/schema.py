"""A recipe: modifiers in the order in which they act, ready to plan, to run and to be written down."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError
from torch import Tensor, nn

from sparse_accel.compress.plan import CompressionPlan
from sparse_accel.errors import RecipeError, suggestion
from sparse_accel.modifiers import MODIFIERS, REFUSED
from sparse_accel.modifiers.base import Modifier
from sparse_accel.recipe import arguments, reader
from sparse_accel.recipe.reader import Value
from sparse_accel.recipe.variables import Overrides, Scope, from_plain
from sparse_accel.session import LossTerms, Session
from sparse_accel.timeline import Clock

M = TypeVar("M", bound=Modifier)

_GROUP = "modifiers"
_VERSION = "1.1.0"
# Top-level keys that say something about the recipe itself and need no use.
_ABOUT = ("version", "__metadata__")
# Fields that every modifier of SparseML took before 1.0.
_IGNORED_EVERYWHERE = {"log_types": "what is logged does not depend on the recipe"}
# Knobs that are set once and stay set: a later start takes over from an earlier one that has no end.
_STAYS_SET = ("lr", "weight_decay")
# Epochs that differ by rounding only.
_SAME_MOMENT = 1e-9


@dataclass(frozen=True)
class Recipe:
    """`modifiers` in SparseML's order (end, start, name), each one's place (`file:line`), and `variables` as evaluated.

    Two recipes are equal when their modifiers are.
    """

    modifiers: tuple[Modifier, ...]
    variables: Mapping[str, Any] = field(default_factory=dict, compare=False)
    places: tuple[str, ...] = field(default=(), compare=False)
    warnings: list[str] = field(default_factory=list, compare=False)

    @classmethod
    def load(cls, source: str | Path, args: str | Mapping[str, Any] | None = None) -> Recipe:
        """Read a recipe from a file (.yaml, .yml, .md), by a shipped recipe's name or from its own text.

        `args` are recipe_args: values for its variables.
        Raises RecipeError, with file:line, for whatever keeps it from being carried out: all of it at once.
        """
        reading = read_recipe(str(source), args)
        if reading.recipe is None:
            raise together(reading.problems)
        return reading.recipe

    @classmethod
    def empty(cls) -> Recipe:
        """A recipe that asks for nothing."""
        return cls(())

    @property
    def num_epochs(self) -> float | None:
        """Epochs to train: the last that a modifier names, rounded up; None when none names one after 0."""
        last = max((math.ceil(modifier.last_epoch - _SAME_MOMENT) for modifier in self.modifiers), default=0)
        return float(last) if last > 0 else None

    def where(self, modifier: Modifier) -> str:
        """`file:line` of a modifier."""
        return next(place for own, place in zip(self.modifiers, self.places, strict=True) if own is modifier)

    def has(self, kind: type[Modifier]) -> bool:
        """Whether a modifier of this class is in the recipe."""
        return bool(self.of(kind))

    def of(self, kind: type[M]) -> tuple[M, ...]:
        """The modifiers of one class."""
        return tuple(modifier for modifier in self.modifiers if isinstance(modifier, kind))

    def problems(self, num_epochs: float) -> list[RecipeError]:
        """What would make a modifier useless or wrong in a run of `num_epochs`."""
        return [
            RecipeError(f"{_name(modifier)}: {problem}", place)
            for modifier, place in zip(self.modifiers, self.places, strict=True)
            for problem in modifier.problems(num_epochs)
        ]

    def check(self, num_epochs: float) -> None:
        """Raises RecipeError that lists all `problems`."""
        problems = self.problems(num_epochs)
        if problems:
            raise together(problems)

    def plan(self, plan: CompressionPlan, model: nn.Module) -> None:
        """Before sharding: what the model needs for the whole run. Raises RecipeError for what it cannot have."""
        for modifier in self.modifiers:
            with self._at(modifier):
                modifier.plan(plan, model)
        masking = [modifier for modifier in self.modifiers if any(_kind(knob) == "mask" for knob in modifier.owns())]
        for one, other in combinations(masking, 2):
            shared = [name for name in plan.masked_by(one) if name in set(plan.masked_by(other))]
            if shared and _overlap(one, other):
                raise RecipeError(
                    f"{_name(other)} and the {_name(one)} at {self.where(one)} both mask {shared[0]}"
                    + (_after_pruning(one, other) or " at the same time"),
                    self.where(other),
                )
            if shared and _leave_a_gap(one, other):
                raise RecipeError(
                    f"{_name(other)} masks {shared[0]} again after the {_name(one)} at {self.where(one)} has let go of it: "
                    "in between, training revives its zeros; let one begin where the other ends",
                    self.where(other),
                )
        if self.modifiers and not any(parameter.requires_grad for parameter in model.parameters()):
            raise RecipeError("the recipe freezes every parameter of the model; nothing is left to train")

    def on_step_start(self, session: Session, clock: Clock) -> None:
        """State what should hold at this step. Whoever starts later speaks later, and has the last word."""
        for modifier in sorted(self.modifiers, key=_start):
            with self._at(modifier):
                modifier.on_step_start(session, clock)

    def on_loss(
        self,
        terms: LossTerms,
        batch: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
        session: Session,
        clock: Clock,
    ) -> LossTerms:
        """The loss of a micro-batch as the modifiers want it."""
        for modifier in self.modifiers:
            with self._at(modifier):
                terms = modifier.on_loss(terms, batch, outputs, session, clock)
        return terms

    def on_step_end(self, session: Session, clock: Clock) -> None:
        """After the optimizer stepped."""
        for modifier in self.modifiers:
            with self._at(modifier):
                modifier.on_step_end(session, clock)

    def metrics(self, session: Session, clock: Clock) -> dict[str, float]:
        """Numbers worth logging, of all modifiers."""
        numbers: dict[str, float] = {}
        for modifier in self.modifiers:
            numbers.update(modifier.metrics(session, clock))
        return numbers

    def to_yaml(self) -> str:
        """The evaluated recipe as SparseML writes it: a list in execution order, fields sorted, defaults written."""
        return yaml.dump(
            {"version": _VERSION, "modifiers": list(self.modifiers)},
            Dumper=_Dumper,
            sort_keys=False,
            allow_unicode=True,
        )

    @contextmanager
    def _at(self, modifier: Modifier) -> Iterator[None]:
        """Gives errors from inside the place of the modifier."""
        try:
            yield
        except RecipeError as error:
            raise error.at(self.where(modifier)) from None


class _Dumper(yaml.SafeDumper):
    """Writes modifiers as tagged mappings."""


def _represent(dumper: _Dumper, modifier: Modifier) -> yaml.Node:
    fields = {name: value for name, value in sorted(modifier.model_dump(mode="json").items()) if value is not None}
    return dumper.represent_mapping(f"!{_name(modifier)}", fields)


def _represent_text(dumper: _Dumper, text: str) -> yaml.Node:
    """Quoted where the reader would take the plain word for a number (`5e5`, which YAML 1.1 does not)."""
    quote = "'" if reader.looks_like_a_number(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=quote)


_Dumper.add_multi_representer(Modifier, _represent)
_Dumper.add_representer(str, _represent_text)


def _name(modifier: Modifier) -> str:
    return type(modifier).__name__


def _start(modifier: Modifier) -> float:
    """-1, the first opportunity, comes before an epoch of 0."""
    return -1.0 if modifier.start_epoch is None else modifier.start_epoch


def _execution_order(modifier: Modifier) -> tuple[float, float, str]:
    end = math.inf if modifier.end_epoch is None else modifier.end_epoch
    return end, _start(modifier), _name(modifier)


# --- from the tree to modifiers -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Section:
    """Variables and modifiers that stand together: the recipe's top level, or one stage."""

    variables: dict[str, Value]
    modifiers: list[Value]


@dataclass(frozen=True)
class Reading:
    """What came of reading a recipe: `recipe` is None where there are `problems`."""

    recipe: Recipe | None
    problems: list[RecipeError]
    warnings: list[str]


def read_recipe(source: str, args: str | Mapping[str, Any] | None = None) -> Reading:
    """Read a recipe as `Recipe.load` does, and say all that is wrong with it rather than the first. Text that is no YAML
    has one problem only: where it breaks."""
    recipe: Recipe | None = None
    problems: list[RecipeError] = []
    warnings: list[str] = []
    with _collected(problems):
        recipe = _build(reader.read(source), arguments.parse_arguments(args), problems, warnings)
    return Reading(recipe, _without_repeats(problems), warnings)


def together(problems: Sequence[RecipeError]) -> RecipeError:
    """One error for all problems, each with its place."""
    first, *others = problems
    return RecipeError("\n".join([first.message, *map(str, others)]), first.where) if others else first


@contextmanager
def _collected(problems: list[RecipeError]) -> Iterator[None]:
    """Notes an error among the problems, so that what comes after is looked at too."""
    try:
        yield
    except RecipeError as error:
        problems.append(error)


def _without_repeats(problems: list[RecipeError]) -> list[RecipeError]:
    """A variable that cannot be had is a problem once, however often it is asked for."""
    return list({str(problem): problem for problem in problems}.values())


def _build(
    root: Value, overrides: Mapping[str, Any], problems: list[RecipeError], warnings: list[str]
) -> Recipe | None:
    """The recipe, or None where `problems` were found, which are added to those given."""
    top, stages = _sections(root, problems)
    sections = [top, *stages]
    declared = [dict(section.variables) for section in sections]
    replaced = _override(sections, overrides, problems)
    scopes = [Scope(top.variables, replaced)]
    scopes += [Scope(stage.variables, replaced, outer=scopes[0]) for stage in stages]
    variables: dict[str, Any] = {}
    for scope in scopes:
        for name in scope.variables:
            with _collected(problems):
                variables[name] = scope.variable(name)
    entries = [(entry, scope) for section, scope in zip(sections, scopes, strict=True) for entry in section.modifiers]
    found = [(_modifier(entry, scope, problems, warnings), entry.where) for entry, scope in entries]
    if not entries and not problems:
        raise RecipeError("the recipe has no modifiers; they stand in lists such as training_modifiers", root.where)
    built = [(modifier, place) for modifier, place in found if modifier is not None]
    built.sort(key=lambda pair: _execution_order(pair[0]))
    problems += _conflicts(built)
    if problems:
        return None  # and an expression that failed half way has not used all its variables
    warnings += _unused(declared, scopes, overrides)
    return Recipe(tuple(m for m, _ in built), variables, tuple(place for _, place in built), warnings)


def _sections(root: Value, problems: list[RecipeError]) -> tuple[_Section, list[_Section]]:
    if root.tag is not None:
        return _Section({}, [root]), []
    if not isinstance(root.data, dict):
        raise RecipeError(
            "a recipe is a mapping of variables and of lists such as training_modifiers, not "
            + ("a list" if isinstance(root.data, list) else f"{root.data!r}"),
            root.where,
        )
    stages = {key: value for key, value in root.data.items() if _is_stage(value)}
    top = _section({key: value for key, value in root.data.items() if key not in stages}, problems)
    return top, [_section(stage.data, problems) for stage in stages.values()]


def _is_stage(value: Value) -> bool:
    return value.tag is None and isinstance(value.data, dict) and any(_GROUP in str(key) for key in value.data)


def _section(entries: Mapping[Any, Value], problems: list[RecipeError]) -> _Section:
    variables: dict[str, Value] = {}
    modifiers: list[Value] = []
    for key, value in entries.items():
        if _GROUP not in str(key):
            stray = next((inner for inner in value.walk() if inner.tag is not None), None)
            if stray is None:
                variables[str(key)] = value
            else:
                problems.append(
                    RecipeError(
                        f"{stray.tag} stands under {key!r}; modifiers stand in lists under a name with {_GROUP!r} in it, "
                        f"such as training_{_GROUP}",
                        stray.where,
                    )
                )
        elif isinstance(value.data, list):
            for item in value.data:
                with _collected(problems):
                    modifiers.append(_tagged(item))
        elif value.tag is not None or isinstance(value.data, dict):
            problems.append(
                RecipeError(
                    f"{key!r} is not a list; this looks like a recipe of SparseML's session API (modifiers by name, "
                    "without tags), which is not run here: write each modifier as an item '- !NameOfModifier'",
                    value.where,
                )
            )
        elif value.data is not None:
            variables[str(key)] = value
    return _Section(variables, modifiers)


def _tagged(item: Value) -> Value:
    if item.tag is None:
        name = (
            item.data
            if isinstance(item.data, str)
            else next(iter(item.data), "")
            if isinstance(item.data, dict)
            else ""
        )
        example = f"!{name}" if name in MODIFIERS else "!EpochRangeModifier"
        raise RecipeError(f"an item here must be a modifier with its tag, such as '- {example}'", item.where)
    return item


def _override(sections: list[_Section], overrides: Mapping[str, Any], problems: list[RecipeError]) -> Overrides:
    replaced = Overrides()
    for name, data in overrides.items():
        homes = [section for section in sections if name in section.variables]
        if not homes:
            problems.append(RecipeError(_no_variable(name, sections), arguments.WHERE))
        for section in homes:
            new = from_plain(data, f"{arguments.WHERE} {name}")
            section.variables[name] = replaced.replace(section.variables[name], new)
    return replaced


def _no_variable(name: str, sections: list[_Section]) -> str:
    if _GROUP in name:
        return f"{name!r} is a list of modifiers; only variables can be set"
    known = dict.fromkeys(variable for section in sections for variable in section.variables)
    return f"the recipe has no variable {name!r}{suggestion(name, known) if known else '; the recipe has no variables'}"


def _unused(declared: list[dict[str, Value]], scopes: list[Scope], overrides: Mapping[str, Any]) -> Iterator[str]:
    for variables, scope in zip(declared, scopes, strict=True):
        for name, original in variables.items():
            if name in scope.used or name in _ABOUT or original.anchor in scope.used_anchors:
                continue
            if name in overrides:
                yield f"recipe_args sets {name!r}, which nothing in the recipe uses ({original.where})"
            else:
                yield f"{original.where}: the variable {name!r} is not used"


def _modifier(entry: Value, scope: Scope, problems: list[RecipeError], warnings: list[str]) -> Modifier | None:
    """The modifier that an item describes, or None where it has problems. The fields of one that is unknown are looked at
    as well: they use variables."""
    tag, where = str(entry.tag), entry.where
    kind = MODIFIERS.get(tag)
    own: list[RecipeError] = []
    if tag in REFUSED:
        own.append(RecipeError(f"{tag} is not offered here: {REFUSED[tag]}", where))
    elif kind is None:
        own.append(RecipeError(f"there is no modifier {tag!r}{suggestion(tag, MODIFIERS)}", where))
    ignored = {**_IGNORED_EVERYWHERE, **(kind.ignored_fields if kind is not None else {})}
    fields: dict[str, Any] = {}
    for name, value in entry.data.items():
        with _collected(own):
            data = scope.resolve(value)
            if kind is None or name in kind.model_fields:
                fields[name] = data
            elif name in ignored:
                warnings.append(f"{value.where}: {tag}: {name} is ignored: {ignored[name]}")
            else:
                hint = suggestion(str(name), kind.model_fields)
                raise RecipeError(f"{tag}: there is no field {name!r}{hint}", value.where)
    modifier = None
    if kind is not None and not own:
        try:
            modifier = kind.model_validate(fields)
        except ValidationError as error:
            own += [_complaint(detail, tag, entry) for detail in error.errors()]
        except RecipeError as error:
            own.append(error.at(where))
    if modifier is not None:
        own += _bad_epochs(modifier, entry)
    problems += own
    return None if own else modifier


def _complaint(detail: Any, tag: str, entry: Value) -> RecipeError:
    """One of pydantic's errors, in our words and with its place."""
    name = str(detail["loc"][0]) if detail["loc"] else None
    place = entry.data[name].where if name in entry.data else entry.where
    if detail["type"] == "missing":
        return RecipeError(f"{tag}: the field {name!r} is missing", place)
    message = (
        str(detail["msg"])
        .removeprefix("Value error, ")
        .replace("Input should be", "must be")
        .replace("a valid tuple", "a list")
    )
    if name is None:
        return RecipeError(f"{tag}: {message}", place)
    hint = ""
    if isinstance(detail["input"], str) and "eval(" in detail["input"]:
        hint = "; eval(...) must enclose the whole value"
    return RecipeError(f"{tag}: {name} {message}; got {detail['input']!r}{hint}", place)


def _bad_epochs(modifier: Modifier, entry: Value) -> Iterator[RecipeError]:
    is_sound = True
    for name in type(modifier).model_fields:
        epoch = getattr(modifier, name)
        if name.endswith("_epoch") and epoch is not None and not 0.0 <= epoch < math.inf:
            is_sound = False
            yield RecipeError(
                f"{_name(modifier)}: {name} must be an epoch from 0 on, or -1 for none; got {epoch}",
                entry.data[name].where,
            )
    if is_sound and modifier.end_epoch is not None and modifier.end_epoch < modifier.interval.start:
        yield RecipeError(
            f"{_name(modifier)}: end_epoch {modifier.end_epoch} lies before start_epoch {modifier.start_epoch}",
            entry.data["end_epoch"].where,
        )


def _conflicts(built: list[tuple[Modifier, str]]) -> Iterator[RecipeError]:
    for (one, one_place), (other, other_place) in combinations(built, 2):
        shared = sorted(a for a in one.owns() for b in other.owns() if _same_knob(a, b))
        if shared and _overlap(one, other) and not (_takes_over(one, other) and _stays_set(shared)):
            yield RecipeError(
                f"{_name(other)} and the {_name(one)} at {one_place} both set {shared[0]}"
                + (_after_pruning(one, other) or " at the same time; let one end before the other starts"),
                other_place,
            )


def _same_knob(one: str, other: str) -> bool:
    """`lr` is the same knob as `lr:0`, one of its groups."""
    return one == other or one.startswith(f"{other}:") or other.startswith(f"{one}:")


def _stays_set(knobs: list[str]) -> bool:
    return all(_kind(knob) in _STAYS_SET for knob in knobs)


def _kind(knob: str) -> str:
    """`lr` of `lr:0`, `mask` of `mask:re:.*query.*`."""
    return knob.partition(":")[0]


def _takes_over(one: Modifier, other: Modifier) -> bool:
    """Whether the earlier of the two has no end and the other really starts later."""
    earlier, later = sorted((one, other), key=_start)
    return earlier.end_epoch is None and _start(earlier) < _start(later)


def _after_pruning(one: Modifier, other: Modifier) -> str | None:
    """What is wrong where the two meet only because the earlier one claims more than the epochs that it names."""
    earlier, later = sorted((one, other), key=_start)
    end = earlier.end_epoch
    if earlier.claims.end is not None or end is None or later.interval.start < end - _SAME_MOMENT:
        return None
    return (
        f", and nothing may after {_name(earlier)}, which holds its zeros to the end of the run by itself (leave_enabled: true); "
        "leave the later one out"
    )


def _overlap(one: Modifier, other: Modifier) -> bool:
    earlier, later = sorted((one.claims, other.claims), key=lambda interval: interval.start)
    return earlier.overlaps(later) and (earlier.end is None or earlier.end - later.start > _SAME_MOMENT)


def _leave_a_gap(one: Modifier, other: Modifier) -> bool:
    earlier, later = sorted((one.interval, other.interval), key=lambda interval: interval.start)
    return earlier.end is not None and later.start - earlier.end > _SAME_MOMENT
