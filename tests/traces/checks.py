"""What every timeline file has to be, and a rank's part in a traced job."""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from typing import Any

import torch

from ringcompile.commands.job import Job, run_job, timeline_of
from ringcompile.compiler import load
from ringcompile.ir.printer import print_program
from ringcompile.parallel_program import ParallelProgram
from ringcompile.runtime.join import Rank
from ringcompile.runtime.outputs import Kept
from ringcompile.traces.events import to_events

Events = list[dict[str, Any]]


def slices(events: dict[str, Any]) -> Events:
    return [row for row in events["traceEvents"] if row["ph"] == "X"]


def check_timeline(events: dict[str, Any], made: ParallelProgram, others: int = 0) -> None:
    """Rows have what the format asks for, slices do not overlap, flows resolve, names are dump's.

    Perfetto's own importer drops a slice that overlaps another of its track, and a flow without
    an end or with one outside of every slice; it says so only in its statistics.

    Args:
        events: the file's.
        made: the programs.
        others: how many nodes may be the run's own.
    """
    rows = events["traceEvents"]
    _check_form(rows)
    tracks = {
        (row["pid"], row["tid"]): row["args"]["name"]
        for row in rows if row["name"] == "thread_name"
    }
    ranks = {row["pid"]: row["args"]["name"] for row in rows if row["name"] == "process_name"}
    assert set(ranks.values()) == {f"rank {rank}" for rank in range(made.world_size)}
    assert set(tracks.values()) <= {"compute", "host", *made.mesh.names}
    assert 0 not in ranks  # Perfetto's own
    _check_names(slices(events), made, others)
    by_track = defaultdict(list)
    for row in slices(events):
        assert ranks[row["pid"]] == f"rank {row['args']['rank']}"
        by_track[row["pid"], row["tid"]].append(row)
    assert set(by_track) <= set(tracks)
    for track in by_track.values():
        track.sort(key=lambda row: row["ts"])
        for one, other in itertools.pairwise(track):
            assert one["ts"] + one["dur"] <= other["ts"] + 1e-6, (one, other)
    _check_flows(rows, by_track, events["otherData"].get("clock_error_us", 0.0))
    _check_counters(rows, set(ranks))


def _check_form(rows: Events) -> None:
    """Of every row, what the Trace Event Format asks for; numbers are finite."""
    needed = {"M": {"pid", "args"}, "X": {"ts", "dur", "pid", "tid", "args"}, "C": {"ts", "args"},
              "s": {"id", "ts", "pid", "tid", "cat"}, "f": {"id", "ts", "pid", "tid", "cat", "bp"}}
    for row in rows:
        assert row["ph"] in needed
        assert needed[row["ph"]] <= row.keys(), row
        assert isinstance(row["name"], str)
        numbers = [row[key] for key in ("ts", "dur") if key in row]
        assert all(math.isfinite(number) and number >= 0 for number in numbers), row
    named = [(row["pid"], row["tid"]) for row in rows if row["name"] == "thread_name"]
    assert len({tid for _, tid in named}) == len(named)  # a thread belongs to one process


def _check_counters(rows: Events, ranks: set[int]) -> None:
    """The memory of every rank, at moments that follow one another."""
    memory = [row for row in rows if row["ph"] == "C"]
    assert {row["pid"] for row in memory} == ranks
    assert all(row["args"]["bytes"] > 0 and row["name"] == "memory" for row in memory)
    for rank in ranks:
        times = [row["ts"] for row in memory if row["pid"] == rank]
        assert times == sorted(times)


def _check_names(found: Events, made: ParallelProgram, others: int) -> None:
    dumps = [print_program(made.rank(rank)) for rank in range(made.world_size)]
    strange = set()
    for row in found:
        args = row["args"]
        line = rf"(?m)^{args.get('value')}: .*= {re.escape(args['op'])}\("
        if "value" not in args or not re.search(line, dumps[args["rank"]]):
            strange.add(row["name"])
        elif args["line"]:
            assert args["line"] in dumps[args["rank"]]
    assert len(strange) <= others, strange


def _check_flows(rows: Events, by_track: dict[Any, Events], clock_error: float) -> None:
    """Each message begins in a transfer that sends, and ends in one of the rank that it is for."""
    ends: dict[int, dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        if row["ph"] in "sf":
            assert row["ph"] not in ends[row["id"]]
            ends[row["id"]][row["ph"]] = row
    for both in ends.values():
        assert both.keys() == set("sf")
        assert both["s"]["ts"] <= both["f"]["ts"] + clock_error
        send, take = (_around(both[which], by_track)["args"] for which in "sf")
        assert (send["to"], take["from"]) == (take["rank"], send["rank"])
        assert (send["axis"], send["bytes"] > 0) == (take["axis"], True)
    for peer in ("to", "from"):
        meant = [row for track in by_track.values() for row in track
                 if row["cat"] == "communication" and row["args"].get(peer) is not None]
        assert len(ends) == len(meant)


def _around(end: dict[str, Any], by_track: dict[Any, Events]) -> dict[str, Any]:
    """The one slice that an end of a flow lies in."""
    found = [
        row for row in by_track[end["pid"], end["tid"]]
        if row["ts"] <= end["ts"] < row["ts"] + row["dur"] - 1e-6
    ]
    assert len(found) == 1, end
    return found[0]


def traced_in_a_job(rank: Rank, folder: str, length: int) -> dict[str, Any] | None:
    """What one rank of a job gives: rank 0 the timeline of all."""
    parallel = load(folder)
    inputs = {"input_ids": torch.arange(length)[None]}
    inputs = {parallel.program.inputs[0].name: inputs["input_ids"]}
    found = run_job(parallel, inputs, Job(Kept(outputs=False, summary=True), trace=True))
    return None if found is None else to_events(*timeline_of(parallel, found, "job"))
