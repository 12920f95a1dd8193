"""What is known of a single node: its type, the user's line behind it, and errors about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import fx

from ringcompile.errors import RingCompileError, SourceLocation
from ringcompile.ir.layout import Layout
from ringcompile.ir.types import TensorType, ValueType

_NOWHERE = SourceLocation()


def type_of(node: fx.Node) -> TensorType:
    """The tensor type of a node that returns one tensor."""
    value: ValueType = node.meta["type"]
    assert isinstance(value, TensorType), f"{node.name} returns several tensors"
    return value


def layout_of(node: fx.Node) -> Layout:
    """The layout of a node's value; all results of an op that returns several share one."""
    return results_of(node)[0].layout


def results_of(node: fx.Node) -> tuple[TensorType, ...]:
    """The types of what a node returns, one or several tensors."""
    value: ValueType = node.meta["type"]
    return value if isinstance(value, tuple) else (value,)


def location_of(node: fx.Node) -> SourceLocation:
    """The user's line behind a node."""
    return node.meta.get("loc", _NOWHERE)


def reached(
    start: Iterable[fx.Node], onwards: Callable[[fx.Node], Iterable[fx.Node]]
) -> set[fx.Node]:
    """The nodes that one comes to from these, step by step, and these.

    Args:
        start: where to begin.
        onwards: the nodes one step from a node.
    """
    found: set[fx.Node] = set()
    work = list(start)
    while work:
        node = work.pop()
        if node not in found:
            found.add(node)
            work += onwards(node)
    return found


def kinds_of_nodes(graph: fx.Graph) -> list[fx.Node]:
    """Nodes of every kind that a graph has: of parts that are alike, those of a few parts.

    A graph that is written out from a shorter one (`ir/stretched.py`) has no op, type or symbol
    that the shorter one does not have.
    """
    return list(getattr(graph, "kinds", None) or graph.nodes)


def error_at(node: fx.Node, message: str, hint: str | None = None) -> RingCompileError:
    """An error about a node, with the user's own source line."""
    return RingCompileError(message, hint=hint, location=location_of(node), node=node.name)
