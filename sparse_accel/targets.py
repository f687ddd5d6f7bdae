"""Names of parameters and modules from what a recipe calls its targets: exact names, `re:` patterns, keywords."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from sparse_accel.errors import TargetError, nearest

ALL = "__ALL__"
ALL_PRUNABLE = "__ALL_PRUNABLE__"
_REGEX = "re:"


def match_parameters(
    target: str | Sequence[str], names: Sequence[str], prunable: Sequence[str], *, what: str = "params"
) -> list[str]:
    """The parameters that `target` means, in the order of `names`.

    `target` is `__ALL__`, `__ALL_PRUNABLE__` (any case) or a list of keywords, full names and `re:` patterns; a pattern
    is anchored at the start of a name, not at its end. `prunable` is what `__ALL_PRUNABLE__` stands for.
    Raises TargetError for a pattern that matches nothing.
    """
    if isinstance(target, str):
        if not is_keyword(target):
            raise TargetError(
                f"{what}: {target!r} is neither {ALL} nor {ALL_PRUNABLE}; names and patterns go in a list: [{target!r}]"
            )
        target = (target,)
    if not target:
        raise TargetError(f"{what}: the list is empty; write {ALL_PRUNABLE} for every prunable weight")
    keywords = {ALL: names, ALL_PRUNABLE: prunable}
    chosen: set[str] = set()
    for pattern in target:
        if is_keyword(pattern):
            found: Iterable[str] = keywords[pattern.upper()]
            if not found:
                raise TargetError(f"{what}: the model has no parameter for {pattern}")
        else:
            found = _matches(pattern, names, _parameter_in_wrapper, what, "parameter")
        chosen.update(found)
    return [name for name in names if name in chosen]


def match_modules(patterns: Sequence[str], names: Sequence[str], *, what: str = "modules") -> list[str]:
    """The modules that a list of full names and `re:` patterns means, in the order of `names`; none for an empty list.

    Raises TargetError for a pattern that matches nothing.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        chosen.update(_matches(pattern, names, _module_in_wrapper, what, "module"))
    return [name for name in names if name in chosen]


def is_keyword(target: str) -> bool:
    """Whether `target` is `__ALL__` or `__ALL_PRUNABLE__`, in any case."""
    return target.upper() in (ALL, ALL_PRUNABLE)


def _parameter_in_wrapper(name: str) -> str:
    """How SparseML's quantized model spells a parameter: `query.weight` is `query.module.weight` there."""
    module, _, parameter = name.rpartition(".")
    return f"{module}.module.{parameter}"


def _module_in_wrapper(name: str) -> str:
    """How SparseML's quantized model spells a module."""
    return f"{name}.module"


def _matches(pattern: str, names: Sequence[str], in_wrapper: Callable[[str], str], what: str, kind: str) -> list[str]:
    """The names that one pattern means; recipes written against SparseML's quantized model are understood too."""
    accepts = _test(pattern, what)
    found = [name for name in names if accepts(name)] or [name for name in names if accepts(in_wrapper(name))]
    if not found:
        raise TargetError(f"{what}: {pattern!r} matched no {kind}{_hint(pattern, names)}")
    return found


def is_pattern(target: str) -> bool:
    """Whether `target` is a `re:` pattern."""
    return target.startswith(_REGEX)


def pattern_problem(pattern: str) -> str | None:
    """What is wrong with a name or `re:` pattern whatever the model is, a clause; None for nothing."""
    if is_pattern(pattern):
        try:
            re.compile(pattern.removeprefix(_REGEX))
        except re.error as error:
            return f"{pattern!r} is not a regular expression: {error}"
    return None


def _test(pattern: str, what: str) -> Callable[[str], bool]:
    problem = pattern_problem(pattern)
    if problem is not None:
        raise TargetError(f"{what}: {problem}")
    if not is_pattern(pattern):
        return lambda name: name == pattern
    expression = re.compile(pattern.removeprefix(_REGEX))
    return lambda name: expression.match(name) is not None


def _hint(pattern: str, names: Sequence[str]) -> str:
    if not is_pattern(pattern):
        try:
            as_expression = re.compile(pattern)
        except re.error:
            as_expression = None
        if as_expression is not None and any(as_expression.match(name) for name in names):
            return f"; did you mean {_REGEX + pattern!r}?"
    plain = pattern.removeprefix(_REGEX).replace("\\", "").replace(".*", "")
    # A pattern says little about the beginning of a name, so its text is compared with the ends of names too.
    tails = {name[-len(plain) :]: name for name in names}
    close = nearest(plain, names) or [tails[tail] for tail in nearest(plain, tails)]
    if close:
        return "; nearest: " + ", ".join(map(repr, close))
    return f"; there are {len(names)}, such as " + ", ".join(map(repr, names[:3])) if names else ""
