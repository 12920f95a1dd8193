"""One HTML file that shows what became of a model: it holds its data, and asks no network."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from importlib import resources
from pathlib import Path
from typing import Any

from ringcompile.cost.hardware import load_cluster
from ringcompile.cost.rank import cost_of
from ringcompile.cost.simulate import simulate
from ringcompile.cost.timeline import How, Timeline
from ringcompile.errors import RingCompileError
from ringcompile.ir.communication import weight_bytes
from ringcompile.ir.expr import BATCH, PART, SEQUENCE
from ringcompile.ir.printer import value_names
from ringcompile.parallel_program import ParallelProgram
from ringcompile.stages import front_stages
from ringcompile.traces.events import read_events
from ringcompile.traces.plot import bars_of
from ringcompile.view.rows import Tables, program_rows

NOMINAL_LENGTH = 16384
# Events of a timeline that a page shows one by one; above, kernels between transfers are one.
_MAX_EVENTS = 60_000


def page(
    parallel: ParallelProgram, cluster: str = "h100x16", length: int | None = None,
    trace: Path | None = None,
) -> str:
    """The viewer with its data.

    Args:
        parallel: as compiled or as loaded.
        cluster: whose tables the timeline below is simulated with; where they do not go far enough
            the page says so instead.
        length: tokens of a sequence, for bytes and times; by default what the program is fixed to,
            or 16,384 as far as the model's code allows.
        trace: what `run --trace` measured of this artifact, to be shown above the simulated one.

    Raises:
        RingCompileError: the artifact or the trace is damaged, or the trace is of another artifact.
    """
    measured = None if trace is None else _measured(parallel, trace)
    shown = {**_data(parallel, cluster, length), "measured": measured}
    data = json.dumps(shown, separators=(",", ":"))
    style, script = _file("viewer.css"), _file("viewer.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    title = html.escape(f"{parallel.program.name}, {parallel.mesh}")
    return (
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
        f"<meta http-equiv=\"Content-Security-Policy\" content=\"{policy}\">\n"
        f"<title>{title}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"<script type=\"application/json\" id=\"data\">{_inside_html(data)}</script>\n"
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def _file(name: str) -> str:
    return resources.files("ringcompile.view").joinpath(name).read_text(encoding="utf-8")


def _inside_html(data: str) -> str:
    """JSON that cannot end the element that it stands in."""
    return data.replace("<", "\\u003c")


def _data(parallel: ParallelProgram, cluster: str, length: int | None) -> dict[str, Any]:
    program = parallel.program
    assert program.sequence is not None
    low, high = program.length_range
    tokens = program.lengths.get(SEQUENCE) or length or max(
        low, min(NOMINAL_LENGTH, high or NOMINAL_LENGTH)
    )
    one_sequence = {BATCH: 1, PART: 1}  # messages are those of one sequence, of each replica
    lengths = program.checked({**program.lengths, **program.at_length(tokens)})
    tables = Tables({**one_sequence, **lengths})
    stages = _stages(parallel, tables)
    ranks = [
        program_rows(rank, tables, f"rank {number}")
        for number, rank in enumerate(parallel.ranks())
    ]
    weights = [weight_bytes(rank) for rank in parallel.ranks()]
    return {
        "model": program.name, "mesh": [list(axis) for axis in parallel.mesh.across],
        "parallel": str(parallel.mesh), "order": program.sequence.order, "tokens": tokens,
        "notes": list(program.notes), "stages": stages, "ranks": ranks, "weights": weights,
        "timeline": _timeline(parallel, cluster, tokens), **tables.to_json(),
    }


def _stages(parallel: ParallelProgram, tables: Tables) -> list[dict[str, Any]]:
    """The program behind each pass, as far as the artifact holds the model it was made from."""
    try:
        found = front_stages(parallel)
    except RingCompileError:  # another version compiled it
        return []
    return [program_rows(program, tables, name) for name, program in found]


def _timeline(parallel: ParallelProgram, cluster: str, tokens: int) -> dict[str, Any]:
    """Where every rank's time goes, by a cluster's tables."""
    try:
        hardware = load_cluster(cluster).sized(parallel.world_size)
        costs = [cost_of(program, tokens) for program in parallel.ranks()]
        many = sum(len(cost.steps) for cost in costs) > _MAX_EVENTS
        found = simulate(costs, hardware, How(merged=many))
    except RingCompileError as error:
        return {"missing": error.message, "cluster": cluster}
    return {"cluster": hardware.name, "seconds": found.seconds, **_events(parallel, found.timeline)}


def _measured(parallel: ParallelProgram, file: Path) -> dict[str, Any]:
    """A measured timeline in the form of a simulated one."""
    events = read_events(file)
    if events["otherData"].get("artifact") != parallel.identity:
        raise RingCompileError(
            f"'{file}' was not measured with this artifact",
            hint="measure it again: ringcompile run OUT --trace FILE",
        )
    bars = bars_of(events)
    streams, kinds = {"compute": 0}, dict[str, int]()
    rows = [
        [bar.rank, streams.setdefault(bar.track, len(streams)),
         int(bar.value[1:]) if bar.value[1:].isdigit() else -1,
         kinds.setdefault(bar.kind, len(kinds)), bar.start, bar.length]
        for bar in bars
    ]
    return {
        "title": str(events["otherData"].get("title", "")), "streams": list(streams),
        "kinds": list(kinds), "events": rows,
        "seconds": max((bar.start + bar.length for bar in bars), default=0.0) / 1e6,
    }


def _events(parallel: ParallelProgram, found: Timeline) -> dict[str, Any]:
    """Of each event: rank, stream, number of the value, kind, start and length in microseconds."""
    streams: dict[str, int] = {"compute": 0}
    kinds: dict[str, int] = {}
    numbers = [
        {node.name: name for node, name in value_names(program).items()}
        for program in parallel.ranks()
    ]
    rows = []
    for number, event in enumerate(found.events):
        start, end = found.start(number), found.ends[number]
        if end > start:
            value = numbers[event.rank].get(event.name, "")
            rows.append([
                event.rank, streams.setdefault(event.stream, len(streams)),
                int(value[1:]) if value[1:].isdigit() else -1,
                kinds.setdefault(event.kind, len(kinds)), round(start * 1e6, 2),
                round((end - start) * 1e6, 2),
            ])
    return {"streams": list(streams), "kinds": list(kinds), "events": rows}
