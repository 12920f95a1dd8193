"""Whether two captured programs compute the same, by their graphs; no weights are needed.

Values are numbered: two nodes have one number if they are the same op with the same arguments, so
names and order do not matter.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from ringcompile.errors import RingCompileError
from ringcompile.ir.calls import map_values
from ringcompile.ir.expr import BATCH, bind_to, symbol
from ringcompile.ir.program import Program
from ringcompile.ir.serialize import op_name
from ringcompile.ir.types import TensorType
from ringcompile.passes.base import Builder, Pipeline
from ringcompile.passes.canonicalize.canonicalize import Canonicalize
from ringcompile.passes.cleanup import CleanUp


def same_for_one_sequence(several: Program, one: Program) -> bool:
    """Whether the program of several sequences is for one what the program of one is."""
    try:
        few = (Canonicalize(), CleanUp())
        first, second = (Pipeline(few).run(p) for p in (_of_one_sequence(several), one))
    except RingCompileError:
        return False
    numbers: dict[Any, int] = {}
    return _results(first, numbers) == _results(second, numbers)


def _of_one_sequence(program: Program) -> Program:
    """The program with 1 for `b`."""
    builder = Builder()
    for node in program.graph.nodes:
        new = builder.env[node] = builder.copy(node)
        new.args, new.kwargs = map_values((new.args, new.kwargs), _of_one)
        if "type" in new.meta:
            new.meta["type"] = map_values(new.meta["type"], _of_one)
    return program.with_graph(builder.graph)


def _of_one(value: Any) -> Any:
    if isinstance(value, TensorType):
        return TensorType.whole(value.dtype, tuple(map(_of_one, value.shape)))
    return bind_to(value, {symbol(BATCH): 1})


def _results(program: Program, numbers: dict[Any, int]) -> list[int]:
    """The numbers of a program's outputs; `numbers` are those of all values so far."""
    known: dict[fx.Node, int] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            weight = program.weights.get(node.name)
            key: Any = ("weight", weight) if weight else ("input", program.placeholders[node.name])
        elif node.op == "call_function":
            args, kwargs = map_values((node.args, node.kwargs), lambda v: _named(v, known))
            key = (op_name(node.target), str(args), str(kwargs), str(node.meta.get("type")))
        else:
            continue
        known[node] = numbers.setdefault(key, len(numbers))
    return [known[node] for node in program.outputs]


def _named(value: Any, known: dict[fx.Node, int]) -> Any:
    """An argument as text that says what it is: 1, 1.0 and True are three."""
    return f"%{known[value]}" if isinstance(value, fx.Node) else repr(value)
