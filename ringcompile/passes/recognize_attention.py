"""Find attention that a model writes out by hand, and make it the one attention op."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, ClassVar

import torch
from torch import fx

from ringcompile.ir.calls import Call
from ringcompile.ir.expr import Size, equal, is_symbolic, product
from ringcompile.ir.nodes import type_of
from ringcompile.ir.program import Program
from ringcompile.ir.types import TensorType
from ringcompile.ops.schemas import op
from ringcompile.passes.base import Builder, Pass
from ringcompile.passes.contraction import Operand, read
from ringcompile.passes.mask_analysis import Analysis
from ringcompile.passes.mask_operands import broadcast, joined
from ringcompile.passes.mask_values import sees_itself
from ringcompile.passes.score_chain import (
    Bend,
    Bias,
    Fill,
    HandWritten,
    NotUnderstoodError,
    Reader,
    Scale,
    Sink,
    short,
)
from ringcompile.passes.score_fills import hides, kept_as_numbers
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
_SOFTMAX = ("aten.softmax.int", "aten._softmax.default")


@dataclass(frozen=True)
class RecognizeAttention(Pass):
    """Rewrite the softmax of scaled, biased and masked q k^T, times v, as attention.

        p = softmax(where(mask, matmul(q, permute(k)) * 0.5 + bias, -inf), -1); y = matmul(p, v)
    ->  y = attention(q, k, v, None, where(mask, bias, -inf), scale=0.5)

    for matmul, bmm and einsum, 2 to 5 dims, grouped heads, soft caps and sinks. Scores are in
    float32 in the kernels whatever the model casts them to. The lowest number of a dtype in place
    of scores hides them as -inf does; a row of nothing else weighs all of its keys evenly, here
    too. Other numbers stay numbers (score_fills.py).
    A row of -inf alone, NaN in the model, is 0. Attention that does more than this, or whose
    weights are used elsewhere, stays as it is, with the reason in `why_not` of q k^T's node.
    """

    name: ClassVar[str] = "recognize-attention"

    def run(self, program: Program) -> Program:
        """Read what is around each softmax; nodes that are not needed any more are left dead."""
        reader, reasons = Reader(program), dict[fx.Node, str]()
        found: dict[fx.Node, HandWritten] = {}
        for node in program.graph.nodes:
            if str(node.target) not in _SOFTMAX or node not in reader.live:
                continue
            try:
                attention = reader.read(node)
                found[attention.values.node] = attention
            except NotUnderstoodError as reason:
                reasons.update(dict.fromkeys(_scores_near(node), str(reason)))
        builder = Builder()
        writer = _AttentionWriter(builder, reader, Analysis(program))
        for node in program.graph.nodes:
            builder.at(node)
            if node in found:
                builder.env[node], refusal = writer.attempt(found[node])
                if refusal:
                    builder.env[found[node].scores.node].meta["why_not"] = refusal
            else:
                builder.env[node] = builder.copy(node)
            if node in reasons:
                builder.env[node].meta["why_not"] = reasons[node]
        return program.with_graph(builder.graph)


def _scores_near(softmax: fx.Node) -> list[fx.Node]:
    """The nearest product below a softmax, with its last dim: where a refusal is to explain."""
    size, level = type_of(softmax).shape[-1], [softmax]
    for _ in range(_FAR):
        level = [n for node in level for n in node.all_input_nodes if n.op == "call_function"]
        near = [n for n in level if read(n) is not None and equal(type_of(n).shape[-1], size)]
        if near:
            return near
    return []


_FAR = 12


@dataclass
class _Scores:
    """What the steps from q k^T to the softmax come to."""

    scale: float = 1.0
    bend: float | None = None
    factors: list[Scale] = field(default_factory=list)
    biases: list[tuple[Bias, float]] = field(default_factory=list)
    fills: list[Fill] = field(default_factory=list)
    sink: Sink | None = None

    def __post_init__(self) -> None:
        self.order: list[str] = []

    def take(self, step: Any) -> None:
        """One more step, behind those before it."""
        if self.sink is not None:
            raise NotUnderstoodError("its scores change beside its sink")
        match step:
            case Scale():
                self._scale(step)
            case Bend():
                if self.bend is not None or self.order:
                    raise NotUnderstoodError("its scores are masked before they are capped")
                self.bend = 1.0
            case Bias():
                self.biases.append((step, float(step.sign)))
                self.order.append("bias")
            case Fill():
                self.fills.append(step)
                self.order.append("fill")
            case Sink():
                self.sink = step

    def _scale(self, step: Scale) -> None:
        if not isinstance(step.factor, float):
            if self.order or self.bend is not None:
                raise NotUnderstoodError("its scores are scaled by a tensor when they are masked")
            self.factors.append(step)
            return
        factor = 1 / step.factor if step.divide else step.factor
        if factor <= 0:
            raise NotUnderstoodError("its scores are scaled by a number that is not positive")
        if self.bend is None:
            self.scale *= factor
        else:
            self.bend *= factor
        self.biases = [(bias, number * factor) for bias, number in self.biases]
        self.fills = [Fill(f.node, f.lead, f.value * factor, f.where) for f in self.fills]


@dataclass
class _AttentionWriter:
    """Writes attention in place of what was read."""

    builder: Builder
    reader: Reader
    analysis: Analysis

    def attempt(self, found: HandWritten) -> tuple[fx.Node, str | None]:
        """The attention, or the node as it was and the reason."""
        old = found.values.node
        try:
            return self.write(found), None
        except NotUnderstoodError as reason:
            return self.builder.copy(old), str(reason)

    def write(self, found: HandWritten) -> fx.Node:
        scores = _Scores()
        for step in found.steps:
            scores.take(step)
        heads = self._heads(found)
        q, k, v = self._operands(found, heads)
        for factor in scores.factors:
            q = self._scaled(q, factor, found.shapes[0][:-2], heads)
        flags = [self._visible(fill, heads) for fill in scores.fills]
        bias = self._bias(scores, heads)
        lasting = [hides(fill, type_of(found.scores.node).dtype) for fill in scores.fills]
        if not all(lasting):
            if lasting != sorted(lasting) or found.zeroed or scores.order != sorted(scores.order):
                raise NotUnderstoodError("a number in place of its scores is changed afterwards")
            count = lasting.count(False)
            pairs = list(zip(scores.fills, flags, strict=True))[:count]
            k, bias = kept_as_numbers(self.builder, k, pairs, bias)
            scores.fills, flags = scores.fills[count:], flags[count:]
        q, mask = self._masks(scores, q, k, flags, bias, found.zeroed)
        sink = self._sink(scores.sink, found.shapes[-1][:-2], heads)
        softcap = scores.bend
        out = self.builder.call(
            op("attention"),
            (q, k, v, None, mask, sink),
            TensorType.whole(type_of(q).dtype, (*type_of(q).shape[:3], type_of(v).shape[3])),
            scale=scores.scale * (softcap or 1.0),
            softcap=softcap,
            lower=None,
            upper=None,
        )
        return self._as_before(out, found)

    # -- operands ------------------------------------------------------------------------------

    def _heads(self, found: HandWritten) -> tuple[Size, Size]:
        """Batch and heads, from the first shape on the way that tells them apart."""
        queries = self.builder.env[found.scores.operands[0].node]
        shapes = [*found.shapes]
        while queries.target is aten.reshape.default:  # [B,H,S,D] was merged to [B*H,S,D]
            queries = queries.args[0]
            shapes.append(type_of(queries).shape)
        total = product(found.shapes[0][:-2])
        for rank in (4, 5, 3):
            for shape in shapes:
                merges = len(shape) == rank and equal(product(shape[:-2]), total)
                if merges and equal(shape[-2], found.shapes[0][-2]):
                    return shape[0], product(shape[1:-2])
        return (1, 1) if not found.shapes[0][:-2] else (found.shapes[0][0], product(
            found.shapes[0][1:-2]))

    def _operands(
        self, found: HandWritten, heads: tuple[Size, Size]
    ) -> tuple[fx.Node, fx.Node, fx.Node]:
        """Q [B,H,Sq,D], k [B,G,Sk,D] and v [B,G,Sk,E] of one dtype."""
        *lead, queries, keys = found.scores.output
        (feature,) = found.scores.summed
        sizes = found.shapes[0][:-2]
        q = self._four(found.scores.operands[0], lead, (queries, feature), sizes, heads, False)
        k = self._four(found.scores.operands[1], lead, (keys, feature), sizes, heads, True)
        weights, values = found.values.operands
        (value_dim,) = set(values.names) - set(weights.names)
        lead = list(weights.names[:-2])
        sizes = tuple(type_of(weights.node).shape[:-2])
        v = self._four(values, lead, (weights.names[-1], value_dim), sizes, heads, True)
        q = expanded(self.builder, q, (*heads, *type_of(q).shape[2:]))
        q, k = self._narrow(q, k, type_of(v).dtype)
        k, v = self._grouped(k, v, heads)
        return q, k, cast(self.builder, v, type_of(q).dtype)

    def _four(
        self,
        operand: Operand,
        lead: Sequence[Any],
        last: tuple[Any, Any],
        sizes: Sequence[Size],
        heads: tuple[Size, Size],
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
        x = in_heads(self.builder, x, sizes, heads, grouped=grouped)
        return permuted(self.builder, x, (0, 1, 3, 2)) if turned else x

    def _narrow(
        self, q: fx.Node, k: fx.Node, dtype: torch.dtype
    ) -> tuple[fx.Node, fx.Node]:
        """Halves that are cast up to be multiplied as they were: kernels sum in float32 anyway."""
        sources = [x.all_input_nodes[0] for x in (q, k) if x.target is aten.to.dtype]
        halves = [x for x in sources if type_of(x).dtype == dtype and dtype.itemsize == 2]
        return (halves[0], halves[1]) if len(halves) == 2 else (q, k)

    def _grouped(
        self, k: fx.Node, v: fx.Node, heads: tuple[Size, Size]
    ) -> tuple[fx.Node, fx.Node]:
        """Keys and values with the batch of queries, and as many heads as each other."""
        k, v = (expanded(self.builder, x, (heads[0], *type_of(x).shape[1:])) for x in (k, v))
        own = [unexpanded(self.builder, x) for x in (k, v)]
        if equal(type_of(own[0]).shape[1], type_of(own[1]).shape[1]):
            return own[0], own[1]
        repeated = [self._repeated(x, heads[1]) for x in (k, v)]
        return repeated[0], repeated[1]

    def _repeated(self, x: fx.Node, num_heads: Size) -> fx.Node:
        batch, groups, *rest = type_of(x).shape
        if equal(groups, num_heads):
            return x
        times = product([num_heads]) // groups
        x = reshaped(self.builder, x, (batch, groups, 1, *rest))
        x = expanded(self.builder, x, (batch, groups, times, *rest))
        return reshaped(self.builder, x, (batch, num_heads, *rest))

    def _scaled(
        self, q: fx.Node, step: Scale, lead: Sequence[Size], heads: tuple[Size, Size]
    ) -> fx.Node:
        factor: Any = step.factor
        if isinstance(factor, fx.Node):
            factor = self._as_mask(self.builder.env[factor], lead, heads)
        elif not is_symbolic(factor):
            raise NotUnderstoodError(f"its scores are scaled by {factor}")
        target = aten.div.Tensor if step.divide else aten.mul.Tensor
        type_ = type_of(q)
        if isinstance(factor, fx.Node):
            dtype = torch.promote_types(type_.dtype, type_of(factor).dtype)
            made = self.builder.call(target, (q, factor), TensorType.whole(dtype, type_.shape))
            return cast(self.builder, made, type_.dtype)
        return self.builder.call(target, (q, factor), type_)

    def _as_before(self, out: fx.Node, found: HandWritten) -> fx.Node:
        """[B,H,Sq,E] as the product with the values gave it."""
        weights, _ = found.values.operands
        old = found.values.node
        out = cast(self.builder, out, type_of(old).dtype)
        lead = type_of(weights.node).shape[:-2]
        out = reshaped(self.builder, out, (*lead, *type_of(out).shape[2:]))
        (value_dim,) = set(found.values.output) - set(weights.names)
        names = [*weights.names[:-1], value_dim]
        out = permuted(self.builder, out, [names.index(n) for n in found.values.output])
        return reshaped(self.builder, out, type_of(old).shape)

    # -- masks ---------------------------------------------------------------------------------

    def _as_mask(
        self, x: fx.Node, lead: Sequence[Size], heads: tuple[Size, Size]
    ) -> fx.Node:
        """A tensor that is broadcast to [*lead, Sq, Sk] in 4 dims."""
        shape = type_of(x).shape
        padded = (*(1,) * (len(lead) + 2 - len(shape)), *shape)
        return in_heads(self.builder, reshaped(self.builder, x, padded), lead, heads)

    def _masks(
        self,
        scores: _Scores,
        q: fx.Node,
        k: fx.Node,
        flags: list[fx.Node],
        bias: fx.Node | None,
        zeroed: Sequence[fx.Node],
    ) -> tuple[fx.Node, fx.Node | None]:
        """One mask of all that is added and filled in; queries are 0 where all keys are even."""
        finite = {fill.value for fill in scores.fills if fill.value != -inf}
        even = [fill.node for fill in scores.fills if fill.value != -inf]
        square = equal(type_of(q).shape[2], type_of(k).shape[2])
        sure = square and all(sees_itself(self.analysis.condition(flag)) for flag in flags)
        # All of such a row's weight is the sink's, or set to 0.
        gone = scores.sink is not None or all(node in zeroed for node in even)
        if not finite or sure or gone:
            return q, joined([*flags, *([bias] if bias is not None else [])], self.builder)
        if len(finite) > 1 or zeroed:
            raise NotUnderstoodError("several numbers stand in place of its scores")
        if scores.order != sorted(scores.order):
            raise NotUnderstoodError("its scores are masked before something is added to them")
        return self._even_rows(scores, q, flags, bias)

    def _visible(self, fill: Fill, heads: tuple[Size, Size]) -> fx.Node:
        """Bool in 4 dims: where the score stays."""
        flag = cast(self.builder, self.builder.env[fill.node], torch.bool)
        if fill.where:
            flag = self._negated(flag)
        return self._as_mask(flag, fill.lead, heads)

    def _negated(self, flag: fx.Node) -> fx.Node:
        """The opposite; that of `or` as an `and`, of which the parts of a mask can be read."""
        if short(flag) in ("logical_not", "bitwise_not"):
            return flag.args[0]  # type: ignore[return-value]
        type_ = type_of(flag)
        source = flag.all_input_nodes[0] if flag.all_input_nodes else flag
        if flag.target is aten.eq.Scalar and Call(flag)["other"] == 0 and (
            type_of(source).dtype == torch.bool
        ):
            return source
        if short(flag) in ("__or__", "bitwise_or", "logical_or"):
            a, b = (self._negated(x) for x in Call(flag).operands)
            return self.builder.call(aten.logical_and.default, (a, b), type_)
        return self.builder.call(aten.logical_not.default, (flag,), type_)

    def _bias(self, scores: _Scores, heads: tuple[Size, Size]) -> fx.Node | None:
        """All that is added to scores, in 4 dims."""
        found = []
        for bias, factor in scores.biases:
            x = self.builder.env[bias.node]
            if not type_of(x).dtype.is_floating_point:
                raise NotUnderstoodError(f"{type_of(x)} is added to its scores")
            x = self._as_mask(x, bias.lead, heads)
            if factor != 1:
                x = self.builder.call(aten.mul.Tensor, (x, factor), type_of(x))
            found.append(x)
        return joined(found, self.builder)

    def _even_rows(
        self, scores: _Scores, q: fx.Node, flags: list[fx.Node], bias: fx.Node | None
    ) -> tuple[fx.Node, fx.Node | None]:
        """Where a row sees no key, the scores that are one finite number share its weight evenly.

        A query of 0 that sees those keys shares it so, too.
        """
        visible = joined(flags, self.builder)
        assert visible is not None
        rows = TensorType.whole(torch.bool, (*type_of(visible).shape[:3], 1))
        sees = self.builder.call(aten.any.dim, (visible, -1, True), rows)
        blind = self.builder.call(aten.logical_not.default, (sees,), rows)
        q = self.builder.call(aten.masked_fill.Scalar, (q, blind, 0.0), type_of(q))
        evened = blind
        if any(fill.value == -inf for fill in scores.fills):
            evened = self._both("logical_and", blind, self._finite(scores.fills, flags))
        visible = self._both("logical_or", visible, evened)
        if bias is None:
            return q, visible
        type_ = broadcast([blind, bias], type_of(bias).dtype)
        bias = self.builder.call(aten.where.ScalarSelf, (blind, 0.0, bias), type_)
        return q, joined([visible, bias], self.builder)

    def _finite(self, fills: Sequence[Fill], flags: Sequence[fx.Node]) -> fx.Node:
        """Where a finite number has the last word."""
        found: fx.Node | None = None
        for fill, flag in zip(fills, flags, strict=True):
            if fill.value == -inf:
                found = found and self._both("logical_and", found, flag)
                continue
            hidden = self.builder.call(aten.logical_not.default, (flag,), type_of(flag))
            found = hidden if found is None else self._both("logical_or", found, hidden)
        assert found is not None
        return found

    def _both(self, name: str, a: fx.Node, b: fx.Node) -> fx.Node:
        target = getattr(aten, name).default
        return self.builder.call(target, (a, b), broadcast([a, b], torch.bool))

    def _sink(
        self, sink: Sink | None, lead: Sequence[Size], heads: tuple[Size, Size]
    ) -> fx.Node | None:
        """The column as one number a head."""
        if sink is None:
            return None
        x = self.builder.env[sink.node]
        known = self.reader.constant(sink.node)
        if known is not None:
            type_ = TensorType.whole(type_of(x).dtype, (heads[1],))
            return self.builder.call(
                aten.full.default, ([heads[1]], known), type_, dtype=type_.dtype
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
            raise NotUnderstoodError("its sink is not one number a head")
        return reshaped(self.builder, x, (heads[1],))
