"""`Queued`: plans run right however NCCL may hold exchanges up, and seeded mistakes are found."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from ringcompile.compiler import transform
from ringcompile.errors import RingCompileError
from ringcompile.mesh import Mesh
from ringcompile.models import zoo
from ringcompile.parallel_program import ParallelProgram
from ringcompile.runtime.collectives import ANSWERS, Collective
from ringcompile.runtime.executor import Request, Shift, Wait
from ringcompile.runtime.inprocess import run_lockstep
from ringcompile.runtime.lockstep import LockStep
from ringcompile.runtime.queued import Queued
from tests import support
from tests.random_plans import REFUSED, VALID, captured, checked
from tests.silent.small import EXACT, Model, ids

Ranks = Generator[Request, Any, Any]
SAMPLE, PLANS = range(3), 200


def engine_of(seed: int) -> Callable[[Mesh], Queued]:
    """Every third plan at the latest moments, the others at random ones."""
    return partial(Queued, seed=None if seed % 3 == 0 else seed)


@pytest.mark.parametrize("seed", SAMPLE)
def test_a_random_plan_gives_the_models_numbers(seed: int) -> None:
    outcome = checked(seed, numbers=True, engine=engine_of(seed))
    assert outcome.kind in (VALID, REFUSED), outcome


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_hundred_random_plans_give_the_models_numbers() -> None:
    valid, seed = 0, SAMPLE.stop
    while valid < PLANS:
        outcome = checked(seed, numbers=True, engine=engine_of(seed))
        assert outcome.kind in (VALID, REFUSED), outcome
        valid += outcome.kind == VALID
        seed += 1


# -- mistakes -----------------------------------------------------------------------------------


def waits_too_early(rank: Ranks, number: int) -> Ranks:
    """Reads what a transfer brings without having waited for it."""
    answer, count = None, -1
    while True:
        request = rank.send(answer)
        count += isinstance(request, Wait) and request.handle.shift.source is not None
        if isinstance(request, Wait) and count == number:
            answer, count = request.handle.buffer, count + 1
        else:
            answer = yield request


def reuses_a_buffer(rank: Ranks, number: int) -> Ranks:
    """Writes to what it sends right after the start."""
    answer, count = None, -1
    while True:
        request = rank.send(answer)
        count += isinstance(request, Shift) and request.to is not None
        answer = yield request
        if isinstance(request, Shift) and request.tensor is not None and count == number:
            request.tensor.copy_(request.tensor + 1)
            count += 1


@dataclass
class Held:
    """Stands for a transfer that has not been started."""

    shift: Shift
    transfer: Any = None


def swaps_starts(rank: Ranks, number: int) -> Ranks:
    """Starts a transfer behind the next one along its axis."""
    answer, count, held = None, -1, None
    while True:
        request = rank.send(answer)
        if isinstance(request, Wait) and isinstance(request.handle, Held):
            assert request.handle.transfer is not None, "there is no start to swap it with"
            request = replace(request, handle=request.handle.transfer)
        if not isinstance(request, Shift):
            answer = yield request
            continue
        count += 1
        if count == number:
            answer = held = Held(request)
        elif held is not None and held.transfer is None and request.axis == held.shift.axis:
            answer = yield request
            held.transfer = yield held.shift
        else:
            answer = yield request


def sends_nothing(rank: Ranks, number: int) -> Ranks:
    """Leaves a message out."""
    answer, count = None, -1
    while True:
        request = rank.send(answer)
        count += isinstance(request, Shift) and request.to is not None
        if isinstance(request, Shift) and request.to is not None and count == number:
            request, count = replace(request, to=None, tensor=None), count + 1
        answer = yield request


def takes_nothing(rank: Ranks, number: int) -> Ranks:
    """Leaves out to receive a message, and computes with zeros."""
    answer, count, skipped = None, -1, None
    while True:
        request = rank.send(answer)
        count += isinstance(request, Shift) and request.source is not None
        if isinstance(request, Shift) and request.source is not None and count == number:
            shape, dtype, count = request.shape, request.dtype, count + 1
            answer = skipped = yield replace(request, source=None)
        elif isinstance(request, Wait) and request.handle is skipped and skipped is not None:
            yield request
            answer = torch.zeros(shape, dtype=dtype)
        else:
            answer = yield request


def stays_away(rank: Ranks, number: int) -> Ranks:
    """Takes no part in a collective, as if the others brought what it brings."""
    answer, count = None, -1
    while True:
        request = rank.send(answer)
        count += isinstance(request, Collective)
        if isinstance(request, Collective) and count == number:
            answer, count = ANSWERS[request.kind]([request] * 2, 0), count + 1
        else:
            answer = yield request


Mistake = Callable[[Ranks, int], Ranks]


@dataclass
class Mistaken:
    """All ranks, one of which makes a mistake."""

    engine: Queued
    mistake: Mistake
    rank: int
    number: int

    def run(self, generators: Sequence[Ranks]) -> Any:
        ranks = list(generators)
        ranks[self.rank] = self._ended(self.mistake(ranks[self.rank], self.number))
        return self.engine.run(ranks)

    @staticmethod
    def _ended(rank: Ranks) -> Ranks:
        """Give what the rank's own generator returned, whose end is an error in its wrapper."""
        try:
            return (yield from rank)
        except RuntimeError as error:
            match error.__cause__:
                case StopIteration(value=value):
                    return value
            raise


@cache
def compiled(model: str, parallel: str) -> ParallelProgram:
    return transform(captured(model), parallel)


@torch.no_grad()
def run(model: str, parallel: str, engine: Callable[[Mesh], Any]) -> torch.Tensor:
    made = compiled(model, parallel)
    _, inputs = zoo.build(model, sequence=24)
    batch = 2 * made.mesh.size("dp")
    inputs = tuple(x.repeat(batch, *[1] * (x.dim() - 1)) for x in inputs)
    outputs: torch.Tensor = run_lockstep(
        made.ranks(), made.mesh, made.source, inputs, engine=engine
    ).outputs
    return outputs


RING, BOTH = ("llama-tiny", "ring=4"), ("llama-tiny", "ring=2,tp=2")
STAGES, PIECES = ("gpt-tiny", "pp=2,ring=3"), ("llama-tiny", "time=2,ring=3")
MOE = ("mixtral-tiny", "ring=2,ulysses=2")
# Around three ranks no two are each other's peers in both directions; of four, pairs swap keys, and
# may do so in any order.
THREE = ("llama-tiny", "ring=3")
PLANS_RUN = (RING, STAGES, BOTH, MOE, PIECES)
# What arrives late also changes what was sent on from the same buffer.
REUSED = r"rank {0} overwrites what it sends in %\w+ before it has waited for that"
EARLY = rf"rank {{0}} never waits for what it starts in %\w+|{REUSED}"
STUCK = r"wait for each other|expects torch|has ended, %\w+ has not|asks for"
# A mistake, what it may be found by, and plans with the rank that makes it and which of its
# transfers (or collectives) it is.
SEEDED = (
    (waits_too_early, EARLY,
     ((RING, 1, 0), (RING, 3, 4), (STAGES, 2, 1), (BOTH, 0, 1), (PIECES, 2, 3))),
    (reuses_a_buffer, REUSED,
     ((RING, 0, 0), (RING, 2, 5), (STAGES, 1, 0), (MOE, 3, 1), (PIECES, 0, 2))),
    (swaps_starts, STUCK,
     ((THREE, 0, 0), (THREE, 1, 2), (THREE, 2, 0), (STAGES, 3, 1), (PIECES, 1, 8))),
    (sends_nothing, STUCK, ((RING, 1, 2), (STAGES, 0, 1))),
    (takes_nothing, STUCK, ((RING, 2, 0),)),
    (stays_away, STUCK, ((BOTH, 3, 2), (MOE, 0, 1))),
)
MISTAKES = [
    pytest.param(
        mistake, message, plan, rank, number, id=f"{mistake.__name__}-{plan[1]}-{rank}-{number}"
    )
    for mistake, message, places in SEEDED for plan, rank, number in places
]


def test_there_are_twenty() -> None:
    assert len(MISTAKES) == 20


@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize(("mistake", "message", "plan", "rank", "number"), MISTAKES)
def test_a_seeded_mistake_is_found(
    mistake: Mistake, message: str, plan: tuple[str, str], rank: int, number: int, seed: int | None
) -> None:
    def engine(mesh: Mesh) -> Mistaken:
        return Mistaken(Queued(mesh, seed), mistake, rank, number)

    with pytest.raises(RingCompileError, match=message.format(rank)):
        run(*plan, engine)


@pytest.mark.parametrize("plan", PLANS_RUN, ids=lambda plan: plan[1])
def test_without_a_mistake_they_run(plan: tuple[str, str]) -> None:
    """A rank that is wrapped as a mistaken one, and makes none, gives what lock-step gives."""
    def engine(mesh: Mesh) -> Mistaken:
        return Mistaken(Queued(mesh, 3), reuses_a_buffer, 0, 1_000_000)

    assert torch.equal(run(*plan, engine), run(*plan, LockStep))


@pytest.mark.parametrize("seed", [None, 1])
def test_neighbours_on_two_axes_together(seed: int | None) -> None:
    """Ends of chunks go to the next rank along ring and ulysses, taken as one axis."""
    def shifted(model: Any, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return F.pad(x, (0, 0, 3, 0))[:, : x.shape[1]]

    model, tokens = Model(shifted), ids(27)
    made = support.compiled(model, (tokens,), "ring=2,ulysses=2")
    assert any(node.kwargs.get("axis") == "ring,ulysses" for node in made.rank(1).graph.nodes
               if "shift_start" in str(node.target))
    outputs = run_lockstep(
        made.ranks(), made.mesh, made.source, (tokens,), engine=partial(Queued, seed=seed)
    ).outputs
    with torch.no_grad():
        assert support.difference(outputs, model(tokens)) <= EXACT
