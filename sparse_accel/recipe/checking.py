"""All that can be found out about a recipe without a model: what keeps it from being carried out, what it says in vain."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sparse_accel.errors import RecipeError
from sparse_accel.modifiers.epoch_range import EpochRangeModifier
from sparse_accel.modifiers.quantization import QuantizationModifier
from sparse_accel.recipe.schema import Recipe, read_recipe

_LINE = re.compile(r"(?P<file>.*):(?P<line>\d+)(?::|$)")


@dataclass(frozen=True)
class Findings:
    """`problems` end a training before it starts, `warnings` do not; both by file and line. `recipe` is None where it could
    not be read."""

    recipe: Recipe | None
    problems: list[RecipeError]
    warnings: list[str]


def check_recipe(source: str, args: str | Mapping[str, Any] | None = None) -> Findings:
    """Look at a recipe (as `Recipe.load` takes it) as closely as can be without a model."""
    reading = read_recipe(source, args)
    problems, warnings = list(reading.problems), list(reading.warnings)
    if reading.recipe is not None:
        problems += reading.recipe.problems(reading.recipe.num_epochs or math.inf)
        warnings += [*_without_effect(reading.recipe), *_beyond_the_end(reading.recipe)]
    by_line = sorted(problems, key=lambda problem: _place(str(problem)))
    return Findings(reading.recipe, by_line, sorted(warnings, key=_place))


def _place(text: str) -> tuple[str, int]:
    found = _LINE.match(text.partition(" ")[0])
    return (found["file"], int(found["line"])) if found else ("", 0)


def _without_effect(recipe: Recipe) -> Iterator[str]:
    """Fields that are read and checked, and change nothing."""
    for modifier, place in zip(recipe.modifiers, recipe.places, strict=True):
        for name, why in type(modifier).idle_fields.items():
            if name in modifier.model_fields_set:
                yield f"{place}: {type(modifier).__name__}: {name} has no effect: {why}"


def _beyond_the_end(recipe: Recipe) -> Iterator[str]:
    """Moments that no run reaches, and a run that lasts longer than the range that it was given."""
    ends = [modifier.end_epoch for modifier in recipe.of(EpochRangeModifier) if modifier.end_epoch is not None]
    last = recipe.num_epochs
    if last is None:
        return
    for modifier, place in zip(recipe.modifiers, recipe.places, strict=True):
        name = type(modifier).__name__
        if ends and modifier.last_epoch > max(ends):
            yield (
                f"{place}: {name}: names epoch {modifier.last_epoch:g}, past the EpochRangeModifier's end at {max(ends):g}: "
                f"training goes on to epoch {last:g}"
            )
        if isinstance(modifier, QuantizationModifier):
            fixed = modifier.disable_quantization_observer_epoch
            if fixed is not None and fixed >= last:
                yield (
                    f"{place}: {name}: disable_quantization_observer_epoch {fixed:g} is not reached, training ends at "
                    f"{last:g}: ranges move to the end"
                )
