"""The row of a view of the same bytes as another dtype: packed weights are read that way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from ringcompile.ir.calls import Call
from ringcompile.ir.layout import WHOLE, Layout, regroup
from ringcompile.ir.nodes import type_of
from ringcompile.ir.rules.base import Placement, Rule
from ringcompile.ir.rules.linear import Linear


@dataclass(frozen=True)
class BitsRule(Rule):
    """Of `view.dtype`: a wide element is made of narrow neighbours, which no split parts.

    In terms of the narrow tensor `[..., n * k]`, the wide one is `[..., n, k]` without its last
    dim, where `k` narrow elements are one wide element.
    """

    shape_argument: str | None = None
    cheap: bool = True
    cost: str = "view"
    linear: Linear | None = None
    elementwise: bool = False

    def forward(
        self, call: Call, layouts: Sequence[Layout], axis_sizes: dict[str, int]
    ) -> Placement:
        """The operand's split where it leaves wide elements in one piece, else both whole."""
        source, target = call.operands[0], call.node
        output = _viewed(source, target, layouts[0], axis_sizes)
        if output is None:
            whole = Layout.whole(len(type_of(source).shape))
            return Placement((whole,), whole)
        return Placement((layouts[0],), output)

    def backward(
        self, call: Call, wanted: Layout, axis_sizes: dict[str, int]
    ) -> tuple[Layout, ...] | None:
        """The wanted split in terms of the operand; None where it would part a wide element."""
        operand = _viewed(call.node, call.operands[0], wanted, axis_sizes)
        return None if operand is None else (operand,)


def _viewed(
    source: fx.Node, target: fx.Node, layout: Layout, axis_sizes: dict[str, int]
) -> Layout | None:
    """The layout of `target`, which has the bytes of `source`; None where it has none."""
    have, made = type_of(source), type_of(target)
    if have.dtype.itemsize == made.dtype.itemsize:
        return layout
    if have.dtype.itemsize > made.dtype.itemsize:
        opened = (*have.shape, have.dtype.itemsize // made.dtype.itemsize)
        return regroup(opened, Layout((*layout.dims, WHOLE)), made.shape, axis_sizes)
    opened = (*made.shape, made.dtype.itemsize // have.dtype.itemsize)
    found = regroup(have.shape, layout, opened, axis_sizes)
    return None if found is None or found.dims[-1] else Layout(found.dims[:-1])
