"""A few tokens of a split sequence on every rank: each rank adds the ones it has.

    x            [b, s/ring, d]
    y = x[:, :6]                 rows = zeros [b, 7, d], and x[i] goes to row i; others to row 6
                                 y = all_reduce(rows[:, :6])

The text's rows of a joint attention are such tokens. Gathering all tokens for them would send the
image's as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ringcompile.ir.calls import Call, target_name
from ringcompile.ir.expr import is_symbolic, simplify, spelled
from ringcompile.ir.layout import Layout
from ringcompile.ir.nodes import layout_of, type_of
from ringcompile.ir.types import TensorType
from ringcompile.ops.schemas import op
from ringcompile.passes.windows.region import HALO

if TYPE_CHECKING:
    from ringcompile.passes.windows.windows import Windows

aten = torch.ops.aten


def few_tokens(windows: Windows, node: fx.Node) -> fx.Node | None:
    """A slice of so few tokens, on every rank; None of what is something else."""
    if target_name(node.target) != "aten.slice.Tensor" or windows.sequence.in_time:
        return None
    call, type_ = Call(node), type_of(node)
    dim, x = call["dim"], windows.value(call["self"])
    layout = Layout.whole(len(type_.shape)).with_dim(dim, windows.rows)
    if layout_of(x) != layout or not _is_few(type_, dim, windows) or call["step"] != 1:
        return None
    return _summed(windows, x, call["start"] or 0, type_, node, dim)


def _is_few(type_: TensorType, dim: int, windows: Windows) -> bool:
    """Whether there are fewer of them than half of the tokens, and they are features."""
    count, length = type_.shape[dim], windows.sequence.length
    if not type_.dtype.is_floating_point or not isinstance(count, int):
        return False
    return is_symbolic(length) or 2 * count < length


def _summed(
    windows: Windows, x: fx.Node, start: Any, type_: TensorType, node: fx.Node, dim: int
) -> fx.Node:
    builder, count = windows.builder, type_.shape[dim]

    def shaped(size: Any, dtype: torch.dtype = type_.dtype) -> TensorType:
        return TensorType.whole(dtype, (*type_.shape[:dim], size, *type_.shape[dim + 1 :]))

    own = windows.level.local
    x = builder.call(
        HALO, (x,), shaped(own), dim=dim, before=0, after=0, axis=windows.level.axis
    )
    places = windows.places((0, 0), own)
    index, flags = type_of(places), TensorType.whole(torch.bool, (own,))
    place = builder.call(aten.sub.Scalar, (places, start), index)
    outside = builder.call(
        aten.logical_or.default,
        (builder.call(aten.lt.Scalar, (place, 0), flags),
         builder.call(aten.ge.Scalar, (place, count), flags)), flags,
    )
    place = builder.call(aten.masked_fill.Scalar, (place, outside, count), index)
    rows = shaped(simplify(count + 1))
    zeros = builder.call(
        aten.full.default, (spelled(rows.shape), 0.0), rows, dtype=type_.dtype
    )
    rows_with = builder.call(aten.index_copy.default, (zeros, dim, place, x), rows)
    part = builder.call(aten.slice.Tensor, (rows_with, dim, 0, count), type_)
    return builder.call(
        op("all_reduce"), (part,), type_, name=node.name, why="a few tokens of each rank",
        axis=windows.level.axis,
    )
