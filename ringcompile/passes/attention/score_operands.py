"""What a hand-written attention reads as queries, keys and values of 4 dims, and its result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ringcompile.ir.expr import Size, equal, is_symbolic, product
from ringcompile.ir.nodes import type_of
from ringcompile.ir.types import TensorType
from ringcompile.passes.attention.score_steps import HandWritten, NotUnderstoodError, Scale, Sink
from ringcompile.passes.base import Builder
from ringcompile.passes.contraction import Operand
from ringcompile.passes.masks.operands import as_mask
from ringcompile.passes.views import (
    cast,
    expanded,
    in_heads,
    permuted,
    reshaped,
    same_shape,
    unexpanded,
)

aten = torch.ops.aten


@dataclass
class OperandWriter:
    """Writes the operands of attention in place of those of the two matmuls.

    Attributes:
        builder: of the new graph.
        found: the attention as it was read.
    """

    builder: Builder
    found: HandWritten

    def __post_init__(self) -> None:
        self.lead = self.found.shapes[0][:-2]
        self.heads = self._of_heads()

    def operands(self) -> tuple[fx.Node, fx.Node, fx.Node]:
        """Q [B,H,Sq,D], k [B,G,Sk,D] and v [B,G,Sk,E] of one dtype."""
        *lead, queries, keys = self.found.scores.output
        (feature,) = self.found.scores.summed
        sizes = self.lead
        q = self._four(self.found.scores.operands[0], lead, (queries, feature), sizes, False)
        k = self._four(self.found.scores.operands[1], lead, (keys, feature), sizes, True)
        weights, values = self.found.values.operands
        (value_dim,) = set(values.names) - set(weights.names)
        lead = list(weights.names[:-2])
        sizes = tuple(type_of(weights.node).shape[:-2])
        v = self._four(values, lead, (weights.names[-1], value_dim), sizes, True)
        q = expanded(self.builder, q, (*self.heads, *type_of(q).shape[2:]))
        q, k = self._narrow(q, k, type_of(v).dtype)
        k, v = self._grouped(k, v)
        return q, k, cast(self.builder, v, type_of(q).dtype)

    def scaled(self, q: fx.Node, step: Scale) -> fx.Node:
        """Queries times, or divided by, what their scores are."""
        factor: Any = step.factor
        if isinstance(factor, fx.Node):
            factor = as_mask(self.builder, self.builder.env[factor], self.lead, self.heads)
        elif not is_symbolic(factor):
            raise NotUnderstoodError(f"its scores are scaled by {factor}")
        target = aten.div.Tensor if step.divide else aten.mul.Tensor
        type_ = type_of(q)
        if isinstance(factor, fx.Node):
            dtype = torch.promote_types(type_.dtype, type_of(factor).dtype)
            made = self.builder.call(target, (q, factor), TensorType.whole(dtype, type_.shape))
            return cast(self.builder, made, type_.dtype)
        return self.builder.call(target, (q, factor), type_)

    def sink(self, sink: Sink, known: float | None) -> fx.Node:
        """The column as one number a head; `known` is the number where that is a constant."""
        lead = self.found.shapes[-1][:-2]
        x = self.builder.env[sink.node]
        if known is not None:
            type_ = TensorType.whole(type_of(x).dtype, (self.heads[1],))
            return self.builder.call(
                aten.full.default, ([self.heads[1]], known), type_, dtype=type_.dtype
            )
        while x.target is aten.expand.default or (
            x.target is aten.to.dtype and x.all_input_nodes[0].target is aten.expand.default
        ):
            x = x.all_input_nodes[0]
        shape = type_of(x).shape
        shape = (*(1,) * (len(lead) + 2 - len(shape)), *shape)
        if not all(equal(size, 1) for size in (*shape[:1], *shape[-2:])) or not same_shape(
            shape[1:-2], lead[1:]
        ):
            raise NotUnderstoodError("its attention sink is not one number per head")
        return reshaped(self.builder, x, (self.heads[1],))

    def as_before(self, out: fx.Node) -> fx.Node:
        """[B,H,Sq,E] as the product with the values gave it."""
        weights, _ = self.found.values.operands
        old = self.found.values.node
        out = cast(self.builder, out, type_of(old).dtype)
        lead = type_of(weights.node).shape[:-2]
        out = reshaped(self.builder, out, (*lead, *type_of(out).shape[2:]))
        (value_dim,) = set(self.found.values.output) - set(weights.names)
        names = [*weights.names[:-1], value_dim]
        out = permuted(self.builder, out, [names.index(n) for n in self.found.values.output])
        return reshaped(self.builder, out, type_of(old).shape)

    def _of_heads(self) -> tuple[Size, Size]:
        """Batch and heads, from the first shape on the way that tells them apart."""
        queries = self.builder.env[self.found.scores.operands[0].node]
        shapes = [*self.found.shapes]
        while queries.target is aten.reshape.default:  # [B,H,S,D] was merged to [B*H,S,D]
            queries = queries.args[0]
            shapes.append(type_of(queries).shape)
        total = product(self.found.shapes[0][:-2])
        for rank in (4, 5, 3):
            for shape in shapes:
                merges = len(shape) == rank and equal(product(shape[:-2]), total)
                if merges and equal(shape[-2], self.found.shapes[0][-2]):
                    return shape[0], product(shape[1:-2])
        return (1, 1) if not self.found.shapes[0][:-2] else (self.found.shapes[0][0], product(
            self.found.shapes[0][1:-2]))

    def _four(
        self,
        operand: Operand,
        lead: Sequence[Any],
        last: tuple[Any, Any],
        sizes: Sequence[Size],
        grouped: bool,
    ) -> fx.Node:
        """An operand as [batch, heads, *last]."""
        x, names = self.builder.env[operand.node], operand.names
        own = [name for name in lead if name in names]
        turned = names[-2:] == last[::-1]  # k^T of a matmul: turned back behind other views
        order = [*own, *(last[::-1] if turned else last)]
        x = permuted(self.builder, x, [names.index(name) for name in order])
        given = iter(type_of(x).shape)
        shape = [next(given) if name in names else 1 for name in lead]
        x = reshaped(self.builder, x, (*shape, *type_of(x).shape[-2:]))
        x = in_heads(self.builder, x, sizes, self.heads, grouped=grouped)
        return permuted(self.builder, x, (0, 1, 3, 2)) if turned else x

    def _narrow(
        self, q: fx.Node, k: fx.Node, dtype: torch.dtype
    ) -> tuple[fx.Node, fx.Node]:
        """Halves that are cast up to be multiplied as they were: kernels sum in float32 anyway."""
        sources = [x.all_input_nodes[0] for x in (q, k) if x.target is aten.to.dtype]
        halves = [x for x in sources if type_of(x).dtype == dtype and dtype.itemsize == 2]
        return (halves[0], halves[1]) if len(halves) == 2 else (q, k)

    def _grouped(
        self, k: fx.Node, v: fx.Node
    ) -> tuple[fx.Node, fx.Node]:
        """Keys and values with the batch of queries, and as many heads as each other."""
        k, v = (expanded(self.builder, x, (self.heads[0], *type_of(x).shape[1:])) for x in (k, v))
        own = [unexpanded(self.builder, x) for x in (k, v)]
        if equal(type_of(own[0]).shape[1], type_of(own[1]).shape[1]):
            return own[0], own[1]
        repeated = [self._repeated(x) for x in (k, v)]
        return repeated[0], repeated[1]

    def _repeated(self, x: fx.Node) -> fx.Node:
        batch, groups, *rest = type_of(x).shape
        num_heads = self.heads[1]
        if equal(groups, num_heads):
            return x
        times = product([num_heads]) // groups
        x = reshaped(self.builder, x, (batch, groups, 1, *rest))
        x = expanded(self.builder, x, (batch, groups, times, *rest))
        return reshaped(self.builder, x, (batch, num_heads, *rest))
