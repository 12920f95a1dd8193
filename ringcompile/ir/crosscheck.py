"""Do the programs of all ranks fit together? Decided from their graphs, before anything runs.

Every message is expected, in order, with its shape and dtype; groups do the same things in the same
order; no rank waits for ever (`rendezvous`); the shares of every weight make up the whole
(`shares`); ranks take inputs and return outputs in one way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ringcompile.errors import RingCompileError
from ringcompile.ir.messages import Messages
from ringcompile.ir.nodes import type_of
from ringcompile.ir.program import Program
from ringcompile.ir.rendezvous import Rendezvous
from ringcompile.ir.shares import check_shares
from ringcompile.mesh import Mesh


def cross_check(programs: Sequence[Program], mesh: Mesh) -> None:
    """Check the programs of all ranks, in order of rank, against each other.

    Raises:
        RingCompileError: naming ranks and nodes: a message that nobody expects or sends, shapes or
            dtypes that differ, ranks that wait for each other in a cycle, a part of a weight that
            nobody holds or that two hold.
    """
    _in_place(programs, mesh)
    for what, of in _COMMON.items():
        _same(programs, mesh, what, of)
    messages = Messages(mesh)
    events = [messages.of(rank, program) for rank, program in enumerate(programs)]
    Rendezvous(mesh, events).run()
    check_shares(programs, mesh)


def _in_place(programs: Sequence[Program], mesh: Mesh) -> None:
    if len(programs) != mesh.world_size:
        raise RingCompileError(
            f"{len(programs)} programs for a mesh of {mesh.world_size} ranks ({mesh})"
        )
    for index, program in enumerate(programs):
        if program.coordinates != mesh.coordinates(index):
            raise RingCompileError(
                f"the program in the place of rank {index} is for {program.coordinates}, "
                f"rank {index} of {mesh} is {mesh.coordinates(index)}"
            )


def _inputs(program: Program) -> str:
    types = {node.name: type_of(node) for node in program.graph.nodes if node.op == "placeholder"}
    taken = sorted((name, p) for p, name in program.placeholders.items())
    return ", ".join(f"{name} as {types[p]}" for name, p in taken)


def _outputs(program: Program) -> str:
    return ", ".join(str(type_of(node)) for node in program.outputs)


# What the ranks of a stage have in common.
_COMMON: dict[str, Callable[[Program], Any]] = {
    "divides the sequence as": lambda program: program.sequence,
    "fixes the lengths": lambda program: program.lengths,
    "takes the inputs": _inputs,
    "returns": _outputs,
}


def _same(
    programs: Sequence[Program], mesh: Mesh, what: str, of: Callable[[Program], Any]
) -> None:
    first: dict[int, int] = {}
    for rank, program in enumerate(programs):
        other = first.setdefault(mesh.coordinates(rank).get("pp", 0), rank)
        mine, theirs = of(program), of(programs[other])
        if mine != theirs:
            raise RingCompileError(f"rank {rank} {what} {mine}, rank {other} {theirs}")
