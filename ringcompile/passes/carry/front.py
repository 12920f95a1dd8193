"""A window of a value's tokens, and what is in front of the first of them.

At the beginning of a sequence a window reaches over token 0. What the model has there, zeros of a
pad or a tensor of its own, is written into the window by position.
"""

from __future__ import annotations

import torch
from torch import fx

from ringcompile.ir.expr import simplify
from ringcompile.ir.layout import WHOLE, Layout
from ringcompile.ir.nodes import type_of
from ringcompile.ir.types import TensorType
from ringcompile.passes.carry.context import NEW, Carrying
from ringcompile.passes.windows.shift_forms import Form

aten = torch.ops.aten


def places(into: Carrying, before: int) -> fx.Node:
    """The positions of a window, of which those before token 0 are negative.

    Args:
        into: the program.
        before: how many tokens before the new ones are in the window.
    """
    here = into.positions
    if not before:
        return here
    whole = TensorType.whole(torch.int64, (simplify(NEW + before),))
    first = into.builder.call(
        aten.slice.Tensor, (here, 0, 0, 1, 1), TensorType.whole(torch.int64, (1,))
    )
    apart = into.builder.call(aten.arange.start_step, (-before, NEW, 1), whole, dtype=torch.int64)
    return into.builder.call(aten.add.Tensor, (apart, first), whole)


def _ahead(into: Carrying, x: fx.Node, form: Form, before: int) -> fx.Node:
    """Bool, [window, 1, ...]: whether an entry is in front of the operand's first."""
    rank, here = len(type_of(x).shape), places(into, before)
    ahead = into.builder.call(
        aten.lt.Scalar, (here, -form.offset), TensorType.whole(torch.bool, type_of(here).shape),
        why="in front of the first",
    )
    shape = (*type_of(here).shape, *(1,) * (rank - form.dim - 1))
    return into.reshaped(ahead, shape, (WHOLE,) * len(shape))


def filled(into: Carrying, x: fx.Node, form: Form, before: int, value: float) -> fx.Node:
    """A window with a number in front of the operand's first entry.

    Args:
        into: the program.
        x: the window.
        form: of the operand that it is a window of.
        before: how many tokens before the new ones are in it.
        value: the number.
    """
    ahead = _ahead(into, x, form, before)
    return into.builder.call(aten.masked_fill.Scalar, (x, ahead, value), type_of(x))


def in_front(
    into: Carrying, x: fx.Node, form: Form, before: int, front: list[fx.Node], left: int
) -> fx.Node:
    """A window with the `left` entries of tensors in front of the operand's first; as `filled`."""
    if not left:
        return x
    dim, type_, call = form.dim, type_of(x), into.builder.call
    here = places(into, before)
    dims = tuple(WHOLE if i == dim else d for i, d in enumerate(type_.layout.dims))
    shape = (*type_.shape[:dim], left, *type_.shape[dim + 1 :])
    given = front[0] if len(front) == 1 else call(
        aten.cat.default, (front, dim), TensorType(type_.dtype, shape, Layout(dims))
    )
    # Entry `left + offset + place` of the result, for places in front of the first.
    index = call(aten.add.Tensor, (here, left + form.offset), type_of(here))
    index = call(aten.clamp.default, (index, 0, left - 1), type_of(here))
    chosen = call(aten.index_select.default, (given, dim, index), type_)
    return call(aten.where.self, (_ahead(into, x, form, before), chosen, x), type_)
