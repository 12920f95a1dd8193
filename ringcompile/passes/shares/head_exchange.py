"""Attention's rows go from tokens to heads, and its results back (DeepSpeed-Ulysses, 2023).

q [B,H,n,D]              cut into U groups of heads                       [B, U, H/U, n, D]
sent [U, n, B, H/U, D]   one dense tensor, group u for rank u: the only copy on the way
came [U, n, B, H/U, D]   tokens of all ranks, which is [U*n, B, H/U, D]   seen as [B, H/U, U*n, D]

Keys and values go in one tensor, side by side as a ring passes them on. Where they go no further,
queries go with them. Results go back in the same order, and are copied where they arrive:

o [B, H/U, U*n, D]       tokens first in memory, so sent as it is         [U, n, B, H/U, D]
came [U, n, B, H/U, D]   each token's heads side by side                  [B, n, U*H/U, D]
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ringcompile.ir.calls import Call
from ringcompile.ir.expr import Size, divide, simplify
from ringcompile.ir.layout import DimLayout, Layout
from ringcompile.ir.nodes import type_of
from ringcompile.ir.types import TensorType, local_shape
from ringcompile.ops.schemas import op
from ringcompile.passes.shares.redistribute import Mover
from ringcompile.passes.views import permuted, reshaped

aten = torch.ops.aten
_AXIS = "ulysses"
_HEADS, _TOKENS = 1, 2
_ROWS = ("q", "k", "v")
_TOKENS_FIRST, _HEADS_FIRST = (2, 0, 1, 3), (1, 2, 0, 3)


@dataclass
class HeadExchange:
    """Writes the exchanges around an attention.

    Attributes:
        mover: writes other redistributions into the same graph.
        waiting: redistributions that are written beside the attention that reads them. Until then
            the builder has no entry for them, so that nothing else can read them by mistake.
    """

    mover: Mover
    waiting: set[fx.Node] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.builder, self.mesh = self.mover.builder, self.mover.mesh

    def takes(self, node: fx.Node) -> bool:
        """Whether a redistribution moves queries, keys or values of attention alone to heads."""
        read = bool(node.users) and all(_as_rows(user, node) for user in node.users)
        return read and _moves(node, _TOKENS, _HEADS)

    def returns(self, node: fx.Node) -> bool:
        """Whether a redistribution moves what attention gives back to tokens."""
        source: fx.Node = node.args[0]  # type: ignore[assignment]
        return source.target is op("attention") and _moves(node, _HEADS, _TOKENS)

    # -- to heads ---------------------------------------------------------------------------------

    def write(self, call: Call) -> None:
        """The exchanges that operands of an attention wait for; one for those of like rows.

        What is sent is ready before the first of them, so that one kernel can compute and copy it.
        """
        here = [
            node for node in dict.fromkeys(call[name] for name in _ROWS) if node in self.waiting
        ]
        self.waiting.difference_update(here)
        alike: dict[Any, list[fx.Node]] = {}
        for node in here:
            alike.setdefault(self._company(node, call), []).append(node)
        in_turn = sorted(alike.values(), key=lambda nodes: nodes[0] is call["q"])
        for nodes, sent in [(nodes, self._sent(nodes)) for nodes in in_turn]:
            self._exchange(nodes, sent)

    @staticmethod
    def _company(node: fx.Node, call: Call) -> Any:
        """Equal for rows that are sent together."""
        type_ = type_of(node)
        passed_on = bool(type_of(call["k"]).layout.dims[_TOKENS])
        return (node is call["q"],) if passed_on else type_.shape[_TOKENS:]

    def _exchange(self, nodes: list[fx.Node], sent: fx.Node) -> None:
        came = self._call(
            op("all_to_all"), (sent,), "tokens to heads", split=0, concat=0, axis=_AXIS
        )
        ways, rows, batch, heads, width = type_of(came).shape
        flat = (simplify(ways * rows), batch, heads, width)
        came = self._call(aten.reshape.default, (came, list(flat)), shape=flat)
        dim, start = _beside(nodes) - 1, 0
        for node in nodes:
            size = self._local(type_of(node))[_HEADS if dim == 2 else 3]
            end, part = simplify(start + size), came
            if len(nodes) > 1:
                shape = (*flat[:dim], size, *flat[dim + 1 :])
                part = self._call(aten.slice.Tensor, (came, dim, start, end), shape=shape)
            part = permuted(self.builder, part, _HEADS_FIRST)
            self.builder.env[node] = self._without_padding(part, node)
            start = end

    def _sent(self, nodes: list[fx.Node]) -> fx.Node:
        """What goes to each rank, in one dense tensor: [ways, n, B, heads/ways, D]."""
        groups = [self._groups(node) for node in nodes]
        if len(groups) == 1:
            return self._dense(groups[0])
        dim, shape = _beside(nodes), list(type_of(groups[0]).shape)
        shape[dim] = simplify(sum(type_of(x).shape[dim] for x in groups))
        return self._call(
            aten.cat.default, (groups, dim), "one exchange for all", shape=tuple(shape)
        )

    def _groups(self, node: fx.Node) -> fx.Node:
        """One rank's tokens of all heads, seen as [ways, n, B, heads/ways, D]."""
        source: fx.Node = node.args[0]  # type: ignore[assignment]
        ways = self.mesh.size(_AXIS)
        batch, heads, rows, width = self._local(type_of(source))
        each = divide(heads, ways)
        assert each is not None, f"{heads} heads over {ways} ranks"
        opened = reshaped(self.builder, self.builder.env[source], (batch, ways, each, rows, width))
        return permuted(self.builder, opened, (1, 3, 0, 2, 4))

    def _without_padding(self, x: fx.Node, node: fx.Node) -> fx.Node:
        """What is whole along the sequence has no padding."""
        type_ = type_of(node)
        if type_.layout.dims[_TOKENS]:
            x.meta["type"] = type_
            return x
        return self.builder.call(
            aten.slice.Tensor, (x, _TOKENS, 0, type_.shape[_TOKENS]), type_, why="without padding"
        )

    # -- back to tokens ---------------------------------------------------------------------------

    def write_back(self, node: fx.Node) -> fx.Node:
        """The exchange of what attention gives."""
        source: fx.Node = node.args[0]  # type: ignore[assignment]
        have, want, ways = type_of(source), type_of(node), self.mesh.size(_AXIS)
        first = TensorType(
            have.dtype, tuple(have.shape[dim] for dim in _TOKENS_FIRST),
            Layout(tuple(have.layout.dims[dim] for dim in _TOKENS_FIRST)),
        )
        x = self.builder.call(
            aten.permute.default, (self.builder.env[source], [*_TOKENS_FIRST]), first
        )
        x = self.mover.padded(x, first, 0, want.layout.dims[_TOKENS])
        batch, heads, rows, width = self._local(want)
        each = self._local(have)[_HEADS]
        x = self._dense(reshaped(self.builder, x, (ways, rows, batch, each, width)))
        came = self._call(
            op("all_to_all"), (x,), node.meta.get("why"), split=0, concat=0, axis=_AXIS
        )
        apart = permuted(self.builder, came, (2, 1, 0, 3, 4))
        x = reshaped(self.builder, apart, (batch, rows, heads, width))
        return self.builder.call(aten.permute.default, (x, [0, 2, 1, 3]), want)

    def _dense(self, x: fx.Node) -> fx.Node:
        return self._call(aten.contiguous.default, (x,))

    def _call(
        self, target: Any, args: tuple[Any, ...], why: str | None = None,
        shape: tuple[Size, ...] | None = None, **how: Any,
    ) -> fx.Node:
        """An op on one rank's tensors; without a shape, its result has that of its operand."""
        like = args[0] if isinstance(args[0], fx.Node) else args[0][0]
        type_ = TensorType.whole(type_of(like).dtype, shape or type_of(like).shape)
        return self.builder.call(target, args, type_, why=why, **how)

    def _local(self, type_: TensorType) -> tuple[Size, ...]:
        return local_shape(type_, self.mesh, self.mover.sequence)


def _beside(nodes: list[fx.Node]) -> int:
    """Along which dim of [ways, n, B, heads, D] rows lie side by side: heads, or their entries."""
    widths = {type_of(node).shape[3] for node in nodes}
    return 3 if len(widths) == 1 else 4


def _moves(node: fx.Node, dim: int, to: int) -> bool:
    """Whether a redistribution takes the last axis that splits one dim to another, and no more."""
    if len(type_of(node).shape) != 4:
        return False
    have, want = (type_of(n).layout.dims for n in (node.args[0], node))  # type: ignore[arg-type]
    return (
        _split_last(have[dim], _AXIS)
        and have[dim][0].axes[:-1] == _axes(want[dim])
        and _split_last(want[to], _AXIS)
        and want[to][0].axes[:-1] == _axes(have[to])
    )


def _as_rows(user: fx.Node, node: fx.Node) -> bool:
    """Whether a node is attention that has another one as queries, keys or values only."""
    if user.target is not op("attention"):
        return False
    return {name for name, x in Call(user).arguments.items() if x is node} <= {*_ROWS}


def _axes(dim: DimLayout) -> tuple[str, ...]:
    return dim[0].axes if len(dim) == 1 else ()


def _split_last(dim: DimLayout, axis: str) -> bool:
    return _axes(dim)[-1:] == (axis,)
