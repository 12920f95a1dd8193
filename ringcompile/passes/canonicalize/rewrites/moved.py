"""An index made of positions alone, moved about: the same moves of what it picks from.

    order = arange(64).reshape(8, 8)[:, [0, 4, 1, 5, 2, 6, 3, 7]].reshape(64)
    y = x[:, order]                ->   y = x.reshape(n, 8, 8)[:, :, [0, 4, 1, ...]].reshape(n, 64)

Which entries a share needs is not told by an index, but by views: AWQ orders what is packed in an
int32 that way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ringcompile.ir.calls import Call
from ringcompile.ir.expr import Size, equal
from ringcompile.ir.nodes import type_of
from ringcompile.ir.types import TensorType
from ringcompile.passes.base import Builder

aten = torch.ops.aten
_HOLD_POSITIONS = (torch.int64, torch.int32)


@dataclass(frozen=True)
class _Around:
    """The dims around those that are moved, and what the moved ones become."""

    before: tuple[Size, ...]
    moved: tuple[Size, ...]
    behind: tuple[Size, ...]

    @property
    def shape(self) -> tuple[Size, ...]:
        return (*self.before, *self.moved, *self.behind)

    def dim(self, dim: int, rank: int) -> int:
        """A dim of the moved ones, of which there are `rank`, among all."""
        return len(self.before) + dim % rank


def picked_by_positions(builder: Builder, x: fx.Node, dim: int, index: fx.Node) -> fx.Node | None:
    """`x` picked along a dim of known size by moved positions, as moves of `x`; None if not so.

    Args:
        builder: writes the graph that `x` and `index` are in.
        x: what is picked from.
        dim: where, counted from the front.
        index: which entries.
    """
    shape, moves = type_of(x).shape, _moves(index, type_of(x).shape[dim])
    for node in moves:
        around = _Around(shape[:dim], type_of(node).shape, shape[dim + 1 :])
        args = _MOVES[node.target](Call(node), around)
        x = builder.call(node.target, (x, *args), TensorType.whole(type_of(x).dtype, around.shape))
    return x if moves else None


def _moves(index: fx.Node, size: Size) -> list[fx.Node]:
    """The ops that make an index of all positions of a dim, first to last; [] if others do."""
    found: list[fx.Node] = []
    while isinstance(size, int) and type_of(index).dtype in _HOLD_POSITIONS:
        if index.target is aten.arange.start_step:
            call = Call(index)
            every = call["start"] == 0 and call["step"] == 1 and equal(call["end"], size)
            return found[::-1] if every else []
        if not _is_move(index) and index.target is not aten.to.dtype:
            return []
        if _is_move(index):
            found.append(index)
        index = Call(index).operands[0]
    return []


def _is_move(node: fx.Node) -> bool:
    """Whether an op moves or picks entries; with several indices their dims may go elsewhere."""
    several = node.target is aten.index.Tensor and len(Call(node).operands) > 2
    return node.target in _MOVES and not several


def _permute(call: Call, around: _Around) -> tuple[Any, ...]:
    rank = len(around.moved)
    behind = range(len(around.before) + rank, len(around.shape))
    moved = (around.dim(dim, rank) for dim in call["dims"])
    return ([*range(len(around.before)), *moved, *behind],)


def _slice(call: Call, around: _Around) -> tuple[Any, ...]:
    dim = around.dim(call["dim"], len(around.moved))
    return (dim, call["start"], call["end"], call["step"])


def _select(call: Call, around: _Around) -> tuple[Any, ...]:
    return (around.dim(call["dim"], len(around.moved) + 1), call["index"])


def _flip(call: Call, around: _Around) -> tuple[Any, ...]:
    return ([around.dim(dim, len(around.moved)) for dim in call["dims"]],)


def _index(call: Call, around: _Around) -> tuple[Any, ...]:
    return ([None] * len(around.before) + list(call["indices"]),)


_MOVES: dict[Any, Callable[[Call, _Around], tuple[Any, ...]]] = {
    aten.reshape.default: lambda call, around: (list(around.shape),),
    aten.permute.default: _permute,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.flip.default: _flip,
    aten.index.Tensor: _index,
}
