"""`eval(...)`: what it may say, that it says the same as Python, and that it can do nothing else."""

from __future__ import annotations

import doctest
import re
import time
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sparse_accel.errors import RecipeError
from sparse_accel.recipe import arguments, expressions
from sparse_accel.recipe.arguments import parse_arguments
from sparse_accel.recipe.expressions import as_number, evaluate, expression_in

VARIABLES: dict[str, Any] = {"n": 13, "rate": "5e-5", "flag": True, "keys": ["a", "b"], "half": 0.5, "word": "abc"}


def calculated(expression: str) -> Any:
    return evaluate(expression, VARIABLES.__getitem__)


def test_the_examples_in_the_docstrings_run() -> None:
    assert doctest.testmod(expressions).failed == 0
    assert doctest.testmod(arguments).failed == 0


@pytest.mark.parametrize(
    ("text", "inner"),
    [
        ("eval(n)", "n"),
        ("  eval( n - 1 ) ", "n - 1"),
        ("eval (n)", "n"),
        ("eval(max(n, (2)))", "max(n, (2))"),
        ("eval(n +\n 1)", "n + 1"),
        ("eval(n) + 1", None),
        ("1 + eval(n)", None),
        ("eval(n) + eval(n)", None),
        ("eval(n", None),
        ("evaluate(n)", None),
    ],
)
def test_only_a_whole_scalar_is_an_expression(text: str, inner: str | None) -> None:
    assert expression_in(text) == inner


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("n", 13),
        ("n - 1", 12),
        ("-n", -13),
        ("+n", 13),
        ("-2 ** 2", -4),
        ("n // 2 + n % 5", 9),
        ("n / 2", 6.5),
        ("2 ** 10", 1024),
        ("rate * 2", 1e-4),
        ("flag + 1", 2),
        ("keys", ["a", "b"]),
        ("word", "abc"),
        ("rate", "5e-5"),
        ("flag", True),
        ("round(2.5)", 2),
        ("round(2.345, ndigits=2)", round(2.345, 2)),
        ("int(6.9) + abs(-2) + max(1, n, 2) + min(1, 2) + float(1)", 6 + 2 + 13 + 1 + 1.0),
        ("(n - 3) * (half + half)", 10.0),
    ],
)
def test_arithmetic_of_recipes(expression: str, value: Any) -> None:
    result = calculated(expression)
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("", "not an expression"),
        ("n +", "not an expression"),
        ("n / 0", "division by zero"),
        ("n % 0", "by zero"),
        ("0 ** -1", ""),
        ("(-8) ** 0.5", "not a real number"),
        ("9 ** 9 ** 9", "too large"),
        ("10.0 ** 400", ""),
        ("1e308 * 10", "inf"),
        ("round(5, -999999999)", "cannot round"),
        ("keys + 1", "keys is .* not a number"),
        ("word * 2", "not a number"),
        ("pow(2, 3)", "no function pow"),
        ("mx(1, 2)", "did you mean 'max'"),
        ("max(3)", ""),
        ("max(*keys)", "not allowed"),
        ("max(**keys)", "not allowed"),
        ("n > 1", "not allowed"),
        ("1 if n else 2", "not allowed"),
        ("'a'", "not allowed"),
        ("True", "not allowed"),
        ("[1]", "not allowed"),
        ("n.real", "not allowed"),
        ("eval(n)", "no function eval"),
        ("1j", "not allowed"),
        ("(lambda: 1)()", "not allowed"),
        ("__import__('os').system('true')", "not allowed"),
        ("n << 900", "not allowed"),
        ("-" * 900 + "1", ""),
        ("(" * 300 + "1" + ")" * 300, ""),
        ("1 + " * 400 + "1", "longer than"),
        ("n\0", ""),
    ],
)
def test_anything_else_is_a_recipe_error_at_once(expression: str, said: str) -> None:
    started = time.monotonic()
    try:
        result = calculated(expression)
    except RecipeError as error:
        assert re.search(said, str(error))
    else:  # deep but valid nesting may be fine, as long as it is right
        assert not said and abs(result) == 1
    assert time.monotonic() - started < 1.0


_numbers = st.integers(-50, 50).map(str) | st.floats(-50, 50, allow_nan=False).map(lambda x: f"{x:.3f}")
_expressions = st.recursive(
    _numbers,
    lambda inner: (
        st.builds("({} {} {})".format, inner, st.sampled_from(["+", "-", "*", "/", "//", "%"]), inner)
        | st.builds("min({}, {})".format, inner, inner)
        | st.builds("-{}".format, inner)
    ),
    max_leaves=8,
)


@settings(deadline=None)  # the machine may be busy
@given(_expressions)
def test_arithmetic_agrees_with_python(expression: str) -> None:
    try:
        expected = eval(expression)
    except ZeroDivisionError:
        with pytest.raises(RecipeError):
            calculated(expression)
        return
    assume(abs(expected) < 1e300)
    assert calculated(expression) == expected


@settings(deadline=None)  # the machine may be busy
@given(st.text(max_size=40))
def test_no_text_gets_out_of_the_evaluator_except_as_a_recipe_error(text: str) -> None:
    try:
        evaluate(text, lambda name: 1)
    except RecipeError:
        pass


def test_numbers_may_be_written_as_text_but_words_are_not_numbers() -> None:
    assert as_number("5e-5") == 5e-5
    assert as_number(" 8 ") == 8
    assert isinstance(as_number("8"), int)
    assert [as_number(text) for text in ("nan", "inf", "True", "", "0x10", "1e", None, [1])] == [None] * 8


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        (
            '{"num_epochs":8,"qat_start_epoch":4.0,"keys":["a"]}',
            {"num_epochs": 8, "qat_start_epoch": 4.0, "keys": ["a"]},
        ),
        ("num_epochs=8,init_lr=5e-5", {"num_epochs": 8, "init_lr": 5e-5}),
        (" num_epochs : 8 , a = b c ", {"num_epochs": 8, "a": "b c"}),
        ("a=True,b=-1,c=nan,d=", {"a": "True", "b": -1, "c": "nan", "d": ""}),
        ('{"a": true, "b": null}', {"a": True, "b": None}),
        ("  ", {}),
        (None, {}),
        ({"a": 1}, {"a": 1}),
    ],
)
def test_recipe_args_are_json_or_pairs(text: Any, parsed: dict[str, Any]) -> None:
    assert parse_arguments(text) == parsed
    assert {name: type(value) for name, value in parse_arguments(text).items()} == {
        name: type(value) for name, value in parsed.items()
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1, 2]", "JSON object"),
        ("3", "JSON object"),
        ('"a"', "JSON object"),
        ("{'a': 1}", "not valid JSON, column 2"),
        ('{"a": 1', "not valid JSON"),
        ('{"a": 1, "a": 2}', "'a' is given twice"),
        ('{"a": NaN}', "NaN"),
        ("a=1,a=2", "'a' is given twice"),
        ("a", "'a' is not of the form name=value"),
        ("a=1,", "'' is not of the form"),
        ("=1", "not of the form"),
        ("a=b=c", "not of the form"),
    ],
)
def test_malformed_recipe_args_say_what_is_wrong(text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=r"^recipe_args: ") as caught:
        parse_arguments(text)
    assert said in str(caught.value)
