"""A timeline as a trace for chrome://tracing or ui.perfetto.dev (the Trace Event Format)."""

from __future__ import annotations

from typing import Any

from ringcompile.cost.timeline import COMPUTE, Timeline


def to_trace(found: Timeline, title: str) -> dict[str, Any]:
    """Events by rank and stream; what is on the longest path is marked.

    Args:
        found: the timeline.
        title: shown with the trace.
    """
    critical = set(found.critical_path())
    streams = sorted({e.stream for e in found.events}, key=lambda s: (s != COMPUTE, s))
    rows: list[dict[str, Any]] = []
    for rank in sorted({event.rank for event in found.events}):
        rows.append({"ph": "M", "name": "process_name", "pid": rank,
                     "args": {"name": f"rank {rank}"}})
        rows += [{"ph": "M", "name": "thread_name", "pid": rank, "tid": i, "args": {"name": s}}
                 for i, s in enumerate(streams)]
    for number, event in enumerate(found.events):
        start, end = found.start(number), found.ends[number]
        if event.kind == "wait":
            before = [found.ends[b] for b in found.graph.predecessors(number)
                      if found.events[b].stream == COMPUTE]
            start = min(before, default=start)
        if end > start:
            rows.append({
                "ph": "X", "name": event.name, "cat": event.kind, "pid": event.rank,
                "tid": streams.index(event.stream), "ts": start * 1e6, "dur": (end - start) * 1e6,
                "args": {"layer": event.layer, "kind": event.kind, "critical": number in critical,
                         "microbatch": event.microbatch},
            })
    return {"traceEvents": rows, "displayTimeUnit": "ms", "otherData": {"title": title}}
