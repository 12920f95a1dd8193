"""A simulated timeline in the form that files and pictures are made from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ringcompile.cost.rank import RankCost
from ringcompile.cost.timeline import COMPUTE, HOST, Timeline
from ringcompile.traces.slices import COMMUNICATION, WAIT, MemoryTrack, Slice, Trace


def simulated(found: Timeline, costs: Sequence[RankCost], title: str) -> Trace:
    """Every rank's slices: its kernels and waits, and its part in each message and collective.

    Args:
        found: the timeline.
        costs: of the ranks that were simulated.
        title: shown with the trace.
    """
    critical = set(found.critical_path())
    slices = [*_computed(found, critical), *_transferred(found, critical)]
    return Trace(title, tuple(slices), tuple(_memory(slices, costs)), {"kind": "simulated"})


def _computed(found: Timeline, critical: set[int]) -> Iterator[Slice]:
    for number, event in enumerate(found.events):
        if event.stream not in (COMPUTE, HOST):
            continue
        start, end = found.start(number), found.ends[number]
        if event.kind == WAIT:  # it takes no time itself: it lasts since the last kernel
            before = [found.ends[b] for b in found.before[number]
                      if found.events[b].stream == COMPUTE]
            start = min(before, default=start)
        if end > start:
            yield Slice(event.rank, event.stream, event.name, event.kind, start, end,
                        event.microbatch, number in critical)


def _transferred(found: Timeline, critical: set[int]) -> Iterator[Slice]:
    for one in found.transfers:
        end = found.ends[one.done]
        start = found.start(one.done) if one.shared else found.ends[one.begin]
        if end > start:
            yield Slice(one.rank, one.channel, one.name, COMMUNICATION, start, end, one.microbatch,
                        one.done in critical)


def _memory(slices: Sequence[Slice], costs: Sequence[RankCost]) -> Iterator[MemoryTrack]:
    """What a rank holds while a node computes, where that is another amount than before."""
    held = {cost.rank: cost.held for cost in costs}
    before: dict[int, int] = {}
    for one in slices:
        now = held.get(one.rank, {}).get(one.node)
        if one.track == COMPUTE and now is not None and now != before.get(one.rank):
            before[one.rank] = now
            yield MemoryTrack(one.rank, one.start, now)
