"""All ranks in one process: what drives them, and what has to match of what they ask for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from ringcompile.errors import RingCompileError
from ringcompile.mesh import Mesh
from ringcompile.runtime.collectives import Collective
from ringcompile.runtime.executor import Request, Shift

Requests = Generator[Request, Any, Any]


@dataclass(eq=False)
class Driven:
    """How far a rank has come: what it asks for, None once it has ended, and what it returned."""

    generator: Requests
    request: Request | None = None
    result: Any = None
    bytes_sent: int = 0

    def advance(self, answer: Any) -> None:
        """Let the rank go on to its next request."""
        try:
            self.request = self.generator.send(answer)
        except StopIteration as done:
            self.request, self.result = None, done.value


_R = TypeVar("_R", bound=Driven)


@dataclass
class Engine(ABC, Generic[_R]):
    """Drives the generators of all ranks of a mesh."""

    mesh: Mesh

    def run(self, generators: Sequence[Requests]) -> tuple[list[Any], list[int]]:
        """Run to the end.

        Returns:
            what each rank's generator returned, and the bytes that each rank sent.

        Raises:
            RingCompileError: the ranks' communication does not match, or they wait for each other.
        """
        ranks = [self.driven(generator) for generator in generators]
        for rank in ranks:
            rank.advance(None)
        while any(rank.request is not None for rank in ranks):
            if not self.turn(ranks):
                raise _stuck(ranks)
        self.finish(ranks)
        return [rank.result for rank in ranks], [rank.bytes_sent for rank in ranks]

    @abstractmethod
    def driven(self, generator: Requests) -> _R:
        """A rank at its beginning."""

    @abstractmethod
    def turn(self, ranks: Sequence[_R]) -> bool:
        """Let some rank go on, or some exchange; whether any did."""

    @abstractmethod
    def finish(self, ranks: Sequence[_R]) -> None:
        """Refuse what is left over when all ranks have ended."""

    def group(self, index: int, asked: Collective) -> list[int]:
        """The ranks of a collective that a rank asks for.

        Raises:
            RingCompileError: the mesh has no such axis.
        """
        if not self.mesh.has(asked.axis):
            raise RingCompileError(
                f"rank {index} asks for {asked.kind} over axis '{asked.axis}' in %{asked.node}, "
                f"which the mesh {self.mesh} does not have"
            )
        return self.mesh.group_of(index, asked.axis)


def check_message(sender: int, sent: Shift, receiver: int, wanted: Shift) -> torch.Tensor:
    """The tensor on its way, if it is what its receiver expects.

    Raises:
        RingCompileError: naming both ranks and nodes.
    """
    assert sent.tensor is not None
    comes = _message(sent.tensor.shape, sent.tensor.dtype, sent.sends, sent.of)
    expected = _message(wanted.shape, wanted.dtype, wanted.takes, wanted.of)
    if comes != expected:
        raise RingCompileError(
            f"rank {receiver} expects {expected} in %{wanted.node}, "
            f"rank {sender} sends {comes} in %{sent.node}"
        )
    return sent.tensor


def check_same(index: int, asked: Collective, others: Iterable[tuple[int, Collective]]) -> None:
    """Refuse a collective that not all its ranks ask for alike.

    Raises:
        RingCompileError: naming two ranks and what each asks for.
    """
    for other, theirs in others:
        if _signature(theirs) != _signature(asked):
            raise RingCompileError(
                f"rank {index} asks for {_signature(asked)}, rank {other} for {_signature(theirs)}"
            )


def _signature(asked: Collective) -> str:
    tensor = asked.tensor
    shape = list(tensor.shape[1:] if asked.sends else tensor.shape)  # each has its own rows
    what = f"{asked.kind} of {tensor.dtype} {shape} {asked.detail}".rstrip()
    return f"{what} in %{asked.node}"


def _message(
    shape: Sequence[int], dtype: torch.dtype, chunks: Sequence[int], of: str
) -> str:
    return f"{dtype} {list(shape)} of chunks {list(chunks)} for %{of}"


def _stuck(ranks: Sequence[Driven]) -> RingCompileError:
    waits = [f"rank {i} at %{rank.request.node}" for i, rank in enumerate(ranks) if rank.request]
    return RingCompileError(
        f"the ranks wait for each other: {', '.join(waits[:8])}",
        hint="the programs' transfers do not match; run `ringcompile verify`",
    )
