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

from ringcompile.ir.calls import append, map_values
from ringcompile.ir.program import Program, WeightSource
from ringcompile.ir.types import ValueType

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
        else:
            env[node] = append(graph, node.op, node.target, tuple(args), kwargs, node.name)
        env[node].meta.update(node.meta)
        if "type" in node.meta:
            env[node].meta["type"] = _wide_type(node.meta["type"])
    inputs = tuple(replace(spec, type=_wide_type(spec.type)) for spec in program.inputs)
    return program.with_graph(graph, inputs=inputs)


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
