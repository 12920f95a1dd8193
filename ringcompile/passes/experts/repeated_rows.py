"""Rows that are repeated or picked, one for each expert that a token chose: where they come from.

A mixture expands each token to a row for each of its K choices before it sorts rows by expert.
Row i of the expanded tensor is row i // K of the tokens, so that sorted rows can be read from the
tokens, without writing the expanded tensor first. Likewise row i of rows that were picked by an
index is the row that entry i of the index says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ringcompile.ir.calls import Call
from ringcompile.ir.expr import Size, equal
from ringcompile.ir.layout import Layout
from ringcompile.ir.nodes import type_of
from ringcompile.ir.types import TensorType
from ringcompile.ops.schemas import op
from ringcompile.passes.base import Builder

aten = torch.ops.aten


@dataclass(frozen=True)
class Repeated:
    """What rows are read from.

    Attributes:
        rows: in the new graph, [..., features].
        steps: what makes the number of a row there of one here, in order: a number that it is
            divided by, because rows are repeated so often side by side, or an index that is read.
    """

    rows: fx.Node
    steps: tuple[int | fx.Node, ...]


@dataclass
class RepeatedRows:
    """Finds what rows are repeated from, in a program of shares.

    Attributes:
        builder: of the new graph.
        spelled: the local shape of a type, as an argument.
    """

    builder: Builder
    spelled: Callable[[TensorType], list[Size]]

    def of(self, x: fx.Node) -> Repeated | None:
        """What the rows of x [..., features] are repeated from; None if they are not.

        Args:
            x: a node of the old graph; all its dims but the last one are rows.
        """
        find = _FINDERS.get(x.target)
        return None if find is None else find(self, x, Call(x))

    def _expanded(self, x: fx.Node, call: Call) -> Repeated | None:
        source, size = type_of(call["self"]), type_of(x).shape
        grown = [i for i, n in enumerate(source.shape) if not equal(n, size[i])] if (
            len(source.shape) == len(size)) else []
        if grown != [len(size) - 2] or not isinstance(size[-2], int):
            return None
        return Repeated(self.builder.env[call["self"]], (size[-2],))

    def _picked(self, x: fx.Node, call: Call) -> Repeated | None:
        source, indices = call["self"], call["indices"]
        if len(type_of(source).shape) != 2 or len(indices) != 1:
            return None
        found = self.of(source)
        rows, steps = (found.rows, found.steps) if found else (self.builder.env[source], ())
        return Repeated(rows, (self.builder.env[indices[0]], *steps))

    def _reshaped(self, x: fx.Node, call: Call) -> Repeated | None:
        source = type_of(call["self"])
        same = source.shape[-1:] == type_of(x).shape[-1:]
        return self.of(call["self"]) if same else None

    def _own(self, x: fx.Node, call: Call) -> Repeated | None:
        """Padding that is cut off before rows are repeated, not after it."""
        source, made, dim = type_of(call["x"]), type_of(x), call["dim"]
        found = self.of(call["x"])
        repeats = len(source.shape) - 2
        if found is None or dim >= repeats or found.steps != (source.shape[repeats],):
            return None
        before, after = _without(source, repeats), _without(made, repeats)
        rows = self.call(aten.reshape.default, (found.rows, self.spelled(before)), before)
        rows = self.call(
            op("own_tokens"), (rows,), after, dim=dim, size=call["size"], why=x.meta.get("why")
        )
        return Repeated(rows, found.steps)

    def call(self, target: Any, args: tuple[Any, ...], type_: TensorType, **how: Any) -> fx.Node:
        """Append a call; see `Builder.call`."""
        return self.builder.call(target, args, type_, **how)


def _without(type_: TensorType, dim: int) -> TensorType:
    """The type without one dim, which is not split."""
    dims = type_.layout.dims
    return TensorType(
        type_.dtype, (*type_.shape[:dim], *type_.shape[dim + 1 :]),
        Layout((*dims[:dim], *dims[dim + 1 :]), type_.layout.partial),
    )


_FINDERS: dict[Any, Callable[[RepeatedRows, fx.Node, Call], Repeated | None]] = {
    aten.expand.default: RepeatedRows._expanded,
    aten.reshape.default: RepeatedRows._reshaped,
    aten.index.Tensor: RepeatedRows._picked,
    op("own_tokens"): RepeatedRows._own,
}
