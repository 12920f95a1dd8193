"""Derives costs that were not compiled from ones that were: batches, ranks, pipeline stages."""

from __future__ import annotations

from dataclasses import replace

from ringcompile.cost.kernels import Kernel
from ringcompile.cost.rank import (
    PIPELINE,
    Exchange,
    RankCost,
    TimedCollective,
    TimedShift,
    TimedStep,
    TimedWait,
)


def with_batch(cost: RankCost, batch: int) -> RankCost:
    """The cost of a batch, derived from the cost of one sequence; weights are still read once.

    Args:
        cost: the cost of a program for one sequence.
        batch: the number of sequences.
    """
    if batch == 1:
        return cost
    steps = tuple(
        replace(step, kernels=tuple(_larger(kernel, batch) for kernel in step.kernels),
                communicates=_more(step.communicates, batch),
                across=step.across and replace(
                    step.across, behind=_larger(step.across.behind, batch),
                    between=_larger(step.across.between, batch),
                ))
        for step in cost.steps
    )
    values = cost.peak_bytes - cost.weight_bytes
    caches = tuple((layer, num_bytes * batch) for layer, num_bytes in cost.caches)
    return replace(cost, steps=steps, peak_bytes=cost.weight_bytes + batch * values, caches=caches)


def _larger(kernel: Kernel, batch: int) -> Kernel:
    if kernel.kind == "matmul":
        rows, item = kernel.rows * batch, kernel.dtype.itemsize
        moved = rows * (kernel.inner + kernel.columns) + kernel.inner * kernel.columns
        return replace(kernel, rows=rows, flops=kernel.flops * batch,
                       num_bytes=kernel.batch * moved * item)
    return replace(kernel, num_bytes=kernel.num_bytes * batch, flops=kernel.flops * batch,
                   parts=tuple(_larger(part, batch) for part in kernel.parts),
                   less=None if kernel.less is None else _larger(kernel.less, batch),
                   batch=kernel.batch * batch if kernel.rows else kernel.batch)


def _more(
    exchange: Exchange | None, batch: int
) -> TimedShift | TimedCollective | TimedWait | None:
    match exchange:
        case TimedShift():
            return replace(exchange, sent=exchange.sent * batch, taken=exchange.taken * batch)
        case TimedCollective():
            return replace(exchange, brought=exchange.brought * batch)
    return exchange


def moved(cost: RankCost, by: int) -> RankCost:
    """The same cost on another rank, with all of its peers shifted by as much."""

    def there(exchange: Exchange | None) -> Exchange | None:
        match exchange:
            case TimedShift(to=to, source=source):
                return replace(exchange, to=None if to is None else to + by,
                               source=None if source is None else source + by)
            case TimedCollective(group=group):
                return replace(exchange, group=tuple(rank + by for rank in group))
        return exchange

    steps = tuple(
        replace(step, communicates=there(step.communicates)) if step.communicates else step
        for step in cost.steps
    )
    return replace(cost, rank=cost.rank + by, steps=steps)


def as_stage(cost: RankCost, stage: int, last: bool, apart: int, hidden_bytes: int) -> RankCost:
    """Add the transfers from the previous pipeline stage and to the next one to a stage's cost.

    Args:
        cost: the cost of the stage alone, on a rank of the first stage.
        stage: the number of the stage.
        last: whether it is the last stage.
        apart: the difference between a rank and its counterpart in the next stage.
        hidden_bytes: the bytes that a rank sends to the next stage.
    """
    here = moved(cost, stage * apart)
    before, after = here.rank - apart, here.rank + apart
    steps = list(here.steps)
    if stage:
        steps[:0] = _crossing("received", TimedShift(PIPELINE, None, before, 0, hidden_bytes))
    if not last:
        steps += _crossing("sent", TimedShift(PIPELINE, after, None, hidden_bytes, 0))
    return replace(here, steps=tuple(steps))


def busiest_stage(cost: RankCost, num_stages: int, apart: int, hidden_bytes: int) -> RankCost:
    """The cost of a middle stage, which receives and sends; of two stages, the first."""
    return as_stage(cost, 1 if num_stages > 2 else 0, False, apart, hidden_bytes)


def _crossing(name: str, shift: TimedShift) -> list[TimedStep]:
    start = TimedStep(name, "shift_start", "", (), shift)
    return [start, TimedStep(f"{name}_wait", "wait", "", (), TimedWait(name))]


def crossing_bytes(cost: RankCost) -> int:
    """The bytes that a stage's program sends to the next stage."""
    shifts = (step.communicates for step in cost.steps)
    return sum(s.sent for s in shifts if isinstance(s, TimedShift) and s.channel == PIPELINE)
