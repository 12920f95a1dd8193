"""A program in float64: what ranks compute differently shows there, however little it is.

In bfloat16 a wrong epsilon or scale hides below rounding. Which numbers a program adds and
multiplies does not depend on their precision, so the same graph is run with every float as wide as
can be, for one device and for all ranks, and the results have to agree to ten digits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ringcompile.ir.calls import Call, append, map_values
from ringcompile.ir.nodes import type_of
from ringcompile.ir.program import Program, WeightSource
from ringcompile.ir.types import TensorType, ValueType

aten = torch.ops.aten

WIDE = {
    torch.float16: torch.float64, torch.bfloat16: torch.float64, torch.float32: torch.float64,
    torch.complex64: torch.complex128,
}


def widened(program: Program) -> Program:
    """The same program with float64 for every float, in its types and in what casts name."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
        if node.op == "call_function":
            args, kwargs = map_values((list(args), dict(kwargs)), _wide)
        if node.op == "output":
            env[node] = graph.output(args[0])
        elif node.target is aten.view.dtype:
            env[node] = _bits(graph, node, args[0])
        else:
            env[node] = append(graph, node.op, node.target, tuple(args), kwargs, node.name)
        env[node].meta.update(node.meta)
        if "type" in node.meta:
            env[node].meta["type"] = _wide_type(node.meta["type"])
    inputs = tuple(replace(spec, type=_wide_type(spec.type)) for spec in program.inputs)
    return program.with_graph(graph, inputs=inputs)


def _bits(graph: fx.Graph, node: fx.Node, x: fx.Node) -> fx.Node:
    """Bytes as another dtype are those of the program's own dtypes; only then they are widened."""
    call = Call(node)
    have, made = type_of(call.operands[0]), type_of(node)
    if have.dtype in WIDE:
        x = _cast(graph, x, have)
    x = append(graph, "call_function", node.target, (x, made.dtype), {}, node.name)
    x.meta.update(type=made, loc=node.meta.get("loc"))
    return _cast(graph, x, _wide_type(made)) if made.dtype in WIDE else x


def _cast(graph: fx.Graph, x: fx.Node, type_: TensorType) -> fx.Node:
    cast = append(graph, "call_function", aten.to.dtype, (x, type_.dtype))
    cast.meta.update(type=type_)
    return cast


def _wide(value: Any) -> Any:
    return WIDE.get(value, value) if isinstance(value, torch.dtype) else value


def _wide_type(type_: Any) -> Any:
    value: ValueType = type_
    if isinstance(value, tuple):
        return tuple(map(_wide_type, value))
    return replace(value, dtype=_wide(value.dtype))


def wide_tensors(value: Any) -> Any:
    """Nested tensors with every float as wide as can be."""
    return pytree.tree_map_only(torch.Tensor, lambda x: x.to(_wide(x.dtype)), value)


@dataclass(frozen=True)
class WideSource:
    """A source of weights in float64, from another one."""

    source: WeightSource

    def __call__(self, name: str) -> torch.Tensor:
        """The whole weight."""
        weight = self.source(name)
        return weight.to(_wide(weight.dtype))


@contextlib.contextmanager
def wide_by_default() -> Iterator[None]:
    """Float64 also for what ops make of whole numbers."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
