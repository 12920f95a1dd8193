"""Attention in tiles of queries and keys: queries are gathered along an axis, results reduced.

    q [B,H,n,D]          gathered along `tile`, put in order of positions   [B,H,T*n,D]
    state [out, lse]     of all these queries over the keys that one rank of `tile` has
    packed [1,B,H,T*n,E+1]  each rank's rows go back to it                  [T,B,H,n,E+1]
    state [out, lse]     merged by the log-sum-exps, over the keys of all ranks

R * T ranks in a ring send R * T - 1 blocks of keys and values each; in tiles they send R - 1 of
those, and T - 1 blocks of queries and of results.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import fx

from ringcompile.ir.expr import Size, simplify
from ringcompile.ir.nodes import type_of
from ringcompile.ir.types import TensorType, accumulator_type
from ringcompile.mesh import Mesh
from ringcompile.ops.schemas import op
from ringcompile.passes.base import Builder

aten = torch.ops.aten
_ROWS = 2


@dataclass
class QueryTiles:
    """Writes what the ranks along an axis exchange around an attention.

    Attributes:
        builder: the graph that is written.
        mesh: the mesh.
        axis: along which queries are gathered; None where they are not.
        chunks: the chunks of all gathered queries, by rank.
        unit: the length of a chunk.
    """

    builder: Builder
    mesh: Mesh
    axis: str | None
    chunks: tuple[int, ...] = ()
    unit: Size = 1
    count: int = field(init=False)

    def __post_init__(self) -> None:
        self.count = 1 if self.axis is None else self.mesh.size(self.axis)

    @property
    def ordered(self) -> tuple[int, ...]:
        """The chunks by position, in which those that see some keys lie side by side."""
        return tuple(sorted(self.chunks))

    def gathered(self, x: fx.Node, shape: Sequence[Size]) -> fx.Node:
        """The rows of queries, or of their mask, of all ranks along the axis, by position.

        Args:
            x: [.., .., n, ..], this rank's.
            shape: of its share of x.
        """
        rows = simplify(shape[_ROWS] * self.count)
        type_ = TensorType.whole(type_of(x).dtype, (*shape[:_ROWS], rows, *shape[_ROWS + 1 :]))
        every = self.builder.call(
            op("gather"), (x,), type_, why="queries of a tile", dim=_ROWS, axis=self.axis,
            limit=None,
        )
        return self._moved(every, _ROWS, self.chunks, self.ordered)

    def reduced(self, state: fx.Node, out: TensorType, own: TensorType) -> fx.Node:
        """A rank's own rows of results over the keys of all ranks along the axis.

        Args:
            state: of all gathered queries over the keys that this rank's place has.
            out: the type of its first tensor.
            own: the type of the attention's result on this rank.
        """
        dtype = accumulator_type(out)[0].dtype
        batch, heads, rows, width = out.shape
        wide = simplify(width + 1)
        packed = TensorType.whole(dtype, (1, batch, heads, rows, wide))
        mine = self.builder.call(op("pack_state"), (state,), packed)
        mine = self._moved(mine, _ROWS + 1, self.ordered, self.chunks)
        each = simplify(self.unit * (len(self.chunks) // self.count))
        every = self.builder.call(
            op("all_to_all"), (mine,),
            TensorType.whole(dtype, (self.count, batch, heads, each, wide)),
            why="results over each rank's keys", split=_ROWS + 1, concat=0, axis=self.axis,
        )
        return self.builder.call(op("merge_states"), (every,), accumulator_type(own))

    def _moved(
        self, x: fx.Node, dim: int, have: tuple[int, ...], wanted: tuple[int, ...]
    ) -> fx.Node:
        """The chunks along a dim in another order."""
        if have == wanted:
            return x
        type_ = type_of(x)
        parts = []
        for first, length in _runs([have.index(chunk) for chunk in wanted]):
            start, end = simplify(first * self.unit), simplify((first + length) * self.unit)
            shape = (*type_.shape[:dim], simplify(end - start), *type_.shape[dim + 1 :])
            parts.append(self.builder.call(
                aten.slice.Tensor, (x, dim, start, end), TensorType.whole(type_.dtype, shape)
            ))
        return self.builder.call(aten.cat.default, (parts, dim), type_, why="by position")


def _runs(places: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Where neighbours in an order begin, and how many there are."""
    for _, run in groupby(enumerate(places), key=lambda pair: pair[1] - pair[0]):
        entries = [place for _, place in run]
        yield entries[0], len(entries)
