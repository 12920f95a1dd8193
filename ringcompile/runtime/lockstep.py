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
    """A tensor on its way, and the node that sent it."""

    node: str
    tensor: torch.Tensor
    chunks: tuple[int, ...]
    of: str


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
                raise self._stuck(ranks)
        for (source, to), messages in self.mail.items():
            if messages:
                raise RingCompileError(
                    f"rank {to} never takes what rank {source} sends in %{messages[0].node}"
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
        return self.mesh.rank({**self.mesh.coordinates(index), axis: coordinate})

    def _shift(self, index: int, rank: _Rank, shift: Shift) -> _Handle:
        to = self._peer(index, shift.axis, shift.to)
        if to is not None and shift.tensor is not None:
            self.mail.setdefault((index, to), deque()).append(
                Message(shift.node, shift.tensor, shift.sends, shift.of)
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
        got = (tuple(message.tensor.shape), message.tensor.dtype, message.chunks, message.of)
        wanted = (expected.shape, expected.dtype, expected.takes, expected.of)
        if got != wanted:
            raise RingCompileError(
                f"rank {index} expects {_message(wanted)} in %{expected.node}, "
                f"rank {handle.source} sends {_message(got)} in %{message.node}"
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
            if _signature(arrived[other]) != _signature(asked):
                raise RingCompileError(
                    f"rank {index} asks for {_signature(asked)}, "
                    f"rank {other} for {_signature(arrived[other])}"
                )
        rank.met[asked.axis] += 1
        brought = [arrived[other] for other in group]
        return ANSWERS[asked.kind](brought, group.index(index))

    def _stuck(self, ranks: list[_Rank]) -> RingCompileError:
        waits = [
            f"rank {i} at %{rank.request.node}" for i, rank in enumerate(ranks) if rank.request
        ]
        return RingCompileError(
            f"the ranks wait for each other: {', '.join(waits[:8])}",
            hint="the programs' transfers do not match; run `ringcompile verify`",
        )


def _signature(asked: Collective) -> str:
    tensor = asked.tensor
    shape = list(tensor.shape[1:] if asked.sends else tensor.shape)  # each has its own rows
    what = f"{asked.kind} of {tensor.dtype} {shape} {asked.detail}".rstrip()
    return f"{what} in %{asked.node}"


def _message(what: tuple[tuple[int, ...], torch.dtype, tuple[int, ...], str]) -> str:
    shape, dtype, chunks, of = what
    return f"{dtype} {list(shape)} of chunks {list(chunks)} for %{of}"
