"""Ranks send the bytes that the formulas say, in graphs and in runs; the page says the same."""

from __future__ import annotations

import dataclasses

import pytest
import sympy

from tests.communication.count import LENGTH, compiled, counted, expected, numbers, ran
from tests.communication.page import PAGE, page
from tests.communication.rows import ROWS, Row

# To compile it takes as long as all others; each of its axes is in another row.
LONG = ("time x ep, exact capacity",)
rows = pytest.mark.parametrize("row", [
    pytest.param(row, id=row.name, marks=pytest.mark.slow if row.name in LONG else ())
    for row in ROWS
])


@rows
def test_graphs_send_what_the_formula_says(row: Row) -> None:
    for rank in range(compiled(row).world_size):
        difference = sympy.expand(counted(row, rank) - expected(row, rank))
        difference = difference and sympy.simplify(difference)  # which is slow
        assert difference == 0, (rank, counted(row, rank), expected(row, rank))


@pytest.mark.parametrize("row", [
    pytest.param(row, id=row.name, marks=pytest.mark.slow if place % 2 or row.name in LONG else ())
    for place, row in enumerate(ROWS)
])
def test_runs_send_what_the_formula_says(row: Row) -> None:
    """At a length that divides over nothing; every third row also at one that divides."""
    lengths = (45, LENGTH) if ROWS.index(row) % 3 == 0 else (45,)
    for length in (LENGTH,) if "length" in row.options else lengths:
        assert ran(row, length) == numbers(row, length)


def test_the_page_is_up_to_date() -> None:
    """`python -m tests.communication --write` writes it."""
    assert PAGE.read_text(encoding="utf-8") == page()


def test_a_wrong_formula_is_noticed() -> None:
    row = ROWS[0]
    wrong = dataclasses.replace(row, terms=(("K*r", "r < R - 1"), ("0", "")))
    assert numbers(wrong, LENGTH) != ran(row, LENGTH)
