"""Do the programs of all ranks fit together? Decided from their graphs, before anything runs.

A transfer is taken to complete only when its peer has started the matching one: passing here does
not rest on sends being buffered, as they are with gloo on one machine. Every message must be
expected, in order, with its shape and dtype; no rank may wait for ever.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import networkx as nx
from torch import fx

from ringcompile.errors import RingCompileError
from ringcompile.ir.communication import COLLECTIVES, COMMUNICATION, SHIFT, short_name
from ringcompile.ir.nodes import type_of
from ringcompile.ir.program import Program
from ringcompile.ir.types import local_shape
from ringcompile.mesh import Mesh

# Shape, dtype, and what of which attention: shapes alone would not tell messages apart.
Signature = tuple[tuple[str, ...], str, str]


@dataclass
class _Rank:
    """How far a rank has come, and what it has started towards each peer."""

    program: Program
    nodes: list[fx.Node]
    at: int = 0
    sent: dict[int, list[fx.Node]] = field(default_factory=dict)
    expected: dict[int, list[fx.Node]] = field(default_factory=dict)
    places: dict[fx.Node, dict[str, tuple[int, int]]] = field(default_factory=dict)
    met: Counter[str] = field(default_factory=Counter)

    @property
    def node(self) -> fx.Node | None:
        return self.nodes[self.at] if self.at < len(self.nodes) else None


def cross_check(programs: Sequence[Program], mesh: Mesh) -> None:
    """Check the programs of all ranks, in order of rank, against each other.

    Raises:
        RingCompileError: naming ranks and nodes: a message that nobody expects or sends, shapes or
            dtypes that differ, ranks that wait for each other in a cycle.
    """
    _Checker(programs, mesh).run()


class _Checker:
    def __init__(self, programs: Sequence[Program], mesh: Mesh) -> None:
        if len(programs) != mesh.world_size:
            raise RingCompileError(
                f"{len(programs)} programs for a mesh of {mesh.world_size} ranks ({mesh})"
            )
        self.mesh = mesh
        for index, program in enumerate(programs):
            if program.coordinates != mesh.coordinates(index):
                raise RingCompileError(
                    f"the program in the place of rank {index} is for {program.coordinates}, "
                    f"rank {index} of {mesh} is {mesh.coordinates(index)}"
                )
        self.ranks = [
            _Rank(p, [n for n in p.graph.nodes if str(n.target) in COMMUNICATION]) for p in programs
        ]

    def run(self) -> None:
        moved = True
        while moved:
            moved = False
            for index in range(len(self.ranks)):
                while self._step(index):
                    moved = True
        if any(rank.node is not None for rank in self.ranks):
            raise self._stuck()
        self._all_taken()

    def _step(self, index: int) -> bool:
        """Advance a rank past its next communication, if that can complete now."""
        rank = self.ranks[index]
        node = rank.node
        if node is None:
            return False
        target = str(node.target)
        if target == SHIFT:
            self._start(index, node)
        elif self._waits_for(index, node):
            return False
        elif target in COLLECTIVES:
            rank.met[str(node.kwargs["axis"])] += 1
        rank.at += 1
        return True

    def _start(self, index: int, node: fx.Node) -> None:
        rank, places = self.ranks[index], {}
        if node.kwargs["source"] is None and any(wait.users for wait in node.users):
            raise RingCompileError(
                f"rank {index} reads what arrives in %{node.name}, and nobody sends it"
            )
        for argument, book in (("to", rank.sent), ("source", rank.expected)):
            peer = self._peer(index, node, argument)
            if peer is not None:
                entries = book.setdefault(peer, [])
                places[argument] = (peer, len(entries))
                entries.append(node)
                self._compare(index, node, argument, *places[argument])
        rank.places[node] = places

    def _compare(self, index: int, node: fx.Node, argument: str, peer: int, place: int) -> None:
        """Hold a message's two ends against each other, once both are known."""
        other = self.ranks[peer]
        entries = (other.expected if argument == "to" else other.sent).get(index, [])
        if place >= len(entries):
            return
        mine, theirs = (self._signature(r, n, a) for r, n, a in (
            (index, node, argument),
            (peer, entries[place], "source" if argument == "to" else "to"),
        ))
        if mine != theirs:
            does, did = ("sends", "expects") if argument == "to" else ("expects", "sends")
            raise RingCompileError(
                f"rank {index} {does} {_format(mine)} in %{node.name}, "
                f"rank {peer} {did} {_format(theirs)} in %{entries[place].name}"
            )

    def _signature(self, index: int, node: fx.Node, argument: str) -> Signature:
        program = self.ranks[index].program
        value = node if argument == "source" else node.args[0]
        type_ = type_of(value)  # type: ignore[arg-type]
        shape = local_shape(type_, program.mesh, program.sequence)
        if str(node.target) in COLLECTIVES:
            return tuple(map(str, shape)), str(type_.dtype), ""
        chunks = node.kwargs["takes" if argument == "source" else "sends"]
        carried = f" of chunks {chunks} for %{node.kwargs['of']}"
        return tuple(map(str, shape)), str(type_.dtype), carried

    def _peer(self, index: int, node: fx.Node, argument: str) -> int | None:
        coordinate = node.kwargs[argument]
        if coordinate is None:
            return None
        axis = str(node.kwargs["axis"])
        if not isinstance(coordinate, int) or not 0 <= coordinate < self.mesh.size(axis):
            raise RingCompileError(
                f"rank {index}: %{node.name} names {coordinate} on axis '{axis}' of size "
                f"{self.mesh.size(axis)}"
            )
        peer = self.mesh.rank({**self.mesh.coordinates(index), axis: coordinate})
        if peer == index:
            raise RingCompileError(f"rank {index} names itself as its peer in %{node.name}")
        return peer

    def _waits_for(self, index: int, node: fx.Node) -> list[int]:
        """The ranks that must act before this rank's `wait` or `gather` completes."""
        rank = self.ranks[index]
        if str(node.target) in COLLECTIVES:
            return self._missing_from(index, node)
        started = node.args[0]
        places = rank.places.get(started, {})  # type: ignore[arg-type]
        waiting = []
        for argument, (peer, place) in places.items():
            other = self.ranks[peer]
            book = other.expected if argument == "to" else other.sent
            if place >= len(book.get(index, [])):
                waiting.append(peer)
        return waiting

    def _missing_from(self, index: int, node: fx.Node) -> list[int]:
        axis = str(node.kwargs["axis"])
        group = self.mesh.group_of(index, axis)
        mine = self.ranks[index].met[axis]
        missing = []
        for peer in group:
            other = self.ranks[peer]
            there = other.met[axis] > mine or (
                other.met[axis] == mine
                and other.node is not None
                and str(other.node.target) in COLLECTIVES
                and other.node.kwargs["axis"] == axis
            )
            if not there:
                missing.append(peer)
            elif other.met[axis] == mine and other.node is not None:
                self._same_collective(index, node, peer, other.node)
        return missing

    def _same_collective(self, index: int, node: fx.Node, peer: int, other: fx.Node) -> None:
        mine, theirs = self._described(index, node), self._described(peer, other)
        if mine != theirs:
            raise RingCompileError(
                f"rank {index} asks for {mine} in %{node.name}, "
                f"rank {peer} for {theirs} in %{other.name}"
            )

    def _described(self, index: int, node: fx.Node) -> str:
        """`gather of float32[1, 8] dim=1 limit=s`: all that has to agree in a group."""
        how = "".join(f" {k}={v}" for k, v in sorted(node.kwargs.items()) if k != "axis")
        return f"{short_name(node)} of {_format(self._signature(index, node, 'to'))}{how}"

    def _stuck(self) -> RingCompileError:
        graph = nx.DiGraph()
        lines = {}
        for index, rank in enumerate(self.ranks):
            if rank.node is not None:
                peers = self._waits_for(index, rank.node)
                graph.add_edges_from((index, peer) for peer in peers)
                lines[index] = (
                    f"rank {index} waits in %{rank.node.name} for rank "
                    f"{', '.join(map(str, peers))}"
                )
        for peer in list(graph):
            if peer not in lines:
                waiting = next(iter(graph.predecessors(peer)))
                return RingCompileError(f"{lines[waiting]}, which has ended")
        cycle = [edge[0] for edge in nx.find_cycle(graph)]
        return RingCompileError(
            f"the ranks {' -> '.join(map(str, [*cycle, cycle[0]]))} wait for each other: "
            + "; ".join(lines[index] for index in cycle)
        )

    def _all_taken(self) -> None:
        for index, rank in enumerate(self.ranks):
            for peer, nodes in rank.sent.items():
                taken = len(self.ranks[peer].expected.get(index, []))
                if taken != len(nodes):
                    raise RingCompileError(
                        f"rank {index} sends {len(nodes)} messages to rank {peer}, "
                        f"which expects {taken}; the first unmatched is %{nodes[taken].name}"
                        if taken < len(nodes)
                        else f"rank {peer} expects {taken} messages from rank {index}, "
                        f"which sends {len(nodes)}"
                    )


def _format(signature: Signature) -> str:
    shape, dtype, carried = signature
    return f"{dtype.removeprefix('torch.')}[{', '.join(shape)}]{carried}"
