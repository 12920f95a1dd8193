"""Let a block's attention be computed into the running state, so that a ring step is one op.

Apart, the block's output is written in the model's dtype, read again, and the state read and
written beside it. A kernel that starts from the state reads and writes the state only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from ringcompile.ir.calls import Call
from ringcompile.ir.program import Program
from ringcompile.ir.types import accumulator_type
from ringcompile.ops.schemas import op
from ringcompile.passes.base import Builder, Pass


@dataclass(frozen=True)
class FuseMerge(Pass):
    """Fuse each block attention with the merge of its result.

        state = block_attention(q, [k, v], ...)              # out in the model's dtype
        block = block_attention(q, [kv], ...); state = merge(state, block, start=0)
    ->  state = block_attention(q, [k, v], ..., wide=True)   # an accumulator from the start
        state = attend_merge(state, q, [kv], ..., start=0)
    """

    name: ClassVar[str] = "fuse-merge"

    def run(self, program: Program) -> Program:
        """Rewrite merges of blocks that nothing else reads; other nodes are copied."""
        if not any(map(_changes, program.graph.nodes)):
            return program
        builder = Builder()
        for node in program.graph.nodes:
            builder.at(node)
            if _is_folded(node):
                continue
            if node.target is op("merge") and _is_folded(node.args[1]):
                builder.env[node] = _attend_merge(builder, node)
            elif _starts_accumulator(node):
                builder.env[node] = _widened(builder, node)
            else:
                builder.env[node] = builder.copy(node)
        return program.with_graph(builder.graph)


def _changes(node: fx.Node) -> bool:
    return _is_folded(node) or _starts_accumulator(node)


def _is_folded(node: Any) -> bool:
    """A block whose only reader merges it into a state."""
    if not isinstance(node, fx.Node) or node.target is not op("block_attention"):
        return False
    users = list(node.users)
    return len(users) == 1 and users[0].target is op("merge") and users[0].args[1] is node


def _starts_accumulator(node: fx.Node) -> bool:
    """A block that others are merged into, in a dtype too narrow for that."""
    if node.target is not op("block_attention"):
        return False
    out, lse = node.meta["type"]
    return out.dtype != lse.dtype and any(user.target is op("merge") for user in node.users)


def _widened(builder: Builder, node: fx.Node) -> fx.Node:
    new = builder.copy(node)
    new.kwargs = {**new.kwargs, "wide": True}
    new.meta["type"] = accumulator_type(node.meta["type"][0])
    return new


def _attend_merge(builder: Builder, node: fx.Node) -> fx.Node:
    state, block = node.args
    assert isinstance(block, fx.Node)
    given = dict(builder.mapped(Call(block).arguments))
    operands = tuple(given.pop(name) for name in ("q", "kv", "key_mask", "mask"))
    given.pop("wide", None)
    return builder.call(
        op("attend_merge"), (builder.mapped(state), *operands), node.meta["type"],
        name=node.name, why=block.meta.get("why"), start=node.kwargs["start"], **given,
    )
