"""Does one rank's program follow from the program for all ranks? Compared node by node.

Passes are deterministic, so what they make of the program for all ranks is the rank's program. A
difference in meaning on one rank (a scale, a position, a merge left out) exchanges tensors of the
right shapes, and nothing that looks at messages alone would see it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import sympy
import torch
from torch import fx

from ringcompile.errors import RingCompileError
from ringcompile.ir.expr import equal
from ringcompile.ir.fused import MARK
from ringcompile.ir.nodes import error_at
from ringcompile.ir.program import Program
from ringcompile.ir.serialize import op_name

_HINT = "this rank's file was changed; transform the model again"
# A pass that only orders nodes anew, by the times of some hardware that need not be at hand here.
_REORDERS = "schedule"


def check_origin(rank: int, found: Program, derived: Program) -> None:
    """Compare a rank's program with what follows from the program for all ranks.

    The order of nodes is compared too, but for programs that were ordered by times of hardware;
    there the check across ranks still holds what ranks exchange to one order.

    Args:
        rank: whose program it is, for messages.
        found: the program that was saved.
        derived: what the passes make of the program for all ranks.

    Raises:
        RingCompileError: naming the first node and argument that differ.
    """
    for what, of in _PARTS.items():
        if of(found) != of(derived):
            raise RingCompileError(
                f"rank {rank} {what} {_short(of(found))}, but the program for all ranks implies "
                f"{_short(of(derived))}", hint=_HINT,
            )
    mine, wanted = (list(program.graph.nodes) for program in (found, derived))
    _check_names(rank, mine, wanted, ordered=_REORDERS not in found.passes)
    by_name = {node.name: node for node in wanted}
    for node in mine:
        for what, value, other in _differences(node, by_name[node.name]):
            raise error_at(
                node,
                f"rank {rank}: {what} of %{node.name} is {_short(value)}, but the program for all "
                f"ranks implies {_short(other)}", hint=_HINT,
            )


# What a program says beside its nodes.
_PARTS: dict[str, Callable[[Program], Any]] = {
    "divides the sequence as": lambda program: str(program.sequence),
    "fixes the lengths": lambda program: program.lengths,
    "serves the lengths": lambda program: program.length_range,
    "takes the inputs": lambda program: program.inputs,
    "takes inputs at": lambda program: program.placeholders,
    "takes the weights": lambda program: program.weights,
    "returns outputs nested as": lambda program: program.output_structure,
    "serves the batches": lambda program: program.batch_range,
    "returns for the whole batch": lambda program: program.returns,
    "runs microbatches": lambda program: program.microbatches,
}


def _check_names(
    rank: int, mine: list[fx.Node], wanted: list[fx.Node], ordered: bool
) -> None:
    """The same nodes, none left out, added or moved."""
    names, derived = ([node.name for node in nodes] for nodes in (mine, wanted))
    known, expected = set(names), set(derived)
    for node in wanted:
        if node.name not in known:
            raise error_at(node, f"rank {rank} lacks %{node.name}", hint=_HINT)
    for i, node in enumerate(mine):
        if node.name not in expected:
            raise error_at(
                node, f"rank {rank} has %{node.name}, which does not follow from the program for "
                "all ranks", hint=_HINT,
            )
        if ordered and node.name != derived[i]:
            raise error_at(
                node, f"rank {rank} has %{node.name} where %{derived[i]} follows from the program "
                "for all ranks", hint=_HINT,
            )


def _differences(node: fx.Node, other: fx.Node) -> Iterator[tuple[str, Any, Any]]:
    """What differs between two nodes of one name: what it is called, here and there."""
    if node.op != other.op or op_name(node.target) != op_name(other.target):
        yield "the op", op_name(node.target), op_name(other.target)
    mine, theirs = _arguments(node), _arguments(other)
    for name in dict.fromkeys((*mine, *theirs)):
        value, wanted = mine.get(name, "absent"), theirs.get(name, "absent")
        if not _same(value, wanted):
            yield f"argument '{name}'", value, wanted
    for key, what in {"type": "the type", "stage": "the stage", MARK: "the fused group"}.items():
        if not _same(node.meta.get(key), other.meta.get(key)):
            yield what, node.meta.get(key), other.meta.get(key)


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by the names that the op's schema gives them."""
    args = node.args[0] if node.op == "output" else node.args
    names: list[str] = []
    if isinstance(node.target, torch._ops.OpOverload):
        names = [argument.name for argument in node.target._schema.arguments]
    assert isinstance(args, tuple)
    named = {names[i] if i < len(names) else str(i): value for i, value in enumerate(args)}
    return {**named, **node.kwargs}


def _same(mine: Any, other: Any) -> bool:
    """Whether two arguments or types mean the same; nodes by their names."""
    if isinstance(mine, fx.Node) or isinstance(other, fx.Node):
        return getattr(mine, "name", None) == getattr(other, "name", mine)
    if isinstance(mine, sympy.Expr) or isinstance(other, sympy.Expr):
        numbers = all(isinstance(value, sympy.Expr | int) for value in (mine, other))
        return numbers and equal(mine, other)
    if isinstance(mine, list | tuple) and isinstance(other, list | tuple):
        return len(mine) == len(other) and all(map(_same, mine, other))
    if isinstance(mine, float) and isinstance(other, float):
        return mine == other or (mine != mine and other != other)
    return type(mine) is type(other) and bool(mine == other)


def _short(value: Any) -> str:
    text = f"%{value.name}" if isinstance(value, fx.Node) else str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
