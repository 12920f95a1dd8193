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
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ringcompile.errors import RingCompileError
from ringcompile.mesh import Mesh
from ringcompile.runtime.collectives import ANSWERS, Collective
from ringcompile.runtime.executor import Request, Shift, Wait
from ringcompile.runtime.lockstep import expected_message, sent_message, signature, stuck


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


@dataclass
class _QueuedRank:
    """How far a rank has come; `joined` is the collective that it waits in."""

    generator: Generator[Request, Any, Any]
    request: Request | None = None
    result: Any = None
    bytes_sent: int = 0
    joined: Joined | None = None
    started: list[QueuedTransfer] = field(default_factory=list)


@dataclass
class Queued:
    """Drives the generators of all ranks of a mesh; see the module.

    Attributes:
        mesh: the mesh.
        seed: of the order in which ranks come on and transfers are done; None to let all ranks go
            as far as they can before any transfer moves, which is the latest moment.
    """

    mesh: Mesh
    seed: int | None = None
    queues: dict[tuple[int, str], Queue] = field(default_factory=dict)
    books: dict[tuple[str, str, int, int], list[QueuedTransfer]] = field(default_factory=dict)

    def run(
        self, generators: Sequence[Generator[Request, Any, Any]]
    ) -> tuple[list[Any], list[int]]:
        """Run to the end.

        Returns:
            what each rank's generator returned, and the bytes that each rank sent.

        Raises:
            RingCompileError: the ranks' communication does not match, they wait for each other,
                or a program relies on more than NCCL promises.
        """
        rng = None if self.seed is None else random.Random(self.seed)
        ranks = [_QueuedRank(generator) for generator in generators]
        for rank in ranks:
            _advance(rank, None)
        while any(rank.request is not None for rank in ranks):
            if not self._some_rank_moves(ranks, rng) and not self._some_transfer_moves(rng):
                raise stuck([rank.request for rank in ranks])
        while self._some_transfer_moves(rng):
            pass
        self._check_all_done(ranks)
        return [rank.result for rank in ranks], [rank.bytes_sent for rank in ranks]

    def _some_rank_moves(self, ranks: list[_QueuedRank], rng: random.Random | None) -> bool:
        """Let ranks go on; with a seed one of them at most, and sometimes none, though one can."""
        if rng is None:
            return any(self._serve(index, rank) for index, rank in enumerate(ranks))
        if rng.random() < 0.5 and self._some_transfer_moves(rng):
            return True
        order = rng.sample(range(len(ranks)), len(ranks))
        return any(self._serve(index, ranks[index]) for index in order)

    def _serve(self, index: int, rank: _QueuedRank) -> bool:
        """Answer a rank's request if that can be done now; whether the rank moved."""
        match rank.request:
            case Shift() as shift:
                _advance(rank, self._start(index, rank, shift))
            case Wait(handle=transfer):
                if not transfer.done:
                    return False
                transfer.check_unchanged()
                transfer.awaited = True
                _advance(rank, transfer.buffer)
            case Collective() as asked:
                if rank.joined is None:
                    rank.joined = self._join(index, rank, asked)
                if not rank.joined.done:
                    return False
                answer, rank.joined = rank.joined.answer, None
                _advance(rank, answer)
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
        coordinates = self.mesh.coordinates(index)
        for direction, at in (("to", shift.to), ("source", shift.source)):
            if at is not None:
                peer = self.mesh.rank({**coordinates, shift.axis: at})
                book = self.books.setdefault((shift.axis, direction, index, peer), [])
                made.places[direction] = (peer, len(book))
                book.append(made)
        self._queue(index, shift.axis).append(made)
        rank.started.append(made)
        rank.bytes_sent += 0 if sent is None else sent.nbytes
        return made

    def _join(self, index: int, rank: _QueuedRank, asked: Collective) -> Joined:
        if not self.mesh.has(asked.axis):
            raise RingCompileError(
                f"rank {index} asks for {asked.kind} over axis '{asked.axis}' in %{asked.node}, "
                f"which the mesh {self.mesh} does not have"
            )
        group = self.mesh.group_of(index, asked.axis)
        rank.bytes_sent += asked.num_bytes(len(group), group.index(index))
        made = Joined(index, asked)
        self._queue(index, asked.axis).append(made)
        return made

    def _some_transfer_moves(self, rng: random.Random | None) -> bool:
        """Finish one of the exchanges that are first in their queues and have their peers there."""
        ready = [
            (axis, queue[0]) for (_, axis), queue in self.queues.items()
            if queue and self._is_ready(axis, queue[0])
        ]
        if not ready:
            return False
        axis, first = ready[-1] if rng is None else rng.choice(ready)
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
        for part in parts:
            if signature(part.asked) != signature(first.asked):
                raise RingCompileError(
                    f"rank {first.rank} asks for {signature(first.asked)}, "
                    f"rank {part.rank} for {signature(part.asked)}"
                )
        brought = [part.asked for part in parts]
        for place, part in enumerate(parts):
            part.answer = ANSWERS[part.asked.kind](brought, place)
            part.done = True

    def _check_all_done(self, ranks: list[_QueuedRank]) -> None:
        for transfer in (one for rank in ranks for one in rank.started):
            node, rank = transfer.shift.node, transfer.rank
            if not transfer.done:
                why = self._lacks(transfer)
                raise RingCompileError(f"rank {rank} has ended, %{node} has not: {why}")
            if not transfer.awaited:
                raise RingCompileError(f"rank {rank} never waits for what it starts in %{node}")

    def _lacks(self, transfer: QueuedTransfer) -> str:
        axis = transfer.shift.axis
        for direction, (peer, _) in transfer.places.items():
            if self._matching(axis, transfer, direction) is None:
                what = "takes what it sends" if direction == "to" else "sends what it expects"
                return f"rank {peer} never {what}"
        return f"what was started before it along '{axis}' is not done"


def _advance(rank: _QueuedRank, answer: Any) -> None:
    try:
        rank.request = rank.generator.send(answer)
    except StopIteration as done:
        rank.request, rank.result = None, done.value


def _move(sender: QueuedTransfer, receiver: QueuedTransfer) -> None:
    """Hand a message over, as it is at this moment."""
    sender.check_unchanged()
    sent, wanted = sent_message(sender.shift), expected_message(receiver.shift)
    if sent != wanted:
        raise RingCompileError(
            f"rank {receiver.rank} expects {wanted} in %{receiver.shift.node}, "
            f"rank {sender.rank} sends {sent} in %{sender.shift.node}"
        )
    assert sender.shift.tensor is not None
    receiver.buffer.copy_(sender.shift.tensor)
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
