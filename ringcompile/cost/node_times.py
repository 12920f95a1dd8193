"""The seconds of a program's nodes on some hardware, for schedulers."""

from __future__ import annotations

from collections.abc import Callable

from ringcompile.cost.collectives import collective_seconds, message_seconds
from ringcompile.cost.hardware import Cluster
from ringcompile.cost.kernels import time_of
from ringcompile.cost.rank import TimedCollective, TimedShift, TimedStep, cost_of
from ringcompile.ir.program import Program


def node_times(
    cluster: Cluster, length: int | None = None
) -> Callable[[Program], dict[str, tuple[float, float]]]:
    """What gives the seconds of a rank's program: of a node's kernels, and of what it exchanges.

    Args:
        cluster: the hardware.
        length: of the sequence; None where the program fixes it.
    """

    def times(program: Program) -> dict[str, tuple[float, float]]:
        cost = cost_of(program, length)
        return {step.name: _seconds(cluster, cost.rank, step) for step in cost.steps}

    return times


def _seconds(cluster: Cluster, rank: int, step: TimedStep) -> tuple[float, float]:
    kernels = sum(time_of(kernel, cluster.device).seconds for kernel in step.kernels)
    match step.communicates:
        case TimedShift(to=to, source=source, sent=sent, taken=taken):
            out = message_seconds(cluster, rank, to, sent) if to is not None else 0.0
            back = message_seconds(cluster, source, rank, taken) if source is not None else 0.0
            return kernels, max(out, back)
        case TimedCollective() as exchange:
            return kernels, collective_seconds(cluster, exchange)
    return kernels, 0.0
