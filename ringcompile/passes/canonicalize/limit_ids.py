"""Which inputs are ids of rows of a table: how large they may be is known before anything runs.

A table that is split over ranks reads an id that no rank has as zeros, and a GPU aborts on one that
is outside of a table. So ids are checked on the host, where inputs are shared out, on every rank.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from ringcompile.ir.calls import Call, target_name
from ringcompile.ir.nodes import location_of, type_of
from ringcompile.ir.program import IdLimit, Program
from ringcompile.ops.schemas import op
from ringcompile.passes.base import Pass

aten = torch.ops.aten
# All entries of the first operand, once or several times, and no others.
_VIEWS = frozenset({
    aten.reshape.default, aten.permute.default, aten.expand.default, aten.flip.default,
    aten.roll.default, op("redistribute"),
})


@dataclass(frozen=True)
class LimitIds(Pass):
    """Record for each input of ids which ids are valid for the tables that they index.

    y = embedding(table [V, D], ids)          ->  ids lie in 0 .. V - 1
    p = embedding(places [N, D], ids + 2)     ->  ids lie in -2 .. N - 3
    """

    name: ClassVar[str] = "limit-ids"

    def run(self, program: Program) -> Program:
        """The same graph; inputs with limits."""
        limits: dict[str, list[IdLimit]] = {}
        for node in program.graph.nodes:
            if node.target is not aten.embedding.default:
                continue
            call = Call(node)
            found = ids_of(call["indices"], program)
            rows = type_of(call["weight"]).shape[0]
            if found is not None and isinstance(rows, int):
                name, added = found
                limit = IdLimit(-added, rows - 1 - added, location_of(node))
                limits.setdefault(name, []).append(limit)
        inputs = tuple(
            replace(spec, limits=tuple(dict.fromkeys(limits.get(spec.name, ()))))
            for spec in program.inputs
        )
        return program.with_graph(program.graph, inputs=inputs)


def ids_of(node: fx.Node, program: Program) -> tuple[str, int] | None:
    """The input whose entries are all ids, and what is added to them; None for computed ids."""
    added = 0
    while node.op == "call_function":
        if node.target is operator.getitem:  # one of several results: sorted, picked
            return None
        call = Call(node)
        if node.target in (aten.add.Scalar, aten.add.Tensor, aten.sub.Scalar, aten.sub.Tensor):
            other, alpha = call["other"], call["alpha"]
            if not isinstance(other, int) or alpha != 1:
                return None
            added += -other if "sub" in target_name(node.target) else other
        elif node.target is aten.to.dtype:
            if type_of(node).dtype not in (torch.int32, torch.int64):
                return None
        elif node.target not in _VIEWS:
            return None
        node = call.operands[0]
    name = program.placeholders.get(node.name)
    whole = type_of(node).dtype in (torch.int32, torch.int64)
    return (name, added) if name is not None and whole else None
