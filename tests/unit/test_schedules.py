"""Schedules against closed formulas."""

from __future__ import annotations

import doctest
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_accel import schedules

rates = st.floats(0.0, 1.0)
progress = st.floats(0.0, 1.0)


def test_the_examples_in_the_docstrings_run() -> None:
    assert doctest.testmod(schedules).failed == 0


@settings(deadline=None)  # the machine may be busy
@given(progress, rates, rates)
def test_linear_and_cosine_stay_between_their_ends(p: float, initial: float, final: float) -> None:
    low, high = min(initial, final), max(initial, final)
    for function in (schedules.linear, schedules.cosine):
        assert low - 1e-12 <= function(p, initial, final) <= high + 1e-12


@settings(deadline=None)  # the machine may be busy
@given(rates, rates)
def test_linear_and_cosine_begin_and_end_where_they_say(initial: float, final: float) -> None:
    for function in (schedules.linear, schedules.cosine):
        assert function(0.0, initial, final) == pytest.approx(initial, abs=1e-15)
        assert function(1.0, initial, final) == pytest.approx(final, abs=1e-15)


@settings(deadline=None)  # the machine may be busy
@given(progress, rates, rates)
def test_cosine_is_the_half_cosine_that_falls_or_rises(p: float, initial: float, final: float) -> None:
    low, span = min(initial, final), abs(initial - final)
    phase = 0.0 if final < initial else math.pi
    assert schedules.cosine(p, initial, final) == pytest.approx(low + span / 2 * (1 + math.cos(math.pi * p + phase)))


def test_cyclic_linear_begins_anew_in_every_cycle() -> None:
    values = [schedules.cyclic_linear(step, 8, 4, 1.0, 0.0) for step in range(8)]
    assert values == pytest.approx([1, 2 / 3, 1 / 3, 0] * 2)


def test_the_last_incomplete_cycle_uses_its_own_length() -> None:
    values = [schedules.cyclic_linear(step, 10, 4, 1.0, 0.0) for step in range(10)]
    assert values == pytest.approx([1, 2 / 3, 1 / 3, 0, 1, 2 / 3, 1 / 3, 0, 1, 0])


@settings(deadline=None)  # the machine may be busy
@given(st.integers(1, 60), st.integers(2, 20), st.data())
def test_cyclic_linear_is_sparsemls_formula_for_whole_steps(total: int, cycle: int, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, total - 1))
    length = total % cycle if step > total // cycle * cycle else cycle
    expected = 0.5 if length == 1 else 0.5 - (step % length) / (length - 1) * (0.5 - 0.1)
    assert schedules.cyclic_linear(step, total, cycle, 0.5, 0.1) == pytest.approx(expected)


@settings(deadline=None)  # the machine may be busy
@given(st.floats(0.0, 50.0), st.floats(0.01, 50.0), st.floats(0.01, 20.0))
def test_cyclic_linear_never_leaves_its_range(step: float, total: float, cycle: float) -> None:
    assert -1e-12 <= schedules.cyclic_linear(min(step, total), total, cycle, 1.0, 0.0) <= 1.0
