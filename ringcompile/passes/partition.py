"""From global shapes to one rank's share: literals, positions, collectives, attention's row.

The rank stays a symbol: `ring` in an argument is this rank's coordinate on that axis, filled in by
`specialize`. `s` is the true length of the sequence and `n` the length of a rank's share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from ringcompile.ir.calls import Call, with_argument
from ringcompile.ir.expr import coordinate, equal, spelled
from ringcompile.ir.layout import WHOLE, Layout
from ringcompile.ir.nodes import error_at, type_of
from ringcompile.ir.program import Program
from ringcompile.ir.rules import find_rule
from ringcompile.ir.types import SequenceSplit, TensorType, local_shape, state_type
from ringcompile.ops.schemas import op
from ringcompile.passes.base import Builder, Pass
from ringcompile.passes.scan import Scan

aten = torch.ops.aten


@dataclass(frozen=True)
class Partition(Pass):
    """Make every node local.

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
        self.program, self.sequence = program, sequence
        self.builder = Builder()
        self.positions: fx.Node | None = None

    def run(self) -> Program:
        for node in self.program.graph.nodes:
            self.builder.at(node)
            step = _STEPS.get(str(node.target), _Partitioner._local)
            self.builder.env[node] = (
                step(self, node) if node.op == "call_function" else self.builder.copy(node)
            )
        return self.program.with_graph(self.builder.graph)

    def _shape(self, type_: TensorType) -> list[Any]:
        return spelled(local_shape(type_, self.program.mesh, self.sequence))

    def _local(self, node: fx.Node) -> fx.Node:
        """The same op on shares; the argument that spells out a shape is written anew."""
        rule = find_rule(node.target)
        new = self.builder.copy(node)
        if rule is not None and rule.shape_argument is not None:
            new.args, new.kwargs = with_argument(
                node, new.args, dict(new.kwargs), rule.shape_argument, self._shape(type_of(node))
            )
        return new

    def _positions(self) -> fx.Node:
        """This rank's positions, made once."""
        if self.positions is None:
            sequence = self.sequence
            layout = Layout.split(1, 0, sequence.length, sequence.names, sequence=True)
            self.positions = self.builder.call(
                op("positions"),
                (list(sequence.own_chunks()),),
                TensorType(torch.int64, (sequence.length,), layout),
                chunk=sequence.chunk,
                limit=sequence.length,
                why="positions of this rank's tokens",
            )
        return self.positions

    def _arange(self, node: fx.Node) -> fx.Node:
        type_, call = type_of(node), Call(node)
        if type_.layout.is_whole:
            return self.builder.copy(node)
        if len(type_.layout.dims[0]) > 1:  # `arange(2 * s)` in pieces: not one run of positions
            whole = self.builder.copy(node)
            whole.meta["type"] = TensorType.whole(type_.dtype, type_.shape)
            return self._move(node, whole, 0, type_, gather=False)
        here = self._positions()
        if call["step"] != 1:
            here = self.builder.call(aten.mul.Tensor, (here, call["step"]), type_of(here))
        if not equal(call["start"], 0):
            here = self.builder.call(aten.add.Tensor, (here, call["start"]), type_of(here))
        if type_.dtype != torch.int64:
            here = self.builder.call(aten.to.dtype, (here, type_.dtype), type_)
        return here

    def _cumsum(self, node: fx.Node) -> fx.Node:
        """A running sum along a split dim: each chunk's own, and the total of all before it."""
        call, type_ = Call(node), type_of(node)
        dim = call["dim"] % len(type_.shape)
        if not type_.layout.dims[dim]:
            return self.builder.copy(node)
        return Scan(self.builder, self.sequence, self._shape).write(
            self.builder.env[call["self"]], dim, type_
        )

    def _redistribute(self, node: fx.Node) -> fx.Node:
        source, target = type_of(node.args[0]), type_of(node)  # type: ignore[arg-type]
        x = self.builder.env[node.args[0]]  # type: ignore[index]
        have = source.layout
        changes = [
            (dim, old, new)
            for dim, (old, new) in enumerate(
                zip(source.layout.dims, target.layout.dims, strict=True)
            )
            if old != new
        ]
        # What is gathered must be gathered while all ranks still hold the same of the other dims.
        for dim, old, new in sorted(changes, key=lambda change: not change[1]):
            if old and new:
                raise error_at(node, "a split dim would have to be split another way")
            have = Layout((*have.dims[:dim], new, *have.dims[dim + 1 :]))
            x = self._move(node, x, dim, target.with_layout(have), gather=bool(old))
        return x

    def _move(
        self, node: fx.Node, x: fx.Node, dim: int, type_: TensorType, gather: bool
    ) -> fx.Node:
        atoms = (type_of(x) if gather else type_).layout.dims[dim]
        if len(atoms) == 1:
            return self._move_atom(x, dim, type_, gather, node.meta.get("why"))
        # A dim of several atoms is taken apart, its split atom moved, and put together again.
        shape, layout = type_.shape, type_.layout
        sizes = tuple(atom.size for atom in atoms)
        where = next(i for i, atom in enumerate(atoms) if atom.axes)
        apart = tuple((atom,) if atom.axes else WHOLE for atom in atoms)
        open_shape = (*shape[:dim], *sizes, *shape[dim + 1 :])

        def opened(split: bool) -> TensorType:
            middle = apart if split else (WHOLE,) * len(atoms)
            dims = (*layout.dims[:dim], *middle, *layout.dims[dim + 1 :])
            return TensorType(type_.dtype, open_shape, Layout(dims))

        x = self._reshape(x, opened(split=gather))
        x = self._move_atom(x, dim + where, opened(split=not gather), gather, node.meta.get("why"))
        return self._reshape(x, type_)

    def _reshape(self, x: fx.Node, type_: TensorType) -> fx.Node:
        return self.builder.call(aten.reshape.default, (x, self._shape(type_)), type_)

    def _move_atom(
        self, x: fx.Node, dim: int, type_: TensorType, gather: bool, why: str | None
    ) -> fx.Node:
        if not gather:
            return self.builder.call(
                aten.index_select.default, (x, dim, self._positions()), type_, why=why
            )
        return self.builder.call(
            op("gather"),
            (x,),
            type_,
            why=why,
            dim=dim,
            axis=self.sequence.axis,
            limit=self.sequence.length,
        )

    def _attention(self, node: fx.Node) -> fx.Node:
        call = Call(node)
        args = self.builder.mapped(tuple(call[name] for name in _ATTENTION_OPERANDS))
        q, k = (type_of(n).layout.dims[2] for n in args[:2])
        how = {name: call[name] for name in ("scale", "softcap", "lower", "upper")}
        if not q and not k:
            return self.builder.copy(node)
        if k:
            new = self.builder.call(
                op("ring_attention"), args, node.meta["type"], name=node.name,
                axis=self.sequence.axis, **how,
            )
            return _with_mask_kind(new, node)
        return self._rows_only(node, args, how)

    def _rows_only(self, node: fx.Node, args: tuple[Any, ...], how: dict[str, Any]) -> fx.Node:
        """Split queries over keys that every rank has whole."""
        q, k, v, key_mask, mask, sink = args
        sequence, type_ = self.sequence, type_of(node)
        state = self.builder.call(
            op("block_attention"),
            (q, [k, v], key_mask, mask),
            state_type(type_),
            head_dim=type_of(q).shape[3],
            queries=list(sequence.chunks(coordinate(sequence.axis))),
            keys=None,
            chunk=sequence.chunk,
            limit=type_of(k).shape[2],
            **how,
        )
        _with_mask_kind(state, node)
        return self.builder.call(
            op("finish"), (state, sink), type_, name=node.name, dtype=type_.dtype
        )


def _with_mask_kind(new: fx.Node, node: fx.Node) -> fx.Node:
    if "mask_kind" in node.meta:
        new.meta["mask_kind"] = node.meta["mask_kind"]
    return new


_ATTENTION_OPERANDS = ("q", "k", "v", "key_mask", "mask", "sink")
_STEPS = {
    "aten.cumsum.default": _Partitioner._cumsum,
    "aten.arange.start_step": _Partitioner._arange,
    "ringcompile.redistribute.default": _Partitioner._redistribute,
    "ringcompile.attention.default": _Partitioner._attention,
}
