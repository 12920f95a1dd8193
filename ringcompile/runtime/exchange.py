"""What a rank does when its program asks for other ranks: transfers over torch.distributed."""

from __future__ import annotations

import atexit
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from ringcompile.errors import RingCompileError
from ringcompile.mesh import Mesh
from ringcompile.runtime.executor import Gather, Request, Shift, Wait
from ringcompile.runtime.join import Rank, first_line, name_ranks


class PeerLostError(RingCompileError):
    """An exchange failed: most often the consequence of what happened to another rank."""


@dataclass
class _Transfer:
    """A shift on its way; keeps alive what torch.distributed reads and writes until it is done."""

    shift: Shift
    peers: list[int]
    buffer: torch.Tensor
    works: list[dist.Work]


@dataclass
class Exchange:
    """Answers what a rank's program asks of others, and counts.

    Making one is collective: all ranks do it in the same order.
    """

    mesh: Mesh
    rank: Rank
    bytes_sent: int = 0
    wait_seconds: float = 0.0
    groups: dict[str, dist.ProcessGroup | None] = field(init=False)

    def __post_init__(self) -> None:
        self.groups = _axis_groups(self.mesh, self.rank.index)
        atexit.register(self.groups.clear)  # before `leave`, which ends only what nobody holds

    def answer(self, request: Request) -> Any:
        """Do what the program asks; see `Executor.run`."""
        match request:
            case Shift():
                return self._start(request)
            case Wait():
                return self._finish(request)
            case Gather():
                return self._gather(request)

    def _peer(self, axis: str, coordinate: int) -> int:
        return self.mesh.rank({**self.mesh.coordinates(self.rank.index), axis: coordinate})

    def _start(self, shift: Shift) -> _Transfer:
        group, ops, peers = self.groups[shift.axis], [], []
        shape = shift.shape if shift.source is not None else (0,)
        buffer = torch.empty(shape, dtype=shift.dtype, device=self.rank.device)
        if shift.to is not None:
            peers.append(self._peer(shift.axis, shift.to))
            ops.append(dist.P2POp(dist.isend, shift.tensor, peers[-1], group))
            self.bytes_sent += shift.tensor.nbytes
        if shift.source is not None:
            peers.append(self._peer(shift.axis, shift.source))
            ops.append(dist.P2POp(dist.irecv, buffer, peers[-1], group))
        with self._meeting(peers, f"in %{shift.node}"):
            return _Transfer(shift, peers, buffer, dist.batch_isend_irecv(ops))

    def _finish(self, wait: Wait) -> torch.Tensor:
        transfer: _Transfer = wait.handle
        with self._meeting(transfer.peers, f"in %{wait.node}"):
            while transfer.works:  # gloo hangs where a work is waited for twice
                transfer.works.pop(0).wait()
        return transfer.buffer

    def _gather(self, gather: Gather) -> list[torch.Tensor]:
        group, tensor = self.groups[gather.axis], gather.tensor
        num_ranks = self.mesh.size(gather.axis)
        if num_ranks == 1:
            return [tensor]
        pieces = list(tensor.new_empty((num_ranks, *tensor.shape)).unbind())
        with self._meeting(dist.get_process_group_ranks(group), f"in %{gather.node}"):
            dist.all_gather(pieces, tensor, group)
        self.bytes_sent += tensor.nbytes * (num_ranks - 1)
        return pieces

    @contextmanager
    def _meeting(self, peers: Iterable[int], where: str) -> Iterator[None]:
        """Counts the time, and says which ranks were lost, and where, if it fails."""
        started = time.perf_counter()
        try:
            yield
        except RuntimeError as error:
            others = name_ranks(set(peers) - {self.rank.index})
            raise PeerLostError(
                f"rank {self.rank.index} lost {others} {where}: {first_line(error)}",
                hint="see what the other ranks report: one failed, stopped or runs another program",
            ) from error
        self.wait_seconds += time.perf_counter() - started

    def collect(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's tensor, of the same type, on rank 0; nothing on the others."""
        everyone = range(self.rank.world_size)
        if len(everyone) == 1:
            return [tensor]
        tensor = tensor.contiguous()
        pieces = [torch.empty_like(tensor) for _ in everyone] if self.rank.index == 0 else None
        with self._meeting(everyone, "collecting outputs"):
            dist.gather(tensor, pieces, dst=0)
        return pieces or []

    def everyones(self, values: Sequence[float]) -> list[list[float]]:
        """The values that each rank brings, in order of ranks; all have to call it."""
        if self.rank.world_size == 1:
            return [list(values)]
        mine = torch.tensor(values, dtype=torch.float64, device=self.rank.device)
        theirs = [torch.empty_like(mine) for _ in range(self.rank.world_size)]
        with self._meeting(range(self.rank.world_size), "comparing notes"):
            dist.all_gather(theirs, mine)
        return [row.tolist() for row in theirs]

    def agree(self, value: int, what: str) -> None:
        """Refuse to go on where another rank has another value than rank 0."""
        values = self.everyones([value])
        differ = [rank for rank, other in enumerate(values) if other != values[0]]
        if differ:
            raise RingCompileError(
                f"{name_ranks(differ)} got other {what} than rank 0",
                hint=f"start all ranks with the same {what}",
            )


def _axis_groups(mesh: Mesh, index: int) -> dict[str, dist.ProcessGroup | None]:
    groups: dict[str, dist.ProcessGroup | None] = {}
    for axis, size in mesh.axes:
        if size == mesh.world_size > 1:
            groups[axis] = dist.group.WORLD
        elif size > 1:
            # Every rank makes all groups of the axis, in the same order.
            made = [(ranks, dist.new_group(ranks)) for ranks in mesh.groups(axis)]
            groups[axis] = next(group for ranks, group in made if index in ranks)
    return groups
