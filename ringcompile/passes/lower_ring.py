"""Write ring attention out as block attention, transfers and merges, for one rank.

Rank r starts with its own keys and values. In step t it works on the block that rank r - t started
with, while it passes that block on to rank r + 1. What a rank cannot see it does not compute, and a
block travels only as far as some rank still needs it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import fx

from ringcompile.ir.calls import Call
from ringcompile.ir.expr import Size, bind
from ringcompile.ir.layout import WHOLE, Layout
from ringcompile.ir.program import Program, type_of
from ringcompile.ir.types import (
    SequenceSplit,
    TensorType,
    accumulator_type,
    local_shape,
    state_type,
)
from ringcompile.ops.blocks import Band
from ringcompile.ops.schemas import op
from ringcompile.passes.base import Builder, Pass

aten = torch.ops.aten


@dataclass(frozen=True)
class LowerRing(Pass):
    """Expand `ring_attention` of a specialized program.

        o = ring_attention(q, k, v, axis=ring)
    ->  kv = pack(k, v)
        t = shift_start(kv, to=r + 1, source=r - 1)
        state = block_attention(q, kv, keys=[r])
        kv = wait(t)                                    # and so on, with merge(state, block)
        o = finish(state)
    """

    name: ClassVar[str] = "lower-ring"

    def run(self, program: Program) -> Program:
        assert program.sequence is not None and program.coordinates is not None
        builder = Builder()
        for node in program.graph.nodes:
            builder.at(node)
            if node.target is op("ring_attention"):
                builder.env[node] = _Ring(program, node, builder).write()
            else:
                builder.env[node] = builder.copy(node)
        return program.with_graph(builder.graph)


@dataclass(frozen=True)
class Route:
    """Who sees and who sends what in a ring, from positions alone.

    Attributes:
        sequence: how the positions are divided.
        band: which keys a query sees.
        chunk: the length of a chunk where it is known.
    """

    sequence: SequenceSplit
    band: Band
    chunk: int | None = None

    @lru_cache(maxsize=4096)  # noqa: B019  (a route is a small value, the same for all layers)
    def seen(self, rank: int, block: int) -> tuple[list[int], list[int]]:
        """Which of the rank's chunks see some of the block, and which of the block's are seen."""
        queries, keys = self.sequence.chunks(rank), self.sequence.chunks(block)

        def sees(query: Any, key: Any) -> bool:
            return self.band.chunk_relation(query, key, self.chunk) != "empty"

        rows = [i for i, q in enumerate(queries) if any(sees(q, k) for k in keys)]
        columns = [j for j, k in enumerate(keys) if any(sees(q, k) for q in queries)]
        return rows, columns

    @lru_cache(maxsize=4096)  # noqa: B019
    def hops(self, block: int) -> int:
        """How many ranks down the ring the block has to travel."""
        ranks = self.sequence.num_ranks
        reach = (hop for hop in range(ranks) if self.seen((block + hop) % ranks, block)[0])
        return max(reach, default=0)

    def sends(self, rank: int, step: int) -> bool:
        """Whether the rank passes on, in this step, the block that it holds."""
        return self.hops((rank - step) % self.sequence.num_ranks) > step


class _Ring:
    def __init__(self, program: Program, node: fx.Node, builder: Builder) -> None:
        self.program, self.node, self.builder = program, node, builder
        self.call = Call(node)
        self.axis: str = self.call["axis"]
        assert program.sequence is not None and program.coordinates is not None
        self.sequence = program.sequence
        self.rank = program.coordinates[self.axis]
        chunk = bind(self.sequence.chunk, program.lengths)
        self.route = Route(
            self.sequence,
            Band(self.call["lower"], self.call["upper"]),
            chunk if isinstance(chunk, int) else None,
        )
        self.q, k, v = (builder.env[self.call[name]] for name in ("q", "k", "v"))
        self.key_mask, self.mask = (
            builder.env[self.call[name]] if self.call[name] is not None else None
            for name in ("key_mask", "mask")
        )
        kv = type_of(k)
        self.head_dim = kv.shape[3]
        self.kv_type = TensorType(
            kv.dtype, (*kv.shape[:3], kv.shape[3] + type_of(v).shape[3]), kv.layout
        )
        self.kv = builder.call(op("pack"), (k, v), self.kv_type, why="one transfer for both")

    def write(self) -> fx.Node:
        """All steps; returns the attention output."""
        ranks, state = self.sequence.num_ranks, None
        kv: fx.Node | None = self.kv
        for step in range(ranks):
            transfer = self._start(kv, step) if step < ranks - 1 else None
            block = (self.rank - step) % ranks
            if kv is not None and (step == 0 or self.route.seen(self.rank, block)[0]):
                state = self._attend(kv, block, state)
            kv = self._wait(transfer) if transfer is not None else None
        assert state is not None
        return self.builder.call(
            op("finish"), (state,), self.node.meta["type"], name=self.node.name,
            dtype=type_of(self.node).dtype,
        )

    def _start(self, kv: fx.Node | None, step: int) -> fx.Node | None:
        ranks = self.sequence.num_ranks
        before = (self.rank - 1) % ranks
        to = (self.rank + 1) % ranks if self.route.sends(self.rank, step) else None
        source = before if self.route.sends(before, step) else None
        if to is None and source is None:
            return None
        none = TensorType.whole(self.kv_type.dtype, (0,))
        return self.builder.call(
            op("shift_start"),
            (kv if to is not None else self.kv,),
            self.kv_type if source is not None else none,
            axis=self.axis,
            to=to,
            source=source,
        )

    def _wait(self, transfer: fx.Node) -> fx.Node | None:
        arrived = self.builder.call(op("wait"), (transfer,), type_of(transfer))
        return arrived if transfer.kwargs["source"] is not None else None

    def _attend(self, kv: fx.Node, block: int, state: fx.Node | None) -> fx.Node:
        """Attention over what is seen of one block, merged into the state so far."""
        rows, columns = self.route.seen(self.rank, block)
        if state is None:  # the rank's own block makes the state: all of its rows
            rows = columns = list(range(self.sequence.chunks_per_rank))
        queries, keys = self.sequence.chunks(self.rank), self.sequence.chunks(block)
        q, mask = self._chunks(self.q, rows), self.mask
        if mask is not None and type_of(mask).shape[2] != 1:
            mask = self._chunks(mask, rows)
        out = type_of(q)
        out_type = TensorType(
            out.dtype, (*out.shape[:3], type_of(self.node).shape[3]), out.layout
        )
        made = self.builder.call(
            op("block_attention"),
            (q, self._chunks(kv, columns), self.key_mask, mask),
            state_type(out_type),
            why=f"keys of rank {block}: {self._relation(rows, columns, queries, keys)}",
            head_dim=self.head_dim,
            queries=[queries[i] for i in rows],
            keys=[keys[j] for j in columns],
            chunk=self.sequence.chunk,
            limit=self.sequence.length,
            scale=self.call["scale"],
            lower=self.call["lower"],
            upper=self.call["upper"],
        )
        if state is None:
            return made
        return self.builder.call(
            op("merge"), (state, made), accumulator_type(type_of(self.node)),
            start=rows[0] * self.sequence.chunk,
        )

    def _relation(self, rows: list[int], columns: list[int], queries: Any, keys: Any) -> str:
        relations = {
            self.route.band.chunk_relation(queries[i], keys[j], self.route.chunk)
            for i in rows
            for j in columns
        }
        return "all visible" if relations == {"full"} else str(self.route.band)

    def _chunks(self, x: fx.Node, kept: list[int]) -> fx.Node:
        """The given chunks of a share [.., .., tokens, ..], which lie side by side."""
        if len(kept) == self.sequence.chunks_per_rank:
            return x
        chunk = self.sequence.chunk
        start, end = kept[0] * chunk, (kept[-1] + 1) * chunk
        local = local_shape(type_of(x), self.program.mesh, self.sequence)
        shape: tuple[Size, ...] = (*local[:2], end - start, local[3])
        return self.builder.call(
            aten.slice.Tensor, (x, 2, start, end),
            TensorType(type_of(x).dtype, shape, Layout((WHOLE,) * 4)),
        )
