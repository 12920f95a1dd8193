"""All ranks of a program in one process, one after another, each until it must wait for a peer.

For tests, for machines without as many devices, and to say which rank and which node do not match
when ranks disagree: a message of another shape, one that nobody takes, a rank that waits for ever.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ringcompile.errors import RingCompileError
from ringcompile.runtime.collectives import ANSWERS, Collective
from ringcompile.runtime.engine import Driven, Engine, Requests, check_message, check_same
from ringcompile.runtime.executor import Shift, Wait


@dataclass(frozen=True)
class _Handle:
    """What a rank expects from a transfer that it started."""

    source: int | None
    request: Shift


@dataclass(eq=False)
class _Rank(Driven):
    """A rank, and how many collectives it has been through along each axis."""

    met: Counter[str] = field(default_factory=Counter)


@dataclass
class LockStep(Engine[_Rank]):
    """Hands every message over as soon as it is sent.

    Attributes:
        mesh: the mesh.
        mail: by sender and receiver, the transfers on their way, in order.
        rounds: by axis, first rank and number, who has come to a collective.
    """

    mail: dict[tuple[int, int], deque[Shift]] = field(default_factory=dict)
    rounds: dict[tuple[str, int, int], dict[int, Collective]] = field(default_factory=dict)

    def driven(self, generator: Requests) -> _Rank:
        """A rank at its beginning."""
        return _Rank(generator)

    def turn(self, ranks: Sequence[_Rank]) -> bool:
        """Each rank in order goes on by one request, if it can."""
        moved = [self._serve(index, rank) for index, rank in enumerate(ranks)]
        return any(moved)

    def finish(self, ranks: Sequence[_Rank]) -> None:
        """Refuse messages that nobody took."""
        for (source, to), messages in self.mail.items():
            if messages:
                raise RingCompileError(
                    f"rank {to} never takes what rank {source} sends in %{messages[0].node}"
                )

    def _serve(self, index: int, rank: _Rank) -> bool:
        """Answer a rank's request if that can be done now; whether the rank moved."""
        match rank.request:
            case Shift() as shift:
                answer: Any = self._shift(index, rank, shift)
            case Wait(handle=handle):
                answer = self._arrived(index, handle)
            case Collective() as collective:
                answer = self._met(index, rank, collective)
            case _:
                return False
        if answer is None:
            return False
        rank.advance(answer)
        return True

    def _peer(self, index: int, axis: str, place: int | None) -> int | None:
        return None if place is None else self.mesh.peer(index, axis, place)

    def _shift(self, index: int, rank: _Rank, shift: Shift) -> _Handle:
        to = self._peer(index, shift.axis, shift.to)
        if to is not None and shift.tensor is not None:
            self.mail.setdefault((index, to), deque()).append(shift)
            rank.bytes_sent += shift.tensor.nbytes
        return _Handle(self._peer(index, shift.axis, shift.source), shift)

    def _arrived(self, index: int, handle: _Handle) -> torch.Tensor | None:
        if handle.source is None:
            return torch.empty(0, dtype=handle.request.dtype)
        waiting = self.mail.get((handle.source, index))
        if not waiting:
            return None
        return check_message(handle.source, waiting.popleft(), index, handle.request)

    def _met(self, index: int, rank: _Rank, asked: Collective) -> Any:
        """What a collective gives this rank, once all ranks of its group are there; else None."""
        group = self.group(index, asked)
        key = (asked.axis, group[0], rank.met[asked.axis])
        arrived = self.rounds.setdefault(key, {})
        if index not in arrived:
            arrived[index] = asked
            rank.bytes_sent += asked.num_bytes(len(group), group.index(index))
        if len(arrived) < len(group):
            return None
        check_same(index, asked, [(other, arrived[other]) for other in group])
        rank.met[asked.axis] += 1
        return ANSWERS[asked.kind]([arrived[other] for other in group], group.index(index))
