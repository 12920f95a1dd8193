"""Timelines as files for ui.perfetto.dev and chrome://tracing (the Trace Event Format).

Each rank is a process, each of its tracks a thread. A message is a flow, from the transfer of the
rank that sends to the transfer of the rank that receives.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ringcompile.errors import RingCompileError
from ringcompile.held import whole_file
from ringcompile.traces.nodes import Nodes
from ringcompile.traces.slices import COMMUNICATION, COMPUTE, Slice, Trace

_FORMAT = "ringcompile timeline 1"
_MOST_TRACKS = 100


def to_events(trace: Trace, nodes: Nodes) -> dict[str, Any]:
    """A timeline in the Trace Event Format, as plain values; times are microseconds.

    Args:
        trace: the timeline.
        nodes: of the programs that it is of.
    """
    tracks = sorted({one.track for one in trace.slices}, key=lambda name: (name != COMPUTE, name))
    number = {name: i for i, name in enumerate(tracks)}
    rows = [
        *_names(sorted({one.rank for one in trace.slices}), tracks),
        *(_slice(one, nodes, number) for one in trace.slices),
        *_flows(trace.slices, nodes, number),
        *({"ph": "C", "name": "memory", "pid": _process(sample.rank), "ts": _micro(sample.time),
           "args": {"bytes": sample.num_bytes}} for sample in trace.memory),
    ]
    about = {"format": _FORMAT, "title": trace.title, **trace.facts}
    return {"traceEvents": rows, "displayTimeUnit": "ms", "otherData": about}


def _process(rank: int) -> int:
    """A number for a rank; process 0 would be the system's own in Perfetto."""
    return rank + 1


def _where(one: Slice, number: Mapping[str, int]) -> dict[str, int]:
    """The process and the thread of a slice; no two processes share the number of a thread."""
    return {"pid": _process(one.rank), "tid": _thread(one.rank, number[one.track])}


def _thread(rank: int, track: int) -> int:
    return _process(rank) * _MOST_TRACKS + track


def _micro(seconds: float) -> float:
    return round(seconds * 1e6, 3)


def _names(ranks: Iterable[int], tracks: list[str]) -> Iterator[dict[str, Any]]:
    for rank in ranks:
        one = {"ph": "M", "pid": _process(rank)}
        yield {**one, "name": "process_name", "args": {"name": f"rank {rank}"}}
        yield {**one, "name": "process_sort_index", "args": {"sort_index": rank}}
        for i, track in enumerate(tracks):
            thread = {**one, "tid": _thread(rank, i)}
            yield {**thread, "name": "thread_name", "args": {"name": track}}
            yield {**thread, "name": "thread_sort_index", "args": {"sort_index": i}}


def _slice(one: Slice, nodes: Nodes, number: Mapping[str, int]) -> dict[str, Any]:
    about, start, end = nodes.about(one.rank, one.node), _micro(one.start), _micro(one.end)
    args = {**about.facts, "rank": one.rank, "kind": one.kind, "microbatch": one.microbatch}
    if one.critical is not None:
        args["critical"] = one.critical
    return {
        "ph": "X", "name": about.label, "cat": one.kind, **_where(one, number), "ts": start,
        "dur": round(end - start, 3), "args": args,
    }


def _flows(
    slices: Iterable[Slice], nodes: Nodes, number: Mapping[str, int]
) -> Iterator[dict[str, Any]]:
    """An arrow for each message: the n-th that a rank sends another is the n-th that that takes."""
    sent: dict[tuple[str, int, int], list[Slice]] = {}
    taken: dict[tuple[str, int, int], list[Slice]] = {}
    for one in sorted(slices, key=lambda one: one.end):
        about = nodes.about(one.rank, one.node)
        if one.kind == COMMUNICATION and about.to is not None:
            sent.setdefault((about.axis, one.rank, about.to), []).append(one)
        if one.kind == COMMUNICATION and about.source is not None:
            taken.setdefault((about.axis, about.source, one.rank), []).append(one)
    count = itertools.count(1)
    for key, sends in sent.items():
        for send, take in zip(sends, taken.get(key, []), strict=False):
            common = {"name": "message", "cat": "message", "id": next(count)}
            yield {**common, "ph": "s", **_where(send, number), "ts": _micro(send.start)}
            yield {**common, "ph": "f", "bp": "e", **_where(take, number), "ts": _near_end(take)}


def _near_end(one: Slice) -> float:
    """The last moment that is inside of a slice: its very end belongs to the next one."""
    start, end = _micro(one.start), _micro(one.end)
    return max(start, round(end - 0.001, 3))


def write_events(file: Path, events: Mapping[str, Any]) -> None:
    """Write what `to_events` made.

    Raises:
        RingCompileError: the file cannot be written.
    """
    try:
        with whole_file(file) as partial:
            partial.write_text(json.dumps(events, separators=(",", ":")), encoding="utf-8")
    except OSError as error:
        raise RingCompileError(f"cannot write '{file}': {error}") from None


def read_events(file: Path) -> dict[str, Any]:
    """What `write_events` wrote.

    Raises:
        RingCompileError: the file cannot be read, or holds something else.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RingCompileError(f"cannot read the trace '{file}': {error}") from None
    about = found.get("otherData") if isinstance(found, dict) else None
    if not isinstance(about, dict) or about.get("format") != _FORMAT:
        raise RingCompileError(
            f"'{file}' is no trace of this version of ringcompile",
            hint="`ringcompile run OUT --trace FILE` and `simulate OUT --trace FILE` write one",
        )
    return found
