"""Attention's rows of the rule table: for a mesh, how queries, keys and values have to lie.

| query                  | key/value             | becomes                                         |
|------------------------|-----------------------|-------------------------------------------------|
| whole                  | whole                 | attention                                       |
| heads on an axis       | heads on it           | attention on local heads                        |
| sequence on ring       | sequence on ring      | ring attention: keys and values rotate          |
| ... and on tile        | the same              | queries are gathered along it, results reduced  |
| ... and on ulysses     | the same              | heads on ulysses instead, one exchange each way |
| ... and on other axes  | sequence on ring only | keys and values are gathered along the others   |
| sequence               | whole                 | local queries over all keys                     |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ringcompile.ir.calls import Call
from ringcompile.ir.expr import Size
from ringcompile.ir.layout import WHOLE, Atom, DimLayout, Layout
from ringcompile.ir.nodes import type_of
from ringcompile.ir.rules import Placement
from ringcompile.ir.types import TensorType
from ringcompile.passes.base import Builder

aten = torch.ops.aten
ATTENTION_OPERANDS = ("q", "k", "v", "key_mask", "mask", "sink")


@dataclass(frozen=True)
class Rows:
    """How the dims of one attention are divided.

    Attributes:
        batch: the first dim of all operands.
        heads: axes that split the heads, of queries and of keys alike.
        queries: the query dim.
        keys: the key dim.
    """

    batch: DimLayout = WHOLE
    heads: tuple[str, ...] = ()
    queries: DimLayout = WHOLE
    keys: DimLayout = WHOLE

    def placement(self, operands: Mapping[str, fx.Node]) -> Placement:
        """The layouts of all operands and of the result.

        Args:
            operands: from `given_operands`; the heads of keys have to divide over `heads`.
        """
        layouts = [self._operand(name, type_of(x).shape) for name, x in operands.items()]
        return Placement(tuple(layouts), layouts[0])

    def _operand(self, name: str, shape: Sequence[Size]) -> Layout:
        heads = self._heads(shape[0] if name == "sink" else shape[1])
        if name == "sink":
            return Layout((heads,))
        rows = {"q": self.queries, "mask": self.queries, "key_mask": WHOLE}.get(name, self.keys)
        dims: tuple[DimLayout, ...] = (self.batch, heads, rows, WHOLE)
        if name in ("mask", "key_mask"):
            dims = tuple(WHOLE if size == 1 else dim for size, dim in zip(shape, dims, strict=True))
        return Layout(dims)

    def _heads(self, size: Size) -> DimLayout:
        return (Atom(size, self.heads),) if self.heads else WHOLE


def given_operands(call: Call, operands: Sequence[fx.Node]) -> dict[str, fx.Node]:
    """The operands of an attention by name, queries first; those it has, in order."""
    names = [name for name in ATTENTION_OPERANDS if call[name] is not None]
    return dict(zip(names, operands, strict=True))


def head_counts(call: Call) -> tuple[int, int]:
    """The numbers of query heads and of key heads."""
    queries, keys = (type_of(call[name]).shape[1] for name in ("q", "k"))
    assert isinstance(queries, int)
    assert isinstance(keys, int)
    return queries, keys


def repeats(queries: int, keys: int, ways: int) -> int:
    """How often key heads have to be repeated to divide over so many ranks; 1 if they do.

    The query heads have to divide; then there always is a number, at most queries / keys.
    """
    assert queries % ways == 0, f"{queries} heads over {ways} ranks"
    counts = (n for n in range(1, queries // keys + 1) if queries % (keys * n) == 0)
    return next(n for n in counts if keys * n % ways == 0)


def repeat_heads(builder: Builder, x: fx.Node, times: int) -> fx.Node:
    """Keys or values [B,G,S,D] with every head repeated: [B,G*times,S,D].

    Args:
        builder: of the graph that holds x.
        x: the keys or values; their heads are whole.
        times: how often.
    """
    if times == 1:
        return x
    type_ = type_of(x)
    (batch, heads, rows, width), dims = type_.shape, type_.layout.dims
    opened = (dims[0], dims[1], WHOLE, *dims[2:])

    def typed(sizes: tuple[Size, ...], layout: tuple[DimLayout, ...]) -> TensorType:
        return TensorType(type_.dtype, sizes, Layout(layout))

    one, many = (batch, heads, 1, rows, width), (batch, heads, times, rows, width)
    x = builder.call(aten.reshape.default, (x, list(one)), typed(one, opened))
    x = builder.call(
        aten.expand.default, (x, list(many)), typed(many, opened), why="one KV head for each rank"
    )
    flat = (batch, heads * times, rows, width)
    return builder.call(aten.reshape.default, (x, list(flat)), typed(flat, dims))

