"""Compute a batch as two halves that know nothing of each other, so that they can overlap.

While one half waits for keys and values, the other can go through its products. The halves share
the weights, and what does not depend on the batch is computed once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from ringcompile.errors import RingCompileError
from ringcompile.ir.calls import append
from ringcompile.ir.nodes import results_of
from ringcompile.ir.program import Input, Program
from ringcompile.ir.types import TensorType
from ringcompile.passes.base import Builder, Pass

aten = torch.ops.aten


@dataclass(frozen=True)
class Halves(Pass):
    """Make a program for one batch into one for two, computed apart.

    y = f(x)    ->   y = cat(f(x[:B]), f(x[B:]))
    """

    name: ClassVar[str] = "halves"

    def run(self, program: Program) -> Program:
        """The program for twice the batch.

        Raises:
            RingCompileError: an input or an output has no batch dim.
        """
        batch = _batch(program)
        builder = Builder()
        halves: list[dict[fx.Node, Any]] = [{}, {}]
        for node in program.graph.nodes:
            builder.at(node)
            if node.op == "placeholder":
                self._placeholder(program, builder, node, halves, batch)
            elif node.op == "call_function":
                for half, env in enumerate(halves):
                    builder.env = env
                    args, kwargs = builder.mapped((node.args, node.kwargs))
                    name = f"{node.name}_half{half}"
                    env[node] = append(builder.graph, node.op, node.target, args, kwargs, name)
                    env[node].meta.update(node.meta)
        made = [self._joined(builder, node, halves, batch) for node in program.outputs]
        builder.output(tuple(made))
        inputs = tuple(Input(one.name, _doubled(one.type)) for one in program.inputs)
        return program.with_graph(builder.graph, inputs=inputs)

    def _placeholder(
        self, program: Program, builder: Builder, node: fx.Node,
        halves: list[dict[fx.Node, Any]], batch: int,
    ) -> None:
        type_ = node.meta["type"]
        if node.name in program.weights:
            halves[0][node] = halves[1][node] = builder.placeholder(node.name, type_)
            return
        whole = builder.placeholder(node.name, _doubled(type_))
        for half, env in enumerate(halves):
            env[node] = builder.call(
                aten.slice.Tensor, (whole, 0, half * batch, (half + 1) * batch), type_,
                name=f"{node.name}_half{half}", why="half of the batch",
            )

    def _joined(
        self, builder: Builder, node: fx.Node, halves: list[dict[fx.Node, Any]], batch: int
    ) -> fx.Node:
        (type_,) = results_of(node)
        if not type_.shape or type_.shape[0] != batch:
            raise RingCompileError(
                f"the output {type_} has no batch dim, so that halves cannot be joined"
            )
        builder.at(node)
        return builder.call(
            aten.cat.default, ([env[node] for env in halves], 0), _doubled(type_),
            why="both halves",
        )


def _batch(program: Program) -> int:
    sizes = {spec.type.shape[0] if len(spec.type.shape) > 1 else None for spec in program.inputs}
    (size,) = sizes if len(sizes) == 1 else (None,)
    if not isinstance(size, int):
        raise RingCompileError(
            "the inputs have no batch dim in common, so that there are no halves of a batch"
        )
    return size


def _doubled(type_: TensorType) -> TensorType:
    size, *rest = type_.shape
    return replace(type_, shape=(size * 2, *rest))
