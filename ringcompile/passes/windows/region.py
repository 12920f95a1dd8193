"""The values between tokens and one value with an entry for each token, on windows of a rank.

All of them have windows of the same tokens: of each chunk, with `before` tokens in front of it and
`after` behind it. At the edge of a window an op may see what it should not; such entries are
trimmed off in the end.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ringcompile.ir.calls import Call, operands, target_name
from ringcompile.ir.expr import simplify, spelled
from ringcompile.ir.layout import Layout
from ringcompile.ir.nodes import reached, type_of
from ringcompile.ir.types import TensorType
from ringcompile.ops.schemas import op
from ringcompile.passes.windows.shift_forms import Form

if TYPE_CHECKING:
    from ringcompile.passes.windows.windows import Windows

aten = torch.ops.aten
HALO, TRIM = op("halo"), op("trim")
Reach = tuple[int, int]  # tokens before the chunk and behind it; negative: less than the chunk


class WindowRegion:
    """Writes a value with an entry for each token, and all that lies between tokens and it.

    Args:
        windows: of the program.
        last: the value.
        stays: whether its entries stay at their tokens; otherwise the first is the first token's.
    """

    def __init__(self, windows: Windows, last: fx.Node, stays: bool = False) -> None:
        self.windows, self.builder, self.last = windows, windows.builder, last
        self.offset = 0 if stays else windows.forms[last].offset
        self.forms, self.level = windows.forms, windows.level
        self.nodes = _between(last, windows.pending)
        self.reach = self._reaches()
        self.before = max(0, *(before for before, _ in self.reach.values()))
        self.after = max(0, *(after for _, after in self.reach.values()))
        self.made = windows.written.setdefault((self.before, self.after), {})

    def _reaches(self) -> dict[fx.Node, Reach]:
        """Which tokens around its chunk a rank needs of each value between, and of the first."""
        reach: dict[fx.Node, Reach] = {self.last: (self.offset, -self.offset)}
        for node in reversed(self.nodes):
            before, after = reach[node]
            for operand in operands(node):
                if operand not in self.forms:
                    continue
                late = self.late(node, operand)
                have = reach.get(operand, (before, after))
                wide = before + late + self.forms[node].reach
                reach[operand] = max(have[0], wide), max(have[1], after - late)
        return reach

    def late(self, node: fx.Node, operand: fx.Node) -> int:
        """By how many tokens a result is ahead of an operand, entry by entry."""
        if self.windows.source(node, self.forms) is not None:
            return 0
        return self.forms[operand].offset - self.forms[node].offset

    # -- windows -------------------------------------------------------------------------------

    def type(self, node: fx.Node) -> TensorType:
        """The type of a value's windows, one behind the other."""
        type_, dim = type_of(node), self.forms[node].dim
        shape = (*type_.shape[:dim], self.size, *type_.shape[dim + 1 :])
        return TensorType.whole(type_.dtype, shape)

    @property
    def size(self) -> Any:
        """The tokens of all windows of a rank."""
        each = self.level.chunk + self.before + self.after
        return simplify(each * self.level.chunks_per_rank)

    def given(self, node: fx.Node, late: int = 0) -> fx.Node:
        """What stands for an operand: its windows, moved on by some tokens, or itself."""
        if node not in self.forms:
            x = self.windows.value(node)
            return self.windows.request(x, Layout.whole(len(type_of(x).shape)))
        if node not in self.made:
            self.made[node] = self._entered(node)
        return self._moved(self.made[node], self.forms[node].dim, late)

    def _entered(self, node: fx.Node) -> fx.Node:
        """A value with an entry for each token, and of its neighbours' what is needed."""
        x, dim = self.windows.value(node), self.forms[node].dim
        if target_name(node.target) == "aten.full.default":
            return self.builder.call(
                node.target, (list(self.type(node).shape), Call(node)["fill_value"]),
                self.type(node), dtype=type_of(node).dtype,
            )
        if self.forms[node].is_part:  # nothing is read of the tokens around
            x = self.windows.request(x, Layout.whole(len(type_of(x).shape)))
            x = self.padded(x, dim, *self.forms[node].around)
        x = self.windows.request(x, Layout.whole(len(type_of(x).shape)).with_dim(
            dim, self.windows.rows
        ))
        return self.builder.call(
            HALO, (x,), self.type(node), why="tokens of the neighbours", dim=dim,
            before=self.before, after=self.after, axis=self.level.axis,
        )

    def _moved(self, x: fx.Node, dim: int, late: int) -> fx.Node:
        return self.padded(x, dim, late, -late) if late else x

    def padded(self, x: fx.Node, dim: int, left: int, right: int) -> fx.Node:
        """So many entries more in front and behind; what they hold is not used."""
        type_ = type_of(x)
        pads = [0, 0] * (len(type_.shape) - dim - 1) + [left, right]
        size = simplify(type_.shape[dim] + left + right)
        made = replace(type_, shape=(*type_.shape[:dim], size, *type_.shape[dim + 1 :]))
        return self.builder.call(aten.constant_pad_nd.default, (x, pads, 0), made)

    def places(self) -> fx.Node:
        """The position of each entry of the windows; negative in front of token 0."""
        return self.windows.places((self.before, self.after), self.size)

    def outside(self, node: fx.Node, name: str, bound: Any) -> fx.Node:
        """Bool [window, 1, ...]: whether a token lies before a bound (lt), or not (ge)."""
        places = self.places()
        target = {"lt": aten.lt.Scalar, "ge": aten.ge.Scalar}[name]
        flags = self.builder.call(
            target, (places, bound), TensorType.whole(torch.bool, type_of(places).shape)
        )
        behind = len(type_of(node).shape) - self.forms[node].dim - 1
        shape = (self.size, *(1,) * behind)
        return self.builder.call(
            aten.reshape.default, (flags, spelled(shape)), TensorType.whole(torch.bool, shape)
        )

    def ends(self, node: fx.Node) -> tuple[int, Any]:
        """The tokens that a value's first entry belongs to, and its first behind the last."""
        form = self.forms[node]
        return -form.offset, simplify(self.windows.sequence.length + form.extra - form.offset)

    def filled(self, node: fx.Node, left: bool, right: bool, value: float) -> fx.Node:
        """A value's windows with a number in front of its first entry, or behind its last."""
        x, (first, end) = self.given(node), self.ends(node)
        for wanted, name, bound in ((left, "lt", first), (right, "ge", end)):
            if wanted:
                x = self.builder.call(
                    aten.masked_fill.Scalar, (x, self.outside(node, name, bound), value),
                    type_of(x), why="what the model has around the sequence",
                )
        return x


def _between(last: fx.Node, pending: dict[fx.Node, Form]) -> list[fx.Node]:
    """The values between tokens and the last one, it included, in order."""
    found = reached([last], lambda node: [n for n in operands(node) if n in pending])
    return [node for node in (*pending, last) if node in found]
