"""What tests let ranks do. The ranks import this module, so it stays light."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from ringcompile import artifact
from ringcompile.errors import RingCompileError, SourceLocation
from ringcompile.mesh import Mesh
from ringcompile.runtime import collecting
from ringcompile.runtime.collectives import Collective
from ringcompile.runtime.distributed import Peer
from ringcompile.runtime.exchange import BY_KIND, Exchange, PeerLostError
from ringcompile.runtime.executor import Shift, Wait
from ringcompile.runtime.handshake import agree
from ringcompile.runtime.join import Rank
from ringcompile.runtime.memory import peak_bytes
from ringcompile.runtime.outputs import Kept


def scaled(rank: Rank, tensors: dict[str, Any]) -> dict[str, Any]:
    print("noise of a rank")
    return {"index": rank.index, "by": [tensors["x"] * rank.index, tensors["none"]]}


def remember(rank: Rank, value: int) -> tuple[int | None, int]:
    before, rank.state = rank.state, value
    return before, os.getpid()


def surroundings(rank: Rank, variable: str) -> tuple[str | None, int, bool]:
    return os.environ.get(variable), torch.get_num_threads(), dist.is_initialized()


def imported(rank: Rank, name: str) -> bool:
    return name in sys.modules


def listening(rank: Rank | None) -> set[str]:
    """The addresses, in hex, at which this process listens."""
    inodes = {os.readlink(f"/proc/self/fd/{fd}") for fd in _descriptors()}
    rows = [row.split() for name in ("tcp", "tcp6") for row in _sockets(name)]
    listen = [row for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes]
    return {row[1].split(":")[0] for row in listen}


def _descriptors() -> list[str]:
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.islink(f"/proc/self/fd/{fd}")]


def _sockets(name: str) -> list[str]:
    path = Path(f"/proc/net/{name}")
    return path.read_text().splitlines()[1:] if path.exists() else []


# What can go wrong in rank 1 while the others wait for it.


def raise_error(rank: Rank) -> None:
    if rank.index == 1:
        raise ValueError("boom")
    dist.barrier()


def refuse(rank: Rank) -> None:
    if rank.index == 1:
        raise RingCompileError(
            "no such thing", hint="take another", location=SourceLocation("model.py", 7)
        )
    dist.barrier()


def be_killed(rank: Rank) -> None:
    if rank.index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def leave(rank: Rank) -> None:
    if rank.index == 1:
        os._exit(3)
    dist.barrier()


def call_exit(rank: Rank) -> None:
    if rank.index == 1:
        sys.exit("enough")
    dist.barrier()


def sleep(rank: Rank) -> None:
    if rank.index == 1:
        time.sleep(60)


def unpicklable(rank: Rank) -> Any:
    return (lambda: 0) if rank.index == 1 else None


# Parts of programs.


def two_axes(rank: Rank) -> tuple[float, list[float], int, bool]:
    """On ring=2,tp=2: what came from the other on `ring`, and from all on `tp`."""
    exchange = Exchange(Mesh.parse("ring=2,tp=2"), rank)
    other = 1 - exchange.mesh.coordinates(rank.index)["ring"]
    mine = torch.full((3,), float(rank.index))
    handle = exchange.answer(Shift("t", "ring", mine, other, other, (3,), mine.dtype))
    arrived = exchange.answer(Wait("w", handle))
    again = exchange.answer(Wait("w", handle))
    pieces = exchange.answer(Collective("g", "gather", "tp", mine))
    gathered = [float(piece[0]) for piece in pieces]
    return float(arrived[0]), gathered, exchange.bytes_sent, again is arrived


def gathered_dtypes(rank: Rank) -> dict[str, bool]:
    exchange, found = Exchange(Mesh.parse("ring=2"), rank), {}
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.bool, torch.int64):
        mine = (torch.arange(4) % 2 == rank.index).to(dtype)
        pieces = exchange.answer(Collective("g", "gather", "ring", mine))
        found[str(dtype)] = torch.equal(pieces[rank.index], mine) and torch.equal(
            pieces[1 - rank.index], (torch.arange(4) % 2 != rank.index).to(dtype)
        )
    return found


def lose_a_peer(rank: Rank) -> None:
    """Rank 1 waits for what rank 0 never sends."""
    exchange = Exchange(Mesh.parse("ring=2"), rank)
    if rank.index == 1:
        mine = torch.ones(3)
        handle = exchange.answer(Shift("t", "ring", mine, None, 0, (3,), mine.dtype))
        exchange.answer(Wait("arrived", handle))


def open_each(rank: Rank, folders: list[str]) -> None:
    Peer(artifact.load(folders[rank.index]), rank)


def run_checked(rank: Rank, folder: str, inputs: list[Any]) -> tuple[Any, list[Any]]:
    """As under torchrun, where each rank has inputs of its own: whole outputs, everyone's cost."""
    peer = Peer(artifact.load(folder), rank, check_inputs=True)
    run = peer.run(inputs[rank.index])
    return peer.assemble(run), peer.everyones_stats(run)


def joined_axes(rank: Rank, axis: str) -> dict[str, list[int]]:
    """On ulysses=2,ring=3: of each collective over both axes, the ranks that values came from."""
    mesh = Mesh.parse("ulysses=2,ring=3")
    exchange = Exchange(mesh, rank, [axis])
    mine, each = torch.tensor([rank.index]), torch.full((6, 1), rank.index)
    addressed = torch.arange(6)[:, None] * 10  # what is meant for each place

    def meet(kind: str, tensor: torch.Tensor) -> Any:
        return exchange.answer(Collective(kind, kind, axis, tensor))

    return {
        "gather": [int(piece) for piece in meet("gather", mine)],
        "all_to_all": meet("all_to_all", each).flatten().tolist(),
        "meant": meet("all_to_all", addressed).flatten().tolist(),
        "reduce_scatter": meet("reduce_scatter", addressed).tolist(),
    }


def state_facts(rank: Rank, everyones: list[dict[str, str]]) -> str:
    """What a rank hears when all state their facts twice: nothing, or why it is refused."""
    try:
        agree(rank, {"artifact": "a"})
        agree(rank, everyones[rank.index])
    except RingCompileError as error:
        return str(error)
    return ""


def _around(rank: Rank, absent: int) -> None:
    """All pass a message around the ring, but for one that does something else."""
    world = rank.world_size
    exchange = Exchange(
        Mesh.parse(f"ring={world}"), rank,
        locations={"arrived": SourceLocation("model.py", 7, "layers.0")},
    )
    if rank.index == absent:
        return
    mine, shape = torch.ones(3), (3,)
    for _ in range(2 * world):
        shift = Shift("t", "ring", mine, (rank.index + 1) % world, (rank.index - 1) % world, shape,
                      mine.dtype)
        exchange.answer(Wait("arrived", exchange.answer(shift)))


def stop_in_the_ring(rank: Rank) -> None:
    _around(rank, 2)
    os.kill(os.getpid(), signal.SIGSTOP)


def miss_one(rank: Rank, absent: int) -> str:
    """What each rank says of the one that does not take part."""
    try:
        _around(rank, absent)
    except PeerLostError as error:
        return str(error)
    return ""


def run_slowly(rank: Rank, folder: str, slow: int, inputs: Any) -> list[Any]:
    """A run in which one rank thinks for long before each exchange: what it cost everyone."""
    session = Peer(artifact.load(folder), rank)
    answer = session.exchange.answer

    def slowly(request: Any) -> Any:
        time.sleep(0.2 if rank.index == slow else 0)
        return answer(request)

    session.exchange.answer = slowly  # type: ignore[method-assign]
    return session.everyones_stats(session.run(inputs))


def children_of(ranks: Any) -> list[int]:
    """The process ids of local ranks, in order."""
    return [process.pid for process in ranks._processes]


# Outputs that are put together.


class Wide(torch.nn.Module):
    """Far more outputs than anything else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.unsqueeze(1)
        y = torch.nn.functional.scaled_dot_product_attention(y, y, y, is_causal=True).squeeze(1)
        return y.unsqueeze(-1).expand(-1, -1, -1, 4096) * 1.5


def assembled_in_pieces(rank: Rank, cases: list[Any]) -> list[tuple[Any, Any, int]]:
    """Of each case the outputs on rank 0, those on all ranks, and how often this rank met others.

    Pieces are small, so that a share has several.
    """
    collecting._PIECE = 256
    found = []
    for folder, inputs, last in cases:
        peer = Peer(artifact.load(folder), rank)
        run = peer.run(inputs, Kept(last))
        with mock.patch.object(peer.exchange, "pass_on", wraps=peer.exchange.pass_on) as passed:
            on_zero = peer.assemble(run, Kept(last))
            everywhere = peer.assemble(run, Kept(last), everywhere=True)
        found.append((on_zero, everywhere, passed.call_count))
    return found


def memory_of_whole(rank: Rank, folder: str, x: torch.Tensor) -> tuple[float, int]:
    """On rank 0, what putting outputs together takes at most, in bytes of the outputs."""
    peer = Peer(artifact.load(folder), rank)
    peer.assemble(peer.run((x[:, :64],)))
    run = peer.run((x,))
    before = peak_bytes(rank.device)
    made = peer.assemble(run)
    num_bytes = 0 if made is None else made.nbytes
    return (peak_bytes(rank.device) - before) / max(num_bytes, 1), num_bytes


def meet_without_gloo(rank: Rank, most_bytes: int) -> tuple[float, str]:
    """The sum of a small exchange, and what a large one says, where gloo does no collective."""
    def refused(asked: Collective, group: dist.ProcessGroup) -> None:
        raise ValueError("gloo was asked")

    exchange = Exchange(Mesh.parse("tp=2"), rank)
    with mock.patch.dict(BY_KIND, all_reduce=refused):
        asked = Collective("node", "all_reduce", "tp", torch.tensor([rank.index + 1.0]))
        small = float(exchange.answer(asked))
        try:
            exchange.answer(replace(asked, tensor=torch.zeros(most_bytes // 4 + 1)))
        except ValueError as error:
            return small, str(error)
    return small, "it did not fail"
