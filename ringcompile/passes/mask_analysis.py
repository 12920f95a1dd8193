"""Reads the ops that compute a mask: an abstract value for each node.

The analysis proves, it does not sample: a node is either understood from the ops that compute it,
or opaque.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from ringcompile.ir.calls import Call
from ringcompile.ir.expr import Size, equal, is_symbolic
from ringcompile.ir.nodes import type_of
from ringcompile.ir.program import Program
from ringcompile.passes.mask_constants import buffer_value
from ringcompile.passes.mask_kinds import expression, same_by_row_and_column
from ringcompile.passes.mask_values import (
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


@dataclass
class Analysis:
    """Abstract values of nodes, computed on demand.

    Attributes:
        program: whose buffers may be read; without it they are opaque.
        values: what is known already.
    """

    program: Program | None = None
    values: dict[fx.Node, Value] = field(default_factory=dict)

    def of(self, node: Any) -> Value:
        """The value of a node, or of a number standing in its place."""
        if not isinstance(node, fx.Node):
            return _number(node)
        if node not in self.values:
            self.values[node] = None
            self.values[node] = self._compute(node)
        return self.values[node]

    def condition(self, node: fx.Node) -> Condition:
        """A bool node as a condition; one opaque test where it is not understood."""
        value = self.of(node)
        return value if isinstance(value, Condition) else Condition((Test(None, node),))

    def number(self, value: Any) -> float | None:
        """The number a scalar, or a tensor that is the same everywhere, holds."""
        if isinstance(value, int | float):
            return float(value)
        known = self.of(value)
        if isinstance(known, Choice) and known.condition.constant is not None:
            return known.true if known.condition.constant else known.false
        return None

    def is_apart(self, node: fx.Node) -> bool:
        """Whether only the difference of two positions decides what a node holds."""
        value = self.of(node)
        if isinstance(value, Condition):
            return bool(value.tests) and all(
                test.value is not None and _is_difference(test.value) for test in value.tests
            )
        return isinstance(value, Affine) and _is_difference(value)

    def _compute(self, node: fx.Node) -> Value:
        if node.op == "placeholder" and self.program is not None:
            return buffer_value(self.program, node.name)
        if node.op != "call_function":
            return None
        name = str(node.target).removeprefix("aten.")
        step = _STEPS.get(name) or _STEPS.get(name.split(".")[0])
        return step(self, Call(node)) if step else None


def _is_difference(value: Affine) -> bool:
    return len(value.coefficients) == 2 and equal(sum(c for _, c in value.coefficients), 0)


def _number(value: Any) -> Value:
    if isinstance(value, bool):
        return Condition(never=not value)
    if isinstance(value, int) or (is_symbolic(value) and value.is_integer):
        return Affine((), value)
    return None


# Integers in which no position or difference of positions wraps around.
_WIDE = (torch.int64, torch.int32)


def _full(analysis: Analysis, call: Call) -> Value:
    fill, dtype = call["fill_value"], type_of(call.node).dtype
    if dtype == torch.bool:
        return Condition(never=not fill)
    if dtype.is_floating_point:
        return Choice(Condition(), float(fill), float(fill)) if not is_symbolic(fill) else None
    if dtype not in _WIDE:
        return None
    return _number(int(fill)) if not is_symbolic(fill) else _number(fill)


def _arange(analysis: Analysis, call: Call) -> Value:
    type_ = type_of(call.node)
    if type_.dtype not in _WIDE:
        return None
    # Along a dim of size 1 nothing changes, and nothing may when the dim is expanded.
    return Affine.of({-1: call["step"]} if type_.shape[0] != 1 else {}, call["start"])


_APART = Affine.of({-2: 1, -1: -1}, 0)


def _map_tests(value: Value, change: Callable[[Affine], Affine], node: fx.Node) -> Value:
    """A value behind an op that only moves elements.

    Of a condition that is not understood in full, `node` itself says the rest.
    """
    if isinstance(value, Affine):
        return change(value)
    if isinstance(value, Floored):  # an unknown number for each entry does not say where it goes
        return replace(value, value=change(value.value)) if value.shift is None else None
    if isinstance(value, Choice):
        inner = _map_tests(value.condition, change, node)
        known = isinstance(inner, Condition) and all(t.node is not node for t in inner.tests)
        return Choice(inner, value.true, value.false) if known else None  # type: ignore[arg-type]
    if isinstance(value, Condition):
        moved = [replace(t, value=change(t.value), node=None) for t in value.tests if t.value]
        opaque = [test for test in value.tests if test.value is None]
        if opaque:
            kind = opaque[0].kind if len(opaque) == 1 else None
            itself = all(test.reflexive for test in opaque) and change(_APART) == _APART
            moved.append(Test(None, node, reflexive=itself, kind=kind))
        return Condition(tuple(moved), value.never)
    return None


def _reshape(analysis: Analysis, call: Call) -> Value:
    """Size-1 dims may come or go, and dims that the value does not depend on."""
    source, target = type_of(call["self"]).shape, type_of(call.node).shape
    value = analysis.of(call["self"])
    kept = [[(i - len(shape), size) for i, size in enumerate(shape) if size != 1]
            for shape in (source, target)]
    if len(kept[0]) == len(kept[1]) and all(
        equal(a[1], b[1]) for a, b in zip(*kept, strict=True)
    ):
        dims = {a[0]: b[0] for a, b in zip(*kept, strict=True)}
        return _map_tests(value, lambda v: v.moved(dims), call.node)
    same = {}
    for dim in range(-1, -1 - min(len(source), len(target)), -1):
        if not equal(source[dim], target[dim]):
            break
        same[dim] = dim
    if not _dims_of(value) <= same.keys():
        return None
    return _map_tests(value, lambda v: v.moved(same), call.node)


def _dims_of(value: Value) -> set[int]:
    """The dims that the understood part of a value depends on."""
    match value:
        case Affine():
            return {dim for dim, _ in value.coefficients}
        case Floored():
            return _dims_of(value.value)
        case Choice():
            return _dims_of(value.condition)
        case Condition():
            return set().union(*(_dims_of(test.value) for test in value.tests))
    return set()


def _permute(analysis: Analysis, call: Call) -> Value:
    rank = len(call["dims"])
    dims = {dim % rank - rank: i - rank for i, dim in enumerate(call["dims"])}
    return _map_tests(analysis.of(call["self"]), lambda v: v.moved(dims), call.node)


def _expand(analysis: Analysis, call: Call) -> Value:
    value = analysis.of(call["self"])
    if value is None and type_of(call.node).dtype == torch.bool:
        return analysis.condition(call["self"])  # broadcasts the same from before the expand
    return value


def _slice(analysis: Analysis, call: Call) -> Value:
    dim = call["dim"] % len(type_of(call.node).shape) - len(type_of(call.node).shape)
    single = type_of(call.node).shape[dim] == 1

    def cut(value: Affine) -> Affine:
        coefficients = dict(value.coefficients)
        c = coefficients.pop(dim, 0)
        if not single:
            coefficients[dim] = c * call["step"]
        return Affine.of(coefficients, value.constant + c * call["start"])

    return _map_tests(analysis.of(call["self"]), cut, call.node)


def _index(analysis: Analysis, call: Call) -> Value:
    """x[i, j, ...] of an affine x with every dim indexed by an affine index."""
    source, entries = analysis.of(call["self"]), list(call["indices"])
    rank = len(type_of(call["self"]).shape)
    indices = [analysis.of(entry) if entry is not None else None for entry in entries]
    if not isinstance(source, Affine) or len(entries) != rank:
        return None
    total = Affine((), source.constant)
    for dim, c in source.coefficients:
        picked = indices[dim]
        if not isinstance(picked, Affine) or not picked.is_never_negative:
            return None  # a negative index counts from the end
        total += picked.scaled(c)
    return total


def _cumsum(analysis: Analysis, call: Call) -> Value:
    value = analysis.of(call["self"])
    if isinstance(value, Condition) and value.never:
        return Affine()
    return None


def _diff(analysis: Analysis, call: Call) -> Value:
    """Differences of an affine tensor whose first is against its own continuation to the left."""
    value, before = analysis.of(call["self"]), analysis.of(call["prepend"])
    if not isinstance(value, Affine) or not isinstance(before, Affine):
        return None
    rank = len(type_of(call.node).shape)
    step = dict(value.coefficients).get(call["dim"] % rank - rank, 0)
    first = Affine.of(
        {d: c for d, c in value.coefficients if d != call["dim"] % rank - rank}, value.constant
    )
    if call["n"] != 1 or call["append"] is not None:
        return None
    if first + before.scaled(-1) != Affine((), step):
        return None
    return Affine((), step)


def _add(sign: int) -> Callable[[Analysis, Call], Value]:
    def step(analysis: Analysis, call: Call) -> Value:
        a, b = analysis.of(call["self"]), analysis.of(call["other"])
        alpha = call.get("alpha", 1)
        if isinstance(a, Affine) and isinstance(b, Affine):
            return a + b.scaled(sign * alpha) if isinstance(alpha, int) else None
        if isinstance(a, Affine) and alpha == 1 and _is_by_batch(call["other"]):
            return Floored(a, (sign, expression(call["other"])))
        return _on_choice(a, call["other"], lambda x, y: x + sign * alpha * y)

    return step


def _is_by_batch(node: Any) -> bool:
    """An integer tensor that is the same for all queries and keys."""
    if not isinstance(node, fx.Node) or type_of(node).dtype not in _WIDE:
        return False
    return len(type_of(node).shape) < 1 or all(n == 1 for n in type_of(node).shape[-2:])


def _divide(analysis: Analysis, call: Call) -> Value:
    """Whole division by a number, rounded down; or to zero where that is the same."""
    value, divisor = analysis.of(call["self"]), call["other"]
    is_division = call.node.target is aten.div.Tensor_mode
    mode = call["rounding_mode"] if is_division else "floor"
    if isinstance(value, Affine):
        value = Floored(value)
    if not isinstance(value, Floored) or value.divisor != 1:
        return None
    if not isinstance(divisor, int) or isinstance(divisor, bool) or divisor < 1:
        return None
    positive = value.shift is None and value.value.is_never_negative
    if mode != "floor" and not (mode == "trunc" and positive):
        return None
    return replace(value, divisor=divisor)


def _rsub(analysis: Analysis, call: Call) -> Value:
    alpha = call["alpha"]
    return _on_choice(analysis.of(call["self"]), call["other"], lambda x, y: y - alpha * x)


def _mul(analysis: Analysis, call: Call) -> Value:
    a, b = analysis.of(call["self"]), analysis.of(call["other"])
    if isinstance(a, Affine) and isinstance(b, Affine) and not b.coefficients:
        return a.scaled(b.constant)
    if isinstance(a, Condition) and isinstance(b, Condition):
        return _and(analysis, call)
    return _on_choice(a, call["other"], lambda x, y: x * y if x else 0.0)


def _on_choice(value: Value, other: Any, change: Callable[[float, float], float]) -> Value:
    if isinstance(value, Choice) and isinstance(other, int | float):
        return Choice(value.condition, change(value.true, other), change(value.false, other))
    return None


def _compare(name: str) -> Callable[[Analysis, Call], Value]:
    def step(analysis: Analysis, call: Call) -> Value:
        a, b = analysis.of(call["self"]), analysis.of(call["other"])
        if isinstance(a, Condition):
            a = Choice(a, 1.0, 0.0)
        if isinstance(a, Choice) and isinstance(call["other"], int | float):
            return _chosen(a, _COMPARE[name], call["other"])
        found = _equal(a, b, call) if name == "eq" else _within(analysis, name, b, call)
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


def _within(analysis: Analysis, name: str, limit: Value, call: Call) -> Condition | None:
    """abs(x) < limit, or <=, as two tests."""
    distance = call["self"]
    if name not in ("lt", "le") or not isinstance(limit, Affine) or limit.coefficients:
        return None
    if not isinstance(distance, fx.Node) or distance.target is not aten.abs.default:
        return None
    value = analysis.of(distance.args[0])
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


_COMPARE: dict[str, Callable[[float, float], bool]] = {
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


def _and(analysis: Analysis, call: Call) -> Value:
    operands = [call["self"], call["other"]]
    if any(isinstance(x, fx.Node) and type_of(x).dtype != torch.bool for x in operands):
        return None
    conditions = [
        analysis.condition(x) if isinstance(x, fx.Node) else analysis.of(x) for x in operands
    ]
    a, b = conditions
    if not isinstance(a, Condition) or not isinstance(b, Condition):
        return None
    return Condition(() if a.never or b.never else a.tests + b.tests, a.never or b.never)


def _or(analysis: Analysis, call: Call) -> Value:
    a, b = analysis.of(call["self"]), analysis.of(call["other"])
    for one, other in ((a, b), (b, a)):
        if isinstance(one, Condition) and one.constant is not None:
            if one.constant:
                return Condition()
            return other if isinstance(other, Condition) else None
    if type_of(call.node).dtype != torch.bool or len(call.operands) != 2:
        return None
    sides = [analysis.condition(x) for x in call.operands]
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


def _not(analysis: Analysis, call: Call) -> Value:
    value = analysis.of(call["self"])
    return value.negated() if isinstance(value, Condition) else None


def _triangle(lower: bool) -> Callable[[Analysis, Call], Value]:
    def step(analysis: Analysis, call: Call) -> Value:
        value, diagonal = analysis.of(call["self"]), call["diagonal"]
        # tril keeps column - row <= diagonal, triu column - row >= diagonal.
        shape = type_of(call.node).shape
        signs: dict[int, Size] = {-2: 1, -1: -1}
        inside = Affine.of({d: c for d, c in signs.items() if shape[d] != 1}, diagonal)
        kept = Condition((Test(inside if lower else inside.scaled(-1), None),))
        if isinstance(value, Condition) and value.constant is not None:
            return kept if value.constant else value
        if isinstance(value, Choice) and value.condition.constant:
            return Choice(kept, value.true, 0.0)
        if isinstance(value, Affine) and not value.coefficients and value.constant in (0, 1):
            return Choice(kept, float(value.constant), 0.0)
        return None

    return step


def _where(analysis: Analysis, call: Call) -> Value:
    condition = analysis.condition(call["condition"])
    numbers = [analysis.number(call[name]) for name in ("self", "other")]
    if None in numbers:
        return None
    return Choice(condition, *numbers)  # type: ignore[arg-type]


def _masked_fill(analysis: Analysis, call: Call) -> Value:
    kept, filled = analysis.number(call["self"]), analysis.number(call["value"])
    if kept is None or filled is None:
        return None
    return Choice(analysis.condition(call["mask"]), filled, kept)


def _cast(analysis: Analysis, call: Call) -> Value:
    value, dtype = analysis.of(call["self"]), type_of(call.node).dtype
    if dtype == torch.bool:
        if isinstance(value, Choice):
            return _chosen(value, _COMPARE["ne"], 0.0)
        return value if isinstance(value, Condition) else None
    if dtype not in _WIDE and not dtype.is_floating_point:
        return None  # arithmetic in it may wrap around
    if isinstance(value, Affine):
        return value if dtype in _WIDE else None
    if isinstance(value, Condition):
        return Choice(value, 1.0, 0.0)
    return value if isinstance(value, Choice) and dtype.is_floating_point else None


_STEPS: dict[str, Callable[[Analysis, Call], Value]] = {
    "full": _full,
    "arange": _arange,
    "reshape": _reshape,
    "permute": _permute,
    "expand": _expand,
    "slice": _slice,
    "index": _index,
    "cumsum": _cumsum,
    "diff": _diff,
    "add": _add(1),
    "sub": _add(-1),
    "rsub": _rsub,
    "mul": _mul,
    "floor_divide": _divide,
    "div.Tensor_mode": _divide,
    **{name: _compare(name) for name in _COMPARE},
    **dict.fromkeys(("__and__", "bitwise_and", "logical_and"), _and),
    **dict.fromkeys(("__or__", "bitwise_or", "logical_or"), _or),
    **dict.fromkeys(("bitwise_not", "logical_not"), _not),
    "tril": _triangle(lower=True),
    "triu": _triangle(lower=False),
    "where": _where,
    "masked_fill": _masked_fill,
    "to": _cast,
}
