"""Timelines, simulated and measured: files, pictures, and the viewer."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from ringcompile.cli import cli
from ringcompile.compiler import load, transform
from ringcompile.cost.hardware import load_cluster
from ringcompile.cost.rank import cost_of
from ringcompile.cost.simulate import simulate
from ringcompile.cost.timeline import How
from ringcompile.cost.values import bind_lengths
from ringcompile.errors import RingCompileError
from ringcompile.parallel_program import ParallelProgram
from ringcompile.runtime.launcher import launch
from ringcompile.traces.events import read_events, to_events, write_events
from ringcompile.traces.nodes import Nodes
from ringcompile.traces.plot import draw
from ringcompile.traces.simulated import simulated
from ringcompile.traces.slices import Slice, one_after_another
from ringcompile.view import page
from tests.support import zoo_program
from tests.traces.checks import check_timeline, slices, traced_in_a_job


@lru_cache
def made(spec: str) -> ParallelProgram:
    return transform(captured(), spec)


def captured() -> Any:
    return zoo_program("llama-tiny", "llama-tiny", sequence=24)


def of_simulation(spec: str, how: How, length: int = 256) -> dict[str, Any]:
    parallel = made(spec)
    costs = [cost_of(program, length) for program in parallel.ranks()]
    found = simulate(costs, load_cluster("h100x16").sized(parallel.world_size), how)
    nodes = Nodes(parallel.ranks(), [bind_lengths(p, length) for p in parallel.ranks()])
    trace = simulated(found.timeline, costs, "simulated")
    assert trace.seconds == pytest.approx(found.seconds)
    return json.loads(json.dumps(to_events(trace, nodes)))


HOW = {
    "as CUDA graphs": How(), "eager": How(eager=True), "deferred": How(deferred=True),
    "merged": How(merged=True), "three microbatches": How(microbatches=3),
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("spec", ["ring=4", "ring=2,tp=2", "pp=2,ulysses=2"])
def test_simulated_timelines(spec: str, how: str) -> None:
    events = of_simulation(spec, HOW[how])
    check_timeline(events, made(spec))
    sent = [row for row in slices(events) if row["cat"] == "communication"]
    assert all(row["args"]["bytes"] or row["args"].get("to", 0) is None for row in sent)
    assert any(row["args"]["critical"] for row in slices(events))


def first(events: dict[str, Any], phase: str, **args: object) -> dict[str, Any]:
    """The first row of a phase, with these arguments."""
    return next(row for row in events["traceEvents"] if row["ph"] == phase
                and all(row["args"].get(name) == value for name, value in args.items()))


def without(events: dict[str, Any], phase: str) -> None:
    events["traceEvents"].remove(first(events, phase))


FAULTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a slice that overlaps the next": lambda e: first(e, "X").update(dur=1e9),
    "a slice of no length that is known": lambda e: first(e, "X").update(dur=float("nan")),
    "a slice before the start": lambda e: first(e, "X").update(ts=-1.0),
    "a slice on a track without a name": lambda e: first(e, "X").update(tid=99),
    "a slice of another rank": lambda e: first(e, "X")["args"].update(rank=1),
    "a name that dump does not print": lambda e: first(e, "X")["args"].update(value="%9999"),
    "an op that dump does not print": lambda e: first(e, "X")["args"].update(op="aten.nothing"),
    "a flow without a start": lambda e: without(e, "s"),
    "a flow without an end": lambda e: without(e, "f"),
    "a flow outside of every slice": lambda e: first(e, "f").update(ts=1e9),
    "a flow that ends before it begins": lambda e: first(e, "s").update(
        ts=first(e, "f")["ts"] + 1e3),
    "two flows of one number": lambda e: first(e, "s").update(id=2),
    "a transfer to another rank": lambda e: first(e, "X", kind="communication")["args"].update(
        to=3),
    "a flow that binds to what follows": lambda e: first(e, "f").pop("bp"),
    "memory that goes back in time": lambda e: first(e, "C").update(ts=1e9),
    "memory of no bytes": lambda e: first(e, "C")["args"].update(bytes=0),
    "a thread of two processes": lambda e: first(e, "M", name="compute").update(tid=301),
    "a row of an unknown kind": lambda e: e["traceEvents"].append({"ph": "Q", "name": "?"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_timeline_is_found(fault: str) -> None:
    events = json.loads(json.dumps(timeline()))
    FAULTS[fault](events)
    with pytest.raises(AssertionError):
        check_timeline(events, made("ring=4"))


@lru_cache
def timeline() -> dict[str, Any]:
    events = of_simulation("ring=4", How())
    check_timeline(events, made("ring=4"))
    return events


def invoke(*words: object) -> Result:
    return CliRunner().invoke(cli, list(map(str, words)), catch_exceptions=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact, what a run of it measured, and what was simulated beside it."""
    folder = tmp_path_factory.mktemp("traces")
    made("ring=2").save(folder / "out")
    for words in (
        ["run", folder / "out", "--seq", 64, "--last", 1, "--trace", folder / "measured.json"],
        ["simulate", folder / "out", "--cluster", "cpu", "--seq", 64, "--trace",
         folder / "simulated.json", "--plot", folder / "both.png", "--measured",
         folder / "measured.json"],
    ):
        done = invoke(*words)
        assert done.exit_code == 0, done.output
    return folder


def test_a_measured_timeline(folder: Path) -> None:
    events = read_events(folder / "measured.json")
    check_timeline(events, made("ring=2"), others=2)  # what takes the last row
    simulated_ = read_events(folder / "simulated.json")
    shared = {row["name"] for row in slices(simulated_)} & {row["name"] for row in slices(events)}
    transfers = {row["name"] for row in slices(events) if row["cat"] == "communication"}
    assert len(transfers) == 4  # a ring of 2, two layers; values are numbered by rank
    assert transfers <= shared
    assert 0 <= events["otherData"]["clock_error_us"] < 1e5
    assert events["otherData"]["title"] == "out: ring=2, 64 tokens, measured over gloo"


def test_ranks_of_a_job_send_rank_0_what_they_measured(folder: Path) -> None:
    events, nothing = launch(traced_in_a_job, 2, (str(folder / "out"), 33))
    assert nothing is None
    check_timeline(events, made("ring=2"))


def test_a_picture_of_both(folder: Path) -> None:
    assert (folder / "both.png").read_bytes().startswith(b"\x89PNG")
    measured = read_events(folder / "measured.json")
    draw(folder / "alone.svg", [measured])
    text = (folder / "alone.svg").read_text()
    assert "<svg" in text


def test_the_viewer_shows_what_was_measured(folder: Path) -> None:
    parallel = load(folder / "out")
    html = page(parallel, trace=folder / "measured.json")
    data = json.loads(html.partition('id="data">')[2].partition("</script>")[0])
    shown = data["measured"]
    assert shown["streams"] == ["compute", "ring"]
    assert len(shown["events"]) == len(slices(read_events(folder / "measured.json")))
    numbered = [row for row in shown["events"] if row[2] >= 0]
    assert len(numbered) >= len(shown["events"]) - 4  # what takes the last row, on each rank
    assert json.loads(page(parallel).partition('id="data">')[2].partition("</script>")[0])[
        "measured"] is None


REFUSED = {
    "--compile and --backend lockstep": (2, ["run", "{out}", "--trace", "t.json", "--compile"]),
    "error: cannot write 'no/t.json': there is no folder ": (
        1, ["run", "{out}", "--trace", "no/t.json"]),
    "--plot FILE": (2, ["simulate", "{out}", "--cluster", "cpu", "--measured", "t.json"]),
    "error: 'p.gif': unknown suffix '.gif'\n  hint: name the picture with one of: .png, .svg, .pdf":
        (1, ["simulate", "{out}", "--cluster", "cpu", "--plot", "p.gif"]),
    "error: cannot read the trace 'none.json': ": (
        1, ["simulate", "{out}", "--cluster", "cpu", "--plot", "p.png", "--measured", "none.json"]),
    "error: cannot read the trace 'none2.json': ": (
        1, ["view", "{out}", "--trace", "none2.json"]),
    "is no trace of this version of ringcompile\n  hint: `ringcompile run OUT --trace FILE`": (
        1, ["view", "{out}", "--trace", "{out}/manifest.json"]),
    "was not measured with this artifact\n  hint: measure it again: ringcompile run OUT --trace": (
        1, ["view", "{out}", "--trace", "{simulated}"]),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_refused(
    folder: Path, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, words = REFUSED[message]
    done = invoke(*(word.format(out=folder / "out", simulated=folder / "simulated.json")
                    for word in words))
    shown = done.output if done.exit_code == 2 else str(done.exception)
    assert message in " ".join(shown.split()) if code == 2 else message in shown
    assert (done.exit_code, list(tmp_path.iterdir())) == (code, [])


def test_a_damaged_trace_is_one_error(folder: Path, tmp_path: Path) -> None:
    events = read_events(folder / "measured.json")
    del next(row for row in events["traceEvents"] if row["ph"] == "X")["dur"]
    write_events(tmp_path / "bad.json", events)
    with pytest.raises(RingCompileError, match="the trace is damaged: KeyError: 'dur'"):
        draw(tmp_path / "p.png", [read_events(tmp_path / "bad.json")])


def test_transfers_that_were_started_early_follow_one_another() -> None:
    def transfer(node: str, start: float, end: float) -> Slice:
        return Slice(0, "ring", node, "communication", start, end)

    found = one_after_another(
        [transfer("b", 1, 5), transfer("a", 0, 3), transfer("inside", 1, 2), transfer("c", 7, 8)]
    )
    assert [(one.node, one.start, one.end) for one in found] == [
        ("inside", 1, 2), ("a", 2, 3), ("b", 3, 5), ("c", 7, 8)
    ]


@pytest.mark.gpu
def test_events_of_a_gpu_are_on_the_clock_of_the_host() -> None:
    import time

    from ringcompile.runtime.clocks import clock_of

    clock = clock_of(torch.device("cuda", 0))
    matrix = torch.randn(4096, 4096, device="cuda")
    before = time.perf_counter()
    begin = clock.mark()
    for _ in range(20):
        matrix = matrix @ matrix
    end = clock.mark()
    torch.cuda.synchronize()
    after = time.perf_counter()
    assert before - 1e-3 < clock.seconds(begin) < clock.seconds(end) < after + 1e-3
