"""Flags and numbers of token pairs that no attention was made of: each rank computes its rows."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from torch import fx

from ringcompile.ir.calls import Call
from ringcompile.ir.layout import Layout
from ringcompile.ir.nodes import type_of
from ringcompile.ir.types import TensorType


def rows_of_pairs(node: fx.Node, layouts: Sequence[Layout]) -> list[Layout] | None:
    """Layouts for one rank's rows of flags or numbers of token pairs (equal documents, say).

    What varies along columns is one number a token, which is replicated: any for flags and whole
    numbers of pairs, a flag or a whole number for floats (a bias, and keys that it hides). None
    for other pairs: they may be scores, whose keys are not to be gathered without a word.
    """
    type_ = node.meta.get("type")
    if not isinstance(type_, TensorType):
        return None
    splits = [
        {i - len(layout.dims) for i, dim in enumerate(layout.dims) if dim} for layout in layouts
    ]
    row = min(min(split) for split in splits if split)
    columns = [not split <= {row} for split in splits]
    floats = [type_of(operand).dtype.is_floating_point for operand in Call(node).operands]
    if type_.dtype.is_floating_point and any(map(operator.and_, columns, floats)):
        return None
    return [
        Layout.whole(len(layout.dims)) if column else layout
        for layout, column in zip(layouts, columns, strict=True)
    ]
