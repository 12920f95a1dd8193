"""Collectives along dim 0 alone: tensors lie in memory as they are sent and as they come.

Libraries such as NCCL send a part of memory to each rank, and put what comes one behind the other.
So the dim that is cut or joined becomes the first one here, and the copies that this may take are
ops of the program: one of what is sent, and one where chunks that come in the order of ranks are
wanted in the order of positions. What reads the result sees its dims as they were, in a view.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from ringcompile.ir.calls import target_name
from ringcompile.ir.communication import ALL_TO_ALL, GATHER, REDUCE_SCATTER
from ringcompile.ir.expr import Size, simplify
from ringcompile.ir.nodes import type_of
from ringcompile.ir.program import Program
from ringcompile.ir.types import TensorType, local_shape
from ringcompile.mesh import Mesh
from ringcompile.ops.schemas import op
from ringcompile.passes.base import Builder, Pass

aten = torch.ops.aten


@dataclass(frozen=True)
class DenseExchange(Pass):
    """Bring the dim that a collective cuts or joins to the front, so that nothing is copied in it.

        y = gather(x, dim=2)           ->  y = permute(gather(contiguous(permute(x)), dim=0))
        y = reduce_scatter(x, dim=1)   ->  likewise
        y = all_to_all(x, split=2, concat=1)
    ->  y = permute(reshape(all_to_all(contiguous(permute(reshape(x))), split=0, concat=0)))
    """

    name: ClassVar[str] = "dense-exchange"

    def run(self, program: Program) -> Program:
        """Rewrite each collective on its own; other nodes are copied."""
        if not any(map(_is_along_another_dim, program.graph.nodes)):
            return program
        builder = Builder()
        for node in program.graph.nodes:
            builder.at(node)
            builder.env[node] = (
                _Dense(program, node, builder).write() if _is_along_another_dim(node)
                else builder.copy(node)
            )
        return program.with_graph(builder.graph)


def _is_along_another_dim(node: fx.Node) -> bool:
    """Whether a collective copies what it sends, or what comes."""
    if target_name(node.target) not in _WRITERS:
        return False
    how = node.kwargs
    return how.get("limit") is not None or any(how.get(x) for x in ("dim", "split", "concat"))


class _Dense:
    """Writes one collective."""

    def __init__(self, program: Program, node: fx.Node, builder: Builder) -> None:
        assert program.mesh is not None
        self.program, self.node, self.builder = program, node, builder
        self.mesh: Mesh = program.mesh
        self.source: fx.Node = node.args[0]  # type: ignore[assignment]
        self.x: fx.Node = builder.env[self.source]
        self.axis = str(node.kwargs["axis"])
        self.ways = self.mesh.size(self.axis)
        self.shape = self._local(type_of(self.source))
        self.dtype = type_of(node).dtype

    def write(self) -> fx.Node:
        """The result, under the collective's name."""
        return _WRITERS[target_name(self.node.target)](self)

    def gather(self) -> fx.Node:
        """The share of every rank along a dim, in order of position."""
        dim, limit = self._dim("dim"), self.node.kwargs["limit"]
        order = _in_front(len(self.shape), dim)
        x = self._in_order(self.x, self.shape, order)
        share = self._seen(self.shape, order)
        came = (simplify(share[0] * self.ways), *share[1:])
        x = self._call(
            op("gather"), (x,), came, why=self.node.meta.get("why"), dim=0, axis=self.axis,
            limit=None,
        )
        if limit is not None:
            x = self._by_position(x, came)
            whole = (self._local(type_of(self.node))[dim], *share[1:])
            x = self._call(aten.slice.Tensor, (x, 0, 0, limit), whole)
        return self._back(x, order)

    def _by_position(self, x: fx.Node, shape: tuple[Size, ...]) -> fx.Node:
        """The chunks of all ranks, in order."""
        assert self.program.sequence is not None
        level = self.program.sequence.level(self.axis.split(","))
        held = [int(chunk) for rank in range(level.num_ranks) for chunk in level.chunks(rank)]
        if held == sorted(held):
            return x
        return self._call(op("in_order"), (x, held), shape, why="by position")

    def reduce_scatter(self) -> fx.Node:
        """A rank's part of the sum along a dim."""
        order = _in_front(len(self.shape), self._dim("dim"))
        x = self._in_order(self.x, self.shape, order)
        part = self._seen(self._local(type_of(self.node)), order)
        x = self._call(
            op("reduce_scatter"), (x,), part, why=self.node.meta.get("why"), dim=0, axis=self.axis
        )
        return self._back(x, order)

    def all_to_all(self) -> fx.Node:
        """A part of one dim for each rank, and theirs joined along another."""
        split, concat = self._dim("split"), self._dim("concat")
        each = simplify(self._local(type_of(self.node))[split])
        if split == concat:
            each = simplify(each / self.ways)
        opened = (*self.shape[:split], self.ways, each, *self.shape[split + 1 :])
        x = self._call(aten.reshape.default, (self.x, list(opened)), opened)
        joined = concat + (concat >= split)  # where the dim is once that of ranks is apart
        rest = [dim for dim in range(len(opened)) if dim not in (split, joined)]
        order = [split, joined, *rest]
        x = self._in_order(x, opened, order)
        came = self._seen(opened, order)
        x = self._call(
            op("all_to_all"), (x,), came, why=self.node.meta.get("why"), split=0, concat=0,
            axis=self.axis,
        )
        flat = (simplify(came[0] * came[1]), *came[2:])
        x = self._call(aten.reshape.default, (x, list(flat)), flat)
        return self._back(x, [dim - (dim > split) for dim in order[1:]])

    # -- parts ------------------------------------------------------------------------------------

    def _dim(self, name: str) -> int:
        dim = self.node.kwargs[name]
        assert isinstance(dim, int)
        return dim

    def _in_order(self, x: fx.Node, shape: tuple[Size, ...], order: Sequence[int]) -> fx.Node:
        """A dense tensor with its dims in another order."""
        seen = self._seen(shape, order)
        if list(order) != sorted(order):
            x = self._call(aten.permute.default, (x, list(order)), seen)
        return self._call(aten.contiguous.default, (x,), seen)

    def _back(self, x: fx.Node, order: Sequence[int]) -> fx.Node:
        """The result, its dims seen in the order that they had."""
        back = [order.index(dim) for dim in range(len(order))]
        return self.builder.call(
            aten.permute.default, (x, back), type_of(self.node), name=self.node.name
        )

    @staticmethod
    def _seen(shape: Sequence[Size], order: Sequence[int]) -> tuple[Size, ...]:
        return tuple(shape[dim] for dim in order)

    def _call(
        self, target: Any, args: tuple[Any, ...], shape: tuple[Size, ...], why: str | None = None,
        **how: Any,
    ) -> fx.Node:
        return self.builder.call(target, args, TensorType.whole(self.dtype, shape), why=why, **how)

    def _local(self, type_: TensorType) -> tuple[Size, ...]:
        return local_shape(type_, self.mesh, self.program.sequence)


def _in_front(rank: int, dim: int) -> list[int]:
    """All dims, one of them first."""
    return [dim, *(other for other in range(rank) if other != dim)]


_WRITERS: dict[str, Callable[[_Dense], fx.Node]] = {
    GATHER: _Dense.gather,
    REDUCE_SCATTER: _Dense.reduce_scatter,
    ALL_TO_ALL: _Dense.all_to_all,
}
