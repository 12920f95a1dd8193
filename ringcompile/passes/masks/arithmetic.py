"""The mask analysis of arithmetic: sums, products, whole divisions and differences along a dim."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from ringcompile.ir.calls import Call
from ringcompile.ir.nodes import type_of
from ringcompile.passes.masks.kinds import expression
from ringcompile.passes.masks.logic import both
from ringcompile.passes.masks.steps import WIDE, Known, Step
from ringcompile.passes.masks.values import Affine, Choice, Condition, Floored, Value

aten = torch.ops.aten


def add(sign: int) -> Step:
    """The step of a sum, or with sign -1 of a difference."""

    def step(known: Known, call: Call) -> Value:
        a, b = known.of(call["self"]), known.of(call["other"])
        alpha = call.get("alpha", 1)
        if isinstance(a, Affine) and isinstance(b, Affine):
            return a + b.scaled(sign * alpha) if isinstance(alpha, int) else None
        if isinstance(a, Affine) and alpha == 1 and _is_by_batch(call["other"]):
            return Floored(a, (sign, expression(call["other"])))
        return _on_choice(a, call["other"], lambda x, y: x + sign * alpha * y)

    return step


def _is_by_batch(node: Any) -> bool:
    """An integer tensor that is the same for all queries and keys."""
    if not isinstance(node, fx.Node) or type_of(node).dtype not in WIDE:
        return False
    return len(type_of(node).shape) < 1 or all(n == 1 for n in type_of(node).shape[-2:])


def divide(known: Known, call: Call) -> Value:
    """Whole division by a number, rounded down; or to zero where that is the same."""
    value, divisor = known.of(call["self"]), call["other"]
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


def rsub(known: Known, call: Call) -> Value:
    """A number less a tensor."""
    alpha = call["alpha"]
    return _on_choice(known.of(call["self"]), call["other"], lambda x, y: y - alpha * x)


def mul(known: Known, call: Call) -> Value:
    """A product with a number, or of two bools, which is `and`."""
    a, b = known.of(call["self"]), known.of(call["other"])
    if isinstance(a, Affine) and isinstance(b, Affine) and not b.coefficients:
        return a.scaled(b.constant)
    if isinstance(a, Condition) and isinstance(b, Condition):
        return both(known, call)
    return _on_choice(a, call["other"], lambda x, y: x * y if x else 0.0)


def _on_choice(value: Value, other: Any, change: Callable[[float, float], float]) -> Value:
    if isinstance(value, Choice) and isinstance(other, int | float):
        return Choice(value.condition, change(value.true, other), change(value.false, other))
    return None


def cumsum(known: Known, call: Call) -> Value:
    """A prefix sum of zeros."""
    value = known.of(call["self"])
    if isinstance(value, Condition) and value.never:
        return Affine()
    return None


def diff(known: Known, call: Call) -> Value:
    """Differences of an affine tensor whose first is against its own continuation to the left."""
    value, before = known.of(call["self"]), known.of(call["prepend"])
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
