"""Every row of the rule table: each rank, from what the row asks for, computes what it says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from ringcompile.ir.calls import Call
from ringcompile.ir.rules import RULES, FactorRule, Factors, Rule, all_whole
from ringcompile.ir.rules.contraction import matmul
from ringcompile.ir.rules.indexing import gather
from ringcompile.ir.rules.table import pointwise, reduction, stack
from ringcompile.ir.rules.windows import WindowRule
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

# What they make lies on several ranks' tokens: tests/passes/test_windows.py runs them.
OF_WINDOWS = {name for name, rule in RULES.items() if isinstance(rule, WindowRule)}
NAMES = sorted({*RULES} - OF_WINDOWS)
# Half of the table are rows that say the same of another op. What is wrong about such a row is
# that the op is of another kind, which shows at once; the kind itself is tried thoroughly once.
FIRST = [name for name in NAMES if name == next(n for n in NAMES if RULES[n] == RULES[name])]
OTHERS = sorted({*NAMES} - {*FIRST})


def profile(examples: int, *more: Phase) -> settings:
    return settings(
        max_examples=examples, deadline=None, derandomize=True, database=None,
        phases=[Phase.generate, *more], report_multiple_bugs=False,
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
    assert set(CASES) == set(NAMES)


@pytest.mark.parametrize("name", FIRST)
@profile(12, Phase.shrink)
@given(st.data())
def test_each_rank_computes_its_piece(name: str, data: st.DataObject) -> None:
    hold(name, RULES[name], data)


@pytest.mark.parametrize("name", OTHERS)
@profile(3, Phase.shrink)
@given(st.data())
def test_each_rank_computes_its_piece_of_another_op(name: str, data: st.DataObject) -> None:
    hold(name, RULES[name], data)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@profile(200, Phase.shrink)
@given(st.data())
def test_each_rank_computes_its_piece_of_many_examples(name: str, data: st.DataObject) -> None:
    hold(name, RULES[name], data)


# -- the property fails where a row is wrong -------------------------------------------------------

def every_dim(call: Call) -> Factors:
    """All dims pass, as if the op worked element by element on operands of one shape."""
    names = tuple(range(len(call.node.meta["type"].shape)))
    return Factors((names,) * len(call.operands), names)


def swapped(call: Call) -> Factors:
    """The product with rows and columns of its result the wrong way round."""
    right = matmul(call)
    return Factors(right.operands, (*right.output[:-2], *right.output[:-3:-1]))


def tied(call: Call) -> Factors:
    """Operands aligned at the right, dims of size 1 tied like others."""
    out = pointwise(call).output
    sizes = (len(names) for names in pointwise(call).operands)
    return Factors(tuple(out[len(out) - size :] for size in sizes), out)


def off_by_one(call: Call) -> Factors:
    """Stack with the new dim at the end, wherever it is."""
    operands = stack(call).operands
    return Factors(operands, (*operands[0], None))


def picked_anywhere(call: Call) -> Factors:
    """Gather of which the other dims pass whether or not the sizes agree."""
    names = gather(call).operands[1]
    numbered = tuple(i if name is None else name for i, name in enumerate(names))
    return Factors((tuple(None if n == "picked" else n for n in numbered), numbered), numbered)


def left_over(call: Call) -> Factors:
    """A reduction of which the kept dims are numbered anew."""
    right = reduction(call)
    return Factors(right.operands, tuple(range(len(right.output))))


FAULTS: dict[str, tuple[str, Callable[[Call], Factors]]] = {
    "cat passes its dim": ("aten.cat.default", every_dim),
    "softmax passes its dim": ("aten.softmax.int", every_dim),
    "scatter passes its dim": ("aten.scatter.src", every_dim),
    "roll passes its dims": ("aten.roll.default", every_dim),
    "layer norm passes what it normalises": ("aten.layer_norm.default", tied),
    "matmul swaps its outer dims": ("aten.matmul.default", swapped),
    "add ties dims of size 1": ("aten.add.Tensor", tied),
    "where passes nothing": ("aten.where.self", all_whole),
    "stack puts its dim last": ("aten.stack.default", off_by_one),
    "gather ties dims of unequal sizes": ("aten.gather.default", picked_anywhere),
    "sum numbers its dims anew": ("aten.sum.dim_IntList", left_over),
    "batch norm is always one of running statistics": ("aten.batch_norm.default", tied),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_row_is_caught(fault: str) -> None:
    name, factors = FAULTS[fault]
    rule = RULES[name]
    assert isinstance(rule, FactorRule)

    @profile(40)
    @given(st.data())
    def held(data: st.DataObject) -> None:
        hold(name, replace(rule, factors=factors), data)

    with pytest.raises(AssertionError):
        held()


def test_a_shape_that_is_not_written_anew_is_caught() -> None:
    rule = RULES["aten.expand.default"]
    assert isinstance(rule, FactorRule)

    @profile(40)
    @given(st.data())
    def held(data: st.DataObject) -> None:
        hold("aten.expand.default", replace(rule, shape_argument=None), data)

    with pytest.raises(AssertionError):
        held()
