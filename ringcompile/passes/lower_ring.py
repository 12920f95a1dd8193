"""Write ring attention out as block attention, transfers and merges, for one rank.

In step t a rank works on what the ranks t places before it and t places behind it started with,
while it passes that on to its neighbours. Every chunk of keys and values travels on its own: down
the ring, up, or both ways, whichever reaches the ranks that see it in the fewest hops, and no
further. A chunk that a rank does not see it does not compute.

With causal attention and zigzag order, the early chunk of a rank is seen by all and goes once
around; the late one is seen by the ranks before it only and goes the other way. Each rank receives
exactly what it sees, three quarters of what passing whole blocks around would cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import fx

from ringcompile.ir.calls import Call
from ringcompile.ir.expr import Size, bind, simplify
from ringcompile.ir.nodes import type_of
from ringcompile.ir.program import Program
from ringcompile.ir.types import (
    TensorType,
    accumulator_type,
    local_shape,
    state_type,
)
from ringcompile.mesh import Mesh
from ringcompile.ops.blocks import Band
from ringcompile.ops.schemas import op
from ringcompile.passes.base import Builder, Pass

aten = torch.ops.aten


@dataclass(frozen=True)
class LowerRing(Pass):
    """Expand `ring_attention` of a specialized program.

        o = ring_attention(q, k, v, axis=ring)
    ->  t = shift_start(pack(k, v), to=r + 1, source=r - 1)  # before the attention that hides it
        state = block_attention(q, [k, v], keys=[r])
        kv = wait(t)                                         # and so on, with merge(state, block)
        o = finish(state)
    """

    name: ClassVar[str] = "lower-ring"

    def run(self, program: Program) -> Program:
        """Expand each ring attention on its own; other nodes are copied."""
        assert program.sequence is not None
        assert program.coordinates is not None
        if all(node.target is not op("ring_attention") for node in program.graph.nodes):
            return program
        builder = Builder()
        for node in program.graph.nodes:
            builder.at(node)
            if node.target is op("ring_attention"):
                builder.env[node] = _Ring(program, node, builder).write()
            else:
                builder.env[node] = builder.copy(node)
        return program.with_graph(builder.graph)


@dataclass(frozen=True, eq=False)
class Route:
    """Who sees what, and how far each chunk travels, from positions alone.

    What it has found out is kept by the object, not by its many positions: see `route`.

    Attributes:
        queries: the chunks of queries, by index, of the rank at each place of the ring.
        keys: the chunks of keys and values that each starts with, likewise.
        band: which keys a query sees.
        chunk: the length of a chunk where it is known.
    """

    queries: tuple[tuple[int, ...], ...]
    keys: tuple[tuple[int, ...], ...]
    band: Band
    chunk: int | None = None

    def sees(self, rank: int, block: int, slot: int) -> bool:
        """Whether a query of the rank sees a key of the chunk that `block` holds in this slot."""
        return bool(self.rows(rank, block, (slot,)))

    @lru_cache(maxsize=1 << 16)  # noqa: B019  (there are few routes)
    def rows(self, rank: int, block: int, slots: tuple[int, ...]) -> tuple[int, ...]:
        """Which slots of the rank's queries see some of these slots of the block's keys."""
        queries, keys = self.queries[rank], self.keys[block]
        return tuple(
            i
            for i, query in enumerate(queries)
            if any(self.relation(query, keys[slot]) != "empty" for slot in slots)
        )

    def relation(self, query: Any, key: Any) -> str:
        """How much of a chunk of keys a chunk of queries sees, by index."""
        return self.band.chunk_relation(query, key, self.chunk)

    @lru_cache(maxsize=1 << 16)  # noqa: B019  (as for `rows`)
    def hops(self, block: int, slot: int) -> dict[int, int]:
        """How many ranks down (1) and up (-1) the ring a chunk travels.

        As few as reach all that see it; among equals the way down is taken, so that chunks share
        transfers.
        """
        ranks = len(self.keys)
        seen = [d for d in range(1, ranks) if self.sees((block + d) % ranks, block, slot)]
        total, down = min(
            (down + ranks - beyond, -down)
            for down, beyond in zip((0, *seen), (*seen, ranks), strict=True)
        )
        return {1: -down, -1: total + down}

    def moving(self, block: int, direction: int, step: int) -> tuple[int, ...]:
        """The slots of a block that take another hop in this direction at this step."""
        slots = range(len(self.keys[block]))
        return tuple(slot for slot in slots if self.hops(block, slot)[direction] > step)


route = lru_cache(maxsize=256)(Route)  # one for all layers and ranks


@dataclass(frozen=True)
class _Held:
    """Keys and values that a rank holds, two nodes or one packed, and which chunks they are."""

    nodes: tuple[fx.Node, ...]
    block: int
    slots: tuple[int, ...]


class _Ring:
    def __init__(self, program: Program, node: fx.Node, builder: Builder) -> None:
        assert program.sequence is not None
        assert program.coordinates is not None
        self.program, self.node, self.builder = program, node, builder
        self.sequence, self.call = program.sequence, Call(node)
        self.axis: str = self.call["axis"]
        self.rank, self.ranks = self._place(self.axis), self._mesh.size(self.axis)
        self.unit, queries, keys = self._chunks()
        self.rows, self.slots = (tuple(range(len(x[self.rank]))) for x in (queries, keys))
        chunk = bind(self.unit, program.lengths)
        self.route = route(
            queries,
            keys,
            Band(self.call["lower"], self.call["upper"]),
            chunk if isinstance(chunk, int) else None,
        )
        self.cut: dict[tuple[fx.Node, tuple[int, ...]], fx.Node] = {}
        self.q, self.k, self.v = (builder.env[self.call[name]] for name in ("q", "k", "v"))
        self.key_mask, self.mask, self.sink = (
            builder.env[self.call[name]] if self.call[name] is not None else None
            for name in ("key_mask", "mask", "sink")
        )

    @property
    def _mesh(self) -> Mesh:
        assert self.program.mesh is not None
        return self.program.mesh

    def _place(self, axis: str) -> int:
        assert self.program.coordinates is not None
        return self._mesh.index(self.program.coordinates, axis)

    def _chunks(self) -> tuple[Size, tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
        """The length of a chunk, and the chunks of queries and of keys at each place of the ring.

        Where ranks along other axes have the same keys and each some of the queries, chunks are
        as short as those of queries.
        """
        axes = type_of(self.call["q"]).layout.dims[2][0].axes
        level = self.sequence.level(axes)
        below = level.num_ranks // self.ranks
        held: Any = [level.chunks(rank) for rank in range(level.num_ranks)]
        own = self._place(",".join(axes)) % below
        queries = tuple(held[place * below + own] for place in range(self.ranks))
        keys = tuple(
            tuple(chain(*held[place * below : (place + 1) * below])) for place in range(self.ranks)
        )
        return level.chunk, queries, keys

    def write(self) -> fx.Node:
        """All steps; returns the attention output."""
        own = _Held((self.k, self.v), self.rank, self.slots)
        held: dict[int, _Held | None] = {1: own, -1: own}
        state: fx.Node | None = None
        for step in range(self.ranks):
            transfers = {way: self._start(held[way], way, step) for way in (1, -1)}
            arrived = [own] if step == 0 else [block for block in held.values() if block]
            for block in arrived:
                state = self._attend(block, state)
            held = {way: self._wait(transfers[way], way, step) for way in (1, -1)}
        assert state is not None
        return self.builder.call(
            op("finish"), (state, self.sink), self.node.meta["type"], name=self.node.name,
            dtype=type_of(self.node).dtype,
        )

    def _pack(self, k: fx.Node, v: fx.Node) -> fx.Node:
        type_ = type_of(k)
        packed = self._packed_shape(self._local(type_)[2])
        return self.builder.call(
            op("pack"),
            (k, v),
            TensorType.whole(type_.dtype, packed),
            why="one transfer for both",
        )

    def _packed_shape(self, rows: Size) -> tuple[Size, ...]:
        """The shape of packed keys and values with so many rows; see `ops.attention.pack`."""
        batch, heads, _, head_dim = self._local(type_of(self.k))
        value_dim = type_of(self.v).shape[3]
        if head_dim == value_dim:
            return batch, 2 * heads, rows, head_dim
        return batch, heads, rows, head_dim + value_dim

    def _start(self, held: _Held | None, way: int, step: int) -> fx.Node | None:
        """Pass on what moves in this direction, and take what comes."""
        out = self.route.moving(held.block, way, step) if held else ()
        coming = self._coming(way, step)
        if not out and not coming:
            return None
        rows = len(coming) * self.unit
        arriving = self._packed_shape(rows) if coming else (0,)
        return self.builder.call(
            op("shift_start"),
            (self._payload(held, out) if held and out else self.k,),
            TensorType.whole(type_of(self.k).dtype, arriving),
            axis=self.axis,
            to=(self.rank + way) % self.ranks if out else None,
            source=(self.rank - way) % self.ranks if coming else None,
            sends=self._indices(held.block, out) if held else [],
            takes=self._indices((self.rank - way * (step + 1)) % self.ranks, coming),
            of=self.node.name,
        )

    def _payload(self, held: _Held, slots: tuple[int, ...]) -> fx.Node:
        nodes = [self._slots(node, held.slots, slots) for node in held.nodes]
        return self._pack(*nodes) if len(nodes) == 2 else nodes[0]

    def _indices(self, block: int, slots: tuple[int, ...]) -> list[Any]:
        """The chunks that these slots of a block are, by index."""
        return [self.route.keys[block][slot] for slot in slots]

    def _queries(self, rows: tuple[int, ...]) -> list[Any]:
        """The chunks that these rows of this rank's queries are, by index."""
        return [self.route.queries[self.rank][row] for row in rows]

    def _coming(self, way: int, step: int) -> tuple[int, ...]:
        return self.route.moving((self.rank - way * (step + 1)) % self.ranks, way, step)

    def _local(self, type_: TensorType) -> tuple[Size, ...]:
        return local_shape(type_, self._mesh, self.sequence)

    def _local_type(self, type_: TensorType, rows: Size) -> TensorType:
        local = self._local(type_)
        return TensorType.whole(type_.dtype, (*local[:2], rows, local[3]))

    def _wait(self, transfer: fx.Node | None, way: int, step: int) -> _Held | None:
        if transfer is None:
            return None
        node = self.builder.call(op("wait"), (transfer,), type_of(transfer))
        slots = self._coming(way, step)
        return _Held((node,), (self.rank - way * (step + 1)) % self.ranks, slots) if slots else None

    def _attend(self, held: _Held, state: fx.Node | None) -> fx.Node | None:
        """Attention over what this rank sees of a block, merged into the state so far."""
        columns = tuple(s for s in held.slots if self.route.sees(self.rank, held.block, s))
        rows = self.route.rows(self.rank, held.block, columns)
        if state is None:  # the rank's own block makes the state: all of its rows
            rows, columns = self.rows, self.slots
        if not columns:
            return state
        queries, keys = self._queries(rows), self._indices(held.block, columns)
        q, mask = self._slots(self.q, self.rows, rows), self.mask
        if mask is not None and type_of(mask).shape[2] != 1:
            mask = self._slots(mask, self.rows, rows)
        kv = [self._slots(node, held.slots, columns) for node in held.nodes]
        out = type_of(q)
        made = self.builder.call(
            op("block_attention"),
            (q, kv, self.key_mask, mask),
            state_type(
                TensorType(out.dtype, (*out.shape[:3], type_of(self.v).shape[3]), out.layout)
            ),
            why=f"keys of rank {held.block}: {self._visible(queries, keys)}",
            head_dim=type_of(self.k).shape[3],
            queries=queries,
            keys=keys,
            chunk=self.unit,
            limit=self.sequence.length,
            scale=self.call["scale"],
            softcap=self.call["softcap"],
            lower=self.call["lower"],
            upper=self.call["upper"],
        )
        if state is None:
            return made
        return self.builder.call(
            op("merge"), (state, made), accumulator_type(type_of(self.node)),
            start=rows[0] * self.unit,
        )

    def _visible(self, queries: list[Any], keys: list[Any]) -> str:
        relations = {self.route.relation(query, key) for query in queries for key in keys}
        return "all visible" if relations == {"full"} else str(self.route.band)

    def _slots(self, x: fx.Node, have: tuple[int, ...], kept: tuple[int, ...]) -> fx.Node:
        """Some of the chunks of a tensor [.., .., tokens, ..], which lie side by side in it."""
        if kept == have:
            return x
        if (x, kept) not in self.cut:
            self.cut[x, kept] = self._cut(x, have, kept)
        return self.cut[x, kept]

    def _cut(self, x: fx.Node, have: tuple[int, ...], kept: tuple[int, ...]) -> fx.Node:
        chunk, first = self.unit, have.index(kept[0])
        start, end = simplify(first * chunk), simplify((first + len(kept)) * chunk)
        return self.builder.call(
            aten.slice.Tensor, (x, 2, start, end),
            self._local_type(type_of(x), len(kept) * chunk),
        )
