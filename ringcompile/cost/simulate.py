"""Summarizes a timeline: the time of a step, where it goes, and each rank's waits and memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ringcompile.cost.hardware import Cluster
from ringcompile.cost.rank import PIPELINE, RankCost
from ringcompile.cost.timeline import COMPUTE, How, Timeline, timeline


@dataclass(frozen=True)
class RankReport:
    """One rank's share of a simulated step.

    Attributes:
        rank: its number.
        compute_seconds: the time in kernels; on a CPU also the host's time for each node.
        exposed_seconds: the time in which compute waits for a transfer or for its peers.
        bubble_seconds: the time in which it waits for another pipeline stage or has no work left.
        flops: the FLOPs of matmuls and attention in one run of its program.
        bytes_sent: the bytes that it sends in one run.
        weight_bytes: the bytes of its share of the weights.
        memory_bytes: its peak memory, weights included.
    """

    rank: int
    compute_seconds: float
    exposed_seconds: float
    bubble_seconds: float
    flops: int
    bytes_sent: int
    weight_bytes: int
    memory_bytes: int


@dataclass(frozen=True)
class Simulation:
    """A simulated step.

    Attributes:
        seconds: the time from the first start to the last end, over all microbatches.
        period: the time between the ends of two microbatches with the pipeline full, in
            seconds; without a pipeline, the time of a step.
        path: the seconds on the critical path by kind of work, largest first.
        ranks: a report for each rank that was simulated.
        timeline: all events.
    """

    seconds: float
    period: float
    path: Mapping[str, float]
    ranks: tuple[RankReport, ...]
    timeline: Timeline

    @property
    def bound(self) -> str:
        """The kind of work on which most of the critical path is spent."""
        return next(iter(self.path), "nothing")

    @property
    def memory_bytes(self) -> int:
        """The peak memory of the rank that holds most, in bytes."""
        return max(rank.memory_bytes for rank in self.ranks)

    @property
    def exposed_seconds(self) -> float:
        """The longest time that any rank's compute waits for transfers, in seconds."""
        return max(rank.exposed_seconds for rank in self.ranks)


def simulate(costs: Sequence[RankCost], cluster: Cluster, how: How | None = None) -> Simulation:
    """Simulate programs on a cluster.

    Args:
        costs: the costs of all ranks, or of some that represent all; see `timeline`.
        cluster: the hardware.
        how: the way in which programs are run.

    Raises:
        RingCompileError: the cluster's tables lack what is needed.
    """
    how = how or How()
    found = timeline(costs, cluster, how)
    return Simulation(
        found.seconds,
        _period(found, how.microbatches),
        _path(found),
        _reports(costs, found),
        found,
    )


def _period(found: Timeline, microbatches: int) -> float:
    """The time per microbatch, measured from the middle on, when the pipeline is full."""
    ends = [0.0] * microbatches
    for event, end in zip(found.events, found.ends, strict=True):
        ends[event.microbatch] = max(ends[event.microbatch], end)
    if microbatches == 1:
        return ends[0]
    middle = (microbatches - 1) // 2
    return (ends[-1] - ends[middle]) / (microbatches - 1 - middle)


def _path(found: Timeline) -> dict[str, float]:
    spent: dict[str, float] = defaultdict(float)
    for number in found.critical_path():
        event = found.events[number]
        for kind, seconds in event.parts or ((event.kind, event.seconds),):
            spent[kind] += seconds
    spent.pop("wait", None)
    return dict(sorted(spent.items(), key=lambda entry: -entry[1]))


def _reports(costs: Sequence[RankCost], found: Timeline) -> tuple[RankReport, ...]:
    computed: dict[int, list[int]] = {cost.rank: [] for cost in costs}
    for number, event in enumerate(found.events):
        if event.stream == COMPUTE:
            computed[event.rank].append(number)
    return tuple(_report(cost, computed[cost.rank], found) for cost in costs)


def _report(cost: RankCost, computed: Sequence[int], found: Timeline) -> RankReport:
    compute = exposed = bubble = now = 0.0
    for number in computed:
        event = found.events[number]
        if event.kind == "wait":
            idle = found.ends[number] - now
            if _awaited(found, number) == PIPELINE:
                bubble += idle
            else:
                exposed += idle
        else:
            compute += event.seconds
        now = found.ends[number]
    bubble += found.seconds - now
    return RankReport(
        cost.rank, compute, exposed, bubble, cost.flops, cost.bytes_sent, cost.weight_bytes,
        cost.peak_bytes,
    )


def _awaited(found: Timeline, number: int) -> str:
    """The mesh axis of the transfer that delayed a wait."""
    before = found.last[number]
    return "" if before is None else found.events[before].stream
