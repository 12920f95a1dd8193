"""Moments of a rank, on the host or on its GPU, as seconds of rank 0's clock."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from ringcompile.runtime.join import Rank

_ROUNDS = 20


class HostClock:
    """Moments of ops that have computed when they return, as on a CPU."""

    def mark(self) -> Any:
        """This moment."""
        return time.perf_counter()

    def mark_done(self, works: list[dist.Work]) -> Any:
        """The moment at which a transfer is done; None where that only shows when it is awaited."""
        return None

    def seconds(self, mark: Any) -> float:
        """A moment as seconds of this process' clock."""
        return mark


class GpuClock(HostClock):
    """Moments of a GPU's streams: CUDA events, which the host only reads once all is done."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._side = device, torch.cuda.Stream(device)
        torch.cuda.synchronize(device)
        self._base = self.mark()
        self._base.synchronize()
        self._host = time.perf_counter()

    def mark(self) -> Any:
        """The moment at which the current stream comes as far as this."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def mark_done(self, works: list[dist.Work]) -> Any:
        """The moment at which a transfer is done, seen by a stream that does nothing else."""
        with torch.cuda.stream(self._side):
            for work in works:
                work.wait()
            return self.mark()

    def seconds(self, mark: Any) -> float:
        """A moment as seconds of this process' clock."""
        mark.synchronize()
        return self._host + self._base.elapsed_time(mark) * 1e-3


def clock_of(device: torch.device) -> HostClock:
    """The clock for what a device computes."""
    return GpuClock(device) if device.type == "cuda" else HostClock()


def offset_to_first(rank: Rank) -> tuple[float, float]:
    """What to add to this rank's clock for rank 0's, and by how much that may be wrong, in seconds.

    All ranks call it. Each in turn asks rank 0 for the time and takes the answer that came back
    soonest: it was given half way, give or take half of the time that question and answer took.
    """
    best = (0.0, 0.0) if rank.index == 0 else (0.0, float("inf"))
    for other in range(1, rank.world_size):
        for _ in range(_ROUNDS):
            if rank.index == 0:
                _tell(rank, other)
            elif rank.index == other:
                best = min(best, _ask(rank), key=lambda found: found[1])
    if rank.world_size > 1:  # nobody begins while others still ask
        together = torch.zeros(1, device=rank.device)
        dist.all_reduce(together)
        together.item()
    return best


def _tell(rank: Rank, other: int) -> None:
    question = torch.zeros(1, dtype=torch.float64, device=rank.device)
    dist.recv(question, other)
    question.item()  # over NCCL the host goes on before it is there
    dist.send(torch.tensor([time.perf_counter()], dtype=torch.float64, device=rank.device), other)


def _ask(rank: Rank) -> tuple[float, float]:
    answer = torch.zeros(1, dtype=torch.float64, device=rank.device)
    asked = time.perf_counter()
    dist.send(torch.zeros_like(answer), 0)
    dist.recv(answer, 0)
    told, now = answer.item(), time.perf_counter()
    return told - (asked + now) / 2, (now - asked) / 2
