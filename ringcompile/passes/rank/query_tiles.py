"""Attention in tiles of queries and keys: queries are gathered along an axis, results reduced.

    q [n,B,H,D]              tokens first, gathered along `tile`              [T*n,B,H,D]
    queries [T*n,B,H,D]      early chunks of all ranks, then late ones: one copy in zigzag order
    state [out, lse]         of all these queries over the keys that one rank of `tile` has
    packed [T,n,B,H,E+1]     by rank, in one copy; each rank's rows go back to it
    state [out, lse]         merged by the log-sum-exps, over the keys of all ranks

R * T ranks in a ring send R * T - 1 blocks of keys and values each; in tiles they send R - 1 of
those, and T - 1 blocks of queries and of results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

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
    def _runs(self) -> int:
        """How many chunks of queries a rank has."""
        return len(self.chunks) // self.count

    @property
    def ordered(self) -> tuple[int, ...]:
        """The chunks in the order of rows, in which those that see some keys lie side by side.

        In zigzag order early chunks rise from rank to rank, and late ones fall.
        """
        return tuple(
            chunk for run in range(self._runs) for chunk in self.chunks[run :: self._runs]
        )

    def gathered(self, x: fx.Node, shape: Sequence[Size]) -> fx.Node:
        """The rows of queries, or of their mask, of all ranks along the axis, as `ordered`.

        Args:
            x: [.., .., n, ..], this rank's.
            shape: of its share of x.
        """
        lead, rows, width = tuple(shape[:_ROWS]), shape[_ROWS], shape[_ROWS + 1]
        every = simplify(rows * self.count)
        x = self._call(aten.permute.default, x, (rows, *lead, width), [2, 0, 1, 3])
        x = self._call(aten.contiguous.default, x, (rows, *lead, width))
        x = self._call(
            op("gather"), x, (every, *lead, width), why="queries of a tile", dim=0,
            axis=self.axis, limit=None,
        )
        if self._runs > 1:
            by_rank = (self.count, self._runs, self.unit, *lead, width)
            by_run = (self._runs, self.count, *by_rank[2:])
            x = self._call(aten.reshape.default, x, by_rank, list(by_rank))
            x = self._call(
                aten.permute.default, x, by_run, [1, 0, *range(2, len(by_rank))]
            )
            flat = (every, *lead, width)
            x = self._call(aten.reshape.default, x, flat, list(flat), why="chunk by chunk")
        return self._call(aten.permute.default, x, (*lead, every, width), [1, 2, 0, 3])

    def reduced(self, state: fx.Node, out: TensorType, own: TensorType) -> fx.Node:
        """A rank's own rows of results over the keys of all ranks along the axis.

        Args:
            state: of all gathered queries over the keys that this rank's place has.
            out: the type of its first tensor.
            own: the type of the attention's result on this rank.
        """
        batch, heads, _, width = out.shape
        rows = simplify(self.unit * self._runs)
        packed = TensorType.whole(
            accumulator_type(out)[0].dtype,
            (self.count, rows, batch, heads, simplify(width + 1)),
        )
        mine = self.builder.call(
            op("pack_state"), (state,), packed, dim=_ROWS, ways=self.count, runs=self._runs
        )
        every = self.builder.call(
            op("all_to_all"), (mine,), packed, why="results over each rank's keys", split=0,
            concat=0, axis=self.axis,
        )
        return self.builder.call(op("merge_states"), (every,), accumulator_type(own))

    def _call(
        self, target: Any, x: fx.Node, shape: tuple[Size, ...], *args: Any, **how: Any
    ) -> fx.Node:
        type_ = TensorType.whole(type_of(x).dtype, shape)
        return self.builder.call(target, (x, *args), type_, name="tile", **how)
