"""From global shapes to one rank's share: literals, positions, collectives, attention's row.

The rank stays a symbol: `ring` in an argument is this rank's coordinate on that axis, filled in by
`specialize`. `s` is the true length of the sequence and `n` the length of a rank's share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from ringcompile.axes import AXES
from ringcompile.errors import RingCompileError
from ringcompile.ir.calls import Call, target_name, with_argument
from ringcompile.ir.expr import coordinate_on, simplify, spelled
from ringcompile.ir.layout import WHOLE, Layout
from ringcompile.ir.nodes import type_of
from ringcompile.ir.program import Program
from ringcompile.ir.rules import find_rule
from ringcompile.ir.types import SequenceSplit, TensorType, local_shape, local_size, state_type
from ringcompile.ops.running import ALONG, SCANS, dim_along
from ringcompile.ops.schemas import op
from ringcompile.passes.base import Builder, Pass, refuse
from ringcompile.passes.ranges import range_at
from ringcompile.passes.sequence.attention_rows import ATTENTION_OPERANDS
from ringcompile.passes.shares.head_exchange import HeadExchange
from ringcompile.passes.shares.redistribute import Mover
from ringcompile.passes.shares.scan import (
    Chunks,
    write_linear_attention,
    write_recurrence,
    write_scan,
)

aten = torch.ops.aten


@dataclass(frozen=True)
class Partition(Pass):
    """Turn the program of the whole model into that of one rank's shares, with communication.

    y = reshape(x, [1, s, 4, 16])          ->  y = reshape(x, [1, n, 4, 16])
    p = arange(0, s)         i64[s/ring]   ->  p = positions([ring], chunk=n, limit=s)
    y = redistribute(x)      [s] to [s/ring]   y = index_select(x, 0, p)
    y = redistribute(x)      [s/ring] to [s]   y = gather(x, axis=ring)
    o = attention(q, k, v)   k, v split    ->  o = ring_attention(q, k, v, axis=ring)
    """

    name: ClassVar[str] = "partition"

    def run(self, program: Program) -> Program:
        """Rewrite by the table `_STEPS`; an op not in it stays the same op, on shares."""
        assert program.sequence is not None
        return _Partitioner(program, program.sequence).run()


class _Partitioner:
    def __init__(self, program: Program, sequence: SequenceSplit) -> None:
        assert program.mesh is not None
        self.program, self.mesh, self.sequence = program, program.mesh, sequence
        self.builder = Builder()
        self.mover = Mover(self.builder, self.mesh, sequence, self._shape)
        self.exchange = HeadExchange(self.mover)

    def run(self) -> Program:
        for node in self.program.graph.nodes:
            self.builder.at(node)
            if node.target is op("redistribute") and self.exchange.takes(node):
                self.exchange.waiting.add(node)  # written beside its attention, with its neighbours
                continue
            step = _STEPS.get(target_name(node.target), _Partitioner._local)
            self.builder.env[node] = (
                step(self, node) if node.op == "call_function" else self.builder.copy(node)
            )
        assert not self.exchange.waiting, f"{self.exchange.waiting} are read by no attention"
        return self.program.with_graph(self.builder.graph)

    def _shape(self, type_: TensorType) -> list[Any]:
        return spelled(local_shape(type_, self.program.mesh, self.sequence))

    def _local(self, node: fx.Node) -> fx.Node:
        """The same op on shares; the argument that spells out a shape is written anew."""
        rule = find_rule(node.target)
        if rule is None or rule.shape_argument is None:
            return self.builder.copy(node)
        args, kwargs = self.builder.mapped((node.args, node.kwargs))
        shape = self._shape(type_of(node))
        return self.builder.copy(
            node, with_argument(node, args, kwargs, rule.shape_argument, shape)
        )

    def _arange(self, node: fx.Node) -> fx.Node:
        type_, call = type_of(node), Call(node)
        if type_.layout.is_whole:
            return self.builder.copy(node)
        atoms = type_.layout.dims[0]
        if len(atoms) > 1 or not atoms[0].sequence:  # `arange(2 * s)`: not one run of positions
            whole = self.builder.copy(node)
            whole.meta["type"] = TensorType.whole(type_.dtype, type_.shape)
            return self.mover.move(whole, type_of(whole), type_, None)
        here = self.mover.positions(atoms[0])
        return range_at(self.builder, here, call, type_)

    def _scan(self, node: fx.Node) -> fx.Node:
        """A scan along a split dim: each chunk's own, and the total of all before it."""
        call, type_ = Call(node), type_of(node)
        dim = dim_along(node) % len(type_.shape)
        if not type_.layout.dims[dim]:
            return self.builder.copy(node)
        atoms = type_.layout.dims[dim]
        assert any(atom.sequence for atom in atoms), f"%{node.name} sums features"
        along = next(atom for atom in atoms if atom.axes)
        chunks = Chunks(self.builder, self.sequence.of(along.size), self._shape, dim, atoms)
        operands = [self.builder.env[operand] for operand in call.operands]
        if node.target is op("recurrence"):
            return write_recurrence(chunks, operands[0], operands[1], type_)
        if node.target is op("linear_attention"):
            named = {name: self.builder.env[x] for name, x in call.arguments.items() if x}
            return write_linear_attention(chunks, named, type_)
        return write_scan(chunks, SCANS[target_name(node.target)], operands[0], type_)

    def _redistribute(self, node: fx.Node) -> fx.Node:
        source: fx.Node = node.args[0]  # type: ignore[assignment]
        if self.exchange.returns(node):
            return self.exchange.write_back(node)
        try:
            return self.mover.move(
                self.builder.env[source], type_of(source), type_of(node), node.meta.get("why")
            )
        except RingCompileError as error:
            raise refuse(node, error) from None

    def _embedding(self, node: fx.Node) -> fx.Node:
        """Rows of a table of which each rank has a part; those of other ranks are terms of 0."""
        table, index = (self.builder.env[n] for n in Call(node).operands[:2])
        rows = type_of(table).layout.dims[0]
        if not type_of(node).layout.partial:
            return self.builder.copy(node)
        count = local_size(rows[0], self.mesh, self.sequence)
        assert count is not None
        start = simplify(coordinate_on(dict(self.mesh.axes), rows[0].axes) * count)
        where, here = type_of(index), replace(type_of(index), dtype=torch.bool)

        def call(target: Any, *args: Any, type_: TensorType = where) -> fx.Node:
            return self.builder.call(target, args, type_)

        index = call(aten.sub.Scalar, index, start)
        outside = call(
            aten.logical_or.default,
            call(aten.lt.Scalar, index, 0, type_=here),
            call(aten.ge.Scalar, index, count, type_=here),
            type_=here,
        )
        index = call(aten.clamp.default, index, 0, simplify(count - 1))
        found = self.builder.call(aten.embedding.default, (table, index), type_of(node))
        opened = TensorType(
            torch.bool, (*where.shape, 1), Layout((*where.layout.dims, WHOLE))
        )
        outside = self.builder.call(
            aten.reshape.default, (outside, self._shape(opened)), opened
        )
        return self.builder.call(
            aten.masked_fill.Scalar, (found, outside, 0), type_of(node), name=node.name,
            why="rows that other ranks have",
        )

    def _attention(self, node: fx.Node) -> fx.Node:
        call = Call(node)
        self.exchange.write(call)
        args = self.builder.mapped(tuple(call[name] for name in ATTENTION_OPERANDS))
        q, k = (type_of(call[name]).layout.dims[2] for name in ("q", "k"))
        how = {name: call[name] for name in ("scale", "softcap", "lower", "upper")}
        if not q and not k:
            return self.builder.copy(node)
        if k:
            new = self.builder.call(
                op("ring_attention"), args, node.meta["type"], name=node.name,
                **_around(k[0].axes), **how,
            )
            return _with_mask_kind(new, node)
        return self._rows_only(node, args, how)

    def _rows_only(self, node: fx.Node, args: tuple[Any, ...], how: dict[str, Any]) -> fx.Node:
        """Split queries over keys that every rank has whole."""
        q, k, v, key_mask, mask, sink = args
        type_ = type_of(node)
        level = self.sequence.at(type_of(q).layout.dims[2][0])
        state = self.builder.call(
            op("block_attention"),
            (q, [k, v], key_mask, mask),
            state_type(type_),
            head_dim=type_of(q).shape[3],
            queries=list(level.own_chunks()),
            keys=None,
            chunk=level.chunk,
            limit=type_of(k).shape[2],
            **how,
        )
        _with_mask_kind(state, node)
        return self.builder.call(
            op("finish"), (state, sink), type_, name=node.name, dtype=type_.dtype
        )


def _around(axes: Sequence[str]) -> dict[str, str]:
    """Along which axes keys pass from rank to rank, and along which queries are gathered."""
    tiles = [axis for axis in axes if AXES[axis].gathers_queries]
    rest = [axis for axis in axes if axis not in tiles] or ["ring"]  # of one rank, if there is none
    return {"axis": ",".join(rest), **({"tile": tiles[0]} if tiles else {})}


def _with_mask_kind(new: fx.Node, node: fx.Node) -> fx.Node:
    if "mask_kind" in node.meta:
        new.meta["mask_kind"] = node.meta["mask_kind"]
    return new


_STEPS = {
    "aten.embedding.default": _Partitioner._embedding,
    **dict.fromkeys(ALONG, _Partitioner._scan),
    "aten.arange.start_step": _Partitioner._arange,
    "ringcompile.redistribute.default": _Partitioner._redistribute,
    "ringcompile.attention.default": _Partitioner._attention,
}
