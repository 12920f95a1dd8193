"""Write ring attention out as block attention, transfers and merges, for one rank.

In every turn a rank sends its own keys and values straight to one other rank, and takes what it
sees of another one's: no rank passes on what it got, so none waits for another one's progress. A
chunk that a rank does not see it neither gets nor computes.

With causal attention and zigzag order, what a rank takes from any other is the same work: from a
rank before it the early chunk, which all its queries see, and from a rank behind it both chunks,
which its late queries see. It receives exactly what it sees, three quarters of whole blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any, ClassVar

import torch
from torch import fx

from ringcompile.ir.calls import Call
from ringcompile.ir.expr import Size, bind
from ringcompile.ir.fused import keep_mark
from ringcompile.ir.nodes import type_of
from ringcompile.ir.program import Program
from ringcompile.ir.types import (
    SequenceSplit,
    TensorType,
    accumulator_type,
    state_type,
)
from ringcompile.ops.blocks import Band
from ringcompile.ops.schemas import op
from ringcompile.passes.base import Builder, Pass
from ringcompile.passes.rank.chunk_cuts import ChunkCuts
from ringcompile.passes.rank.query_tiles import QueryTiles
from ringcompile.passes.rank.ring_routes import Route, Turn, chunk_shares, route

aten = torch.ops.aten
_Slots = tuple[int, ...]


@dataclass(frozen=True)
class LowerRing(Pass):
    """Expand `ring_attention` into transfers, attention over blocks of keys, and merges.

        o = ring_attention(q, k, v, axis=ring)
    ->  kv = pack(k, v); t = shift_start(kv, to=r + 1, source=r - 1)
        state = block_attention(q, [k, v], keys=[r])
        u = shift_start(kv, to=r + 2, source=r - 2)  # before the attention that hides it
        state = merge(state, block_attention(q, [wait(t)], keys=[r - 1]))  # and so on
        o = finish(state)

    Keys and values of earlier pieces in time, `past_k` and `past_v`, travel beside those of the
    queries' own piece, and are merged into the same state. Along `tile` queries are gathered before
    and results reduced behind it: see `query_tiles`.

    Args:
        left: the names of attentions to leave as they are; see `alike_rings`.
    """

    name: ClassVar[str] = "lower-ring"
    left: frozenset[str] = field(default=frozenset(), repr=False)

    def run(self, program: Program) -> Program:
        """Expand each ring attention on its own; other nodes are copied."""
        assert program.sequence is not None
        assert program.coordinates is not None
        if all(node.target is not op("ring_attention") for node in program.graph.nodes):
            return program
        builder = Builder()
        for node in program.graph.nodes:
            builder.at(node)
            if node.target is op("ring_attention") and node.name not in self.left:
                builder.env[node] = _Ring(program, node, builder).write()
                keep_mark(node, builder.env[node])
            else:
                builder.env[node] = builder.copy(node)
        return program.with_graph(builder.graph)


@dataclass(frozen=True)
class _Held:
    """Keys and values that a rank holds, two nodes or one packed, and which chunks they are."""

    nodes: tuple[fx.Node, ...]
    block: int
    slots: _Slots


class _Ring:
    """Writes one attention: what ranks send each other is some streams of keys and values."""

    def __init__(self, program: Program, node: fx.Node, builder: Builder) -> None:
        assert program.sequence is not None
        assert program.coordinates is not None
        assert program.mesh is not None
        self.program, self.node, self.builder = program, node, builder
        self.sequence, self.mesh, self.call = program.sequence, program.mesh, Call(node)
        self.coordinates = program.coordinates
        self.axis: str = self.call["axis"]
        self.rank, self.ranks = self._place(self.axis), self.mesh.size(self.axis)
        rows = type_of(self.call["q"]).layout.dims[2]
        self.axes = rows[0].axes if rows else ()
        self.level, self.of_keys = (
            self.sequence.of(type_of(self.call[name]).shape[2]).level(self.axes)
            for name in ("q", "k")
        )
        self.tile: str | None = self.call["tile"]
        self.unit = self.level.chunk
        self.band = Band(self.call["lower"], self.call["upper"])
        by_rank = self._queries()
        tiles = [QueryTiles(builder, self.mesh, self.tile, own, self.unit) for own in by_rank]
        self.tiles = tiles[self.rank]
        self.queries = tuple(each.ordered for each in tiles)
        self.rows: _Slots = tuple(range(len(self.queries[self.rank])))
        self.cuts = ChunkCuts(builder, self.mesh, self.sequence)
        self.q, self.key_mask, self.mask, self.sink = map(
            self.given, ("q", "key_mask", "mask", "sink")
        )
        self.out = type_of(self.node)
        if self.tile is not None:
            self._gather_queries()
        self.streams = [_Stream(self, "k", "v", [self.call["piece"] or 0])]
        if self.call["past_k"] is not None:
            self.streams.append(_Stream(self, "past_k", "past_v", self.call["past"]))

    def given(self, name: str) -> Any:
        """What stands for an operand; None where the attention does not have it."""
        return None if self.call[name] is None else self.builder.env[self.call[name]]

    def _place(self, axis: str) -> int:
        return self.mesh.index(self.coordinates, axis)

    def _gather_queries(self) -> None:
        """Those of all ranks along `tile`, by position, and the rows of their mask."""
        self.q = self.tiles.gathered(self.q, self.cuts.local(type_of(self.q)))
        if self.mask is not None and type_of(self.mask).shape[2] != 1:
            self.mask = self.tiles.gathered(self.mask, self.cuts.local(type_of(self.mask)))
        width = self.cuts.local(self.out)[3]
        self.out = TensorType.whole(self.out.dtype, (*type_of(self.q).shape[:3], width))

    @property
    def _tiles(self) -> int:
        return 1 if self.tile is None else self.mesh.size(self.tile)

    @property
    def _below(self) -> int:
        """How many ranks along other axes have the same keys, and each some of the queries."""
        return self.level.num_ranks // (self.ranks * self._tiles)

    def _share(self, place: int, tile: int, below: int) -> int:
        """Which share of the sequence a rank has, by its places on ring, tile and other axes."""
        return (place * self._tiles + tile) * self._below + below

    def _queries(self) -> tuple[_Slots, ...]:
        """The chunks of queries at each place of the ring, by rank along `tile`."""
        own = self._place(",".join(self.axes)) % self._below
        piece = self.call["piece"] or 0
        return tuple(
            tuple(chain(*(
                self._chunks(self.level, self._share(place, tile, own), piece)
                for tile in range(self._tiles)
            )))
            for place in range(self.ranks)
        )

    def keys(self, pieces: list[int]) -> tuple[_Slots, ...]:
        """The chunks of keys at each place of the ring, piece by piece, as many as of queries."""
        tile = 0 if self.tile is None else self._place(self.tile)
        return tuple(
            tuple(chain(*(
                self._chunks(self.of_keys, self._share(place, tile, i), piece)
                for piece in pieces for i in range(self._below)
            )))
            for place in range(self.ranks)
        )

    @staticmethod
    def _chunks(level: SequenceSplit, share: int, piece: int) -> _Slots:
        """The chunks of a share in one piece in time."""
        each, held = level.chunks_per_piece, chunk_shares(level)[share]
        return held[piece * each : (piece + 1) * each]

    def write(self) -> fx.Node:
        """All turns; returns the attention output."""
        state: fx.Node | None = None
        for stream, held in self._blocks():
            state = self._attend(stream, held, state)
        assert state is not None
        if self.tile is not None:
            state = self.tiles.reduced(state, self.out, type_of(self.node))
        return self.builder.call(
            op("finish"), (state, self.sink), self.node.meta["type"], name=self.node.name,
            dtype=type_of(self.node).dtype,
        )

    def _blocks(self) -> Iterator[tuple[_Stream, _Held]]:
        """This rank's own block, then what it takes, with the transfers written around them.

        While one block is computed with, the next one is on its way.
        """
        # All ranks have the same order of turns and streams, so that none waits for ever.
        exchanges = sorted(
            ((stream, meeting) for stream in self.streams for meeting in stream.meetings),
            key=lambda exchange: exchange[1].turn,
        )
        started: list[fx.Node] = []
        coming = [i for i, (_, meeting) in enumerate(exchanges) if meeting.takes]
        for before, upto in pairwise((-1, *coming, len(exchanges) - 1)):
            started += [stream.start(one) for stream, one in exchanges[len(started) : upto + 1]]
            if before < 0:
                yield from ((stream, stream.own) for stream in self.streams)
            else:
                stream, meeting = exchanges[before]
                yield stream, stream.arrived(meeting, started[before])
        for (stream, meeting), transfer in zip(exchanges, started, strict=True):
            if not meeting.takes:  # what it only sends hides behind all of its attention
                stream.wait(transfer)

    # -- attention over what is here -----------------------------------------------------------

    def _attend(self, stream: _Stream, held: _Held, state: fx.Node | None) -> fx.Node | None:
        """Attention over what this rank sees of a block, merged into the state so far."""
        if state is None:  # the rank's own block makes the state: all of its rows
            return self._block(stream, held, self.rows, held.slots)
        for columns in stream.seen(held):
            first, *others = stream.route.rows(self.rank, held.block, columns)
            rows = tuple(range(first, max((first, *others)) + 1))
            made = self._block(stream, held, rows, columns)
            state = self.builder.call(
                op("merge"), (state, made), accumulator_type(self.out),
                start=rows[0] * self.unit,
            )
        return state

    def _block(self, stream: _Stream, held: _Held, rows: _Slots, columns: _Slots) -> fx.Node:
        queries = [self.queries[self.rank][row] for row in rows]
        keys = stream.indices(held.block, columns)
        q, mask = self.cuts.of(self.q, self.rows, rows, self.unit), self.mask
        if mask is not None and type_of(mask).shape[2] != 1:
            mask = self.cuts.of(mask, self.rows, rows, self.unit)
        kv = self._some_of(held, columns)
        out, whose = type_of(q), f"rank {held.block}" if self.ranks > 1 else f"chunks {keys}"
        return self.builder.call(
            op("block_attention"),
            (q, kv, self.key_mask, mask),
            state_type(
                TensorType(out.dtype, (*out.shape[:3], type_of(stream.v).shape[3]), out.layout)
            ),
            why=f"keys of {whose}: {stream.visible(queries, keys)}",
            head_dim=type_of(stream.k).shape[3],
            queries=queries if self.level == self.of_keys else None,  # else they see all keys
            keys=keys,
            chunk=self.of_keys.chunk,
            limit=self.of_keys.length,
            **{name: self.call[name] for name in ("scale", "softcap", "lower", "upper")},
        )

    def _some_of(self, held: _Held, kept: _Slots) -> list[fx.Node]:
        """Some of the chunks of a block: of packed keys and values, whose first dim they are."""
        dim = 2 if len(held.nodes) == 2 else 0
        return [
            self.cuts.of(node, held.slots, kept, self.of_keys.chunk, dim) for node in held.nodes
        ]


@dataclass
class _Stream:
    """Keys and values that ranks send each other together.

    Args:
        ring: the attention that they are for.
        k_name, v_name: the operands that hold this rank's own.
        pieces: which pieces in time they are.
    """

    ring: _Ring
    k_name: str
    v_name: str
    pieces: list[int]
    packed: fx.Node | None = None

    def __post_init__(self) -> None:
        ring, chunk = self.ring, bind(self.ring.of_keys.chunk, self.ring.program.lengths)
        self.k, self.v = ring.given(self.k_name), ring.given(self.v_name)
        keys = ring.keys(self.pieces)
        known = chunk if isinstance(chunk, int) else None
        self.route: Route = route(ring.queries, keys, ring.band, known)
        self.own = _Held((self.k, self.v), ring.rank, tuple(range(len(keys[ring.rank]))))
        self.meetings = self.route.meetings(ring.rank)

    def seen(self, held: _Held) -> list[_Slots]:
        """The slots that this rank sees of a block, by the kernel call that they are for.

        What all queries see in full is one call, without a mask; other pieces are one call each.
        """
        columns = self.route.seen(self.ring.rank, held.block)
        if len(self.pieces) == 1:
            return [columns] if columns else []
        each = len(self.route.keys[held.block]) // len(self.pieces)
        groups: dict[int, list[int]] = {}
        for slot in columns:
            groups.setdefault(-1 if self._is_full(held.block, slot) else slot // each, []).append(
                slot
            )
        return [tuple(groups[number]) for number in sorted(groups)]

    def _is_full(self, block: int, slot: int) -> bool:
        key = self.route.keys[block][slot]
        queries = self.ring.queries[self.ring.rank]
        return all(self.route.relation(query, key) == "full" for query in queries)

    def indices(self, block: int, slots: _Slots) -> list[Any]:
        """The chunks that these slots of a block are, by index."""
        return [self.route.keys[block][slot] for slot in slots]

    def visible(self, queries: list[Any], keys: list[Any]) -> str:
        """What the queries see of the keys, for dumps."""
        relations = {self.route.relation(query, key) for query in queries for key in keys}
        return "all visible" if relations == {"full"} else str(self.route.band)

    # -- transfers -----------------------------------------------------------------------------

    def start(self, meeting: Turn) -> fx.Node:
        """Send what this rank sends in a turn, and take what comes."""
        ring, takes = self.ring, meeting.takes
        arriving = self._packed_shape(len(takes) * ring.of_keys.chunk) if takes else (0,)
        return ring.builder.call(
            op("shift_start"),
            (self._payload(meeting.sends) if meeting.sends else self.k,),
            TensorType.whole(type_of(self.k).dtype, arriving),
            axis=ring.axis,
            to=meeting.to,
            source=meeting.source,
            sends=self.indices(ring.rank, meeting.sends),
            takes=[] if meeting.source is None else self.indices(meeting.source, takes),
            of=ring.node.name,
        )

    def wait(self, transfer: fx.Node) -> fx.Node:
        """The end of a transfer."""
        return self.ring.builder.call(op("wait"), (transfer,), type_of(transfer))

    def arrived(self, meeting: Turn, transfer: fx.Node) -> _Held:
        """What a transfer brings, once it is there."""
        assert meeting.source is not None
        return _Held((self.wait(transfer),), meeting.source, meeting.takes)

    def _payload(self, slots: _Slots) -> fx.Node:
        """Some of this rank's own chunks: a part of one buffer with all that it ever sends."""
        cuts, unit = self.ring.cuts, self.ring.of_keys.chunk
        ever = tuple(sorted({slot for meeting in self.meetings for slot in meeting.sends}))
        if self.packed is None:
            self.packed = self._pack(
                *(cuts.of(node, self.own.slots, ever, unit) for node in self.own.nodes)
            )
        return cuts.of(self.packed, ever, slots, unit, 0)

    def _pack(self, k: fx.Node, v: fx.Node) -> fx.Node:
        packed = self._packed_shape(self.ring.cuts.local(type_of(k))[2])
        return self.ring.builder.call(
            op("pack"), (k, v), TensorType.whole(type_of(k).dtype, packed),
            why="one transfer for both",
        )

    def _packed_shape(self, rows: Size) -> tuple[Size, ...]:
        """The shape of packed keys and values with so many rows; see `ops.packed_keys.pack`."""
        batch, heads, _, head_dim = self.ring.cuts.local(type_of(self.k))
        value_dim = type_of(self.v).shape[3]
        if head_dim == value_dim:
            return rows, batch, 2 * heads, head_dim
        return rows, batch, heads, head_dim + value_dim
