"""The mask analysis of ops that make positions and move them along dims."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import fx

from ringcompile.ir.calls import Call
from ringcompile.ir.expr import equal, is_symbolic
from ringcompile.ir.nodes import type_of
from ringcompile.passes.masks.steps import WIDE, Known, number_value
from ringcompile.passes.masks.values import Affine, Choice, Condition, Floored, Test, Value


def full(known: Known, call: Call) -> Value:
    """One value everywhere."""
    fill, dtype = call["fill_value"], type_of(call.node).dtype
    if dtype == torch.bool:
        return Condition(never=not fill)
    if dtype.is_floating_point:
        return Choice(Condition(), float(fill), float(fill)) if not is_symbolic(fill) else None
    if dtype not in WIDE:
        return None
    return number_value(int(fill)) if not is_symbolic(fill) else number_value(fill)


def arange(known: Known, call: Call) -> Value:
    """A number for each position."""
    type_ = type_of(call.node)
    if type_.dtype not in WIDE:
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


def reshape(known: Known, call: Call) -> Value:
    """Size-1 dims may come or go, and dims that the value does not depend on."""
    source, target = type_of(call["self"]).shape, type_of(call.node).shape
    value = known.of(call["self"])
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


def permute(known: Known, call: Call) -> Value:
    """The same elements with the dims in another order."""
    rank = len(call["dims"])
    dims = {dim % rank - rank: i - rank for i, dim in enumerate(call["dims"])}
    return _map_tests(known.of(call["self"]), lambda v: v.moved(dims), call.node)


def expand(known: Known, call: Call) -> Value:
    """The same value at every index of a dim of size 1."""
    value = known.of(call["self"])
    if value is None and type_of(call.node).dtype == torch.bool:
        return known.condition(call["self"])  # broadcasts the same from before the expand
    return value


def sliced(known: Known, call: Call) -> Value:
    """Some indices of a dim, which then count from 0."""
    dim = call["dim"] % len(type_of(call.node).shape) - len(type_of(call.node).shape)
    single = type_of(call.node).shape[dim] == 1

    def cut(value: Affine) -> Affine:
        coefficients = dict(value.coefficients)
        c = coefficients.pop(dim, 0)
        if not single:
            coefficients[dim] = c * call["step"]
        return Affine.of(coefficients, value.constant + c * call["start"])

    return _map_tests(known.of(call["self"]), cut, call.node)


def selected(known: Known, call: Call) -> Value:
    """One index of a dim, which is gone then."""
    rank, index, value = len(type_of(call["self"]).shape), call["index"], known.of(call["self"])
    dim = call["dim"] % rank - rank
    if dim in _dims_of(value) and (is_symbolic(index) or index < 0):
        return None  # counted from an end that is not known here
    dims = {d: d + 1 if d < dim else d for d in range(-rank, 0) if d != dim}

    def cut(value: Affine) -> Affine:
        coefficients = dict(value.coefficients)
        constant = value.constant + coefficients.pop(dim, 0) * index
        return Affine.of({dims[d]: c for d, c in coefficients.items()}, constant)

    return _map_tests(value, cut, call.node)


def indexed(known: Known, call: Call) -> Value:
    """x[i, j, ...] of an affine x with every dim indexed by an affine index."""
    source, entries = known.of(call["self"]), list(call["indices"])
    rank = len(type_of(call["self"]).shape)
    indices = [known.of(entry) if entry is not None else None for entry in entries]
    if not isinstance(source, Affine) or len(entries) != rank:
        return None
    total = Affine((), source.constant)
    for dim, c in source.coefficients:
        picked = indices[dim]
        if not isinstance(picked, Affine) or not picked.is_never_negative:
            return None  # a negative index counts from the end
        total += picked.scaled(c)
    return total
