"""What a timeline says of a node: its name as in `dump`, its line, shape, bytes and peers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from ringcompile.ir.call_text import op_name
from ringcompile.ir.calls import target_name
from ringcompile.ir.communication import COLLECTIVES, SHIFT, WAIT, bytes_of
from ringcompile.ir.expr import bind
from ringcompile.ir.kinds import kind_of
from ringcompile.ir.nodes import location_of, results_of
from ringcompile.ir.printer import value_names
from ringcompile.ir.program import Program
from ringcompile.ir.types import TensorType, local_shape
from ringcompile.mesh import Mesh
from ringcompile.traces.slices import COMMUNICATION
from ringcompile.traces.slices import WAIT as WAITING

# What a timeline calls the kinds of work that take most; all others only move bytes in memory.
_KINDS = {
    "attention": "attention", "block_attention": "attention", "cached_attention": "attention",
    "attend_merge": "attention", "matmul": "matmul", "grouped_matmul": "matmul",
    "expert_matmul": "matmul", "convolution": "matmul", "transposed_convolution": "matmul",
}


@dataclass(frozen=True)
class About:
    """What a timeline says of a node.

    Attributes:
        label: `%12 ring.attention`; the number is the one in `dump --rank`.
        kind: of its work.
        facts: value, op, layer, line, shape, and of what communicates also bytes and peers.
        axis: of a transfer.
        to: the global rank that a transfer sends to.
        source: the global rank that it receives from.
    """

    label: str
    kind: str
    facts: Mapping[str, Any]
    axis: str = ""
    to: int | None = None
    source: int | None = None


class Nodes:
    """Reads the programs of all ranks for a timeline.

    Args:
        programs: of all ranks, in order.
        lengths: the values of size symbols, of each rank.
    """

    def __init__(self, programs: Sequence[Program], lengths: Sequence[Mapping[str, int]]) -> None:
        self._known = [
            {
                node.name: _about(program, node, value, dict(known), rank)
                for node, value in value_names(program).items() if node.op == "call_function"
            }
            for rank, (program, known) in enumerate(zip(programs, lengths, strict=True))
        ]

    def about(self, rank: int, name: str) -> About:
        """What is said of a node; of one that no program has, its name alone.

        A run that computes the last positions only has a few nodes of its own.
        """
        return self._known[rank].get(name) or About(name, "memory", {"op": name})


def _about(
    program: Program, node: fx.Node, value: str, lengths: dict[str, int], rank: int
) -> About:
    op, location, target = op_name(node), location_of(node), target_name(node.target)
    facts: dict[str, Any] = {
        "value": value, "op": op, "layer": location.layer, "line": location.short,
        "shape": ", ".join(_shape(program, type_, lengths) for type_ in results_of(node)),
    }
    mesh = program.mesh or Mesh(())
    axis, to, source = "", None, None
    if target == SHIFT:
        axis = str(node.kwargs["axis"])
        to, source = (_peer(mesh, rank, axis, node.kwargs[key]) for key in ("to", "source"))
        facts |= {"to": to, "from": source}
    elif target in COLLECTIVES:
        axis = str(node.kwargs["axis"])
        facts["ranks"] = mesh.group_of(rank, axis)
    if axis:
        size = bind(bytes_of(program, node), lengths)
        facts |= {"axis": axis, "bytes": size if isinstance(size, int) else str(size)}
    return About(f"{value} {op}", _kind(node), facts, axis, to, source)


def _peer(mesh: Mesh, rank: int, axis: str, coordinate: Any) -> int | None:
    if coordinate is None:
        return None
    return mesh.peer(rank, axis, coordinate)


def _shape(program: Program, type_: TensorType, lengths: dict[str, int]) -> str:
    """`float32 [1, 24, 64]`, of this rank's share."""
    sizes = local_shape(type_, program.mesh, program.sequence)
    shape = ", ".join(str(bind(size, lengths)) for size in sizes)
    return f"{str(type_.dtype).removeprefix('torch.')} [{shape}]"


def _kind(node: fx.Node) -> str:
    target = target_name(node.target)
    if target == SHIFT or target in COLLECTIVES:
        return COMMUNICATION
    if target == WAIT:
        return WAITING
    return _KINDS.get(kind_of(node.target), "memory")
