"""`--recipe_args`: values for a recipe's variables, as JSON or as `name=value,name=value`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from sparse_accel.errors import RecipeError
from sparse_accel.recipe.expressions import as_number

_PAIR = re.compile(r"\s*([^=:]*?)\s*[=:](.*)", re.DOTALL)
WHERE = "recipe_args"


def parse_arguments(arguments: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """Variable name -> value. In `name=value` a number becomes one and anything else stays text; `:` may stand for `=`.

    >>> parse_arguments("num_epochs=8,teacher:disable")
    {'num_epochs': 8, 'teacher': 'disable'}

    Raises RecipeError for text that is neither JSON nor pairs, for JSON other than an object, for a name given twice.
    """
    if arguments is None:
        return {}
    if isinstance(arguments, Mapping):
        return dict(arguments)
    if not arguments.strip():
        return {}
    try:
        parsed = json.loads(arguments, object_pairs_hook=_without_repeats, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        if arguments.lstrip().startswith(("{", "[")):
            raise RecipeError(f"not valid JSON, column {error.colno}: {error.msg}", WHERE) from None
        return _without_repeats([_pair(item) for item in arguments.split(",")])
    except RecursionError:
        raise RecipeError("nested too deeply", WHERE) from None
    if not isinstance(parsed, dict):
        raise RecipeError(f'needs a JSON object such as {{"num_epochs": 8}}, not {arguments.strip()}', WHERE)
    return parsed


def _pair(item: str) -> tuple[str, Any]:
    match = _PAIR.fullmatch(item)
    if match is None or not match[1] or "=" in match[2]:
        raise RecipeError(f"{item.strip()!r} is not of the form name=value", WHERE)
    text = match[2].strip()
    number = as_number(text)
    return match[1], text if number is None else number


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise RecipeError(f"{name!r} is given twice", WHERE)
        result[name] = value
    return result


def _refuse_constant(name: str) -> Any:
    raise RecipeError(f"{name} is not a value that a recipe can use", WHERE)
