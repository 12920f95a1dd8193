"""Queries, keys and values go from tokens to heads in one exchange (DeepSpeed-Ulysses, 2023).

q [B,H,n,D], k and v [B,G,n,D]   each cut into U groups of heads, side by side:
packed [B, U, (H+2G)/U, n, D]    group u goes to rank u, and tokens come from all ranks
packed [B, (H+2G)/U, U*n, D]     taken apart into q, k and v of a rank's heads
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ringcompile.ir.calls import Call
from ringcompile.ir.expr import Size, divide, simplify
from ringcompile.ir.layout import DimLayout
from ringcompile.ir.nodes import type_of
from ringcompile.ir.types import SequenceSplit, TensorType, local_shape
from ringcompile.mesh import Mesh
from ringcompile.ops.schemas import op
from ringcompile.passes.base import Builder

aten = torch.ops.aten
_AXIS = "ulysses"
_HEADS, _TOKENS = 1, 2
_ROWS = ("q", "k", "v")


@dataclass
class HeadExchange:
    """Writes the exchanges of an attention's operands.

    Attributes:
        builder: the graph that is written.
        mesh: the mesh.
        sequence: how the sequence is divided.
        waiting: redistributions that are written beside the attention that reads them. Until then
            the builder has no entry for them, so that nothing else can read them by mistake.
    """

    builder: Builder
    mesh: Mesh
    sequence: SequenceSplit
    waiting: set[fx.Node] = field(default_factory=set)

    def takes(self, node: fx.Node) -> bool:
        """Whether a redistribution moves queries, keys or values of attention alone to heads."""
        read = bool(node.users) and all(_as_rows(user, node) for user in node.users)
        if not read or len(type_of(node).shape) != 4:
            return False
        have, want = (type_of(n).layout.dims for n in (node.args[0], node))  # type: ignore[arg-type]
        return (
            _split_last(have[_TOKENS], _AXIS)
            and have[_TOKENS][0].axes[:-1] == _axes(want[_TOKENS])
            and _split_last(want[_HEADS], _AXIS)
            and want[_HEADS][0].axes[:-1] == _axes(have[_HEADS])
        )

    def write(self, call: Call) -> None:
        """The exchanges that operands of an attention wait for; one for those of like rows."""
        here = [
            node for node in dict.fromkeys(call[name] for name in _ROWS) if node in self.waiting
        ]
        self.waiting.difference_update(here)
        alike: dict[Any, list[fx.Node]] = {}
        for node in here:
            alike.setdefault(type_of(node).shape[2:], []).append(node)
        for nodes in alike.values():
            self._exchange(nodes)

    def _exchange(self, nodes: list[fx.Node]) -> None:
        ways = self.mesh.size(_AXIS)
        packed = [self._grouped(node, ways) for node in nodes]
        x = packed[0]
        if len(packed) > 1:
            sizes = [type_of(n).shape for n in packed]
            shape = (*sizes[0][:2], simplify(sum(s[2] for s in sizes)), *sizes[0][3:])
            x = self._call(aten.cat.default, (packed, 2), nodes[0], shape, "one exchange for all")
        batch, _, heads, rows, width = type_of(x).shape
        gathered = (batch, 1, heads, simplify(rows * ways), width)
        x = self._call(
            op("all_to_all"), (x,), nodes[0], gathered, "tokens to heads",
            split=1, concat=3, axis=_AXIS,
        )
        flat = (batch, heads, gathered[3], width)
        x = self._call(aten.reshape.default, (x, list(flat)), nodes[0], flat)
        start: Size = 0
        for node in nodes:
            end = simplify(start + self._local(type_of(node))[_HEADS])
            part = x
            if len(nodes) > 1:
                shape = (batch, simplify(end - start), *flat[2:])
                part = self._call(aten.slice.Tensor, (x, _HEADS, start, end), node, shape)
            self.builder.env[node] = self._without_padding(part, node)
            start = end

    def _grouped(self, node: fx.Node, ways: int) -> fx.Node:
        """One rank's tokens of all heads, [B, ways, heads/ways, n, D]."""
        source: fx.Node = node.args[0]  # type: ignore[assignment]
        batch, heads, rows, width = self._local(type_of(source))
        each = divide(heads, ways)
        assert each is not None, f"{heads} heads over {ways} ranks"
        shape = (batch, ways, each, rows, width)
        x = self.builder.env[source]
        return self._call(aten.reshape.default, (x, list(shape)), node, shape)

    def _without_padding(self, x: fx.Node, node: fx.Node) -> fx.Node:
        """What is whole along the sequence has no padding."""
        type_ = type_of(node)
        if type_.layout.dims[_TOKENS]:
            x.meta["type"] = type_
            return x
        return self.builder.call(
            aten.slice.Tensor, (x, _TOKENS, 0, type_.shape[_TOKENS]), type_, why="without padding"
        )

    def _call(
        self, target: Any, args: tuple[Any, ...], node: fx.Node, shape: tuple[Size, ...],
        why: str | None = None, **how: Any,
    ) -> fx.Node:
        type_ = TensorType.whole(type_of(node).dtype, shape)
        return self.builder.call(target, args, type_, why=why, **how)

    def _local(self, type_: TensorType) -> tuple[Size, ...]:
        return local_shape(type_, self.mesh, self.sequence)


def _as_rows(user: fx.Node, node: fx.Node) -> bool:
    """Whether a node is attention that has another one as queries, keys or values only."""
    if user.target is not op("attention"):
        return False
    return {name for name, x in Call(user).arguments.items() if x is node} <= {*_ROWS}


def _axes(dim: DimLayout) -> tuple[str, ...]:
    return dim[0].axes if len(dim) == 1 else ()


def _split_last(dim: DimLayout, axis: str) -> bool:
    return _axes(dim)[-1:] == (axis,)
