"""Programs that do not fit together are found, by their graphs alone and when they run.

Real compiled programs are damaged in one place, at random sites, in every way that a pass could go
wrong (`faults/`); then they are cross-checked, and run in lock-step.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice

import pytest
import torch

from ringcompile.capture.export import capture
from ringcompile.compiler import transform
from ringcompile.errors import RingCompileError
from ringcompile.ir.communication import COMMUNICATION, SHIFT
from ringcompile.ir.crosscheck import cross_check
from ringcompile.mesh import Mesh
from tests.ir.faults import groups, ring, stages, weights
from tests.ir.faults.cases import PLANS, Case, Kind, Programs, cases, nodes_of
from tests.test_ops_across_the_sequence import H, Lambda

KINDS: dict[str, Kind] = {**ring.KINDS, **groups.KINDS, **stages.KINDS, **weights.KINDS}
MANY = 1000
STEPPED = [name for name, kind in KINDS.items() if kind.steps]


def mutants(name: str, among: Iterable[Case], seed: int = 0) -> Iterator[tuple[Case, Programs]]:
    """Damaged programs of a kind, at random sites: one for each case that has a site for it."""
    for case in among:
        programs = case.mutable()
        rng = random.Random(f"{name} {case.name} {seed}")
        if KINDS[name].mutation(programs, rng):
            yield case, programs


def some(name: str) -> Iterator[tuple[Case, Programs]]:
    """Of each model one damaged program, compiled for another plan for each kind."""
    place = list(KINDS).index(name)
    for model in KINDS[name].models:
        begin = place % len(cases(model))
        yield from islice(mutants(name, cases(model)[begin:] + cases(model)[:begin]), 1)


@dataclass
class Outcome:
    """What became of one mutant: the cross-check's words, and what lock-step did."""

    case: str
    said: str | None
    lockstep: str


@cache
def outcomes(name: str) -> tuple[Outcome, ...]:
    steps = KINDS[name].steps
    found = tuple(
        Outcome(case.name, case.checked(programs), case.stepped(programs) if steps else "")
        for case, programs in some(name)
    )
    assert found, "sites for this kind"
    return found


@pytest.mark.parametrize("model", PLANS)
def test_compiled_programs_fit_together(model: str) -> None:
    for case in cases(model):
        cross_check(case.parallel.ranks(), case.parallel.mesh)
        programs = case.mutable()
        cross_check(programs, case.parallel.mesh)
        assert case.stepped(programs) == "right"
        for program in programs:
            assert any(str(node.target) in COMMUNICATION for node in program.graph.nodes)


@pytest.mark.parametrize("name", KINDS)
def test_found_by_the_cross_check(name: str) -> None:
    """Every mutant, with the ranks and nodes in the text."""
    for outcome in outcomes(name):
        assert outcome.said is not None, outcome.case
        assert re.search(KINDS[name].says, outcome.said), (outcome.case, outcome.said)


@pytest.mark.parametrize("name", STEPPED)
def test_never_wrong_in_lockstep(name: str) -> None:
    """Nor does a rank wait for ever."""
    assert [outcome.case for outcome in outcomes(name) if outcome.lockstep == "wrong"] == []


@pytest.mark.parametrize("name", STEPPED)
def test_refused_in_lockstep(name: str) -> None:
    """With an error of ours, unless the numbers are right after all."""
    assert {outcome.lockstep for outcome in outcomes(name)} <= {"refused", "right"}


@pytest.mark.parametrize("name", KINDS)
def test_mutants_are_graphs(name: str) -> None:
    """What is found wrong is the communication, not the graph."""
    for program in next(some(name))[1]:
        program.graph.lint()


@pytest.mark.slow
def test_every_one_of_many_mutants_is_found() -> None:
    """Of all models for all plans, at new sites with every seed."""
    found, seed = dict.fromkeys(KINDS, 0), 0
    while sum(found.values()) < MANY:
        for name, kind in KINDS.items():
            among = [case for model in kind.models for case in cases(model)]
            for case, programs in mutants(name, among, seed):
                said = case.checked(programs)
                assert said is not None, (name, case.name, seed)
                assert re.search(kind.says, said), (name, case.name, seed, said)
                found[name] += 1
        seed += 1
    assert all(found.values())


def test_one_rank_may_receive_before_it_sends() -> None:
    """Only all around the ring is it a cycle; and the numbers are the same."""
    for case in cases("two attentions"):
        programs = case.mutable()
        ring.take_apart(programs[0], nodes_of(programs[0], SHIFT)[0], "receive")
        cross_check(programs, case.parallel.mesh)
        assert case.stepped(programs) == "right"


def test_no_communication_is_fine() -> None:
    module = Lambda(lambda x: x * 2).eval()
    parallel = transform(capture(module, (torch.randn(2, 17, H),)), "ring=3")
    cross_check(parallel.ranks(), parallel.mesh)
    with pytest.raises(RingCompileError, match="3 programs for a mesh of 4 ranks"):
        cross_check(parallel.ranks(), Mesh.parse("ring=4"))
