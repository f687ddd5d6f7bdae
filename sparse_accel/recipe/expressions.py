"""Arithmetic in recipes: what stands between the parentheses of `eval(...)`."""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable
from typing import Any

from sparse_accel.errors import RecipeError, suggestion

Number = int | float
Lookup = Callable[[str], Any]

_WHOLE = re.compile(r"\s*eval\s*\((.*)", re.DOTALL)
_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")
# Long enough for any recipe, short enough for Python's parser.
_MAX_LENGTH = 1000
# 2 ** 1024 is where floats end; larger integers serve no recipe and cost memory.
_MAX_BITS = 1024


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(base, int) and isinstance(exponent, int) and abs(exponent) * base.bit_length() > _MAX_BITS:
        raise OverflowError("the power is too large")
    result = base**exponent
    if isinstance(result, complex):
        raise ValueError(f"{base} ** {exponent} is not a real number")
    return result


def _round(number: Number, ndigits: int | None = None) -> Number:
    if ndigits is not None and abs(ndigits) > _MAX_BITS:
        raise OverflowError(f"cannot round to {ndigits} digits")
    return round(number, ndigits)


_BINARY: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
}
_UNARY: dict[type[ast.unaryop], Callable[[Number], Number]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "float": float,
    "int": int,
    "max": max,
    "min": min,
    "round": _round,
}


def expression_in(text: str) -> str | None:
    """What `eval(...)` encloses when it is the whole text (spaces aside), else None.

    >>> expression_in("eval(num_epochs - 1)"), expression_in("eval(n) + 1"), expression_in("plain")
    ('num_epochs - 1', None, None)
    """
    match = _WHOLE.fullmatch(text)
    if match is None:
        return None
    depth = 1
    for index, character in enumerate(match[1]):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0:
            return None if match[1][index + 1 :].strip() else " ".join(match[1][:index].split())
    return None


def as_number(value: Any) -> Number | None:
    """The number that a variable stands for in arithmetic, or None.

    Booleans count as 0 and 1. Text that reads as a number is one: YAML takes `5e-5`, without a dot, for text.
    """
    if isinstance(value, bool | int):
        return int(value)
    if isinstance(value, float):
        return value
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        return float(value) if re.search(r"[.eE]", value) else int(value)
    return None


def evaluate(expression: str, lookup: Lookup) -> Any:
    """The value of an expression; `lookup` gives the value of a variable or raises RecipeError.

    Numbers, names, parentheses, + - * / // ** %, unary + and -, abs float int max min round. A lone name gives its
    variable's value whatever it is; in arithmetic a variable must be a number. Raises RecipeError for anything else.
    """
    if len(expression) > _MAX_LENGTH:
        raise RecipeError(f"eval({expression[:40]}...): longer than {_MAX_LENGTH} characters")
    try:
        body = ast.parse(expression, mode="eval").body
        if isinstance(body, ast.Name):
            return lookup(body.id)
        result = _value(body, lookup)
        if isinstance(result, float) and not math.isfinite(result):
            raise OverflowError(f"the result is {result}")
        return result
    except SyntaxError as error:
        raise RecipeError(f"eval({expression}): not an expression: {error.msg}") from None
    except (ArithmeticError, TypeError, ValueError) as error:
        raise RecipeError(f"eval({expression}): {error}") from None
    except (MemoryError, RecursionError):
        raise RecipeError(f"eval({expression[:40]}...): nested too deeply") from None


def _value(node: ast.expr, lookup: Lookup) -> Number:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return number
        case ast.Name(id=name):
            value = lookup(name)
            meant = as_number(value)
            if meant is None:
                raise TypeError(f"{name} is {value!r}, not a number")
            return meant
        case ast.BinOp(left=left, op=binary, right=right) if type(binary) in _BINARY:
            return _BINARY[type(binary)](_value(left, lookup), _value(right, lookup))
        case ast.UnaryOp(op=unary, operand=operand) if type(unary) in _UNARY:
            return _UNARY[type(unary)](_value(operand, lookup))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
            if name not in _FUNCTIONS:
                raise TypeError(f"there is no function {name}{suggestion(name, _FUNCTIONS)}")
            if any(keyword.arg is None for keyword in keywords):
                raise TypeError("** is not allowed in a call")
            named = {str(keyword.arg): _value(keyword.value, lookup) for keyword in keywords}
            result: Number = _FUNCTIONS[name](*(_value(arg, lookup) for arg in args), **named)
            return result
    raise TypeError(
        f"'{ast.unparse(node)}' is not allowed; only numbers, variables, parentheses, + - * / // ** % and "
        f"{', '.join(_FUNCTIONS)} are"
    )
