"""What a rank's program says to others, in order: transfers, waits, what groups do together.

What has to agree at both ends of a transfer, or in a group, is spelled out once, as text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from ringcompile.errors import RingCompileError
from ringcompile.ir.calls import target_name
from ringcompile.ir.communication import COLLECTIVES, COMMUNICATION, SHIFT, short_name
from ringcompile.ir.nodes import type_of
from ringcompile.ir.program import Program
from ringcompile.ir.types import TensorType, local_shape
from ringcompile.mesh import Mesh


@dataclass(frozen=True)
class End:
    """One end of a transfer.

    Attributes:
        peer: the rank at the other end.
        what: shape, dtype, and what the values are; shapes alone would not tell messages apart.
    """

    peer: int
    what: str


@dataclass(frozen=True, eq=False)
class Start:
    """A transfer is started: it sends, takes, or both at once."""

    name: str
    axis: str
    to: End | None
    source: End | None

    @property
    def ends(self) -> tuple[tuple[str, End], ...]:
        """The ends that it has, by the name of the argument."""
        both = (("to", self.to), ("source", self.source))
        return tuple((name, end) for name, end in both if end is not None)


@dataclass(frozen=True, eq=False)
class WaitEvent:
    """A rank goes on when a transfer that it started is done."""

    name: str
    started: Start


@dataclass(frozen=True, eq=False)
class Meeting:
    """A rank's part in what its group along some axes does together."""

    name: str
    axis: str
    what: str


Event = Start | WaitEvent | Meeting


@dataclass
class Messages:
    """Reads the events of programs of one mesh.

    Attributes:
        mesh: the mesh.
    """

    mesh: Mesh
    _texts: dict[TensorType, str] = field(default_factory=dict)

    def of(self, rank: int, program: Program) -> list[Event]:
        """The events of a rank, in order.

        Raises:
            RingCompileError: a peer or an axis that does not exist, or a value that nobody sends.
        """
        started: dict[fx.Node, Start] = {}
        events: list[Event] = []
        for node in program.graph.nodes:
            target = target_name(node.target) if node.op == "call_function" else ""
            if target not in COMMUNICATION:
                continue
            if target in COLLECTIVES:
                events.append(self._meeting(rank, program, node))
            elif target == SHIFT:
                started[node] = self._start(rank, program, node)
                events.append(started[node])
            else:
                events.append(_wait(rank, node, started))
        return events

    def _meeting(self, rank: int, program: Program, node: fx.Node) -> Meeting:
        axis = str(node.kwargs["axis"])
        self._known(rank, node, axis)
        how = "".join(f" {k}={v}" for k, v in sorted(node.kwargs.items()) if k != "axis")
        brought = self._text(program, _operand(node))
        return Meeting(node.name, axis, f"{short_name(node)} of {brought}{how}")

    def _start(self, rank: int, program: Program, node: fx.Node) -> Start:
        axis = str(node.kwargs["axis"])
        self._known(rank, node, axis)
        if node.kwargs["source"] is None and any(wait.users for wait in node.users):
            raise RingCompileError(
                f"rank {rank} reads what arrives in %{node.name}, and nobody sends it"
            )
        to, source = (self._peer(rank, node, argument) for argument in ("to", "source"))
        if to is not None:
            _sends_what_it_says(rank, node)
        return Start(
            node.name,
            axis,
            None if to is None else End(to, self._carried(program, node, _operand(node), "sends")),
            None if source is None else End(source, self._carried(program, node, node, "takes")),
        )

    def _carried(self, program: Program, node: fx.Node, value: fx.Node, argument: str) -> str:
        chunks: Any = node.kwargs[argument]
        of = f"%{node.kwargs['of']}"
        return f"{self._text(program, value)} of " + (f"chunks {chunks} for {of}" if chunks else of)

    def _peer(self, rank: int, node: fx.Node, argument: str) -> int | None:
        coordinate = node.kwargs[argument]
        if coordinate is None:
            return None
        axis = str(node.kwargs["axis"])
        if not isinstance(coordinate, int) or not 0 <= coordinate < self.mesh.size(axis):
            raise RingCompileError(
                f"rank {rank}: %{node.name} names {coordinate} on axis '{axis}' of size "
                f"{self.mesh.size(axis)}"
            )
        peer = self.mesh.peer(rank, axis, coordinate)
        if peer == rank:
            raise RingCompileError(f"rank {rank} names itself as its peer in %{node.name}")
        return peer

    def _known(self, rank: int, node: fx.Node, axis: str) -> None:
        if not self.mesh.has(axis):
            raise RingCompileError(
                f"rank {rank} asks for {short_name(node)} over axis '{axis}' in %{node.name}, "
                f"which the mesh {self.mesh} does not have"
            )

    def _text(self, program: Program, node: fx.Node) -> str:
        """`float32[1, n, 64]`, the share of a rank; where it is one of a split value, of which."""
        type_ = type_of(node)
        if type_ not in self._texts:
            shape: Sequence[Any] = local_shape(type_, program.mesh, program.sequence)
            dtype = str(type_.dtype).removeprefix("torch.")
            whole = "" if type_.layout.is_whole else f", a share of {type_},"
            self._texts[type_] = f"{dtype}[{', '.join(map(str, shape))}]{whole}"
        return self._texts[type_]


def _operand(node: fx.Node) -> fx.Node:
    operand = node.args[0]
    assert isinstance(operand, fx.Node), f"%{node.name} brings nothing"
    return operand


def _wait(rank: int, node: fx.Node, started: dict[fx.Node, Start]) -> WaitEvent:
    start = started.get(_operand(node))
    if start is None:
        raise RingCompileError(
            f"rank {rank} waits in %{node.name} for %{_operand(node).name}, which is no transfer"
        )
    return WaitEvent(node.name, start)


def _sends_what_it_says(rank: int, node: fx.Node) -> None:
    """Between stages a transfer is named for its value; where the graph has that value, it goes."""
    if node.kwargs["sends"] or _operand(node).name == node.kwargs["of"]:
        return
    if any(other.name == node.kwargs["of"] for other in node.graph.nodes):
        raise RingCompileError(
            f"rank {rank} sends %{_operand(node).name} in %{node.name}, "
            f"which is for %{node.kwargs['of']}"
        )
