"""Compute a batch as two halves that know nothing of each other, so that they can overlap.

While one half waits for keys and values, the other can go through its products. The halves share
the weights, and what does not depend on the batch is computed once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, ClassVar

import torch
from torch import fx

from ringcompile.errors import RingCompileError
from ringcompile.ir.calls import append
from ringcompile.ir.expr import BATCH, divide, simplify, symbol
from ringcompile.ir.nodes import type_of
from ringcompile.ir.program import Program
from ringcompile.ir.types import TensorType
from ringcompile.passes.base import Builder, Pass
from ringcompile.passes.deal_batch import deal_out, routing

aten = torch.ops.aten
_B = symbol(BATCH)
_HALF = _B / 2


@dataclass(frozen=True)
class Halves(Pass):
    """Make a program for a batch into one that computes its halves apart.

    y = f(x)    ->   y = cat(f(x[:b/2]), f(x[b/2:]))

    Attributes:
        capacity: "local" where each half may count a capacity of experts alone.
    """

    name: ClassVar[str] = "halves"
    capacity: str = "exact"

    def run(self, program: Program) -> Program:
        """The program for an even batch.

        Raises:
            RingCompileError: at the op that mixes the sequences of a batch, or the batch is fixed.
        """
        if program.batch != _B:
            raise RingCompileError(
                f"the batch is fixed at {program.batch}, so that there are no halves of it",
                hint="; ".join(program.notes) or None,
            )
        local = self.capacity == "local"
        regions = [r for r in routing(program, {}) if local or not r.has_capacity]
        try:
            halves = [deal_out(program, regions, _HALF, first) for first in (0, _HALF)]
        except RingCompileError as error:
            raise RingCompileError(
                f"{error.message}, so that halves of it cannot be computed apart",
                hint="leave out --overlap halves; with a capacity of experts, --capacity local "
                "counts it by each half alone",
                location=error.location, node=error.node,
            ) from None
        return _Joiner(program, halves).run()


class _Joiner:
    """Writes the programs of both halves into one."""

    def __init__(self, program: Program, halves: list[Program]) -> None:
        self.program, self.halves = program, halves
        self.builder = Builder()
        self.given: dict[str, fx.Node] = {}
        self.envs: list[dict[fx.Node, Any]] = [{}, {}]

    def run(self) -> Program:
        for half in self.halves:
            for node in half.graph.nodes:
                if node.op == "placeholder":
                    self._given(half, node)
        # In turns, so that one half computes while the other one communicates.
        for nodes in zip_longest(*(half.graph.nodes for half in self.halves)):
            for i, node in enumerate(nodes):
                if node is not None:
                    self._write(i, node)
        made = [self._joined(i, type_) for i, type_ in enumerate(self.halves[0].returns)]
        self.builder.output(tuple(made))
        low, high = self.program.batch_range
        return self.program.with_graph(
            self.builder.graph,
            inputs=tuple(replace(x, type=_whole(x.type)) for x in self.program.inputs),
            placeholders=self.halves[0].placeholders,
            batch_range=(max(low, 2), high),
        )

    def _write(self, number: int, node: fx.Node) -> None:
        """A node of one half."""
        self.builder.env = env = self.envs[number]
        self.builder.at(node)
        if node.op == "placeholder":
            env[node] = self._own(self.halves[number], node, number)
        elif node.op == "call_function":
            args, kwargs = self.builder.mapped((node.args, node.kwargs))
            name = f"{node.name}_half{number}"
            env[node] = append(self.builder.graph, node.op, node.target, args, kwargs, name)
            env[node].meta.update(node.meta)

    def _given(self, half: Program, node: fx.Node) -> None:
        """A weight or an input, once for both halves."""
        if node.name in self.given:
            return
        type_ = type_of(node)
        if node.name not in half.weights:
            shape = tuple(_B if size == _HALF else size for size in type_.shape)
            type_ = TensorType.whole(type_.dtype, shape)
        self.given[node.name] = self.builder.placeholder(node.name, type_)

    def _own(self, half: Program, node: fx.Node, number: int) -> fx.Node:
        whole, type_ = self.given[node.name], type_of(node)
        dims = [dim for dim, size in enumerate(type_.shape) if size == _HALF]
        if node.name in half.weights or not dims:
            return whole
        ends = [simplify(_HALF * number), simplify(_HALF * (number + 1))]
        return self.builder.call(
            aten.slice.Tensor, (whole, dims[0], *ends), type_, name=f"{node.name}_half{number}",
            why="half of the batch",
        )

    def _joined(self, index: int, type_: TensorType) -> fx.Node:
        """An output of both halves along its batch dim; what has none is the same for both."""
        parts = [
            env[half.outputs[index]] for env, half in zip(self.envs, self.halves, strict=True)
        ]
        self.builder.at(self.halves[0].outputs[index])
        dims = [dim for dim, atoms in enumerate(type_.layout.dims) if atoms]
        if not dims:
            return parts[0]
        if divide(type_.layout.dims[dims[0]][0].size, _B) is None:
            raise RingCompileError(
                f"the sequences of the output {_whole(type_)} are not side by side, so that halves "
                "cannot be joined",
                hint="leave out --overlap halves",
            )
        return self.builder.call(
            aten.cat.default, (parts, dims[0]), _whole(type_), why="both halves"
        )


def _whole(type_: TensorType) -> TensorType:
    return TensorType.whole(type_.dtype, type_.shape)
