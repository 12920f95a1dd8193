"""Faults between the stages of a pipeline."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import combinations
from typing import Any

from torch import fx

from ringcompile.ir.communication import SHIFT
from ringcompile.ir.layout import Layout
from ringcompile.ir.nodes import type_of
from ringcompile.ir.program import Program
from ringcompile.ir.types import TensorType
from tests.ir.faults.cases import (
    Kind,
    Mutation,
    Programs,
    at_a_site,
    brings_double,
    brings_less,
    double,
    erase,
    hoist,
    longer,
    nodes_of,
    set_kwargs,
    transfer,
    wait_of,
)
from tests.ir.faults.ring import CYCLE, DTYPES, ENDED, SHAPES, UNMATCHED


def between_stages(program: Program) -> list[fx.Node]:
    return [n for n in nodes_of(program, SHIFT) if n.kwargs["axis"] == "pp"]


def at_an_end(
    mutate: Callable[[Program, fx.Node, random.Random], None], end: str | None = None
) -> Mutation:
    """A mutation at one end of a transfer between stages."""
    return at_a_site(
        lambda programs: [
            (p, n) for p in programs for n in between_stages(p)
            if end is None or n.kwargs[end] is not None
        ],
        mutate,
    )


def drop(program: Program, start: fx.Node, rng: random.Random) -> None:
    erase(program, wait_of(start))
    program.graph.erase_node(start)


def another_name(program: Program, start: fx.Node, rng: random.Random) -> None:
    """The rank takes it for another value, as if it had other stages in mind."""
    others = [n.name for n in program.graph.nodes if n.op == "call_function"]
    set_kwargs(start, of=rng.choice([name for name in others if name != start.kwargs["of"]]))


def another_value(program: Program, start: fx.Node, rng: random.Random) -> None:
    """Something else of the same type is sent under the name."""
    sent: Any = start.args[0]
    before = list(program.graph.nodes)
    fits = [
        n for n in before[: before.index(start)]
        if n.op == "call_function" and n is not sent and n.meta.get("type") == type_of(sent)
    ]
    start.args = (rng.choice(fits),)


def no_such_stage(program: Program, start: fx.Node, rng: random.Random) -> None:
    end = "to" if start.kwargs["to"] is not None else "source"
    set_kwargs(start, **{end: rng.choice([-1, 9])})


def its_own_stage(program: Program, start: fx.Node, rng: random.Random) -> None:
    assert program.coordinates is not None
    end = "to" if start.kwargs["to"] is not None else "source"
    set_kwargs(start, **{end: program.coordinates["pp"]})


def skips_a_stage(programs: Programs, rng: random.Random) -> bool:
    """Sends over the next stage's head, or expects it from one further back."""
    mesh = programs[0].mesh
    assert mesh is not None
    if mesh.size("pp") < 3:
        return False
    sites = []
    for program in programs:
        assert program.coordinates is not None
        at = program.coordinates["pp"]
        for start in between_stages(program):
            end, other = ("to", at + 2) if start.kwargs["to"] is not None else ("source", at - 2)
            if 0 <= other < mesh.size("pp"):
                sites.append((start, end, other))
    start, end, other = rng.choice(sites)
    set_kwargs(start, **{end: other})
    return True


def retyped(change: Callable[[TensorType], TensorType]) -> Callable[..., None]:
    def mutate(program: Program, start: fx.Node, rng: random.Random) -> None:
        start.meta["type"] = wait_of(start).meta["type"] = change(type_of(start))

    return mutate


def partial(type_: TensorType) -> TensorType:
    """One rank's term of a sum, which has the shape of the whole."""
    return type_.with_layout(Layout(type_.layout.dims, ("tp",)))


def swapped(programs: Programs, rng: random.Random) -> bool:
    """Two values that cross the same way, in the other order at one end."""
    sites = [
        (a, b)
        for program in programs
        for a, b in combinations(between_stages(program), 2)
        if (a.kwargs["to"], a.kwargs["source"]) == (b.kwargs["to"], b.kwargs["source"])
    ]
    if sites:
        first, second = rng.choice(sites)
        hoist(second, first)
    return bool(sites)


def waits_for_the_next_stage(programs: Programs, rng: random.Random) -> bool:
    """Something goes back, and is waited for before what it depends on goes forth."""
    sites = [(p, n) for p in programs for n in between_stages(p) if n.kwargs["to"] is not None]
    program, start = rng.choice(sites)
    mesh, at = program.mesh, program.coordinates
    assert mesh is not None
    assert at is not None
    target: Any = start.kwargs["to"]
    later = programs[mesh.rank({**at, "pp": target})]
    value: Any = start.args[0]
    carried = {"axis": "pp", "of": "back"}
    transfer(program, value, value, None, target, **carried)
    of = start.kwargs["of"]
    arrived = next(wait_of(n) for n in between_stages(later) if n.kwargs["of"] == of)
    transfer(later, arrived, arrived, at["pp"], None, **carried)
    return True


MODELS = ("gpt in stages", "paths in stages")
NAMED = r"rank \d (sends|expects) .* of %\w+ in %\w+, rank \d (expects|sends) .* of %\w+ in %\w+"
KINDS: dict[str, Kind] = {
    "a value that is not sent": Kind(at_an_end(drop, "to"), UNMATCHED, MODELS),
    "a value that is not taken": Kind(at_an_end(drop, "source"), UNMATCHED, MODELS),
    "another stage's value": Kind(
        at_an_end(another_name), rf"{NAMED}|rank \d sends %\w+ in %\w+, which is for %\w+", MODELS,
    ),
    "another value under the name": Kind(
        at_an_end(another_value, "to"), r"rank \d sends %\w+ in %\w+, which is for %\w+", MODELS,
        steps=False,
    ),
    "a stage that does not exist": Kind(
        at_an_end(no_such_stage), r"rank \d: %\w+ names -?\d on axis 'pp' of size \d", MODELS,
        steps=False,
    ),
    "a stage that hands to itself": Kind(
        at_an_end(its_own_stage), r"rank \d names itself as its peer in %\w+", MODELS, steps=False
    ),
    "a stage that is left out": Kind(skips_a_stage, rf"{NAMED}|{UNMATCHED}", ("paths in stages",)),
    "a value of another shape sent": Kind(at_an_end(brings_less, "to"),
                                          rf"{SHAPES}|which is for %", MODELS),
    "a value of another dtype sent": Kind(at_an_end(brings_double, "to"),
                                          rf"{DTYPES}|which is for %", MODELS),
    "a value of another shape taken": Kind(at_an_end(retyped(longer), "source"), SHAPES, MODELS),
    "a value of another dtype taken": Kind(at_an_end(retyped(double), "source"), DTYPES, MODELS),
    "a sum taken for its term": Kind(
        at_an_end(retyped(partial), "source"), r"a share of .* partial\(tp\), of %\w+ in %",
        MODELS, steps=False,
    ),
    "values that cross in the wrong order": Kind(swapped, NAMED, ("paths in stages",)),
    "a stage that waits for the next": Kind(
        waits_for_the_next_stage, rf"{CYCLE}|{ENDED}", MODELS
    ),
}
