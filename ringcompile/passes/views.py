"""Views written into a new graph, folded with the views that they stand on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import fx

from ringcompile.ir.expr import Size, equal, product
from ringcompile.ir.nodes import type_of
from ringcompile.ir.types import TensorType
from ringcompile.passes.base import Builder

aten = torch.ops.aten


def same_shape(a: Sequence[Size], b: Sequence[Size]) -> bool:
    """Whether two shapes are equal for all lengths."""
    return len(a) == len(b) and all(map(equal, a, b))


def reshaped(builder: Builder, x: fx.Node, shape: Sequence[Size]) -> fx.Node:
    """`x` in another shape; a reshape of a reshape is one."""
    while x.target is aten.reshape.default and not same_shape(type_of(x).shape, shape):
        x = x.args[0]  # type: ignore[assignment]
    if same_shape(type_of(x).shape, shape):
        return x
    type_ = TensorType.whole(type_of(x).dtype, tuple(shape))
    return builder.call(aten.reshape.default, (x, list(shape)), type_)


def permuted(builder: Builder, x: fx.Node, dims: Sequence[int]) -> fx.Node:
    """`x` with its dims in another order; a permute of a permute is one."""
    if x.target is aten.permute.default:
        before: list[int] = x.args[1]  # type: ignore[assignment]
        rank = len(before)
        x, dims = x.args[0], [before[dim] % rank for dim in dims]  # type: ignore[assignment]
    if list(dims) == list(range(len(dims))):
        return x
    type_ = type_of(x)
    shape = tuple(type_.shape[dim] for dim in dims)
    return builder.call(
        aten.permute.default, (x, list(dims)), TensorType.whole(type_.dtype, shape)
    )


def expanded(builder: Builder, x: fx.Node, shape: Sequence[Size]) -> fx.Node:
    """`x` with dims of size 1 grown to `shape`."""
    if same_shape(type_of(x).shape, shape):
        return x
    type_ = TensorType.whole(type_of(x).dtype, tuple(shape))
    return builder.call(aten.expand.default, (x, list(shape)), type_)


def cast(builder: Builder, x: fx.Node, dtype: torch.dtype) -> fx.Node:
    """`x` in another dtype."""
    type_ = type_of(x)
    if type_.dtype == dtype:
        return x
    return builder.call(aten.to.dtype, (x, dtype), replace(type_, dtype=dtype))


def in_heads(
    builder: Builder,
    x: fx.Node,
    lead: Sequence[Size],
    heads: tuple[Size, Size],
    *,
    grouped: bool = False,
) -> fx.Node:
    """[*lead, a, b] as [batch, heads, a, b]; a leading dim may be 1 where it is broadcast.

    Args:
        builder: where new nodes go.
        x: the tensor.
        lead: the leading sizes that `x` is broadcast to.
        heads: batch and heads; their product is that of `lead`.
        grouped: a head may stand for the run of heads that read it, as keys and values do.
    """
    *own, rows, columns = type_of(x).shape
    if all(size == 1 for size in own):
        return reshaped(builder, x, (1, 1, rows, columns))
    where = _boundary(lead, heads)
    if where is None:
        whole = expanded(builder, x, (*lead, rows, columns))
        return reshaped(builder, whole, (*heads, rows, columns))
    parts = [(own[:where], lead[:where], False), (own[where:], lead[where:], grouped)]
    grown = [_grown(sizes, full, runs) for sizes, full, runs in parts]
    x = expanded(builder, x, (*grown[0], *grown[1], rows, columns))
    return reshaped(builder, x, (product(grown[0]), product(grown[1]), rows, columns))


def _boundary(lead: Sequence[Size], heads: tuple[Size, Size]) -> int | None:
    """How many of the leading dims make the batch."""
    for i in (1, *range(len(lead) + 1)):
        if equal(product(lead[:i]), heads[0]) and equal(product(lead[i:]), heads[1]):
            return i
    return None


def _grown(own: Sequence[Size], full: Sequence[Size], runs: bool) -> list[Size]:
    """The sizes that merge into one dim: all 1, or all there, or (in runs) there up to a point."""
    there = [not equal(size, 1) or equal(target, 1)
             for size, target in zip(own, full, strict=True)]
    if all(equal(size, 1) for size in own):
        return list(own)
    if runs and there == sorted(there, reverse=True):
        return list(own)
    return list(full)


def unexpanded(builder: Builder, x: fx.Node) -> fx.Node:
    """[B,G,S,D] behind one in which each of its heads is repeated, [B,G*r,S,D].

        reshape(expand(reshape(x, [B,G,1,S,D]), [B,G,r,S,D]), [B,G*r,S,D])  ->  x

    also where the heads were repeated before a permute brought them to dim 1.
    """
    if x.target is aten.permute.default:
        dims: list[int] = x.args[1]  # type: ignore[assignment]
        inner = _unrepeated(x.args[0], dims[1] % len(dims))  # type: ignore[arg-type]
        return x if inner is None else permuted(builder, inner, dims)
    inner = _unrepeated(x, 1)
    return x if inner is None else inner


def _unrepeated(x: fx.Node, dim: int) -> fx.Node | None:
    """What is behind a repetition of each index of a dim; None if `x` is none."""
    steps = [x]
    for target in (aten.reshape.default, aten.expand.default, aten.reshape.default):
        if steps[-1].target is not target:
            return None
        steps.append(steps[-1].args[0])  # type: ignore[arg-type]
    shape, grown, single, source = (type_of(node).shape for node in steps)
    apart = (*source[: dim + 1], 1, *source[dim + 1 :])
    if len(shape) != len(source) or not same_shape(single, apart):
        return None
    repeated = len(grown) == len(apart) and all(
        equal(a, b) for i, (a, b) in enumerate(zip(grown, apart, strict=True)) if i != dim + 1
    )
    merged = (*source[:dim], product(grown[dim : dim + 2]), *source[dim + 1 :])
    return steps[-1] if repeated and same_shape(shape, merged) else None
