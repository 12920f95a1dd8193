"""`ringcompile bench`: the quantities of `simulate`, measured on this machine's processes."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
from typing import TYPE_CHECKING, Any

import click

from ringcompile.commands.options import (
    CONTEXT,
    JSON,
    NEW_TOKENS,
    RECORDING,
    Out,
    artifact_argument,
    complete_clusters,
    milliseconds,
    noted,
    print_table,
    working,
)
from ringcompile.cost.hardware import load_cluster
from ringcompile.errors import RingCompileError
from ringcompile.later import Later

if TYPE_CHECKING:
    import torch

    from ringcompile import execution, generation_plans, latency, session
    from ringcompile.cost import rank as ranks_cost
    from ringcompile.cost import simulate as simulation
    from ringcompile.cost import timeline
    from ringcompile.ir import expr
    from ringcompile.parallel_program import ParallelProgram
    from ringcompile.runtime import batches, join, outputs
    from ringcompile.runtime.tasks import Stats
else:
    torch = Later("torch")
    execution = Later("ringcompile.execution")
    generation_plans = Later("ringcompile.generation_plans")
    latency = Later("ringcompile.latency")
    ranks_cost = Later("ringcompile.cost.rank")
    simulation = Later("ringcompile.cost.simulate")
    timeline = Later("ringcompile.cost.timeline")
    expr = Later("ringcompile.ir.expr")
    batches = Later("ringcompile.runtime.batches")
    join = Later("ringcompile.runtime.join")
    outputs = Later("ringcompile.runtime.outputs")
    session = Later("ringcompile.session")

_CONTEXT = 1024  # tokens of a prompt, where the cache has room for them
_PERCENTILES = (10, 50, 90, 99)


@click.command()
@artifact_argument
@click.option("--seq", type=click.IntRange(1), default=1024, show_default=True, metavar="N",
              help="Sequence length in tokens, if the artifact takes any length.")
@click.option("--batch", type=click.IntRange(1), metavar="N",
              help="Number of sequences in a step. By default one for each replica.")
@click.option("--steps", type=click.IntRange(1), default=10, show_default=True, metavar="N",
              help="Number of measured steps.")
@click.option("--warm-up", type=click.IntRange(0), default=2, show_default=True, metavar="N",
              help="Number of steps before them that are not measured.")
@click.option("--threads", type=click.IntRange(1), metavar="N",
              help="Threads of each rank. By default the CPU cores are divided over the ranks.")
@click.option("--backend", type=click.Choice(["auto", "gloo", "nccl"]), default="auto",
              show_default=True,
              help="auto: nccl if there are as many GPUs as ranks, otherwise gloo.")
@click.option("--cluster", metavar="NAME|FILE", shell_complete=complete_clusters,
              help="The hardware for the predicted column; best is a file that `ringcompile "
              "calibrate` wrote on this machine. The default is cpu.")
@click.option("--timeout", type=float, default=600.0, show_default=True, metavar="SECONDS",
              help="Give up if a step takes longer.")
@NEW_TOKENS
@CONTEXT
@RECORDING
@JSON
def bench(
    out: Out,
    seq: int,
    batch: int | None,
    steps: int,
    warm_up: int,
    threads: int | None,
    backend: str,
    cluster: str | None,
    timeout: float,
    new_tokens: int | None,
    context: int | None,
    cuda_graphs: str,
    as_json: bool,
) -> None:
    """Measure the step time of the artifact OUT on local processes.

    The time that the cost model predicts is printed beside it. A step is one forward pass of the
    whole batch. With --new-tokens a step is one generation request: TTFT is the time to its
    first token, TPOT the time per output token after it, ITL the time between two tokens.
    """
    made = out.load()
    if new_tokens is not None:
        how = {"steps": steps, "warm_up": warm_up, "threads": threads, "timeout": timeout,
               "cuda_graphs": cuda_graphs}
        _generation(made, cluster, backend, (batch or 1, context, new_tokens), as_json, how)
        return
    _check_step_options(context, cuda_graphs)
    length = made.program.lengths.get(expr.SEQUENCE, seq)
    batch = _batch(out, made, batch)
    predicted = _predicted(made, cluster, length, batch)
    inputs = execution.random_inputs(made, length, batch)
    picked = join.pick_backend(backend, made.world_size)
    opened = session.Session(made, picked, threads=threads, timeout=timeout)
    with working(f"running {made.world_size} ranks"), opened as ranks:
        runs = [ranks.result(inputs, outputs.EVERYTHING).stats for _ in range(warm_up + steps)]
    facts = {
        "parallel": str(made.mesh), "model": made.program.name, "tokens": length * batch,
        "steps": steps, **_measured(runs[warm_up:], length * batch), "predicted": predicted,
        "environment": environment(picked, threads),
    }
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        _print(facts)


def _check_step_options(context: int | None, cuda_graphs: str) -> None:
    if context is not None:
        raise click.UsageError("--context needs --new-tokens")
    if cuda_graphs != "auto":
        raise click.UsageError("--cuda-graphs needs --new-tokens")


def _batch(out: Out, made: ParallelProgram, asked: int | None) -> int:
    fixed = made.program.batch if isinstance(made.program.batch, int) else None
    if fixed is not None and asked not in (None, fixed):
        raise RingCompileError(f"'{out}' is for a batch of {fixed}, --batch asks for {asked}")
    return fixed or asked or max(made.mesh.size("dp"), made.program.batch_range[0])


def _generation(
    made: ParallelProgram,
    cluster: str | None,
    backend: str,
    request: tuple[int, int | None, int],
    as_json: bool,
    how: dict[str, Any],
) -> None:
    capacity = made.with_cache().program.length_range[1]
    batch, context, new = request
    batch = max(batch, made.mesh.size("dp"))
    if new < 2:
        raise RingCompileError("--new-tokens 1: TPOT needs two tokens at least")
    context = context or max(1, min(_CONTEXT, (capacity or _CONTEXT) - new))
    asked = generation_plans.GenerationRequest(context, new, batch)
    ids = torch.randint(0, 2, (batch, context), generator=torch.Generator().manual_seed(0))
    steps, warm_up = how.pop("steps"), how.pop("warm_up")
    picked = join.pick_backend(backend, made.world_size)
    opened = session.Session(made, picked, **how)
    with working(f"running {made.world_size} ranks"), noted(), opened as ranks:
        found = [latency.request(ranks, ids, new) for _ in range(warm_up + steps)][warm_up:]
    facts = {
        "parallel": str(made.mesh), "model": made.program.name, "context": context,
        "new_tokens": new, "batch": batch, "steps": steps, **latency.summary(found),
        "predicted": _predicted_request(made, cluster, asked),
        "environment": environment(picked, how["threads"]),
    }
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        _print_generation(facts)


def _predicted_request(
    made: ParallelProgram, cluster: str | None, asked: generation_plans.GenerationRequest
) -> dict[str, Any]:
    """What the tables say; where no cluster is named, that of a CPU, as far as it goes."""
    try:
        hardware = load_cluster(cluster or "cpu").sized(made.world_size)
        found = generation_plans.simulate_request(made, hardware, asked)
    except RingCompileError as error:
        if cluster is not None:
            raise
        hint = f" ({error.hint})" if error.hint else ""
        return {"cluster": None, "why_not": error.message + hint}
    return {"cluster": hardware.name, "ttft_ms": found.ttft * 1e3,
            "tpot_ms": found.step.seconds * 1e3, "memory_bytes": found.memory_bytes}


def _print_generation(facts: dict[str, Any]) -> None:
    predicted = facts["predicted"]
    names = {"ttft_ms": "TTFT", "tpot_ms": "TPOT", "itl_p50_ms": "ITL p50", "itl_p99_ms": "ITL p99"}
    rows = [
        [name, milliseconds(facts[key] / 1e3),
         milliseconds(predicted[key] / 1e3) if key in predicted else ""]
        for key, name in names.items()
    ]
    rows.append(["tokens a second", f"{facts['tps']:,.1f}", ""])
    title = (f"{facts['model']}, {facts['parallel']}, batch {facts['batch']}, {facts['context']} "
             f"tokens and {facts['new_tokens']} new ones")
    print_table(title, ["", "measured", f"predicted by '{predicted['cluster']}'"], rows)
    _print_machine(facts, "requests")


def _measured(runs: list[list[Stats]], tokens: int) -> dict[str, Any]:
    """Of each step the slowest rank counts."""
    seconds = [max(stats.seconds for stats in run) for run in runs]
    middle = statistics.median(seconds)
    last = runs[-1]
    return {
        "tps": tokens / middle,
        "prefill_tps": tokens / middle,
        "step_ms": middle * 1e3,
        "percentiles_ms": {f"p{p}": latency.percentile(seconds, p) * 1e3 for p in _PERCENTILES},
        "ranks": [
            {
                "rank": stats.rank,
                "seconds_ms": statistics.median(r[i].seconds for r in runs) * 1e3,
                "exposed_ms": statistics.median(r[i].wait_seconds for r in runs) * 1e3,
                "bytes_sent": stats.bytes_sent,
                "memory_bytes": stats.peak_bytes,
            }
            for i, stats in enumerate(last)
        ],
    }


def _predicted(
    made: ParallelProgram, cluster: str | None, length: int, batch: int
) -> dict[str, Any]:
    """The same quantities by the cost model.

    Where no cluster is named, the table of a CPU is tried, and what it lacks is said.
    """
    count, each = batches.runs_of(made.program, batch)
    costs = [ranks_cost.cost_of(program, length, each) for program in made.ranks()]
    tokens = length * batch
    try:
        hardware = load_cluster(cluster or "cpu").sized(made.world_size)
        found = simulation.simulate(costs, hardware, timeline.How(count))
    except RingCompileError as error:
        if cluster is not None:
            raise
        hint = f" ({error.hint})" if error.hint else ""
        return {"cluster": None, "why_not": error.message + hint}
    return {
        "cluster": hardware.name,
        "tps": tokens / found.seconds,
        "step_ms": found.seconds * 1e3,
        "bound": found.bound,
        # Measured is whatever a rank waits for, other stages included.
        "exposed_ms": max(r.exposed_seconds + r.bubble_seconds for r in found.ranks) * 1e3,
        "bytes_sent": [cost.bytes_sent * count for cost in costs],
        "memory_bytes": found.memory_bytes,
    }


def environment(backend: str, threads: int | None) -> dict[str, Any]:
    """What a reader needs to judge a number by."""
    device = torch.cuda.get_device_name() if backend == "nccl" else platform.processor()
    return {
        "date": datetime.date.today().isoformat(),
        "device": device or platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "threads": threads,
        "backend": backend,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _print(facts: dict[str, Any]) -> None:
    predicted, percentiles = facts["predicted"], facts["percentiles_ms"]
    rows = [
        ["tokens a second", f"{facts['tps']:,.0f}"],
        ["step time", milliseconds(facts["step_ms"] / 1e3)],
        *([name, milliseconds(value / 1e3)] for name, value in percentiles.items()),
        ["waiting for others", milliseconds(max(r["exposed_ms"] for r in facts["ranks"]) / 1e3)],
        ["bytes sent, rank 0", f"{facts['ranks'][0]['bytes_sent']:,}"],
    ]
    columns = ["", "measured"]
    if predicted["cluster"] is not None:
        columns.append(f"predicted by '{predicted['cluster']}'")
        by_name = {
            "tokens a second": f"{predicted['tps']:,.0f}",
            "step time": milliseconds(predicted["step_ms"] / 1e3),
            "waiting for others": milliseconds(predicted["exposed_ms"] / 1e3),
            "bytes sent, rank 0": f"{predicted['bytes_sent'][0]:,}",
        }
        rows = [[*row, by_name.get(row[0], "")] for row in rows]
    title = f"{facts['model']}, {facts['parallel']}, {facts['tokens']} tokens a step"
    print_table(title, columns, rows)
    _print_machine(facts, "steps")


def _print_machine(facts: dict[str, Any], what: str) -> None:
    if facts["predicted"]["cluster"] is None:
        click.echo(f"not predicted: {facts['predicted']['why_not']}")
    known = facts["environment"]
    click.echo(f"{facts['steps']} {what}, {known['backend']}, torch {known['torch']}, "
               f"{known['cores']} cores, load {known['load']:.1f}")
