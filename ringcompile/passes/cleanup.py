"""Remove what nothing reads, and compute once what is computed twice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from ringcompile.ir.program import Program
from ringcompile.ir.verifier import CONSUMING
from ringcompile.passes.base import Builder, Pass

_EFFECTS = frozenset({"ringcompile.shift_start.default", "ringcompile.wait.default"})


@dataclass(frozen=True)
class CleanUp(Pass):
    """Dead code and common subexpressions.

    Transfers are never removed or merged here: a peer waits for them.
    """

    name: ClassVar[str] = "clean-up"

    def run(self, program: Program) -> Program:
        """Copy what is live, and each value only where it is computed first."""
        live = _live(program)
        builder = Builder()
        seen: dict[Any, fx.Node] = {}
        for node in program.graph.nodes:
            if node not in live:
                continue
            key = _key(node, builder)
            if key is not None and key in seen:
                builder.env[node] = seen[key]
                continue
            builder.env[node] = builder.copy(node)
            if key is not None:
                seen[key] = builder.env[node]
        names = {node.name for node in builder.graph.nodes if node.op == "placeholder"}
        return program.with_graph(
            builder.graph,
            placeholders={k: v for k, v in program.placeholders.items() if k in names},
            weights={k: v for k, v in program.weights.items() if k in names},
        )


def _live(program: Program) -> set[fx.Node]:
    live: set[fx.Node] = set()
    for node in reversed(program.graph.nodes):
        if node.op == "output" or node in live or str(node.target) in _EFFECTS:
            live.add(node)
            live.update(node.all_input_nodes)
    return live


def _key(node: fx.Node, builder: Builder) -> Any:
    """Equal for nodes that compute the same value; None for nodes that must stay apart."""
    if node.op != "call_function" or str(node.target) in _EFFECTS | CONSUMING:
        return None
    if any(str(user.target) in CONSUMING for user in node.users):
        return None
    return (
        node.target,
        _hashable(builder.mapped(node.args)),
        _hashable(builder.mapped(dict(node.kwargs))),
        node.meta.get("type"),
    )


def _hashable(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple(sorted((k, _hashable(v)) for k, v in value.items()))
    if isinstance(value, list | tuple):
        return tuple(map(_hashable, value))
    # 1, 1.0 and True are equal as keys, and different as arguments.
    return (type(value), value)


