"""Rows of an additive mask that hide all of their keys by a very negative finite number.

Softmax is of differences: a row of nothing but the most negative number of its dtype leaves no key
more weight than another, since the scores beside it have no digits left. A device that sees all of
the row's keys weighs them evenly. In a ring, the log-sum-exp of a block would have no digits left
for the number of its keys. So such a row is shifted to begin at 0, and its query becomes 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any

import torch
from torch import fx

from ringcompile.ir.nodes import type_of
from ringcompile.ir.program import Program
from ringcompile.ir.types import TensorType
from ringcompile.ops.blocks import Band
from ringcompile.passes.base import Builder
from ringcompile.passes.masks.operands import broadcast
from ringcompile.passes.masks.reach import may_hide

aten = torch.ops.aten
# Scores of less than 32 vanish beside a number of this size in float32, as in float64.
_GONE = {torch.float32: -(2.0**29), torch.bfloat16: -(2.0**29), torch.float64: -(2.0**58)}


def may_even(program: Program | None, nodes: Sequence[fx.Node]) -> bool:
    """Whether a device that sees all of a row's keys may weigh them evenly under these masks."""
    return may_hide(program, [n for n in nodes if type_of(n).dtype in _GONE])


def evened(
    builder: Builder, q: fx.Node, bias: fx.Node, band: Band, keys: Any
) -> tuple[fx.Node, fx.Node]:
    """The queries and the mask, with rows that a finite number hides as rows of zeros.

    Args:
        builder: of the graph.
        q: queries [B, H, Sq, D].
        bias: all that is added to scores, in 4 dims.
        band: which keys a query sees besides.
        keys: how many keys there are.
    """
    type_ = type_of(bias)
    visible = bias
    if band != Band():
        inside = _inside(builder, band, type_of(q).shape[2], keys)
        visible = builder.call(
            aten.where.ScalarOther, (inside, bias, -inf), broadcast([inside, bias], type_.dtype)
        )
    rows = TensorType.whole(type_.dtype, (*type_of(visible).shape[:3], 1))
    flags = TensorType.whole(torch.bool, rows.shape)
    top = builder.call(aten.amax.default, (visible, [-1], True), rows)
    low = builder.call(aten.le.Scalar, (top, _GONE[type_.dtype]), flags)
    finite = builder.call(aten.gt.Scalar, (top, -inf), flags)
    hidden = builder.call(aten.logical_and.default, (low, finite), flags)
    q = builder.call(aten.masked_fill.Scalar, (q, hidden, 0.0), type_of(q))
    shift = builder.call(aten.where.ScalarOther, (hidden, top, 0.0), rows)
    shifted = builder.call(aten.sub.Tensor, (bias, shift), broadcast([bias, shift], type_.dtype))
    return q, shifted


def _inside(builder: Builder, band: Band, queries: Any, keys: Any) -> fx.Node:
    """Bool [1, 1, Sq, Sk]: which keys lie in the band of each query."""
    apart = TensorType.whole(torch.int64, (1, 1, queries, keys))
    numbers = [
        _positions(builder, size, shape)
        for size, shape in ((queries, (1, 1, queries, 1)), (keys, (1, 1, 1, keys)))
    ]
    difference = builder.call(aten.sub.Tensor, tuple(numbers), apart)
    flags = TensorType.whole(torch.bool, apart.shape)
    ends = ((aten.ge.Scalar, band.lower), (aten.le.Scalar, band.upper))
    tests = [
        builder.call(test, (difference, end), flags) for test, end in ends if end is not None
    ]
    if len(tests) == 1:
        return tests[0]
    return builder.call(aten.logical_and.default, tuple(tests), flags)


def _positions(builder: Builder, size: Any, shape: tuple[Any, ...]) -> fx.Node:
    type_ = TensorType.whole(torch.int64, (size,))
    made = builder.call(aten.arange.start_step, (0, size, 1), type_, dtype=torch.int64)
    whole = TensorType.whole(torch.int64, shape)
    return builder.call(aten.reshape.default, (made, list(shape)), whole)
