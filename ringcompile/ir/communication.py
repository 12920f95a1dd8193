"""What a program sends, read off its graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from ringcompile.ir.expr import Size, product, simplify
from ringcompile.ir.nodes import type_of
from ringcompile.ir.types import local_shape

if TYPE_CHECKING:
    from ringcompile.ir.program import Program

SHIFT = "ringcompile.shift_start.default"
GATHER = "ringcompile.gather.default"
WAIT = "ringcompile.wait.default"
COMMUNICATION = frozenset({SHIFT, GATHER, WAIT})


def bytes_of(program: Program, node: fx.Node) -> Size:
    """The bytes that this rank sends in a node: whole buffers to one peer, a share to each other.

    An all-gather counts world size - 1 shares, what any algorithm has to send per rank.
    """
    target = str(node.target)
    if target == SHIFT and node.kwargs["to"] is not None:
        return num_bytes(program, node.args[0])  # type: ignore[arg-type]
    if target == GATHER:
        assert program.mesh is not None
        peers = program.mesh.size(str(node.kwargs["axis"])) - 1
        return simplify(num_bytes(program, node.args[0]) * peers)  # type: ignore[arg-type]
    return 0


def num_bytes(program: Program, node: fx.Node) -> Size:
    """The bytes of one rank's share of a node's value."""
    type_ = type_of(node)
    shape = local_shape(type_, program.mesh, program.sequence)
    return product([*shape, type_.dtype.itemsize])


def bytes_sent(program: Program) -> Size:
    """The bytes that this rank sends in one run, as an expression in the lengths."""
    total: Size = 0
    for node in program.graph.nodes:
        total = simplify(total + bytes_of(program, node))
    return total
