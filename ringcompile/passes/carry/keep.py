"""A prompt taken in at once: the program of the whole sequence, of which only keys and values stay.

The ranks of a ring compute a long prompt as they compute any sequence, each its own share. Softmax
does not care in which order keys come, so that they stay where that leaves them: nothing moves
between the prompt and the tokens that follow.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from ringcompile.axes import AXES, TIME
from ringcompile.ir.calls import Call
from ringcompile.ir.layout import WHOLE, Layout
from ringcompile.ir.nodes import type_of
from ringcompile.ir.program import Program, Structure
from ringcompile.ir.types import TensorType
from ringcompile.mesh import Mesh
from ringcompile.ops.schemas import op
from ringcompile.ops.slots import slots_of
from ringcompile.passes.base import Builder, Pass
from ringcompile.passes.carry.attention import cache_name, reader_of
from ringcompile.passes.requests import placeholders_first

_ATTENTION = op("attention")


@dataclass(frozen=True)
class Keep(Pass):
    """Store keys and values of a placed program, and return nothing.

    o = attention(q, k, v)    k [s/ring]   ->  store(k, cached_keys, slots)
                                               store(v, cached_values, slots)
                                               o = attention(q, k, v)

    Attributes:
        mesh: the parallel plan; `ring` divides the sequence.
        capacity: the tokens that a sequence may have in all.
    """

    name: ClassVar[str] = "keep"
    mesh: Mesh
    capacity: int

    def run(self, program: Program) -> Program:
        """The same program with stores; `clean-up` removes what was for outputs only."""
        builder, state = Builder(), dict[str, str]()
        slots = slots_of(self.capacity, self.mesh.size("ring"))
        stored: set[tuple[fx.Node, Hashable]] = set()
        caches: dict[fx.Node, fx.Node] = {}
        where: fx.Node | None = None
        for node in program.graph.nodes:
            builder.at(node)
            if node.op == "output":
                builder.output(())
                continue
            builder.env[node] = builder.copy(node)
            if node.target is not _ATTENTION:
                continue
            for operand, what in (("k", "keys"), ("v", "values")):
                x: fx.Node = Call(node)[operand]
                key = x, reader_of(node, self.mesh)
                if key in stored:
                    continue
                stored.add(key)
                if where is None:
                    where = _slots(builder, type_of(x))
                    state[where.name] = "slots"
                if x not in caches:
                    name = cache_name(what, node)
                    caches[x] = builder.placeholder(name, _kept(type_of(x), slots))
                    state[caches[x].name] = "cache"
                builder.call(op("store"), (builder.env[x], caches[x], where), type_of(x))
        return program.with_graph(
            placeholders_first(builder.graph), state=state,
            output_structure=Structure("tuple"),
            microbatches=1,
        )


def may_prefill(program: Program) -> bool:
    """Whether a prompt can be divided over ranks: along a ring, and all that stays are keys.

    Args:
        program: the one for the next tokens.
    """
    assert program.mesh is not None
    mesh = program.mesh
    others = (axis for axis in AXES if axis != "ring" and AXES[axis].own_tokens)
    along = mesh.size("ring") > 1 and all(mesh.size(axis) == 1 for axis in (TIME, *others))
    return along and {"sums", "recent"}.isdisjoint(program.state.values())


def caches_of(program: Program) -> dict[str, tuple[TensorType, frozenset[int]]]:
    """The caches of a program by name: their types, and the stages that write them."""
    types = {node.name: type_of(node) for node in program.graph.nodes if node.op == "placeholder"}
    stages: dict[str, set[int]] = {}
    for node in program.graph.nodes:
        if node.target is op("store"):
            stages.setdefault(Call(node)["cache"].name, set()).add(node.meta.get("stage", 0))
    return {name: (types[name], frozenset(found)) for name, found in stages.items()}


def _slots(builder: Builder, keys: TensorType) -> fx.Node:
    """Where each of a rank's tokens goes."""
    layout = keys.layout
    rows = TensorType(torch.int64, (keys.shape[2],), Layout((layout.dims[2],)))
    return builder.placeholder("new_slots", rows)


def _kept(type_: TensorType, slots: int) -> TensorType:
    batch, heads, _, width = type_.shape
    layout = type_.layout.with_dim(2, WHOLE)
    return TensorType(type_.dtype, (batch, heads, slots + 1, width), layout)
