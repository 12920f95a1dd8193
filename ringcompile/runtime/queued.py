"""All ranks in one process, their exchanges held up as NCCL may hold them up.

`LockStep` hands every message over as soon as it is sent. Over NCCL a send is done only when its
receiver has begun to receive; what a rank does along one axis is done in the order in which it
starts it, transfers and collectives alike; and nobody knows when a transfer that could begin does.
Programs that run right under `Queued`, whatever its seed, rely on nothing else:

- a transfer moves its bytes between its start and its wait, at the latest moment or at a random
  one, so that what is sent may not be overwritten before, and what arrives is garbage until then;
- a transfer and its peer's have both to be the first in their queues;
- what is never waited for, or is never taken, is an error.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ringcompile.errors import RingCompileError
from ringcompile.runtime.collectives import ANSWERS, Collective
from ringcompile.runtime.engine import Driven, Engine, Requests, check_message, check_same
from ringcompile.runtime.executor import Shift, Wait


@dataclass(eq=False)
class QueuedTransfer:
    """A transfer that a rank started, which is what answers a `Shift`.

    Attributes:
        rank: the rank.
        shift: what it asked for.
        buffer: where what it receives arrives; garbage until then.
        sent: what it sends, as it was at the start.
        places: by direction ("to", "source"), the peer and how many messages went before this one.
        moved: the directions whose bytes were moved.
        done: whether all were, so that a wait may end.
        awaited: whether the rank waited for it.
    """

    rank: int
    shift: Shift
    buffer: torch.Tensor
    sent: torch.Tensor | None
    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    moved: set[str] = field(default_factory=set)
    done: bool = False
    awaited: bool = False

    def check_unchanged(self) -> None:
        """Refuse a program that wrote to what is being sent."""
        tensor = self.shift.tensor
        if self.sent is not None and tensor is not None and not _same_bytes(tensor, self.sent):
            raise RingCompileError(
                f"rank {self.rank} overwrites what it sends in %{self.shift.node} before it has "
                "waited for that"
            )


@dataclass(eq=False)
class Joined:
    """A rank's part in a collective that waits for its turn."""

    rank: int
    asked: Collective
    answer: Any = None
    done: bool = False


Queue = deque[QueuedTransfer | Joined]
_OTHER = {"to": "source", "source": "to"}


@dataclass(eq=False)
class _QueuedRank(Driven):
    """A rank, the collective that it waits in, and the transfers that it started."""

    joined: Joined | None = None
    started: list[QueuedTransfer] = field(default_factory=list)


@dataclass
class Queued(Engine[_QueuedRank]):
    """Holds exchanges up; see the module.

    Attributes:
        mesh: the mesh.
        seed: of the order in which ranks come on and transfers are done; None to let all ranks go
            as far as they can before any transfer moves, which is the latest moment.
    """

    seed: int | None = None
    queues: dict[tuple[int, str], Queue] = field(default_factory=dict)
    books: dict[tuple[str, str, int, int], list[QueuedTransfer]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng = None if self.seed is None else random.Random(self.seed)

    def driven(self, generator: Requests) -> _QueuedRank:
        """A rank at its beginning."""
        return _QueuedRank(generator)

    def turn(self, ranks: Sequence[_QueuedRank]) -> bool:
        """A rank goes on, or a transfer moves."""
        return self._some_rank_moves(ranks) or self._some_transfer_moves()

    def finish(self, ranks: Sequence[_QueuedRank]) -> None:
        """Move what is left to move, and refuse what is not done or was never waited for."""
        while self._some_transfer_moves():
            pass
        for transfer in (one for rank in ranks for one in rank.started):
            node, rank = transfer.shift.node, transfer.rank
            if not transfer.done:
                why = self._lacks(transfer)
                raise RingCompileError(f"rank {rank} has ended, %{node} has not: {why}")
            if not transfer.awaited:
                raise RingCompileError(f"rank {rank} never waits for what it starts in %{node}")

    def _some_rank_moves(self, ranks: Sequence[_QueuedRank]) -> bool:
        """Let ranks go on; with a seed one of them at most, and sometimes none, though one can."""
        if self.rng is None:
            return any(self._serve(index, rank) for index, rank in enumerate(ranks))
        if self.rng.random() < 0.5 and self._some_transfer_moves():
            return True
        order = self.rng.sample(range(len(ranks)), len(ranks))
        return any(self._serve(index, ranks[index]) for index in order)

    def _serve(self, index: int, rank: _QueuedRank) -> bool:
        """Answer a rank's request if that can be done now; whether the rank moved."""
        match rank.request:
            case Shift() as shift:
                rank.advance(self._start(index, rank, shift))
            case Wait(handle=transfer):
                if not transfer.done:
                    return False
                transfer.check_unchanged()
                transfer.awaited = True
                rank.advance(transfer.buffer)
            case Collective() as asked:
                if rank.joined is None:
                    rank.joined = self._join(index, rank, asked)
                if not rank.joined.done:
                    return False
                answer, rank.joined = rank.joined.answer, None
                rank.advance(answer)
            case _:
                return False
        return True

    def _queue(self, index: int, axis: str) -> Queue:
        return self.queues.setdefault((index, axis), deque())

    def _start(self, index: int, rank: _QueuedRank, shift: Shift) -> QueuedTransfer:
        sent = shift.tensor if shift.to is not None else None
        shape = shift.shape if shift.source is not None else (0,)
        made = QueuedTransfer(
            index, shift, _garbage(shape, shift.dtype), None if sent is None else sent.clone()
        )
        for direction, at in (("to", shift.to), ("source", shift.source)):
            if at is not None:
                peer = self.mesh.peer(index, shift.axis, at)
                book = self.books.setdefault((shift.axis, direction, index, peer), [])
                made.places[direction] = (peer, len(book))
                book.append(made)
        self._queue(index, shift.axis).append(made)
        rank.started.append(made)
        rank.bytes_sent += 0 if sent is None else sent.nbytes
        return made

    def _join(self, index: int, rank: _QueuedRank, asked: Collective) -> Joined:
        group = self.group(index, asked)
        rank.bytes_sent += asked.num_bytes(len(group), group.index(index))
        made = Joined(index, asked)
        self._queue(index, asked.axis).append(made)
        return made

    def _some_transfer_moves(self) -> bool:
        """Finish one of the exchanges that are first in their queues and have their peers there."""
        ready = [
            (axis, queue[0]) for (_, axis), queue in self.queues.items()
            if queue and self._is_ready(axis, queue[0])
        ]
        if not ready:
            return False
        axis, first = ready[-1] if self.rng is None else self.rng.choice(ready)
        if isinstance(first, QueuedTransfer):
            self._finish(axis, first)
        else:
            self._meet(axis, first)
        return True

    def _is_ready(self, axis: str, first: QueuedTransfer | Joined) -> bool:
        if isinstance(first, Joined):
            group = self.mesh.group_of(first.rank, axis)
            return all(isinstance(self._first(other, axis), Joined) for other in group)
        others = [self._matching(axis, first, direction) for direction in first.places]
        return all(
            other is not None and (other.done or self._first(other.rank, axis) is other)
            for other in others
        )

    def _first(self, index: int, axis: str) -> QueuedTransfer | Joined | None:
        queue = self.queues.get((index, axis))
        return queue[0] if queue else None

    def _matching(
        self, axis: str, transfer: QueuedTransfer, direction: str
    ) -> QueuedTransfer | None:
        """The peer's transfer that holds the other end of a message, if it was started."""
        peer, place = transfer.places[direction]
        book = self.books.get((axis, _OTHER[direction], peer, transfer.rank), [])
        return book[place] if place < len(book) else None

    def _finish(self, axis: str, transfer: QueuedTransfer) -> None:
        for direction in transfer.places:
            other = self._matching(axis, transfer, direction)
            assert other is not None
            if direction not in transfer.moved:
                _move(*((transfer, other) if direction == "to" else (other, transfer)))
        transfer.done = True
        self.queues[transfer.rank, axis].popleft()

    def _meet(self, axis: str, first: Joined) -> None:
        """A collective of all ranks of a group, which each has as the first in its queue."""
        group = self.mesh.group_of(first.rank, axis)
        parts = [part for rank in group
                 if isinstance(part := self.queues[rank, axis].popleft(), Joined)]
        check_same(first.rank, first.asked, [(part.rank, part.asked) for part in parts])
        brought = [part.asked for part in parts]
        for place, part in enumerate(parts):
            part.answer = ANSWERS[part.asked.kind](brought, place)
            part.done = True

    def _lacks(self, transfer: QueuedTransfer) -> str:
        axis = transfer.shift.axis
        for direction, (peer, _) in transfer.places.items():
            if self._matching(axis, transfer, direction) is None:
                what = "takes what it sends" if direction == "to" else "sends what it expects"
                return f"rank {peer} never {what}"
        return f"what was started before it along '{axis}' is not done"


def _move(sender: QueuedTransfer, receiver: QueuedTransfer) -> None:
    """Hand a message over, as it is at this moment."""
    sender.check_unchanged()
    tensor = check_message(sender.rank, sender.shift, receiver.rank, receiver.shift)
    receiver.buffer.copy_(tensor)
    sender.moved.add("to")
    receiver.moved.add("source")


def _garbage(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """What a buffer holds before anything arrives: numbers that would be seen in the outputs."""
    if dtype.is_floating_point or dtype.is_complex:
        return torch.full(shape, float("nan"), dtype=dtype)
    return torch.full(shape, True if dtype == torch.bool else torch.iinfo(dtype).max, dtype=dtype)


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    flat = (x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (a, b))
    return torch.equal(*flat)
