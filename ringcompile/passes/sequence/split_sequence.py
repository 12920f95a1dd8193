"""Which lengths of a model ranks divide, which is the main one, and in which order they hold it."""

from __future__ import annotations

from collections import Counter

from ringcompile.ir.calls import Call
from ringcompile.ir.expr import LENGTHS, SEQUENCE, Size, equal, is_symbolic, symbol, symbols_in
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


def other_lengths(program: Program, main: Size) -> tuple[Size, ...]:
    """Further lengths that are divided, as many as programs have symbols for.

    They are those of queries that vary independently of the main one, as a decoder's beside an
    encoder's. What is only attended to, such as a text that an image looks at, is replicated.

    Args:
        program: in which attention is recognized.
        main: from `sequence_length`.
    """
    found: Counter[Size] = Counter()
    for node in program.graph.nodes:
        if node.target is _ATTENTION:
            size = type_of(Call(node)["q"]).shape[2]
            found.update([size] if _is_apart(size, main) else [])
    chosen: list[Size] = []
    for size, _ in found.most_common():
        if all(_is_apart(size, other) for other in chosen):
            chosen.append(size)
    return tuple(chosen[: len(LENGTHS) - 1])


def _is_apart(size: Size, other: Size) -> bool:
    """Whether a size varies, and not with another one."""
    if not is_symbolic(size):
        return False
    names = symbols_in(size)
    return names <= {*LENGTHS} and (not is_symbolic(other) or names.isdisjoint(symbols_in(other)))
