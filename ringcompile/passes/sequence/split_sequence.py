"""Which length of a model is the sequence that ranks divide, and in which order they hold it."""

from __future__ import annotations

from collections import Counter

from ringcompile.ir.calls import Call
from ringcompile.ir.expr import SEQUENCE, Size, equal, is_symbolic, symbol
from ringcompile.ir.nodes import type_of
from ringcompile.ir.program import Program
from ringcompile.ops.schemas import op

_ATTENTION = op("attention")


def order_of(program: Program) -> str:
    """The order of positions under which ranks have the same work: zigzag if all is causal.

    Args:
        program: in which attention is recognized.
    """
    calls = [Call(node) for node in program.graph.nodes if node.target is _ATTENTION]
    causal = calls and all(c["lower"] == 0 and c["upper"] is None for c in calls)
    return "zigzag" if causal else "contiguous"


def sequence_length(program: Program) -> Size | None:
    """The length that is split: the one that most self-attentions have, of those that may vary.

    It is not a length of the inputs where the model adds prefix tokens, or cuts patches. Where all
    attention is over another sequence, and no length varies, it is that of the queries. None where
    there is no attention, and the length is fixed.
    """
    lengths: Counter[Size] = Counter()
    of_queries: Counter[Size] = Counter()
    for node in program.graph.nodes:
        if node.target is _ATTENTION:
            queries, keys = (type_of(n).shape[2] for n in Call(node).operands[:2])
            (lengths if equal(queries, keys) else of_queries)[queries] += 1
    if not lengths:
        varies = any(
            is_symbolic(size) and symbol(SEQUENCE) in size.free_symbols
            for spec in program.inputs for size in spec.type.shape
        )
        if varies:
            return symbol(SEQUENCE)
        lengths = of_queries
    return max(
        lengths, key=lambda x: (is_symbolic(x), lengths[x], x == symbol(SEQUENCE)), default=None
    )
