"""The mask analysis of comparisons, of `and`, `or`, `not`, and of what is chosen by a condition."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from ringcompile.ir.calls import Call
from ringcompile.ir.expr import Size, equal, is_symbolic
from ringcompile.ir.nodes import type_of
from ringcompile.passes.masks.kinds import same_by_row_and_column
from ringcompile.passes.masks.steps import WIDE, Known, Step
from ringcompile.passes.masks.values import (
    Affine,
    Choice,
    Condition,
    Floored,
    Test,
    Value,
    hull,
    implied,
    sees_itself,
)

aten = torch.ops.aten


def compare(name: str) -> Step:
    """The step of one of the six comparisons."""

    def step(known: Known, call: Call) -> Value:
        a, b = known.of(call["self"]), known.of(call["other"])
        if isinstance(a, Condition):
            a = Choice(a, 1.0, 0.0)
        if isinstance(a, Choice) and isinstance(call["other"], int | float):
            return _chosen(a, COMPARE[name], call["other"])
        found = _equal(a, b, call) if name == "eq" else _within(known, name, b, call)
        if found is not None:
            return found
        if not isinstance(a, Affine) or not isinstance(b, Affine):
            return None
        if name in ("eq", "ne"):
            apart = a + b.scaled(-1)
            if apart.coefficients or is_symbolic(apart.constant):
                return None
            return Condition(never=(apart.constant == 0) != (name == "eq"))
        low, high = (a, b) if name in ("le", "lt") else (b, a)
        slack = -1 if name in ("lt", "gt") else 0
        return _decided(high + low.scaled(-1) + Affine((), slack), call.node)

    return step


def _within(known: Known, name: str, limit: Value, call: Call) -> Condition | None:
    """abs(x) < limit, or <=, as two tests."""
    distance = call["self"]
    if name not in ("lt", "le") or not isinstance(limit, Affine) or limit.coefficients:
        return None
    if not isinstance(distance, fx.Node) or distance.target is not aten.abs.default:
        return None
    value = known.of(distance.args[0])
    if not isinstance(value, Affine) or not value.coefficients:
        return None
    most = limit + Affine((), 0 if name == "le" else -1)
    return Condition(tuple(Test(most + value.scaled(sign), call.node) for sign in (1, -1)))


def _equal(a: Value, b: Value, call: Call) -> Condition | None:
    """Equal chunks, which are less than a chunk apart, or equal documents."""
    node = call.node
    if isinstance(a, Floored) and isinstance(b, Floored):
        if (a.shift, a.divisor) != (b.shift, b.divisor):
            return None
        apart, most = a.value + b.value.scaled(-1), Affine((), a.divisor - 1)
        bounds = [Test(most + apart.scaled(sign), None, implied=True) for sign in (1, -1)]
        exact = Test(
            None, node, reflexive=_is_apart(apart), kind=f"chunks of {a.divisor}"
        )
        return Condition((*bounds, exact))
    if isinstance(a, Affine) and isinstance(b, Affine):
        apart = a + b.scaled(-1)
        if not apart.coefficients:
            return None
        return Condition((Test(apart, node), Test(apart.scaled(-1), node)))
    pair = isinstance(call["other"], fx.Node) and not type_of(call["self"]).dtype.is_floating_point
    if pair and same_by_row_and_column(*call.operands):
        return Condition((Test(None, node, reflexive=True, kind="documents"),))
    return None


def _is_apart(value: Affine) -> bool:
    """Whether it is a multiple of query - key."""
    match dict(value.coefficients):
        case {-2: query, -1: key, **rest} if not rest:
            return equal(query, -key) and equal(value.constant, 0)
    return False


def _decided(value: Affine, node: fx.Node) -> Condition:
    if isinstance(value.constant, int):
        if not value.coefficients:
            return Condition(never=value.constant < 0)
        if value.is_never_negative:
            return Condition()
    return Condition((Test(value, node),))


COMPARE: dict[str, Callable[[float, float], bool]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


def _chosen(value: Choice, compare: Callable[[float, float], bool], other: float) -> Value:
    true, false = compare(value.true, other), compare(value.false, other)
    if true == false:
        return Condition(never=not true)
    return value.condition if true else value.condition.negated()


def both(known: Known, call: Call) -> Value:
    """`and` of two bools: all tests of either."""
    operands = [call["self"], call["other"]]
    if any(isinstance(x, fx.Node) and type_of(x).dtype != torch.bool for x in operands):
        return None
    conditions = [
        known.condition(x) if isinstance(x, fx.Node) else known.of(x) for x in operands
    ]
    a, b = conditions
    if not isinstance(a, Condition) or not isinstance(b, Condition):
        return None
    return _met(a, b)


def _met(a: Condition, b: Condition) -> Condition:
    """Where both conditions hold."""
    never = a.never or b.never
    return Condition(() if never else a.tests + b.tests, never)


def either(known: Known, call: Call) -> Value:
    """`or` of two bools: one opaque test, and the band around both."""
    a, b = known.of(call["self"]), known.of(call["other"])
    for one, other in ((a, b), (b, a)):
        if isinstance(one, Condition) and one.constant is not None:
            if one.constant:
                return Condition()
            return other if isinstance(other, Condition) else None
    if type_of(call.node).dtype != torch.bool or len(call.operands) != 2:
        return None
    sides = [known.condition(x) for x in call.operands]
    kind = "prefix" if _is_prefix(call.operands, sides) else None
    whole = Test(None, call.node, reflexive=any(map(sees_itself, sides)), kind=kind)
    return Condition((*implied(hull(sides)), whole))


def _is_prefix(nodes: list[fx.Node], sides: list[Condition]) -> bool:
    """What is before, and some keys for all queries."""
    for node, other in (nodes, sides[1]), (nodes[::-1], sides[0]):
        shape = type_of(node[0]).shape
        if other.tests and hull([other]).lower == 0 and (len(shape) < 2 or shape[-2] == 1):
            return True
    return False


def negation(known: Known, call: Call) -> Value:
    """`not`, where the opposite is one test again."""
    value = known.of(call["self"])
    return value.negated() if isinstance(value, Condition) else None


def triangle(lower: bool) -> Step:
    """The step of tril, or of triu: a band of a tensor that is the same everywhere."""

    def step(known: Known, call: Call) -> Value:
        value, diagonal = known.of(call["self"]), call["diagonal"]
        # tril keeps column - row <= diagonal, triu column - row >= diagonal.
        shape = type_of(call.node).shape
        signs: dict[int, Size] = {-2: 1, -1: -1}
        inside = Affine.of({d: c for d, c in signs.items() if shape[d] != 1}, diagonal)
        kept = Condition((Test(inside if lower else inside.scaled(-1), None),))
        if isinstance(value, Condition):
            return _met(value, kept)
        if isinstance(value, Choice) and (value.condition.constant or value.false == 0.0):
            return Choice(_met(value.condition, kept), value.true, 0.0)
        if isinstance(value, Affine) and not value.coefficients and value.constant in (0, 1):
            return Choice(kept, float(value.constant), 0.0)
        return None

    return step


def where(known: Known, call: Call) -> Value:
    """One of two numbers by a condition."""
    condition = known.condition(call["condition"])
    numbers = [known.number(call[name]) for name in ("self", "other")]
    if None in numbers:
        return None
    return Choice(condition, *numbers)  # type: ignore[arg-type]


def masked_fill(known: Known, call: Call) -> Value:
    """A number in place of another where a mask is true."""
    kept, filled = known.number(call["self"]), known.number(call["value"])
    if kept is None or filled is None:
        return None
    return Choice(known.condition(call["mask"]), filled, kept)


def cast(known: Known, call: Call) -> Value:
    """Another dtype; opaque where numbers could wrap around in it."""
    value, dtype = known.of(call["self"]), type_of(call.node).dtype
    if dtype == torch.bool:
        if isinstance(value, Choice):
            return _chosen(value, COMPARE["ne"], 0.0)
        return value if isinstance(value, Condition) else None
    if dtype not in WIDE and not dtype.is_floating_point:
        return None  # arithmetic in it may wrap around
    if isinstance(value, Affine):
        return value if dtype in WIDE else None
    if isinstance(value, Condition):
        return Choice(value, 1.0, 0.0)
    return value if isinstance(value, Choice) and dtype.is_floating_point else None
