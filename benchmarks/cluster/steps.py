"""Steps of a plan on all ranks of the job: their numbers, their time, and what hides transfers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from math import isnan
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.cluster.hardware import decided, everyones
from benchmarks.cluster.plans import Method
from benchmarks.gpu import exact
from benchmarks.gpu.lockstep import compared
from benchmarks.gpu.weights import DrawnWeights
from ringcompile.cost.hardware import Cluster
from ringcompile.cost.rank import cost_of
from ringcompile.cost.simulate import simulate
from ringcompile.cost.timeline import How
from ringcompile.ir.program import Program
from ringcompile.parallel_program import ParallelProgram
from ringcompile.runtime.batches import runs_of
from ringcompile.runtime.distributed import Peer
from ringcompile.runtime.join import Rank
from ringcompile.runtime.outputs import Kept
from ringcompile.runtime.runner import Settings
from ringcompile.runtime.tasks import RankRun, run_task
from ringcompile.traces.measured import OP, RankTrace
from ringcompile.traces.slices import COMMUNICATION, COMPUTE, WAIT

_WARM_UP = 2
_SEED = 2


def hidden_states(model: str, shape: tuple[int, int], device: torch.device) -> torch.Tensor:
    """Inputs [sequences, tokens, features] of a zoo model, the same on every rank."""
    config = DrawnWeights(model, device).config
    generator = torch.Generator().manual_seed(_SEED)
    drawn = torch.randn(*shape, config.hidden_size, generator=generator)
    return drawn.to(device, getattr(torch, config.dtype))


def with_weights(made: ParallelProgram, model: str, device: torch.device) -> ParallelProgram:
    """The programs with weights that every rank draws for itself on its own device."""
    source = DrawnWeights(model, device, cached=False)
    return replace(made, program=replace(made.program, source=source))


def reference(rank: Rank, model: str, length: int) -> torch.Tensor | None:
    """Rank 0's answer of one device for one sequence, in float64; None on other ranks."""
    if rank.index > 0:
        return None
    weights = DrawnWeights(model, rank.device, cached=False)
    return exact.forward(weights, hidden_states(model, (1, length), rank.device)).cpu()


def numbers(
    rank: Rank, model: str, method: Method, made: ParallelProgram, want: torch.Tensor | None,
    length: int,
) -> dict[str, Any]:
    """How far all ranks together are from one device; all ranks call it.

    Args:
        rank: this process' place.
        model: the zoo's name.
        method: how the model is run.
        made: its programs.
        want: what `reference` gave.
        length: tokens of the sequence.
    """
    peer = Peer(with_weights(made, model, rank.device), rank)
    batch = max(method.variant.mesh.size("dp"), method.variant.sequences)
    inputs = hidden_states(model, (1, length), rank.device).repeat(batch, 1, 1)
    found = peer.assemble(peer.run(inputs))
    row = {"model": model, "method": method.name, "parallel": str(method.variant), "tokens": length}
    errors = decided(
        rank, lambda: [] if want is None else [compared(one[None].cpu(), want) for one in found]
    )
    return {**row, **max(errors, key=lambda one: (isnan(one["max_error"]), one["max_error"]))}


def step(
    rank: Rank, model: str, method: Method, cluster: Cluster, length: int, rounds: int
) -> dict[str, Any]:
    """One plan's step: as the measured table simulates it, as it is measured, and its transfers.

    All ranks call it.
    """
    made = with_weights(method.compiled(model, length, cluster), model, rank.device)
    batch = method.batch
    count, each = runs_of(made.program, batch)
    simulated = decided(rank, lambda: _simulated(made.ranks(), cluster, length, count, each))
    inputs = hidden_states(model, (batch, length), rank.device)
    seconds = _measured(rank, made, inputs, rounds)
    tokens = batch * length
    middle = statistics.median(seconds)
    return {
        "model": model, "method": method.name, "parallel": str(method.variant),
        "tokens": tokens, "sequences": batch, "rounds": rounds,
        "simulated_ms": simulated * 1e3, "measured_ms": middle * 1e3,
        "simulated_over_measured": simulated / middle,
        "fastest_ms": min(seconds) * 1e3, "slowest_ms": max(seconds) * 1e3,
        "tokens_per_second": tokens / middle,
        **_transfers(rank, made, inputs),
    }


def _simulated(
    programs: list[Program], cluster: Cluster, length: int, count: int, each: int
) -> float:
    costs = [cost_of(program, length, each) for program in programs]
    return simulate(costs, cluster, How(count)).seconds


def _measured(
    rank: Rank, made: ParallelProgram, inputs: torch.Tensor, rounds: int
) -> list[float]:
    """Seconds of each step, on the rank that took longest; all begin together."""
    peer = Peer(made, rank)
    with torch.no_grad():
        prepared = peer.runner.prepare(run_task(peer.program(), inputs))
        taken = [_seconds(rank, lambda: peer.timed(prepared)) for _ in range(_WARM_UP + rounds)]
    slowest = [max(of_step) for of_step in zip(*everyones(rank, taken), strict=True)]
    return slowest[_WARM_UP:]


def _seconds(rank: Rank, call: Callable[[], RankRun]) -> float:
    """Of a call, from a common start: between CUDA events, or by the clock of a CPU."""
    dist.barrier()
    if rank.device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _transfers(rank: Rank, made: ParallelProgram, inputs: torch.Tensor) -> dict[str, Any]:
    """From a traced step: what transfers take, what compute waits, and what of them it hides."""
    peer = Peer(made, rank, settings=Settings(trace=True))
    task = run_task(peer.program(), inputs, Kept(outputs=False), whole=False)
    run = peer.answer(task)
    assert run.trace is not None
    found = everyones(rank, overlap(run.trace))
    most = max(found, key=lambda one: one["transfers_ms"])
    sent = max(everyones(rank, run.stats.bytes_sent))
    return {**most, "bytes_sent": sent}


def overlap(trace: RankTrace) -> dict[str, float]:
    """Of one rank's trace: milliseconds of transfers, waits, and the share that compute hides."""
    transfers = [(a, b) for _, _, kind, a, b, _ in trace.slices if kind == COMMUNICATION]
    ops = [(a, b) for track, _, kind, a, b, _ in trace.slices if track == COMPUTE and kind == OP]
    waits = [(a, b) for _, _, kind, a, b, _ in trace.slices if kind == WAIT]
    under_way = _union(transfers)
    total = sum(b - a for a, b in under_way)
    beside = sum(
        max(0.0, min(b, d) - max(a, c)) for a, b in under_way for c, d in ops
    )
    return {
        "transfers_ms": total * 1e3,
        "waits_ms": sum(b - a for a, b in waits) * 1e3,
        "hidden": beside / total if total else 1.0,
    }


def _union(periods: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The periods in which at least one of these is."""
    made: list[tuple[float, float]] = []
    for start, end in sorted(periods):
        if made and start <= made[-1][1]:
            made[-1] = (made[-1][0], max(made[-1][1], end))
        else:
            made.append((start, end))
    return made
