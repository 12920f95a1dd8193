"""Measures what only a running job shows: links between ranks, and what a node costs the host.

The functions of a rank are called in all ranks of a job together; each returns its own seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import fx

from ringcompile.ir.layout import Layout
from ringcompile.ir.program import Program, Structure
from ringcompile.ir.types import TensorType
from ringcompile.runtime.collectives import Collective
from ringcompile.runtime.exchange import BY_KIND
from ringcompile.runtime.executor import Executor, run_alone
from ringcompile.runtime.join import Rank
from ringcompile.runtime.memory import keep_freed_memory

_LARGE = 4 << 20  # bytes of a message that takes many milliseconds
_TINY = 64  # bytes: nothing but startup
_SIDE = 512  # of the matrices of a product: some milliseconds of a CPU's core


@dataclass(frozen=True)
class LinkSizes:
    """Bytes of messages, of what each rank brings to small collectives, and how often."""

    messages: tuple[int, ...] = tuple((1 << 16) << i for i in range(0, 11, 2))
    small: tuple[int, ...] = (256, 4096, 16384, 65536)
    num_samples: int = 9

    def samples(self, num_bytes: int) -> int:
        """How often a message is sent: large ones, whose times vary less, fewer times."""
        return max(2, self.num_samples // 3) if num_bytes >= _LARGE else self.num_samples


@dataclass(frozen=True)
class Peers:
    """The ranks among which a rank measures.

    Attributes:
        rank: this process' place in the job.
        group: they, in the order in which each sends to the next.
    """

    rank: Rank
    group: dist.ProcessGroup

    @property
    def device(self) -> torch.device:
        """Where this rank's tensors live."""
        return self.rank.device

    @property
    def ranks(self) -> list[int]:
        """Their numbers in the job."""
        return dist.get_process_group_ranks(self.group)

    def next_and_previous(self) -> tuple[int, int]:
        """Whom this rank sends to, and whom it receives from, by their numbers in the job."""
        ranks = self.ranks
        at = ranks.index(self.rank.index)
        return ranks[(at + 1) % len(ranks)], ranks[at - 1]


def link_seconds(
    rank: Rank, sizes: LinkSizes, group: dist.ProcessGroup | None = None
) -> dict[str, Any]:
    """The seconds of exchanges among ranks, by kind and bytes; all ranks of the job call it.

    Exchanges come behind a product, as in programs: ranks are then not there at the same moment,
    and the threads that carry messages have to be woken.

    Args:
        rank: this process' place in the job.
        sizes: of what is exchanged.
        group: the ranks that exchange with this one, all of the job if none is given; other
            ranks measure in their groups at the same time.

    Returns:
        `startup`, seconds of a shift of next to nothing; by kind, a list with the seconds for each
        size: `shift` (that many bytes to one neighbour, as many from the other), `all_reduce`,
        `all_gather` (of the gathered tensor), `all_to_all` and `small`, all-reduces of little,
        behind little; and `interference`, the share of a shift's seconds by which compute beside it
        is held up. Startup is from a common start.
    """
    keep_freed_memory()
    world = dist.group.WORLD
    assert world is not None
    peers = Peers(rank, group or world)
    matrix = torch.randn(_SIDE, _SIDE, device=rank.device)

    def product() -> None:
        torch.mm(matrix, matrix)

    def short() -> None:
        torch.mv(matrix, matrix[0])

    made: dict[str, Any] = {
        "startup": _median(rank, _shift(peers, _TINY), 2 * sizes.num_samples),
    }
    for kind, prepare in _KINDS.items():
        made[kind] = [
            _median(rank, prepare(peers, n), sizes.samples(n), behind=product)
            for n in sizes.messages
        ]
    made["small"] = [
        _median(rank, _all_reduce(peers, n), 2 * sizes.num_samples, behind=short)
        for n in sizes.small
    ]
    made["interference"] = _interference(peers, sizes, made["shift"][-1])
    return made


def _shift(peers: Peers, num_bytes: int) -> Callable[[], object]:
    tensors = _in_turn(peers.device, (num_bytes,), torch.uint8)

    def call() -> None:
        sent = next(tensors)
        for work in _start(peers, sent, torch.empty_like(sent)):
            work.wait()

    return call


def _start(peers: Peers, sent: torch.Tensor, taken: torch.Tensor) -> list[dist.Work]:
    after, before = peers.next_and_previous()
    return dist.batch_isend_irecv([
        dist.P2POp(dist.isend, sent, after, peers.group),
        dist.P2POp(dist.irecv, taken, before, peers.group),
    ])


def _collective(
    kind: str, peers: Peers, shape: tuple[int, ...], dtype: torch.dtype
) -> Callable[[], object]:
    """As programs ask for it: results are new tensors, and operands have just been written."""
    tensors, links, ranks = _in_turn(peers.device, shape, dtype), peers.rank.links, peers.ranks

    def call() -> object:
        asked = Collective("", kind, "", next(tensors))
        if links is not None and links.carries(asked, ranks):
            return links.meet(asked, ranks)
        return BY_KIND[kind](asked, peers.group)

    return call


def _in_turn(
    device: torch.device, shape: tuple[int, ...], dtype: torch.dtype
) -> Iterator[torch.Tensor]:
    """Tensors of a shape, several of them in turn."""
    return cycle([torch.zeros(shape, dtype=dtype, device=device) for _ in range(_IN_TURN)])


def _all_reduce(peers: Peers, num_bytes: int) -> Callable[[], object]:
    return _collective("all_reduce", peers, (num_bytes // 4,), torch.float32)


def _all_gather(peers: Peers, num_bytes: int) -> Callable[[], object]:
    return _collective("gather", peers, (num_bytes // peers.group.size(),), torch.uint8)


def _all_to_all(peers: Peers, num_bytes: int) -> Callable[[], object]:
    each = num_bytes // peers.group.size()
    return _collective("all_to_all", peers, (peers.group.size(), each), torch.uint8)


_IN_TURN = 4
_KINDS = {"shift": _shift, "all_reduce": _all_reduce, "all_gather": _all_gather,
          "all_to_all": _all_to_all}


def _interference(peers: Peers, sizes: LinkSizes, shift: float) -> float:
    """How much longer products take beside the largest shift, over its own seconds."""
    num_bytes = sizes.messages[-1]
    sent = torch.zeros(num_bytes, dtype=torch.uint8, device=peers.device)
    taken = torch.empty_like(sent)
    matrix = torch.randn(384, 384, device=peers.device)
    once = _median(peers.rank, lambda: matrix @ matrix, sizes.num_samples)
    repeats = max(1, round(3 * shift / once))

    def compute() -> None:
        for _ in range(repeats):
            torch.mm(matrix, matrix)

    def both() -> None:
        works = _start(peers, sent, taken)
        compute()
        for work in works:
            work.wait()

    alone = _median(peers.rank, compute, sizes.num_samples)
    together = _median(peers.rank, both, sizes.num_samples)
    return min(max((together - alone) / shift, 0.0), 1.0)


def _median(
    rank: Rank,
    call: Callable[[], object],
    num_samples: int,
    behind: Callable[[], object] = lambda: None,
) -> float:
    """Seconds to this rank's end: from a common start, or from the end of what comes before."""
    samples = []
    for _ in range(num_samples + 2):
        dist.barrier()
        behind()
        _synchronize(rank.device)
        start = time.perf_counter()
        call()
        _synchronize(rank.device)
        samples.append(time.perf_counter() - start)
    return median(samples[2:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def node_seconds(device: torch.device) -> float:
    """The host's seconds for a node: of a program of additions of next to nothing.

    On CUDA the device is not waited for. Elsewhere host and device are one, and what the addition
    itself takes, which counts as a kernel, is left out; and a sample is so short that seldom
    another process interrupts it.
    """
    num_nodes, num_samples = (400, 9) if device.type == "cuda" else (50, 31)
    executor, x = Executor(_additions(num_nodes), {}, device), torch.ones(8, device=device)
    samples = []
    for _ in range(num_samples):
        _synchronize(device)
        start = time.perf_counter()
        run_alone(executor, {"x": x})
        seconds = time.perf_counter() - start
        if device.type != "cuda":
            start = time.perf_counter()
            for _ in range(num_nodes):
                torch.add(x, x)
            seconds = max(seconds - (time.perf_counter() - start), 0.0)
        samples.append(seconds / num_nodes)
    _synchronize(device)
    return median(samples)


def _additions(num_nodes: int) -> Program:
    graph, type_ = fx.Graph(), TensorType(torch.float32, (8,), Layout.whole(1))
    node = graph.placeholder("x")
    node.meta["type"] = type_
    for _ in range(num_nodes):
        node = graph.call_function(torch.ops.aten.add.Tensor, (node, node))
        node.meta["type"] = type_
    graph.output((node,))
    return Program(graph, (), {"x": "x"}, {}, Structure("tensor"))
