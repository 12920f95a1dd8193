"""Find attention that a model writes out by hand, and make it the one attention op."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from ringcompile.ir.calls import target_name
from ringcompile.ir.expr import equal, is_symbolic
from ringcompile.ir.nodes import type_of
from ringcompile.ir.program import Program
from ringcompile.ir.types import TensorType
from ringcompile.ops.schemas import op
from ringcompile.passes.attention.score_chain import Reader
from ringcompile.passes.attention.score_fills import hides, kept_as_numbers
from ringcompile.passes.attention.score_masks import MaskWriter
from ringcompile.passes.attention.score_operands import OperandWriter
from ringcompile.passes.attention.score_steps import HandWritten, NotUnderstoodError, Scores
from ringcompile.passes.base import Builder, Pass
from ringcompile.passes.contraction import read
from ringcompile.passes.masks.analysis import Analysis

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
            if target_name(node.target) not in _SOFTMAX or node not in reader.live:
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
        scores = Scores()
        for step in found.steps:
            scores.take(step)
        operands = OperandWriter(self.builder, found)
        q, k, v = operands.operands()
        if is_symbolic(type_of(q).shape[1]):
            raise NotUnderstoodError("every token has its own keys")
        for factor in scores.factors:
            q = operands.scaled(q, factor)
        masks = MaskWriter(self.builder, self.analysis, operands.heads)
        flags = [masks.visible(fill) for fill in scores.fills]
        bias = masks.bias(scores)
        lasting = [hides(fill, type_of(found.scores.node).dtype) for fill in scores.fills]
        if not all(lasting):
            if lasting != sorted(lasting) or found.zeroed or scores.order != sorted(scores.order):
                raise NotUnderstoodError("its masked scores are changed afterwards")
            count = lasting.count(False)
            pairs = list(zip(scores.fills, flags, strict=True))[:count]
            k, bias = kept_as_numbers(self.builder, k, pairs, bias)
            scores.fills, flags = scores.fills[count:], flags[count:]
        q, mask = masks.mask(scores, q, k, flags, bias, found.zeroed)
        sink = scores.sink and operands.sink(scores.sink, self.reader.constant(scores.sink.node))
        out = self.builder.call(
            op("attention"),
            (q, k, v, None, mask, sink),
            TensorType.whole(type_of(q).dtype, (*type_of(q).shape[:3], type_of(v).shape[3])),
            scale=scores.scale * (scores.bend or 1.0),
            softcap=scores.bend,
            lower=None,
            upper=None,
        )
        return operands.as_before(out)
