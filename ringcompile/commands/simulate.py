"""`ringcompile simulate`: the timeline of an artifact's ranks on a cluster's tables."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ringcompile.commands.options import (
    CLUSTER,
    CONTEXT,
    EAGER,
    JSON,
    NEW_TOKENS,
    Out,
    artifact_argument,
    milliseconds,
    print_table,
    shares,
    size_text,
    working,
)
from ringcompile.cost.hardware import Cluster, load_cluster
from ringcompile.errors import RingCompileError
from ringcompile.later import Later

if TYPE_CHECKING:
    from ringcompile import generation_plans
    from ringcompile.commands import tensor_files
    from ringcompile.cost import rank as ranks
    from ringcompile.cost import simulate as simulation
    from ringcompile.cost import timeline, values
    from ringcompile.cost.rank import RankCost
    from ringcompile.ir import expr
    from ringcompile.ir.program import Program
    from ringcompile.parallel_program import ParallelProgram
    from ringcompile.traces import events
    from ringcompile.traces import nodes as nodes_of
    from ringcompile.traces import plot as pictures
    from ringcompile.traces import simulated as traces
else:
    generation_plans = Later("ringcompile.generation_plans")
    ranks = Later("ringcompile.cost.rank")
    simulation = Later("ringcompile.cost.simulate")
    timeline = Later("ringcompile.cost.timeline")
    values = Later("ringcompile.cost.values")
    expr = Later("ringcompile.ir.expr")
    events = Later("ringcompile.traces.events")
    nodes_of = Later("ringcompile.traces.nodes")
    pictures = Later("ringcompile.traces.plot")
    traces = Later("ringcompile.traces.simulated")
    tensor_files = Later("ringcompile.commands.tensor_files")


@click.command()
@artifact_argument
@CLUSTER
@click.option("--seq", type=click.IntRange(1), metavar="N", help="Sequence length in tokens, if "
              "the artifact takes any length. The default is 16384.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, metavar="N",
              help="Number of sequences in one run of each replica.")
@click.option("--microbatches", type=click.IntRange(1), default=1, show_default=True, metavar="N",
              help="Number of runs of the program, one after another, as in a pipeline.")
@NEW_TOKENS
@CONTEXT
@EAGER
@click.option("--deferred", is_flag=True,
              help="Assume that compute waits for a collective only where its result is used.")
@click.option("--trace", type=click.Path(path_type=Path), metavar="FILE",
              help="Write a trace for ui.perfetto.dev or chrome://tracing.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE",
              help="Draw the timeline into a .png, .svg or .pdf file. This needs matplotlib.")
@click.option("--measured", type=click.Path(path_type=Path), metavar="TRACE",
              help="With --plot: also draw the timeline that `ringcompile run OUT --trace TRACE` "
              "measured.")
@JSON
def simulate(
    out: Out,
    cluster: str,
    seq: int | None,
    batch: int,
    microbatches: int,
    new_tokens: int | None,
    context: int | None,
    eager: bool,
    deferred: bool,
    trace: Path | None,
    plot: Path | None,
    measured: Path | None,
    as_json: bool,
) -> None:
    """Estimate time and memory of OUT on a cluster.

    Compute, communication and memory are estimated for each rank. No GPU is needed. With
    --new-tokens one decode step is simulated: the one that makes the token in the middle of the
    new ones.
    """
    _check_together(new_tokens, context)
    drawn = _Drawn.checked(trace, plot, measured)
    made = out.load()
    hardware = load_cluster(cluster).sized(made.world_size)
    how = timeline.How(microbatches, eager, deferred)
    if new_tokens is not None:
        request = generation_plans.GenerationRequest(
            context or seq or 1024, new_tokens, batch * made.mesh.size("dp")
        )
        _generation(out, made, hardware, request, how, drawn, as_json)
        return
    length, batch = _length(out, made, seq), _batch(made, batch)
    with working(f"simulating {made.world_size} ranks"):
        costs = [ranks.cost_of(one, length, batch) for one in made.ranks()]
        found = simulation.simulate(costs, hardware, how)
    if drawn.wanted:
        title = f"{out.path.name}: {made.mesh}, {length} tokens, simulated on {hardware.name}"
        lengths = [values.bind_lengths(one, length, batch) for one in made.ranks()]
        drawn.write(_shown(made.ranks(), lengths, found, costs, title))
    facts = _facts(made, hardware, length, batch * made.mesh.size("dp"), found)
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        _print(facts, found)


def _check_together(new_tokens: int | None, context: int | None) -> None:
    if context is not None and new_tokens is None:
        raise click.UsageError("--context needs --new-tokens")


def _batch(made: ParallelProgram, asked: int) -> int:
    if isinstance(made.program.batch, int):
        return made.program.batch
    return max(asked, made.program.batch_range[0])


def _length(out: Out, made: ParallelProgram, seq: int | None) -> int:
    length = made.program.lengths.get(expr.SEQUENCE) or seq or 16384
    if seq is not None and seq != length:
        raise RingCompileError(f"'{out}' is for {length} tokens, --seq asks for {seq}")
    return length


@dataclass(frozen=True)
class _Drawn:
    """The files that show the timeline, and what was measured to draw beside it."""

    trace: Path | None
    plot: Path | None
    beside: dict[str, Any] | None

    @classmethod
    def checked(cls, trace: Path | None, plot: Path | None, measured: Path | None) -> _Drawn:
        """Raises where a file cannot be read or written."""
        return cls(trace, plot, _beside(trace, plot, measured))

    @property
    def wanted(self) -> bool:
        return self.trace is not None or self.plot is not None

    def write(self, shown: dict[str, Any]) -> None:
        if self.trace is not None:
            events.write_events(self.trace, shown)
            click.echo(f"wrote {self.trace}", err=True)
        if self.plot is not None:
            pictures.draw(self.plot, [shown] if self.beside is None else [shown, self.beside])
            click.echo(f"wrote {self.plot}", err=True)


def _beside(
    trace: Path | None, plot: Path | None, measured: Path | None
) -> dict[str, Any] | None:
    """What was measured, to draw beside; raises where a file cannot be read or written."""
    if measured is not None and plot is None:
        raise click.UsageError("--measured TRACE is drawn beside the simulated timeline, and "
                               "needs --plot FILE")
    for file in filter(None, (trace, plot)):
        tensor_files.check_place(file)
    if plot is not None:
        pictures.check_picture(plot)
    return None if measured is None else events.read_events(measured)


def _shown(
    programs: list[Program],
    lengths: list[dict[str, int]],
    found: simulation.Simulation,
    costs: list[RankCost],
    title: str,
) -> dict[str, Any]:
    """The timeline as events, with what is known of its nodes."""
    nodes = nodes_of.Nodes(programs, lengths)
    return events.to_events(traces.simulated(found.timeline, costs, title), nodes)


def _generation(
    out: Out,
    made: ParallelProgram,
    hardware: Cluster,
    request: generation_plans.GenerationRequest,
    how: timeline.How,
    drawn: _Drawn,
    as_json: bool,
) -> None:
    """Simulate and tell the step that makes the token in the middle."""
    with working(f"simulating {made.world_size} ranks"):
        found = generation_plans.simulate_request(made, hardware, request, how)
    if drawn.wanted:
        title = f"{out.path.name}: {made.mesh}, one token, simulated on {hardware.name}"
        carried = made.with_cache().ranks()
        drawn.write(_shown(carried, found.lengths, found.step, found.costs, title))
    _print_generation(made, hardware, request, found, as_json)


def _print_generation(
    made: ParallelProgram,
    hardware: Cluster,
    request: generation_plans.GenerationRequest,
    found: generation_plans.SimulatedRequest,
    as_json: bool,
) -> None:
    step = found.step
    title = (f"{made.mesh} on {hardware.name}, batch {request.batch}, {request.context} tokens and "
             f"{request.new_tokens} new ones")
    facts = {
        **_facts(made, hardware, 1, request.batch, step),
        "context": request.context,
        "new_tokens": request.new_tokens,
        "ttft_ms": found.ttft * 1e3,
        "tpot_ms": step.seconds * 1e3,
        "cache_bytes": found.cache_bytes,
        "memory_bytes": found.memory_bytes,
        "fits": found.memory_bytes <= _room(hardware),
    }
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    print_table(title, COLUMNS, _rows(step))
    click.echo(f"TTFT {milliseconds(found.ttft)}, TPOT {milliseconds(step.seconds)}, "
               f"{facts['tps']:,.1f} tokens/s, cache {size_text(found.cache_bytes)} a rank")
    click.echo(f"longest path of a token: {shares(dict(step.path))}")


def _facts(
    made: ParallelProgram,
    hardware: Cluster,
    length: int,
    batch: int,
    found: simulation.Simulation,
) -> dict[str, Any]:
    tokens = length * batch
    return {
        "parallel": str(made.mesh),
        "cluster": hardware.name,
        "tokens": tokens,
        "tps": tokens / found.period,
        "step_ms": found.period * 1e3,
        "latency_ms": found.seconds * 1e3,
        "bound": found.bound,
        "path_ms": {kind: seconds * 1e3 for kind, seconds in found.path.items()},
        "memory_bytes": found.memory_bytes,
        "fits": found.memory_bytes <= _room(hardware),
        "ranks": [
            {
                "rank": rank.rank,
                "compute_ms": rank.compute_seconds * 1e3,
                "exposed_ms": rank.exposed_seconds * 1e3,
                "bubble_ms": rank.bubble_seconds * 1e3,
                "flops": rank.flops,
                "bytes_sent": rank.bytes_sent,
                "weight_bytes": rank.weight_bytes,
                "memory_bytes": rank.memory_bytes,
            }
            for rank in found.ranks
        ],
    }


def _room(hardware: Cluster) -> float:
    """The bytes that a rank may hold."""
    return hardware.device.value("memory") - hardware.device.value("reserved")


COLUMNS = ["rank", "compute", "exposed communication", "bubble", "TFLOP", "sent", "weights",
           "memory peak"]


def _rows(found: simulation.Simulation) -> list[list[str]]:
    return [
        [str(r.rank), milliseconds(r.compute_seconds), milliseconds(r.exposed_seconds),
         milliseconds(r.bubble_seconds), f"{r.flops / 1e12:.4g}", size_text(r.bytes_sent),
         size_text(r.weight_bytes), size_text(r.memory_bytes)]
        for r in found.ranks
    ]


def _print(facts: dict[str, Any], found: simulation.Simulation) -> None:
    title = f"{facts['parallel']} on {facts['cluster']}, {facts['tokens']} tokens"
    print_table(title, COLUMNS, _rows(found))
    click.echo(f"step time {milliseconds(found.seconds)}, {facts['tps'] / 1e6:.4g} M tokens/s")
    click.echo(f"longest path: {shares(dict(found.path))}")
    if not facts["fits"]:
        click.echo(f"does not fit: {size_text(found.memory_bytes)} a rank")


