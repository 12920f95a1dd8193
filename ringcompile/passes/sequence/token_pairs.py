"""What pairs every token with every other, outside of the attention op: each rank has its rows.

Scores that become no softmax, products of attention maps, distances, masks: dims of the result
are the sequence twice, and an axis can split one of them. The first one stays split. What varies
along the other one is needed whole, so keys are gathered where attention's own op would rotate
them. Every op behind it that works row by row, and the product with gathered values, then follows
from the ops' ordinary rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from ringcompile.ir.calls import Call
from ringcompile.ir.expr import product, to_text
from ringcompile.ir.layout import WHOLE, DimLayout, Layout
from ringcompile.ir.nodes import location_of, type_of
from ringcompile.ir.rules import FactorRule, Rule


def rows_of_pairs(rule: Rule, call: Call, layouts: Sequence[Layout]) -> list[Layout]:
    """Layouts of the operands for which no axis splits two dims of the result.

    Args:
        rule: the op's, which finds no row for `layouts`.
        call: the op.
        layouts: of its operands, as they are.

    Returns:
        The same, but that dims of the operands are whole which would split an axis' second dim.
    """
    assert isinstance(rule, FactorRule), "a view has one operand, whose layout is consistent"
    names = rule.factors(call)
    splits: dict[Any, DimLayout] = {}
    for dims, layout in zip(names.operands, layouts, strict=True):
        for factor, dim in zip(dims, layout.dims, strict=True):
            if dim and factor is not None:
                splits.setdefault(factor, dim)
    taken: set[str] = set()
    dropped = set()
    for factor in names.output:
        axes = {axis for atom in splits.get(factor, ()) for axis in atom.axes}
        if axes & taken:
            dropped.add(factor)
        else:
            taken |= axes
    return [
        Layout(tuple(
            WHOLE if factor in dropped else dim
            for factor, dim in zip(dims, layout.dims, strict=True)
        ), layout.partial)
        for dims, layout in zip(names.operands, layouts, strict=True)
    ]


def note_of_pairs(node: fx.Node, gathered: Sequence[fx.Node]) -> str:
    """What it costs that rows of all pairs are computed on gathered operands.

    Args:
        node: the op, of the program before it has layouts.
        gathered: its operands that are gathered on every rank.
    """
    types = [type_of(operand) for operand in gathered]
    size = sum(product([*type_.shape, type_.dtype.itemsize]) for type_ in types)
    reason = node.meta.get("why_not")
    because = f" ({reason})" if reason else ""
    return (
        f"{location_of(node).short}: this pairs every token with every other, but is not a "
        f"supported attention pattern{because}: each rank computes its rows of all pairs, from "
        f"{to_text(size)} bytes gathered on every rank"
    ).lstrip(": ")
