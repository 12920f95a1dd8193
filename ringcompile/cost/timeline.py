"""Places all kernels and transfers in time: a graph of events and its critical path.

Each rank has a compute stream, on which its kernels run one after another, and a stream for each
mesh axis that it communicates on. As with torch.distributed over NCCL, a transfer starts once the
kernels before it in the program and the previous transfer on its axis are done. A message travels
once both of its ends have started. Compute continues until the wait. A collective blocks compute
at its place in the program. So only what the order of the program allows overlaps. With deferred
waits, compute continues until a result is read, which is the most that any runtime could overlap.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ringcompile.cost.collectives import collective_seconds, held_up, message_seconds
from ringcompile.cost.hardware import Cluster
from ringcompile.cost.kernels import Kernel, Time, time_of
from ringcompile.cost.rank import RankCost, TimedCollective, TimedShift, TimedStep, TimedWait

COMPUTE = "compute"
HOST = "host"


class Event(NamedTuple):
    """A period of time on a stream of a rank.

    Attributes:
        rank: the rank; for events that several ranks share, the first of them.
        stream: "compute", "host", or the mesh axis of a transfer.
        name: the name of the node, or of the event that a rank waits for.
        kind: the kind of work: "matmul", "attention", "weights", "memory", "launch",
            "host", "communication", "interference" or "wait" (which takes none itself).
        seconds: the duration.
        layer: the module path of the node.
        microbatch: the number of the microbatch.
        parts: the seconds by kind, where one event stands for several kernels.
    """

    rank: int
    stream: str
    name: str
    kind: str
    seconds: float
    layer: str = ""
    microbatch: int = 0
    parts: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class How:
    """How the programs are run.

    Attributes:
        microbatches: how often each rank repeats its program.
        eager: whether the host issues node by node; otherwise, as with CUDA graphs, it is not
            waited for. Where host and device are one, as on a CPU, nodes cost their host's time
            in any case.
        deferred: whether the compute goes on until a result is read: behind a collective, as with
            torch's functional collectives, and behind a message to the next stage of a pipeline;
            what comes from the stage before is then taken as soon as it is there.
        merged: whether kernels between two transfers are one event, which is quicker to simulate.
            Not with `eager`, where each waits for the host.
    """

    microbatches: int = 1
    eager: bool = False
    deferred: bool = False
    merged: bool = False


@dataclass(frozen=True)
class Transfer:
    """A rank's part in a message or a collective, from its start to the moment its data is there.

    Attributes:
        rank: the rank.
        channel: the mesh axis.
        name: the node that starts it.
        begin: the event behind which this rank takes part.
        done: the event at whose end it is done.
        shared: whether the time begins with the event `done`, in which all ranks take part, and not
            behind `begin`.
        microbatch: its number.
    """

    rank: int
    channel: str
    name: str
    begin: int
    done: int
    shared: bool
    microbatch: int


@dataclass
class Timeline:
    """All events, with their start and end times and the event that each waited for.

    Attributes:
        before: for each event the numbers of those that end before it begins.
        events: the events by number.
        ends: the end of each event in seconds from the start of the step.
        last: for each event the one that delayed its start; None if it started at once.
        transfers: of each rank, in order.
    """

    before: list[list[int]]
    events: list[Event]
    ends: list[float]
    last: list[int | None]
    transfers: list[Transfer] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """The time from the first start to the last end."""
        return max(self.ends, default=0.0)

    def start(self, number: int) -> float:
        """The start of an event in seconds from the start of the step."""
        return self.ends[number] - self.events[number].seconds

    def critical_path(self) -> list[int]:
        """The events on the critical path, in order."""
        if not self.ends:
            return []
        at: int | None = max(range(len(self.ends)), key=lambda i: self.ends[i])
        path = []
        while at is not None:
            path.append(at)
            at = self.last[at]
        return path[::-1]


def timeline(costs: Sequence[RankCost], cluster: Cluster, how: How | None = None) -> Timeline:
    """Simulate the programs of ranks on their streams.

    Args:
        costs: the costs of all ranks, or of some. Peers that are left out are assumed to be
            ready when the rank itself is, which is exact if all ranks are alike.
        cluster: the hardware.
        how: the way in which programs are run.

    Raises:
        RingCompileError: the cluster's tables lack what is needed.
    """
    return _Builder({cost.rank for cost in costs}, cluster, how or How()).build(costs)


@dataclass
class _InFlight:
    """A transfer: the event at which both ends have started, and the one at which it is done."""

    begin: int
    done: int
    shift: TimedShift


@dataclass
class _Streams:
    """The state of a rank's streams during the simulation."""

    compute: int | None = None
    host: int | None = None
    channels: dict[str, int] = field(default_factory=dict)
    started: dict[str, _InFlight] = field(default_factory=dict)
    pending: dict[str, int] = field(default_factory=dict)
    met: dict[tuple[str, tuple[int, ...]], int] = field(default_factory=dict)
    parts: dict[str, float] = field(default_factory=dict)


class _Builder:
    def __init__(self, ranks: set[int], cluster: Cluster, how: How) -> None:
        self.ranks, self.cluster, self.how = ranks, cluster, how
        self.before, self.events = list[list[int]](), list[Event]()
        self.sent: dict[tuple[str, int, int], list[_InFlight]] = {}
        self.taken: dict[tuple[str, int, int], list[_InFlight]] = {}
        self.shared: dict[tuple[str, tuple[int, ...], int], int] = {}
        self.times: dict[Kernel, Time] = {}
        self.known: dict[int, Time] = {}
        self.host = 0.0
        self.transfers: list[Transfer] = []

    def build(self, costs: Sequence[RankCost]) -> Timeline:
        for cost in costs:
            rank, self.host = _Streams(), self._host_seconds(cost)
            for microbatch in range(self.how.microbatches):
                for step in cost.steps:
                    self._step(cost, rank, step, microbatch)
                self._flush(cost, rank, cost.steps[-1], microbatch)
        self._messages()
        return self._timed()

    def _add(self, event: Event, after: Iterable[int | None]) -> int:
        number = len(self.events)
        self.events.append(event)
        self.before.append([other for other in after if other is not None])
        return number

    def _step(self, cost: RankCost, rank: _Streams, step: TimedStep, microbatch: int) -> None:
        for name in step.reads:
            if name in rank.pending:
                self._wait(cost, rank, step, rank.pending.pop(name), microbatch)
        merged = self.how.merged and not (self.how.eager and self.cluster.device.asynchronous)
        if merged:
            self._collect(cost, rank, step)
            if step.communicates:
                self._flush(cost, rank, step, microbatch)
        else:
            self._compute(cost, rank, step, microbatch)
        match step.communicates:
            case TimedShift() as shift:
                self._start(cost, rank, step, shift, microbatch)
            case TimedWait(name):
                self._finish(cost, rank, step, rank.started.pop(name), microbatch)
            case TimedCollective() as collective:
                self._meet(cost, rank, step, collective, microbatch)

    def _collect(self, cost: RankCost, rank: _Streams, step: TimedStep) -> None:
        """Collect a step's kernels, to merge them with the next ones into one event."""
        if not self.cluster.device.asynchronous:
            rank.parts[HOST] = rank.parts.get(HOST, 0.0) + self.host
        for kernel in step.kernels:
            time = self._time(kernel)
            rank.parts[time.bound] = rank.parts.get(time.bound, 0.0) + time.seconds

    def _flush(self, cost: RankCost, rank: _Streams, step: TimedStep, microbatch: int) -> None:
        if rank.parts:
            event = Event(cost.rank, COMPUTE, step.name, COMPUTE, sum(rank.parts.values()),
                          step.layer, microbatch, tuple(rank.parts.items()))
            rank.compute = self._add(event, (rank.compute,))
            rank.parts = {}

    def _compute(self, cost: RankCost, rank: _Streams, step: TimedStep, microbatch: int) -> None:
        device, host = self.cluster.device, self.host
        if device.asynchronous and self.how.eager:
            event = Event(cost.rank, HOST, step.name, HOST, host, step.layer, microbatch)
            rank.host = self._add(event, (rank.host,))
        elif not device.asynchronous:
            event = Event(cost.rank, COMPUTE, step.name, HOST, host, step.layer, microbatch)
            rank.compute = self._add(event, (rank.compute,))
        for kernel in step.kernels:
            time = self._time(kernel)
            event = Event(cost.rank, COMPUTE, step.name, time.bound, time.seconds, step.layer,
                          microbatch)
            rank.compute = self._add(event, (rank.compute, rank.host))

    def _time(self, kernel: Kernel) -> Time:
        found = self.known.get(id(kernel))  # calls that are alike have the same kernels
        if found is None:
            if kernel not in self.times:
                self.times[kernel] = time_of(kernel, self.cluster.device)
            found = self.known[id(kernel)] = self.times[kernel]
        return found

    def _host_seconds(self, cost: RankCost) -> float:
        """The host's time for a step in seconds, including the views around it."""
        return self.cluster.device.value("issue") * cost.num_nodes / max(len(cost.steps), 1)

    def _begin(self, cost: RankCost, rank: _Streams, step: TimedStep, channel: str, mb: int) -> int:
        event = Event(cost.rank, channel, step.name, "wait", 0.0, step.layer, mb)
        return self._add(event, (rank.compute, rank.host, rank.channels.get(channel)))

    def _start(
        self, cost: RankCost, rank: _Streams, step: TimedStep, shift: TimedShift, mb: int
    ) -> None:
        if self.how.deferred and shift.to is None:  # there is nothing to compute for it
            event = Event(cost.rank, shift.channel, step.name, "wait", 0.0, step.layer, mb)
            begin = self._add(event, (rank.channels.get(shift.channel),))
        else:
            begin = self._begin(cost, rank, step, shift.channel, mb)
        event = Event(cost.rank, shift.channel, step.name, "wait", 0.0, step.layer, mb)
        started = _InFlight(begin, self._add(event, (begin,)), shift)
        rank.channels[shift.channel] = started.done
        rank.started[step.name] = started
        self.transfers.append(
            Transfer(cost.rank, shift.channel, step.name, begin, started.done, False, mb)
        )
        if shift.to is not None:
            self.sent.setdefault((shift.channel, cost.rank, shift.to), []).append(started)
        if shift.source is not None:
            self.taken.setdefault((shift.channel, shift.source, cost.rank), []).append(started)

    def _finish(
        self, cost: RankCost, rank: _Streams, step: TimedStep, started: _InFlight, mb: int
    ) -> None:
        shift = started.shift
        if self.how.deferred and shift.source is None:
            return
        lost = held_up(self.cluster, cost.rank, shift, max(shift.sent, shift.taken))
        if lost:
            event = Event(cost.rank, COMPUTE, step.name, "interference", lost, step.layer, mb)
            rank.compute = self._add(event, (rank.compute,))
        self._wait(cost, rank, step, started.done, mb)

    def _wait(self, cost: RankCost, rank: _Streams, step: TimedStep, done: int, mb: int) -> None:
        self._flush(cost, rank, step, mb)
        event = Event(cost.rank, COMPUTE, step.name, "wait", 0.0, step.layer, mb)
        rank.compute = self._add(event, (rank.compute, done))

    def _meet(
        self, cost: RankCost, rank: _Streams, step: TimedStep, exchange: TimedCollective, mb: int
    ) -> None:
        begin = self._begin(cost, rank, step, exchange.channel, mb)
        group = (exchange.channel, exchange.group)
        count = rank.met[group] = rank.met.get(group, 0) + 1
        key = (*group, count)
        if key not in self.shared:
            seconds = collective_seconds(self.cluster, exchange)
            event = Event(cost.rank, exchange.channel, step.name, "communication", seconds,
                          step.layer, mb)
            self.shared[key] = self._add(event, ())
        done = self.shared[key]
        self.before[done].append(begin)
        rank.channels[exchange.channel] = done
        self.transfers.append(
            Transfer(cost.rank, exchange.channel, step.name, begin, done, True, mb)
        )
        if self.how.deferred:
            rank.pending[step.name] = done
        else:
            self._wait(cost, rank, step, done, mb)

    def _messages(self) -> None:
        """Pair the n-th send with the n-th receive for each pair of ranks."""
        for (channel, source, to), entries in self.sent.items():
            others = self.taken.pop((channel, source, to), []) if to in self.ranks else entries
            for begun, expected in zip(entries, others, strict=True):
                self._message(channel, source, to, begun, expected)
        for (channel, source, to), entries in self.taken.items():
            for expected in entries:  # from ranks that are left out
                self._message(channel, source, to, expected, expected)

    def _message(
        self, channel: str, source: int, to: int, begun: _InFlight, expected: _InFlight
    ) -> None:
        num_bytes = begun.shift.sent if begun.shift.to == to else expected.shift.taken
        first = self.events[begun.begin]
        seconds = message_seconds(self.cluster, source, to, num_bytes)
        event = Event(source if source in self.ranks else to, channel, first.name,
                      "communication", seconds, first.layer, first.microbatch)
        number = self._add(event, (begun.begin, expected.begin))
        self.before[begun.done].append(number)
        self.before[expected.done].append(number)

    def _timed(self) -> Timeline:
        ends, last = _ends(self.before, [event.seconds for event in self.events])
        return Timeline(self.before, self.events, ends, last, self.transfers)


def _ends(
    before: Sequence[Sequence[int]], seconds: Sequence[float]
) -> tuple[list[float], list[int | None]]:
    """When each event ends, and which one delayed it: all that it begins behind go first."""
    after: list[list[int]] = [[] for _ in before]
    for number, others in enumerate(before):
        for other in others:
            after[other].append(number)
    missing = list(map(len, before))
    ready = [number for number, count in enumerate(missing) if not count]
    ends, last = [0.0] * len(before), list[int | None]([None]) * len(before)
    for number in ready:
        start, delayed = 0.0, None
        for other in before[number]:
            if delayed is None or ends[other] > start:
                start, delayed = ends[other], other
        ends[number], last[number] = start + seconds[number], delayed
        for other in after[number]:
            missing[other] -= 1
            if not missing[other]:
                ready.append(other)
    assert len(ready) == len(before), "events wait for each other"
    return ends, last
