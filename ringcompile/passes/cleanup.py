"""Remove what nothing reads, and compute once what is computed twice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from ringcompile.ir.calls import target_name
from ringcompile.ir.program import Program
from ringcompile.ir.verifier import CONSUMING
from ringcompile.passes.base import Builder, Pass

_EFFECTS = frozenset({
    "ringcompile.shift_start.default", "ringcompile.wait.default", "ringcompile.store.default",
})
_APART = _EFFECTS | CONSUMING


@dataclass(frozen=True)
class CleanUp(Pass):
    """Remove dead code and common subexpressions.

    Transfers are never removed or merged here: a peer waits for them.
    """

    name: ClassVar[str] = "clean-up"

    def run(self, program: Program) -> Program:
        """Copy what is live, and each value only where it is computed first."""
        first = _first(program)
        if len(first) == len(program.graph.nodes) and all(a is b for a, b in first.items()):
            return program
        builder = Builder()
        for node, same in first.items():
            builder.env[node] = builder.copy(node) if same is node else builder.env[same]
        names = {node.name for node in builder.graph.nodes if node.op == "placeholder"}
        return program.with_graph(
            builder.graph,
            placeholders={k: v for k, v in program.placeholders.items() if k in names},
            weights={k: v for k, v in program.weights.items() if k in names},
            state={k: v for k, v in program.state.items() if k in names},
        )


def _live(program: Program) -> set[fx.Node]:
    live: set[fx.Node] = set()
    for node in reversed(program.graph.nodes):
        if node.op == "output" or node in live or target_name(node.target) in _EFFECTS:
            live.add(node)
            live.update(node.all_input_nodes)
    return live


def _first(program: Program) -> dict[fx.Node, fx.Node]:
    """For each live node the first one that computes the same."""
    live, seen = _live(program), dict[Any, fx.Node]()
    first: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        if node in live:
            key = _key(node, first)
            first[node] = node if key is None else seen.setdefault(key, node)
    return first


def _key(node: fx.Node, first: Mapping[fx.Node, fx.Node]) -> Any:
    """Equal for nodes that compute the same value; None for nodes that must stay apart."""
    if node.op != "call_function" or target_name(node.target) in _APART:
        return None
    if any(target_name(user.target) in CONSUMING for user in node.users):
        return None
    return (
        node.target,
        _hashable(fx.map_arg(node.args, first.__getitem__)),
        _hashable(fx.map_arg(node.kwargs, first.__getitem__)),
        node.meta.get("type"),
    )


def _hashable(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple(sorted((k, _hashable(v)) for k, v in value.items()))
    if isinstance(value, list | tuple):
        return tuple(map(_hashable, value))
    # 1, 1.0 and True are equal as keys, and different as arguments.
    return (type(value), value)


