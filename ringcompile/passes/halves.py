"""Compute a batch as two halves that know nothing of each other, so that they can overlap.

While one half waits for keys and values, the other can go through its products. The halves share
the weights, and what does not depend on the batch is computed once.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from ringcompile.errors import RingCompileError
from ringcompile.ir.calls import Call
from ringcompile.ir.layout import Layout
from ringcompile.ir.nodes import error_at, results_of, type_of
from ringcompile.ir.program import Input, Program
from ringcompile.ir.rules import ConflictError, find_rule
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
                    env[node] = builder.graph.create_node(node.op, node.target, args, kwargs, name)
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


def check_rows_apart(program: Program) -> None:
    """Check that no sequence of a batch changes another one's result, by the rules of the ops.

    Args:
        program: for two or more sequences, prepared.

    Raises:
        RingCompileError: at the op that mixes them, such as one that counts tokens of all of them
            for an expert's capacity.
    """
    layouts: dict[fx.Node, Layout] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            shape = type_of(node).shape
            split = node.name in program.placeholders and len(shape) > 1
            layouts[node] = (
                Layout.split(len(shape), 0, shape[0], (_AXIS,)) if split
                else Layout.whole(len(shape))
            )
        elif node.op == "call_function" and "type" in node.meta:
            layouts[node] = _carried(node, layouts)


_AXIS = "dp"


def _carried(node: fx.Node, layouts: dict[fx.Node, Layout]) -> Layout:
    """The layout of a node's result, if it needs no more of its operands than a row has."""
    if node.target is operator.getitem:
        return layouts[node.args[0]]  # type: ignore[index]
    call = Call(node)
    given = [layouts[operand] for operand in call.operands]
    if all(layout.is_whole for layout in given):
        return Layout.whole(len(results_of(node)[0].shape))
    rule = find_rule(node.target)
    if rule is None or (str(node.target) in _RUNNING and given[0].dims[call["dim"]]):
        raise _mixes(node)
    try:
        placed = rule.forward(call, given, {_AXIS: 2})
    except ConflictError:
        raise _mixes(node) from None
    for have, need in zip(given, placed.operands, strict=True):
        if not have.is_whole and have != need:
            raise _mixes(node)
    return placed.output


# Running sums go from rank to rank, and so from row to row.
_RUNNING = frozenset({"aten.cumsum.default"})


def _mixes(node: fx.Node) -> RingCompileError:
    return error_at(
        node, "sequences of a batch are mixed here, so that halves of it cannot be computed apart",
        hint="leave out --overlap halves; with a capacity of experts, --capacity local counts it "
        "by each half alone",
    )
