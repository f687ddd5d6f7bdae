"""A recipe's variables: overridden first, then evaluated in whatever order they need each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from sparse_accel.errors import RecipeError, suggestion
from sparse_accel.recipe.expressions import evaluate, expression_in
from sparse_accel.recipe.reader import Value

# Variables that depend on one another in a row: more is a mistake, and would end in a crash.
_LONGEST_CHAIN: Final = 50


class Overrides:
    """Values that replace variables wherever these are written: by name, and through YAML aliases of their anchor."""

    def __init__(self) -> None:
        self._by_anchor: dict[int, Value] = {}

    def replace(self, variable: Value, new: Value) -> Value:
        """What stands in the variable's place; its aliases follow, while an alias that is overridden stands alone."""
        if variable.anchor is not None and not variable.is_alias:
            self._by_anchor[variable.anchor] = new
        return new

    def current(self, value: Value) -> Value:
        """The value, or what an override made of it."""
        return self._by_anchor.get(value.anchor, value) if value.anchor is not None else value


class Scope:
    """Variables by name, inside the variables of an `outer` scope that they hide; gives evaluated values.

    `used` and `used_anchors` record what was asked for.
    """

    def __init__(self, variables: Mapping[str, Value], overrides: Overrides, outer: Scope | None = None) -> None:
        self.variables = variables
        self.used: set[str] = set()
        self.used_anchors: set[int] = outer.used_anchors if outer is not None else set()
        self._overrides = overrides
        self._outer = outer
        self._known: dict[str, Any] = {}
        self._failed: dict[str, RecipeError] = {}
        self._pending: list[str] = []

    def names(self) -> list[str]:
        """All names that an expression here may use."""
        return [*self.variables, *(self._outer.names() if self._outer is not None else ())]

    def variable(self, name: str) -> Any:
        """The evaluated value of a variable. Raises RecipeError for an unknown name and for a cycle."""
        if name not in self.variables:
            if self._outer is not None:
                return self._outer.variable(name)
            raise RecipeError(f"the variable {name!r} is not defined{suggestion(name, self.names())}")
        if name in self._known:
            return self._known[name]
        if name in self._failed:
            raise self._failed[name]
        if name in self._pending:
            chain = " -> ".join([*self._pending[self._pending.index(name) :], name])
            raise RecipeError(f"variables depend on each other in a circle: {chain}")
        if len(self._pending) >= _LONGEST_CHAIN:
            raise RecipeError(f"eval({name}): the chain of variables is too long; {_LONGEST_CHAIN} are allowed")
        self._pending.append(name)
        try:
            self._known[name] = self.resolve(self.variables[name])
        except RecipeError as error:
            self._failed[name] = error
            raise
        finally:
            self._pending.pop()
        return self._known[name]

    def resolve(self, value: Value) -> Any:
        """Plain Python with every `eval(...)` carried out. Raises RecipeError at the place of the expression."""
        if value.is_alias and value.anchor is not None:
            self.used_anchors.add(value.anchor)
        value = self._overrides.current(value)
        if value.tag is not None:
            raise RecipeError(
                f"{value.tag} stands here as a value; modifiers stand in lists under *modifiers", value.where
            )
        if isinstance(value.data, list):
            return [self.resolve(item) for item in value.data]
        if isinstance(value.data, dict):
            return {key: self.resolve(item) for key, item in value.data.items()}
        expression = expression_in(value.data) if isinstance(value.data, str) else None
        if expression is None:
            return value.data
        try:
            return evaluate(expression, self._lookup)
        except RecipeError as error:
            raise error.at(value.where) from None

    def _lookup(self, name: str) -> Any:
        scope: Scope | None = self
        while scope is not None and name not in scope.variables:
            scope = scope._outer
        if scope is not None:
            scope.used.add(name)
        return self.variable(name)


def from_plain(data: Any, where: str) -> Value:
    """Plain Python (from recipe_args) as a Value."""
    if isinstance(data, list | tuple):
        return Value([from_plain(item, where) for item in data], where)
    if isinstance(data, Mapping):
        return Value({key: from_plain(item, where) for key, item in data.items()}, where)
    return Value(data, where)
