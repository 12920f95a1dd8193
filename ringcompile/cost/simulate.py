"""What a timeline says: seconds of a step, what they go to, and what each rank waits and holds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ringcompile.cost.hardware import Cluster
from ringcompile.cost.rank import PIPELINE, RankCost
from ringcompile.cost.timeline import COMPUTE, How, Timeline, timeline


@dataclass(frozen=True)
class RankReport:
    """What a rank does in the time that was simulated.

    Attributes:
        rank: its number.
        compute_seconds: in kernels; on a CPU also in the host's part of a node.
        exposed_seconds: its compute stands still for a transfer, or for those who take part in it.
        bubble_seconds: it stands still for another stage of the pipeline, or has nothing left.
        flops: of products and attention, in one run of its program.
        bytes_sent: in one run.
        weight_bytes: of its share of the weights.
        memory_bytes: the most that it holds, weights included.
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
    """A step, simulated.

    Attributes:
        seconds: of one step from its first start to its last end; with microbatches, of all.
        period: seconds from one microbatch's end to the next one's, the pipeline being full;
            without a pipeline, the seconds of a step.
        path: seconds on the longest path by what they are spent on, largest first.
        ranks: of those that were simulated.
        timeline: everything, in time.
    """

    seconds: float
    period: float
    path: Mapping[str, float]
    ranks: tuple[RankReport, ...]
    timeline: Timeline

    @property
    def bound(self) -> str:
        """What most of the longest path is spent on."""
        return next(iter(self.path), "nothing")

    @property
    def memory_bytes(self) -> int:
        """The most that any rank holds."""
        return max(rank.memory_bytes for rank in self.ranks)

    @property
    def exposed_seconds(self) -> float:
        """The longest that any rank's compute stands still for transfers."""
        return max(rank.exposed_seconds for rank in self.ranks)


def simulate(costs: Sequence[RankCost], cluster: Cluster, how: How | None = None) -> Simulation:
    """Run programs on a cluster's tables.

    Args:
        costs: of all ranks, or of some that stand for all, see `timeline`.
        cluster: the hardware.
        how: how they are run.

    Raises:
        RingCompileError: the cluster's tables lack what is needed.
    """
    how = how or How()
    found = timeline(costs, cluster, how)
    return Simulation(
        found.seconds,
        _period(found, how.microbatches),
        _path(found),
        tuple(_report(cost, found) for cost in costs),
        found,
    )


def _period(found: Timeline, microbatches: int) -> float:
    """From the middle on: by then a pipeline is full."""
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


def _report(cost: RankCost, found: Timeline) -> RankReport:
    compute = exposed = bubble = now = 0.0
    for number, event in enumerate(found.events):
        if event.rank != cost.rank or event.stream != COMPUTE:
            continue
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
    """The axis of the transfer that a wait came right behind."""
    before = found.last[number]
    return "" if before is None else found.events[before].stream
