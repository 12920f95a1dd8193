"""The row of ops between a split sequence and what of it each rank has by itself.

That is a window, a chunk of the sequence with some tokens before and behind it, or a rank's own
tokens without padding. Such a value has another content on every rank, and no rule may take its dim
of tokens apart: in types it is whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ringcompile.ir.calls import Call
from ringcompile.ir.layout import DimLayout, Layout
from ringcompile.ir.nodes import type_of
from ringcompile.ir.rules.base import Placement, Rule
from ringcompile.ir.rules.linear import FIRST, Linear


@dataclass(frozen=True)
class WindowRule(Rule):
    """The dim of tokens stays laid out as it was placed; others pass."""

    cost: str
    shape_argument: str | None = None
    cheap: bool = False
    linear: Linear | None = FIRST
    elementwise: bool = False

    def forward(
        self, call: Call, layouts: Sequence[Layout], axis_sizes: dict[str, int]
    ) -> Placement:
        """The operand's split of every dim but that of the tokens."""
        dim = call["dim"]
        taken, made = _along(call)
        operand = layouts[0].with_dim(dim, taken)
        return Placement((operand,) * len(layouts), operand.with_dim(dim, made))

    def backward(
        self, call: Call, wanted: Layout, axis_sizes: dict[str, int]
    ) -> tuple[Layout, ...] | None:
        """The wanted split of the other dims; None where that of the tokens would change."""
        dim = call["dim"]
        taken, made = _along(call)
        if wanted.dims[dim] != made:
            return None
        return (wanted.with_dim(dim, taken),) * len(call.operands)


def _along(call: Call) -> tuple[DimLayout, DimLayout]:
    """The layout of the tokens' dim, of the operand and of the result."""
    taken, made = (type_of(node).layout for node in (call.operands[0], call.node))
    return taken.dims[call["dim"]], made.dims[call["dim"]]
