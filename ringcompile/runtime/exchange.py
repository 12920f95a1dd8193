"""What a rank does when its program asks for other ranks: transfers over torch.distributed."""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as funcol
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ringcompile.errors import RingCompileError, SourceLocation
from ringcompile.mesh import Mesh
from ringcompile.runtime.collectives import ANSWERS, Collective
from ringcompile.runtime.executor import Replayed, Request, Shift, Wait
from ringcompile.runtime.join import Rank, first_line, limit_exchanges, name_ranks
from ringcompile.runtime.recorder import Recorder
from ringcompile.runtime.reports import silent_ranks
from ringcompile.runtime.stamps import Checked, Stamps


class PeerLostError(RingCompileError):
    """An exchange failed: most often the consequence of what happened to another rank."""


@dataclass
class _Transfer:
    """A shift on its way; keeps alive what torch.distributed reads and writes until it is done.

    Attributes:
        shift: what was asked for.
        peers: the ranks that it goes to and comes from.
        buffer: what arrives.
        works: what is waited for.
        checked: what is compared before it is received, if ranks check each other.
    """

    shift: Shift
    peers: list[int]
    buffer: torch.Tensor
    works: list[dist.Work] = field(default_factory=list)
    checked: Checked | None = None


@dataclass
class Exchange:
    """Answers what a rank's program asks of others, and counts.

    Making one is collective, and so is `join`: all ranks do it in the same order.

    Attributes:
        joined: combinations of axes that programs communicate along, such as `ring,ulysses`; the
            same on all ranks.
        locations: by node, the user's line, for errors.
        check: whether ranks say ahead of every message what it is, and compare; see `stamps`.
        recorder: what was exchanged last.
    """

    mesh: Mesh
    rank: Rank
    joined: Iterable[str] = ()
    bytes_sent: int = 0
    wait_seconds: float = 0.0
    locations: dict[str, SourceLocation] = field(default_factory=dict)
    check: bool = False
    stamps: Stamps | None = field(init=False, default=None)
    devices: DeviceMesh | None = field(init=False)
    groups: dict[str, dist.ProcessGroup | None] = field(init=False)
    recorder: Recorder = field(init=False)
    _along: dict[str, list[int]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.recorder = Recorder(self.rank.index)
        self.devices, self.groups = _devices(self.mesh, self.rank), {}
        if self.devices is not None:
            self.stamps = Stamps(self.rank, self.locations) if self.check else None
            for axis in (axis for axis, size in self.mesh.across if size > 1):
                self._add(axis, self.devices.get_group(axis))
        self.join(self.joined)
        atexit.register(self.groups.clear)  # before `leave`, which ends only what nobody holds

    def join(self, joined: Iterable[str]) -> None:
        """Make a group for each of these combinations of axes that has none yet."""
        for text in sorted(set(joined) - self.groups.keys()):
            along = tuple(sorted(text.split(","), key=self.mesh.names.index))  # as torch wants them
            if len(along) > 1 and self.mesh.size(text) > 1:
                assert self.devices is not None
                self._add(text, self.devices[along]._flatten().get_group())

    def _add(self, axis: str, group: dist.ProcessGroup) -> None:
        self.groups[axis] = group
        if self.rank.devices is None:
            limit_exchanges(group, self.rank.timeout)
        if self.stamps is not None:
            self.stamps.add(axis, self.mesh.group_of(self.rank.index, axis))

    def answer(self, request: Request) -> Any:
        """Do what the program asks; see `Executor.run`."""
        match request:
            case Shift():
                return self._start(request)
            case Wait():
                return self._finish(request)
            case Collective():
                return self._meet(request)
            case Replayed():
                self.bytes_sent += request.num_bytes
                return None

    def end(self) -> None:
        """Say that a run has ended, and hear it of the others, if ranks check each other."""
        if self.stamps is not None:
            with self._meeting(range(self.rank.world_size), "ending the run"):
                self.stamps.end()

    @property
    def _timeout(self) -> timedelta:
        return timedelta(seconds=self.rank.timeout)

    def _peer(self, axis: str, coordinate: int) -> int:
        return self.mesh.peer(self.rank.index, axis, coordinate)

    def _start(self, shift: Shift) -> _Transfer:
        group, ops, peers = self._group(shift.axis), [], []
        shape = shift.shape if shift.source is not None else (0,)
        buffer = torch.empty(shape, dtype=shift.dtype, device=self.rank.device)
        sent = 0
        if shift.to is not None and shift.tensor is not None:
            peers.append(self._peer(shift.axis, shift.to))
            ops.append(dist.P2POp(dist.isend, shift.tensor, peers[-1], group))
            sent = shift.tensor.nbytes
        if shift.source is not None:
            peers.append(self._peer(shift.axis, shift.source))
            ops.append(dist.P2POp(dist.irecv, buffer, peers[-1], group))
        self.bytes_sent += sent
        transfer = _Transfer(shift, peers, buffer)
        with self._meeting(peers, "shift", shift.node, sent):
            if self.stamps is not None:
                transfer.checked, ops = self.stamps.start(shift, ops)
            transfer.works = dist.batch_isend_irecv(ops) if ops else []
        return transfer

    def _finish(self, wait: Wait) -> torch.Tensor:
        transfer: _Transfer = wait.handle
        with self._meeting(transfer.peers, "wait", wait.node):
            if self.stamps is not None and transfer.checked is not None:
                transfer.works += self.stamps.arrive(transfer.checked)
            self._complete(transfer.works)
        return transfer.buffer

    def _complete(self, works: list[dist.Work]) -> None:
        """Wait for each work, once: gloo hangs where one is waited for twice."""
        # gloo limits transfers by its group's first timeout unless told; over NCCL this would
        # hold the host up, and the group's own timeout counts.
        limit = () if self.rank.device.type == "cuda" else (self._timeout,)
        while works:
            works.pop(0).wait(*limit)

    def _meet(self, asked: Collective) -> Any:
        num_ranks = self.mesh.size(asked.axis)
        if num_ranks == 1:
            return ANSWERS[asked.kind]([asked], 0)
        group, ranks, links = self._group(asked.axis), self._ranks(asked.axis), self.rank.links
        with self._meeting(ranks, asked.kind, asked.node, asked.tensor.nbytes):
            if self.stamps is not None:
                self.stamps.meet(asked)
            if links is not None and links.carries(asked, ranks):
                answer = links.meet(asked, ranks)
            else:
                answer = self._in_order(asked, group)
        self.bytes_sent += asked.num_bytes(num_ranks, dist.get_rank(group))
        return answer

    def _ranks(self, axis: str) -> list[int]:
        """The ranks along an axis, in its order, this one among them."""
        if axis not in self._along:
            self._along[axis] = self.mesh.group_of(self.rank.index, axis)
        return self._along[axis]

    def _in_order(self, asked: Collective, group: dist.ProcessGroup) -> Any:
        """What a group gives, with its ranks in the order of the axes that are named.

        torch has a group's ranks in increasing order, whatever it was made of: that is another one
        where axes are named in another order than the mesh has them.
        """
        if "," not in asked.axis:
            return BY_KIND[asked.kind](asked, group)
        ranks = self._ranks(asked.axis)
        order = sorted(range(len(ranks)), key=ranks.__getitem__)
        if asked.kind in ("reduce_scatter", "all_to_all"):
            asked = replace(asked, tensor=asked.tensor[order])
        answer = BY_KIND[asked.kind](asked, group)
        back = sorted(range(len(order)), key=order.__getitem__)
        return answer[back] if asked.kind in ("gather", "all_to_all") else answer

    def _group(self, axis: str) -> dist.ProcessGroup:
        """The process group along an axis, or along several together."""
        if axis not in self.groups:
            raise RingCompileError(
                f"rank {self.rank.index} has no group for axis '{axis}'",
                hint="name all axes that programs communicate along when the exchange is made",
            )
        group = self.groups[axis]
        assert group is not None
        return group

    @contextmanager
    def _meeting(
        self, peers: Iterable[int], kind: str, node: str = "", num_bytes: int = 0
    ) -> Iterator[None]:
        """Counts the time, and says which ranks were lost, and where, if it fails."""
        peers = list(peers)
        started, exchanged = time.perf_counter(), self.recorder.begin(kind, node, peers, num_bytes)
        try:
            yield
        except RuntimeError as error:
            exchanged.end("failed")
            raise self._lost(peers, f"in %{node}" if node else kind, node, error) from error
        exchanged.end("done")
        self.wait_seconds += time.perf_counter() - started

    def _lost(
        self, peers: Iterable[int], where: str, node: str, error: RuntimeError
    ) -> PeerLostError:
        """The error for an exchange that failed, about the ranks that do not report the same."""
        record = self.recorder.write()
        waited_for, silent = set(peers) - {self.rank.index}, silent_ranks(self.rank)
        others = waited_for & silent or silent or waited_for
        kept = f"; what this rank did last is in {record}" if record is not None else ""
        return PeerLostError(
            f"rank {self.rank.index} lost {name_ranks(others)} {where}: {first_line(error)}",
            hint="see what the other ranks report: one failed, stopped or runs another program"
            + kept,
            location=self.locations.get(node), node=node or None,
        )

    def pass_on(self, piece: torch.Tensor, owner: int, everywhere: bool) -> torch.Tensor:
        """A tensor of one rank, on rank 0 or on all; those and the owner call it.

        Args:
            piece: contiguous; the tensor itself on its owner, elsewhere one to write it into.
            owner: the rank that has it.
            everywhere: give it to all ranks.
        """
        flat = piece.view(-1).view(torch.uint8)  # gloo does not send every dtype
        peers = list(range(self.rank.world_size)) if everywhere else [0, owner]
        with self._meeting(peers, "collecting outputs", "", piece.nbytes):
            if everywhere:
                dist.broadcast(flat, owner)
            elif self.rank.index == owner:
                self._complete(dist.batch_isend_irecv([dist.P2POp(dist.isend, flat, 0)]))
            else:
                self._complete(dist.batch_isend_irecv([dist.P2POp(dist.irecv, flat, owner)]))
        return piece

    def everyones(self, values: Sequence[float]) -> list[list[float]]:
        """The values that each rank brings, in order of ranks; all have to call it."""
        if self.rank.world_size == 1:
            return [list(values)]
        mine = torch.tensor(values, dtype=torch.float64, device=self.rank.device)
        theirs = [torch.empty_like(mine) for _ in range(self.rank.world_size)]
        with self._meeting(range(self.rank.world_size), "comparing notes"):
            dist.all_gather(theirs, mine)
        return [row.tolist() for row in theirs]

    def texts(self, text: str) -> list[str]:
        """The texts that each rank brings, on rank 0; all have to call it."""
        mine = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(self.rank.device)
        sizes = [int(size) for size, in self.everyones([mine.numel()])]
        found = []
        for owner, size in enumerate(sizes):
            text_of = mine if owner == self.rank.index else mine.new_empty(size)
            if owner and self.rank.index in (0, owner):
                self.pass_on(text_of, owner, everywhere=False)
            found.append(text_of)
        if self.rank.index:
            return []
        return [bytes(one.tolist()).decode() for one in found]

    def agree(self, value: int, what: str) -> None:
        """Refuse to go on where another rank has another value than rank 0."""
        values = self.everyones([value])
        differ = [rank for rank, other in enumerate(values) if other != values[0]]
        if differ:
            raise RingCompileError(
                f"{name_ranks(differ)} got other {what} than rank 0",
                hint=f"start all ranks with the same {what}",
            )


# torch 2.13 renamed these two, and warns of the names that 2.11 has.
_gather_single = getattr(funcol, "all_gather_single", funcol.all_gather_tensor)
_reduce_scatter_single = getattr(funcol, "reduce_scatter_single", funcol.reduce_scatter_tensor)


def _gather(asked: Collective, group: dist.ProcessGroup) -> torch.Tensor:
    """Every rank's tensor: [num_ranks, ...]."""
    return funcol.wait_tensor(_gather_single(asked.tensor.unsqueeze(0), 0, group))


def _all_reduce(asked: Collective, group: dist.ProcessGroup) -> torch.Tensor:
    return funcol.wait_tensor(funcol.all_reduce(asked.tensor, "sum", group))


def _reduce_scatter(asked: Collective, group: dist.ProcessGroup) -> torch.Tensor:
    """[num_ranks, ...] to this rank's [...]."""
    part = _reduce_scatter_single(asked.tensor, "sum", 0, group)
    return funcol.wait_tensor(part).squeeze(0)


def _all_to_all(asked: Collective, group: dist.ProcessGroup) -> torch.Tensor:
    """[num_ranks, ...]: entry i goes to rank i; the result's entry i came from it."""
    return funcol.wait_tensor(funcol.all_to_all_single(asked.tensor, None, None, group))


def _rows(asked: Collective, group: dist.ProcessGroup) -> torch.Tensor:
    takes, sends = list(asked.takes), list(asked.sends)
    return funcol.wait_tensor(funcol.all_to_all_single(asked.tensor, takes, sends, group))


# What asks torch for a collective, by its kind.
BY_KIND: dict[str, Callable[[Collective, dist.ProcessGroup], Any]] = {
    "gather": _gather,
    "all_reduce": _all_reduce,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "dispatch": _rows,
    "combine": _rows,
}


def _devices(mesh: Mesh, rank: Rank) -> DeviceMesh | None:
    """The mesh as torch knows it, where any axis has peers: the caller's, if there is one."""
    if all(size == 1 for _, size in mesh.across):
        return None
    names, sizes = zip(*mesh.across, strict=True)
    return rank.devices or init_device_mesh(rank.device.type, sizes, mesh_dim_names=names)
