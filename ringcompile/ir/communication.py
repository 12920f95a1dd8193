"""What a program sends, read off its graph."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import sympy
from torch import fx

from ringcompile.ir.calls import target_name
from ringcompile.ir.expr import Size, product, simplify
from ringcompile.ir.nodes import type_of
from ringcompile.ir.stretched import sections_of
from ringcompile.ir.types import local_shape

if TYPE_CHECKING:
    from ringcompile.ir.program import Program

SHIFT = "ringcompile.shift_start.default"
WAIT = "ringcompile.wait.default"
GATHER = "ringcompile.gather.default"
ALL_REDUCE = "ringcompile.all_reduce.default"
REDUCE_SCATTER = "ringcompile.reduce_scatter.default"
ALL_TO_ALL = "ringcompile.all_to_all.default"
DISPATCH = "ringcompile.dispatch.default"
COMBINE = "ringcompile.combine.default"
COLLECTIVES = frozenset(
    {GATHER, ALL_REDUCE, REDUCE_SCATTER, ALL_TO_ALL, DISPATCH, COMBINE}
)
COMMUNICATION = COLLECTIVES | {SHIFT, WAIT}


def collective_bytes(kind: str, num_bytes: Size, num_ranks: int) -> Size:
    """The bytes that any algorithm has to send per rank.

    A reduction and an exchange keep their own part (of rows that go to experts this is so on
    average, where all are chosen alike); an all-reduce is a reduce-scatter and a gather
    of the parts (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms", 2009).

    Args:
        kind: the op's short name.
        num_bytes: of what a rank brings.
        num_ranks: ranks of the group.
    """
    others = num_ranks - 1
    if kind == "gather":
        return simplify(num_bytes * others)
    rounds = 2 if kind == "all_reduce" else 1
    return simplify(sympy.ceiling(sympy.Rational(rounds * others, num_ranks) * num_bytes))


def short_name(node: fx.Node) -> str:
    """`all_reduce` of `ringcompile.all_reduce.default`."""
    return target_name(node.target).split(".")[1]


def bytes_of(program: Program, node: fx.Node) -> Size:
    """The bytes that this rank sends in a node: whole buffers to a peer, what it must in others."""
    target = target_name(node.target)
    if target == SHIFT and node.kwargs["to"] is not None:
        return num_bytes(program, node.args[0])  # type: ignore[arg-type]
    if target in COLLECTIVES:
        assert program.mesh is not None
        num_ranks = program.mesh.size(str(node.kwargs["axis"]))
        # As many rows come back from experts as went to them.
        rows = node if target == COMBINE else node.args[0]
        brought = num_bytes(program, rows)  # type: ignore[arg-type]
        return collective_bytes(short_name(node), brought, num_ranks)
    return 0


def num_bytes(program: Program, node: fx.Node) -> Size:
    """The bytes of one rank's share of a node's value."""
    type_ = type_of(node)
    shape = local_shape(type_, program.mesh, program.sequence)
    return product([*shape, type_.dtype.itemsize])


def weight_bytes(program: Program) -> int:
    """The bytes of this rank's share of all weights; one that it takes twice alike is held once."""
    shares = {
        (program.weights[node.name].name, type_of(node).layout): num_bytes(program, node)
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in program.weights
    }
    return sum(map(int, shares.values()))


def bytes_sent(program: Program) -> Size:
    """The bytes that this rank sends in one run, as an expression in the lengths.

    Layers that are alike are looked at once, and the graph is not written for it.
    """
    times = Counter(node for section in sections_of(program.graph) for node in section.nodes)
    sent = Counter[Size]()
    for node, count in times.items():
        sent[bytes_of(program, node)] += count
    return simplify(sum((count * size for size, count in sent.items()), sympy.Integer(0)))
