"""What `run --check` costs, on and off: one model on 2 ranks of one thread each.

    python -m benchmarks.check_cost [--rounds N]

Three sides take turns: with the check; without it; and a rank that has no such code at all, with
which the second is compared. Ratios of medians of the step's wall and CPU seconds.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click
import torch
import torch.distributed as dist

import ringcompile as rc
from benchmarks.machine import environment
from benchmarks.pool import Pool, Setup, Step
from ringcompile.models import zoo
from ringcompile.runtime.collectives import Collective
from ringcompile.runtime.data import share_inputs
from ringcompile.runtime.distributed import Peer
from ringcompile.runtime.exchange import BY_KIND
from ringcompile.runtime.executor import Shift, Wait
from ringcompile.runtime.join import Rank
from ringcompile.runtime.runner import Settings

RANKS = 2


@dataclass(frozen=True)
class Case:
    """A model of the zoo, how it is divided, and the length of its sequence."""

    model: str
    spec: str
    length: int


def _peer(rank: int, world: int, case: Case, check: bool) -> tuple[Peer, Step]:
    program = rc.capture(*zoo.build(case.model))
    parallel = rc.transform(program, case.spec)
    peer = Peer(
        parallel, Rank(rank, world, torch.device("cpu")), settings=Settings(check_finite=check)
    )
    _, inputs = zoo.build(case.model, sequence=case.length, seed=3)
    whole = dict(zip([spec.name for spec in peer.program().inputs], inputs, strict=True))
    lengths = peer.program().bindings(whole)
    share = share_inputs(peer.program(), whole, lengths)
    return peer, lambda: peer.run_share(share, lengths).outputs[0]


def checked(rank: int, world: int, case: Case) -> Step:
    """With the check."""
    return _peer(rank, world, case, True)[1]


def plain(rank: int, world: int, case: Case) -> Step:
    """As ever: the check is there, and off."""
    return _peer(rank, world, case, False)[1]


def without(rank: int, world: int, case: Case) -> Step:
    """The same rank, in which ops are called and messages sent with no question asked."""
    peer, step = _peer(rank, world, case, False)
    step()
    for executor in peer.runner.opened["whole"].executors.values():
        executor._called = lambda step, args, kwargs: step.function(*args, **kwargs)  # type: ignore
    peer.exchange.answer = _bare(peer)  # type: ignore[method-assign]
    peer.exchange.end = lambda: None  # type: ignore[method-assign]
    return step


def _bare(peer: Peer) -> Callable[[Any], Any]:
    exchange = peer.exchange

    def start(shift: Shift) -> Any:
        group, ops = exchange._group(shift.axis), []
        shape = shift.shape if shift.source is not None else (0,)
        buffer = torch.empty(shape, dtype=shift.dtype)
        if shift.to is not None and shift.tensor is not None:
            peer = exchange._peer(shift.axis, shift.to)
            ops.append(dist.P2POp(dist.isend, shift.tensor, peer, group))
        if shift.source is not None:
            peer = exchange._peer(shift.axis, shift.source)
            ops.append(dist.P2POp(dist.irecv, buffer, peer, group))
        with exchange._meeting([], "shift", shift.node):
            return buffer, dist.batch_isend_irecv(ops)

    def answer(request: Any) -> Any:
        if isinstance(request, Shift):
            return start(request)
        if isinstance(request, Collective):
            with exchange._meeting([], request.kind, request.node):
                return BY_KIND[request.kind](request, exchange._group(request.axis))
        assert isinstance(request, Wait)
        buffer, works = request.handle
        with exchange._meeting([], "wait", request.node):
            while works:
                works.pop(0).wait()
        return buffer

    return answer


SIDES: dict[str, Setup] = {"without": without, "off": plain, "on": checked}
CASES = (Case("dense-4l-tiny", "ring=2", 512), Case("dense-4l-tiny", "tp=2", 512),
         Case("dense-4l-tiny", "ring=2", 4096))


def measure(pool: Pool, case: Case, rounds: int) -> dict[str, Any]:
    """Medians over rounds in which the sides take turns, as ratios."""
    names = {side: f"{side} {case}" for side in SIDES}
    for side, setup in SIDES.items():
        pool.load(names[side], setup, case)
        pool.output(names[side])
    turns = [{side: pool.time(name) for side, name in names.items()} for _ in range(rounds)]

    def ratio(side: str, other: str, what: str) -> float:
        return statistics.median(
            getattr(turn[side], what) / getattr(turn[other], what) for turn in turns
        )

    return {
        "model": case.model, "spec": case.spec, "tokens": case.length,
        "on/off wall": ratio("on", "off", "seconds"),
        "on/off CPU": ratio("on", "off", "cpu_seconds"),
        "off/without wall": ratio("off", "without", "seconds"),
        "off/without CPU": ratio("off", "without", "cpu_seconds"),
        "ms a step": 1e3 * statistics.median(turn["off"].seconds for turn in turns),
    }


@click.command()
@click.option("--rounds", default=31, show_default=True)
def main(rounds: int) -> None:
    """Print what the check costs: on, as a ratio to off; off, as a ratio to code without it."""
    facts = environment()
    click.echo(", ".join(f"{name} {value}" for name, value in facts.items()))
    with Pool(RANKS, 1) as pool:
        for case in CASES:
            row = measure(pool, case, rounds)
            click.echo(", ".join(f"{name} {value:.4g}" if isinstance(value, float) else str(value)
                                 for name, value in row.items()))


if __name__ == "__main__":
    main()
