"""Put thin ops that one kernel can compute next to each other, and mark them as a group.

Thin ops (pointwise ops, casts, copies, gathers and reductions over rows) read and write whole
tensors and compute little, so what a chain of them costs is the bytes that pass between them. One
kernel for the chain reads once what comes from outside, and writes once what is read outside
(Ansel et al., PyTorch 2, ASPLOS 2024).

Which ops share a group is found by one rule (`thin_groups.py`). Nothing is moved past an exchange
or an attention, so transfers start and are waited for where they were.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf
from typing import ClassVar

from torch import fx

from ringcompile.ir.fused import mark_group, moves_on
from ringcompile.ir.program import Program
from ringcompile.passes.base import Builder, Pass
from ringcompile.passes.rank.thin_groups import thin_groups


@dataclass(frozen=True)
class Fuse(Pass):
    """Make neighbours of nodes that one kernel computes; what they compute stays as it is.

        h = linear(x, w); y = add(x, h); g = linear(x, v); z = rms_norm(y)
    ->  h = linear(x, w); g = linear(x, v); y = add(x, h); z = rms_norm(y)    # one group

    It comes before ring attention is written out, so that all attentions that are alike still look
    alike. Ring attention's last step, `finish`, takes the place that the attention has in a group.
    """

    name: ClassVar[str] = "fuse"

    def run(self, program: Program) -> Program:
        """Copy all nodes, those of each group one after another and marked."""
        builder = Builder()
        calls = list[fx.Node]()
        for node in program.graph.nodes:
            if node.op == "call_function":
                calls.append(node)
            elif node.op == "placeholder":
                builder.env[node] = builder.copy(node)
        for unit in (unit for piece in _pieces(calls) for unit in _ordered(piece)):
            for node in unit:
                builder.env[node] = builder.copy(node)
            mark_group([builder.env[node] for node in unit])
        output = program.output_node
        builder.env[output] = builder.copy(output)
        return program.with_graph(builder.graph)


def _pieces(calls: Sequence[fx.Node]) -> Iterator[list[fx.Node]]:
    """Runs of calls that may be put in another order; what may not be moved begins one."""
    piece: list[fx.Node] = []
    for node in calls:
        if piece and not moves_on(node):
            yield piece
            piece = []
        piece.append(node)
    if piece:
        yield piece


def _ordered(piece: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """The calls of a piece in units: groups, and other nodes by themselves.

    A group comes where the last of its nodes was, which keeps early what does not depend on it.
    """
    places = {node: i for i, node in enumerate(piece)}
    groups = thin_groups(piece)
    unit_of = {node: group for group in groups for node in group}
    units = [group if node is group[0] else [] for node in piece
             for group in [unit_of.setdefault(node, [node])]]
    numbered = {node: i for i, unit in enumerate(units) for node in unit}
    reads = [
        {numbered[x] for node in unit for x in node.all_input_nodes if x in numbered} - {i}
        for i, unit in enumerate(units)
    ]
    readers: dict[int, list[int]] = {}
    for i, read in enumerate(reads):
        for operand in read:
            readers.setdefault(operand, []).append(i)
    ready = [(_place(unit, places), i) for i, unit in enumerate(units) if unit and not reads[i]]
    heapq.heapify(ready)
    order: list[list[fx.Node]] = []
    while ready:
        _, i = heapq.heappop(ready)
        order.append(units[i])
        for reader in readers.get(i, ()):
            reads[reader].discard(i)
            if not reads[reader]:
                heapq.heappush(ready, (_place(units[reader], places), reader))
    assert sum(map(len, order)) == len(piece)
    return order


def _place(unit: list[fx.Node], places: dict[fx.Node, int]) -> float:
    """Where a unit is wanted: what may not be moved as soon as can be."""
    return places[unit[-1]] if moves_on(unit[0]) else -inf
