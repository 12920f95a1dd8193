"""Every row of the rule table: each rank, from what the row asks for, computes what it says."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from ringcompile.ir.rules import RULES, Rule
from tests.ir.cases import CASES
from tests.ir.draws import Draws
from tests.ir.rule_check import (
    Example,
    check_backward,
    check_forward,
    check_kept,
    example,
    free_splits,
)

NAMES = sorted(RULES)


def profile(examples: int) -> settings:
    return settings(
        max_examples=examples, deadline=None, derandomize=True, database=None,
        phases=[Phase.generate, Phase.shrink], report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )


def hold(name: str, rule: Rule, data: st.DataObject) -> None:
    """Draw a call and layouts for it, and hold the row against them both ways."""
    draws = Draws(data.draw)
    made = example(name, CASES[name], draws)
    note(str(made))
    free = list(free_splits(made))
    for layouts in free:
        check_kept(made, rule, layouts)
    if free:
        check_forward(made, rule, draws.pick(free))
    check_forward(made, rule, [draws.layout(shape) for shape in made.shapes])
    check_backward(made, rule, draws.layout(_result_shape(made)))


def _result_shape(made: Example) -> tuple[int, ...]:
    return tuple(made.results[0].shape)


def test_every_row_has_a_case() -> None:
    assert set(CASES) == set(RULES)


@pytest.mark.parametrize("name", NAMES)
@profile(20)
@given(st.data())
def test_each_rank_computes_its_piece(name: str, data: st.DataObject) -> None:
    hold(name, RULES[name], data)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@profile(200)
@given(st.data())
def test_each_rank_computes_its_piece_of_many_examples(name: str, data: st.DataObject) -> None:
    hold(name, RULES[name], data)
