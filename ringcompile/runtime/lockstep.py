"""All ranks of a program in one process, one after another, each until it must wait for a peer.

For tests, for machines without as many devices, and to say which rank and which node do not match
when ranks disagree: a message of another shape, one that nobody takes, a rank that waits for ever.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ringcompile.errors import RingCompileError
from ringcompile.mesh import Mesh
from ringcompile.runtime.collectives import ANSWERS, Collective
from ringcompile.runtime.executor import Request, Shift, Wait


@dataclass
class Message:
    """A tensor on its way, and the transfer that sends it."""

    tensor: torch.Tensor
    shift: Shift


@dataclass(frozen=True)
class _Handle:
    """What a rank expects from a transfer that it started."""

    source: int | None
    request: Shift


@dataclass
class _Rank:
    generator: Generator[Request, Any, Any]
    request: Request | None = None
    result: Any = None
    bytes_sent: int = 0
    met: Counter[str] = field(default_factory=Counter)


@dataclass
class LockStep:
    """Drives the generators of all ranks of a mesh."""

    mesh: Mesh
    mail: dict[tuple[int, int], deque[Message]] = field(default_factory=dict)
    rounds: dict[tuple[str, int, int], dict[int, Collective]] = field(default_factory=dict)

    def run(
        self, generators: Sequence[Generator[Request, Any, Any]]
    ) -> tuple[list[Any], list[int]]:
        """Run to the end.

        Returns:
            what each rank's generator returned, and the bytes that each rank sent.

        Raises:
            RingCompileError: the ranks' communication does not match.
        """
        ranks = [_Rank(generator) for generator in generators]
        for rank in ranks:
            self._advance(rank, None)
        while any(rank.request is not None for rank in ranks):
            moved = [self._serve(index, rank) for index, rank in enumerate(ranks)]
            if not any(moved):
                raise stuck([rank.request for rank in ranks])
        for (source, to), messages in self.mail.items():
            if messages:
                raise RingCompileError(
                    f"rank {to} never takes what rank {source} sends in %{messages[0].shift.node}"
                )
        return [rank.result for rank in ranks], [rank.bytes_sent for rank in ranks]

    def _advance(self, rank: _Rank, answer: Any) -> None:
        try:
            rank.request = rank.generator.send(answer)
        except StopIteration as done:
            rank.request, rank.result = None, done.value

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
        self._advance(rank, answer)
        return True

    def _peer(self, index: int, axis: str, coordinate: int | None) -> int | None:
        if coordinate is None:
            return None
        return self.mesh.peer(index, axis, coordinate)

    def _shift(self, index: int, rank: _Rank, shift: Shift) -> _Handle:
        to = self._peer(index, shift.axis, shift.to)
        if to is not None and shift.tensor is not None:
            self.mail.setdefault((index, to), deque()).append(
                Message(shift.tensor, shift)
            )
            rank.bytes_sent += shift.tensor.nbytes
        return _Handle(self._peer(index, shift.axis, shift.source), shift)

    def _arrived(self, index: int, handle: _Handle) -> torch.Tensor | None:
        expected = handle.request
        if handle.source is None:
            return torch.empty(0, dtype=expected.dtype)
        waiting = self.mail.get((handle.source, index))
        if not waiting:
            return None
        message = waiting.popleft()
        got, wanted = sent_message(message.shift), expected_message(expected)
        if got != wanted:
            raise RingCompileError(
                f"rank {index} expects {wanted} in %{expected.node}, "
                f"rank {handle.source} sends {got} in %{message.shift.node}"
            )
        return message.tensor

    def _met(self, index: int, rank: _Rank, asked: Collective) -> Any:
        """What a collective gives this rank, once all ranks of its group are there; else None."""
        if not self.mesh.has(asked.axis):
            raise RingCompileError(
                f"rank {index} asks for {asked.kind} over axis '{asked.axis}' in %{asked.node}, "
                f"which the mesh {self.mesh} does not have"
            )
        group = self.mesh.group_of(index, asked.axis)
        key = (asked.axis, group[0], rank.met[asked.axis])
        arrived = self.rounds.setdefault(key, {})
        if index not in arrived:
            arrived[index] = asked
            rank.bytes_sent += asked.num_bytes(len(group), group.index(index))
        if len(arrived) < len(group):
            return None
        for other in group:
            if signature(arrived[other]) != signature(asked):
                raise RingCompileError(
                    f"rank {index} asks for {signature(asked)}, "
                    f"rank {other} for {signature(arrived[other])}"
                )
        rank.met[asked.axis] += 1
        brought = [arrived[other] for other in group]
        return ANSWERS[asked.kind](brought, group.index(index))


def stuck(requests: Sequence[Request | None]) -> RingCompileError:
    """The error for ranks of which none can go on, by what each asks for; None where it ended."""
    waits = [f"rank {i} at %{request.node}" for i, request in enumerate(requests) if request]
    return RingCompileError(
        f"the ranks wait for each other: {', '.join(waits[:8])}",
        hint="the programs' transfers do not match; run `ringcompile verify`",
    )


def signature(asked: Collective) -> str:
    """What has to be the same on all ranks of a collective, as text."""
    tensor = asked.tensor
    shape = list(tensor.shape[1:] if asked.sends else tensor.shape)  # each has its own rows
    what = f"{asked.kind} of {tensor.dtype} {shape} {asked.detail}".rstrip()
    return f"{what} in %{asked.node}"


def sent_message(shift: Shift) -> str:
    """What a rank sends in a transfer, as text; the same as its receiver expects."""
    assert shift.tensor is not None
    return _message(shift.tensor.shape, shift.tensor.dtype, shift.sends, shift.of)


def expected_message(shift: Shift) -> str:
    """What a rank expects in a transfer, as text."""
    return _message(shift.shape, shift.dtype, shift.takes, shift.of)


def _message(
    shape: Sequence[int], dtype: torch.dtype, chunks: Sequence[int], of: str
) -> str:
    return f"{dtype} {list(shape)} of chunks {list(chunks)} for %{of}"
