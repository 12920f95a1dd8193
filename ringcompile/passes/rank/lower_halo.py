"""Windows of a rank's tokens, from what its neighbours send: the ends of their chunks, no more.

    rank 1 of 4                  [the end of chunk 0, from rank 0] [chunk 1]
    rank 1 of 4, zigzag          [the end of chunk 0, from rank 0] [chunk 1]
                                 [the end of chunk 5, from rank 2] [chunk 6]

Every chunk is at least as long as what a neighbour takes of it, since shorter sequences are padded
(`SequenceSplit.least`). In front of the first chunk and behind the last one nobody sends anything,
and an op that looks there fills in what the model has there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from ringcompile.ir.calls import Call
from ringcompile.ir.expr import Size, equal, simplify
from ringcompile.ir.nodes import type_of
from ringcompile.ir.program import Program
from ringcompile.ir.types import TensorType, local_shape
from ringcompile.ops.schemas import op
from ringcompile.passes.base import Builder, Pass

aten = torch.ops.aten
_HALO = op("halo")


@dataclass(frozen=True)
class LowerHalo(Pass):
    """Expand `halo` (tokens of neighbouring ranks) into transfers between ranks.

        w = halo(x, before=3, axis=ring)
    ->  t = shift_start(x[n - 3 : n], to=r + 1, source=r - 1)
        w = cat([wait(t), x])
    """

    name: ClassVar[str] = "lower-halo"

    def run(self, program: Program) -> Program:
        """Expand each halo on its own; other nodes are copied."""
        if all(node.target is not _HALO for node in program.graph.nodes):
            return program
        builder = Builder()
        for node in program.graph.nodes:
            builder.at(node)
            builder.env[node] = (
                _Halo(program, node, builder).write() if node.target is _HALO
                else builder.copy(node)
            )
        return program.with_graph(builder.graph)


@dataclass(frozen=True)
class _Edge:
    """The end of a chunk that another one's window begins with, or its beginning, at the end.

    Attributes:
        of: the index of the chunk whose tokens they are.
        to: the index of the chunk that the window is of.
        ahead: whether they lie before that chunk.
    """

    of: int
    to: int
    ahead: bool


class _Halo:
    """Writes the windows of one value, in one piece in time."""

    def __init__(self, program: Program, node: fx.Node, builder: Builder) -> None:
        assert program.sequence is not None
        assert program.coordinates is not None
        assert program.mesh is not None
        self.program, self.node, self.builder, self.call = program, node, builder, Call(node)
        self.axis: str = self.call["axis"]
        names = tuple(filter(None, self.axis.split(",")))
        self.level = program.sequence.level(names)
        self.share = program.mesh.index(program.coordinates, self.axis) if names else 0
        self.dim: int = self.call["dim"]
        self.counts = {True: self.call["before"], False: self.call["after"]}
        self.piece: int = self.call["piece"] or 0
        pieces = {"past": self.piece - 1, "x": self.piece, "later": self.piece + 1}
        self.x = {
            piece: builder.env[self.call[name]] for name, piece in pieces.items()
            if self.call[name] is not None
        }
        level = self.level
        chunks = [tuple(map(int, level.chunks(share))) for share in range(level.num_ranks)]
        self.held = chunks[self.share]
        self.shares = {index: share for share, held in enumerate(chunks) for index in held}
        self.each = self.level.chunks_per_piece
        first = self.piece * self.each
        self.targets = [held[first : first + self.each] for held in chunks]

    def write(self) -> fx.Node:
        """The windows of all chunks, one behind the other."""
        started = [self._start(edges) for edges in self._rounds()]
        arrived = {}
        for edge, transfer in filter(None, started):
            arrived[edge] = self.builder.call(op("wait"), (transfer,), type_of(transfer))
        parts: list[fx.Node] = []
        for index in self.targets[self.share]:
            parts += self._end(_Edge(index - 1, index, ahead=True), arrived)
            parts += self._cut(index, 0, self.level.chunk)
            parts += self._end(_Edge(index + 1, index, ahead=False), arrived)
        if len(parts) == 1:
            return parts[0]
        return self.builder.call(
            aten.cat.default, (parts, self.dim), self.node.meta["type"], name=self.node.name,
            why=self.node.meta.get("why"),
        )

    # -- transfers -----------------------------------------------------------------------------

    def _rounds(self) -> list[list[_Edge]]:
        """What goes between ranks; in a round each sends once at most, and takes once at most."""
        rounds: list[list[_Edge]] = []
        for edge in self._edges():
            of, to = self.shares[edge.of], self.shares[edge.to]
            fits = (edges for edges in rounds if all(
                self.shares[e.of] != of and self.shares[e.to] != to for e in edges
            ))
            found = next(fits, None)
            if found is None:
                found = []
                rounds.append(found)
            found.append(edge)
        return rounds

    def _edges(self) -> list[_Edge]:
        """What any rank needs of another one's chunks."""
        return [
            edge
            for place in range(self.each) for chunks in self.targets for index in chunks[place:][:1]
            for ahead, other in ((True, index - 1), (False, index + 1))
            for edge in (_Edge(other, index, ahead),)
            if self.counts[ahead] and other in self.shares
            and self.shares[other] != self.shares[index]
        ]

    def _start(self, edges: list[_Edge]) -> tuple[_Edge | None, fx.Node] | None:
        """Send an end of a chunk, take one, or both."""
        out = next((e for e in edges if self.shares[e.of] == self.share), None)
        coming = next((e for e in edges if self.shares[e.to] == self.share), None)
        if out is None and coming is None:
            return None
        type_ = type_of(self.call["x"])
        x = self.builder.env[self.call["x"]] if out is None else self._taken(out)
        arriving = self._local(self.counts[coming.ahead]) if coming else TensorType.whole(
            type_.dtype, (0,)
        )
        transfer = self.builder.call(
            op("shift_start"), (x,), arriving, axis=self.axis,
            to=None if out is None else self.shares[out.to],
            source=None if coming is None else self.shares[coming.of],
            sends=[out.of] if out else [], takes=[coming.of] if coming else [],
            of=self.node.name,
        )
        return coming, transfer

    # -- parts of chunks -----------------------------------------------------------------------

    def _end(self, edge: _Edge, arrived: Mapping[_Edge | None, fx.Node]) -> list[fx.Node]:
        """What a window has before its chunk, or behind it; anything, where no such chunk is."""
        count = self.counts[edge.ahead]
        if not count:
            return []
        if edge.of not in self.shares:
            return self._cut(edge.to, 0, count)
        return [arrived[edge]] if edge in arrived else [self._taken(edge)]

    def _taken(self, edge: _Edge) -> fx.Node:
        """The end of one of this rank's chunks, or its beginning."""
        count, chunk = self.counts[edge.ahead], self.level.chunk
        start, end = (simplify(chunk - count), chunk) if edge.ahead else (0, count)
        (part,) = self._cut(edge.of, start, end)
        return part

    def _cut(self, index: int, start: Size, end: Size) -> list[fx.Node]:
        """Some tokens of one of this rank's chunks."""
        piece, place = divmod(self.held.index(index), self.each)
        x = self.x[piece]
        if equal(end - start, self.level.chunk) and self.each == 1:
            return [x]
        at = place * self.level.chunk
        return [self.builder.call(
            aten.slice.Tensor, (x, self.dim, simplify(at + start), simplify(at + end)),
            self._local(simplify(end - start)), name="tokens",
        )]

    def _local(self, size: Size) -> TensorType:
        """The type of so many tokens of this rank's."""
        type_ = type_of(self.call["x"])
        local = local_shape(type_, self.program.mesh, self.program.sequence)
        return TensorType.whole(
            type_.dtype, (*local[: self.dim], size, *local[self.dim + 1 :])
        )
