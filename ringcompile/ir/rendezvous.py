"""Ranks driven through their messages, to see whether all of them come to an end.

A transfer is done only when its peers have begun the matching ones: nothing here rests on sends
being buffered, as they are with gloo on one machine. What a rank does along one axis is done in the
order in which it starts it, transfers and collectives alike, as it is on an NCCL communicator: a
transfer begins when the one before it is done.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ringcompile.errors import RingCompileError
from ringcompile.ir.messages import End, Event, Meeting, Start, WaitEvent
from ringcompile.later import Later
from ringcompile.mesh import Mesh

if TYPE_CHECKING:
    import networkx as nx
else:
    nx = Later("networkx")

_OTHER_END = {"to": "source", "source": "to"}


@dataclass(eq=False)
class _Started:
    """A transfer that a rank has started, and which message between two ranks each end is.

    Attributes:
        places: for each end the peer, and how many came before it between the two.
    """

    start: Start
    places: dict[str, tuple[int, int]]
    done: bool = False


@dataclass
class _RankState:
    """How far a rank has come.

    Attributes:
        under_way: by axis, the transfers that are not done, in order; the first has begun.
        books: by end and peer, what was started towards it.
        met: how often it met its group along an axis.
    """

    events: Sequence[Event]
    at: int = 0
    transfers: dict[Start, _Started] = field(default_factory=dict)
    under_way: dict[str, deque[_Started]] = field(default_factory=dict)
    books: dict[tuple[str, int], list[_Started]] = field(default_factory=dict)
    met: Counter[str] = field(default_factory=Counter)

    @property
    def event(self) -> Event | None:
        """What it does next."""
        return self.events[self.at] if self.at < len(self.events) else None

    def first(self, axis: str) -> _Started | None:
        """The transfer that has begun and is not done."""
        waiting = self.under_way.get(axis)
        return waiting[0] if waiting else None

    def begun(self, transfer: _Started) -> bool:
        """Whether a transfer of this rank has begun."""
        return transfer.done or self.first(transfer.start.axis) is transfer


# Why a rank does not go on: in its program (axis None), or with a transfer along an axis.
_Place = tuple[int, str | None]


@dataclass
class Rendezvous:
    """All ranks of a mesh, and what each does, in order."""

    mesh: Mesh
    events: Sequence[Sequence[Event]]

    def __post_init__(self) -> None:
        self.ranks = [_RankState(events) for events in self.events]
        axes = {e.axis for events in self.events for e in events if isinstance(e, Meeting)}
        self.groups = {
            (axis, rank): group
            for axis in axes
            for group in self.mesh.groups(axis)
            for rank in group
        }

    def run(self) -> None:
        """Drive all ranks to the end.

        Raises:
            RingCompileError: naming ranks and nodes: a message that nobody expects or sends, ends
                that differ, ranks that wait for each other in a cycle.
        """
        moved = True
        while moved:
            moved = False
            for index in range(len(self.ranks)):
                while self._settle(index) or self._step(index):
                    moved = True
        if any(rank.event is not None for rank in self.ranks):
            raise self._stuck()
        self._all_taken()
        if any(queue for rank in self.ranks for queue in rank.under_way.values()):
            raise self._stuck()

    def _step(self, index: int) -> bool:
        """Advance a rank past its next event, if that can complete now."""
        rank = self.ranks[index]
        match rank.event:
            case None:
                return False
            case Start() as start:
                self._start(index, start)
            case WaitEvent(started=started):
                if not rank.transfers[started].done:
                    return False
            case Meeting() as meeting:
                if any(True for _ in self._missing(index, meeting)):
                    return False
                rank.met[meeting.axis] += 1
        rank.at += 1
        return True

    def _settle(self, index: int) -> bool:
        """Note what is done of a rank's transfers, so that the next ones begin."""
        settled = False
        for queue in self.ranks[index].under_way.values():
            while queue and not any(True for _ in self._lacking(index, queue[0])):
                queue.popleft().done = True
                settled = True
        return settled

    def _start(self, index: int, start: Start) -> None:
        rank = self.ranks[index]
        transfer = rank.transfers[start] = _Started(start, {})
        rank.under_way.setdefault(start.axis, deque()).append(transfer)
        for name, end in start.ends:
            book = rank.books.setdefault((name, end.peer), [])
            transfer.places[name] = (end.peer, len(book))
            book.append(transfer)
            self._compare(index, transfer, name, end)

    def _matching(self, index: int, transfer: _Started, name: str) -> _Started | None:
        """The peer's transfer that holds the other end, if it was started."""
        peer, place = transfer.places[name]
        book = self.ranks[peer].books.get((_OTHER_END[name], index), [])
        return book[place] if place < len(book) else None

    def _compare(self, index: int, transfer: _Started, name: str, end: End) -> None:
        """Hold a message's two ends against each other, once both are known."""
        other = self._matching(index, transfer, name)
        if other is None:
            return
        theirs = dict(other.start.ends)[_OTHER_END[name]].what
        if end.what != theirs:
            does, did = ("sends", "expects") if name == "to" else ("expects", "sends")
            raise RingCompileError(
                f"rank {index} {does} {end.what} in %{transfer.start.name}, "
                f"rank {end.peer} {did} {theirs} in %{other.start.name}"
            )

    def _lacking(self, index: int, transfer: _Started) -> Iterator[_Place]:
        """What keeps a transfer that has begun from being done."""
        for name, (peer, _) in transfer.places.items():
            other = self._matching(index, transfer, name)
            if other is None:
                yield peer, None
            elif not self.ranks[peer].begun(other):
                yield peer, other.start.axis

    def _missing(self, index: int, meeting: Meeting) -> Iterator[_Place]:
        """What keeps a group from meeting."""
        axis, mine = meeting.axis, self.ranks[index].met[meeting.axis]
        for peer in self.groups[axis, index]:
            other = self.ranks[peer]
            if other.met[axis] > mine:
                continue
            theirs = other.event
            if other.met[axis] < mine or not isinstance(theirs, Meeting) or theirs.axis != axis:
                yield peer, None
                continue
            # All have one program behind them: what is equal but for its name was swapped.
            if (theirs.what, theirs.name) != (meeting.what, meeting.name):
                raise RingCompileError(
                    f"rank {index} asks for {meeting.what} in %{meeting.name}, "
                    f"rank {peer} for {theirs.what} in %{theirs.name}"
                )
            if other.first(axis) is not None:
                yield peer, axis

    # -- what to say ----------------------------------------------------------------------------

    def _stuck(self) -> RingCompileError:
        graph, lines = nx.DiGraph(), {}
        for place in self._stopped():
            node, needed = self._reason(place)
            ranks = sorted({rank for rank, _ in needed} - {place[0]})
            names = f" for rank {', '.join(map(str, ranks))}" if ranks else ""
            lines[place] = f"rank {place[0]} waits in %{node}{names}"
            graph.add_edges_from((place, other) for other in needed)
        for place, other in graph.edges:
            if other not in lines:
                return RingCompileError(f"{lines[place]}, which has ended")
        cycle = [edge[0] for edge in nx.find_cycle(graph)]
        named = [rank for i, (rank, _) in enumerate(cycle) if rank != cycle[i - 1][0]]
        named = named or [cycle[0][0]]
        return RingCompileError(
            f"the ranks {' -> '.join(map(str, [*named, named[0]]))} wait for each other: "
            + "; ".join(lines[place] for place in cycle)
        )

    def _stopped(self) -> Iterator[_Place]:
        """Where ranks do not go on."""
        for index, rank in enumerate(self.ranks):
            if rank.event is not None:
                yield index, None
            yield from ((index, axis) for axis, queue in rank.under_way.items() if queue)

    def _reason(self, place: _Place) -> tuple[str, list[_Place]]:
        """The node in which a rank waits, and what for."""
        index, axis = place
        rank = self.ranks[index]
        if axis is not None:
            transfer = rank.under_way[axis][0]
            return transfer.start.name, list(self._lacking(index, transfer))
        if isinstance(rank.event, Meeting):
            return rank.event.name, list(self._missing(index, rank.event))
        assert isinstance(rank.event, WaitEvent)
        transfer = rank.transfers[rank.event.started]
        if rank.begun(transfer):
            return rank.event.name, list(self._lacking(index, transfer))
        return rank.event.name, [(index, transfer.start.axis)]

    def _all_taken(self) -> None:
        for index, rank in enumerate(self.ranks):
            for (name, peer), sent in rank.books.items():
                taken = len(self.ranks[peer].books.get((_OTHER_END[name], index), []))
                if taken >= len(sent):
                    continue
                does, does_not = ("sends", "expects") if name == "to" else ("expects", "sends")
                towards = ("to", "from") if name == "to" else ("from", "to")
                raise RingCompileError(
                    f"rank {index} {does} {len(sent)} messages {towards[0]} rank {peer}, "
                    f"which {does_not} {taken}; the first unmatched is %{sent[taken].start.name}"
                )
