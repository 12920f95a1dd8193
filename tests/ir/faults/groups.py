"""Faults of what groups do together: gathers, all-reduces, reduce-scatters, exchanges."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import combinations
from typing import Any

from torch import fx

from ringcompile.ir.communication import (
    ALL_REDUCE,
    ALL_TO_ALL,
    COLLECTIVES,
    GATHER,
    REDUCE_SCATTER,
)
from ringcompile.ir.nodes import type_of
from ringcompile.ir.program import Program
from ringcompile.ops.schemas import op
from tests.ir.faults.cases import (
    Kind,
    Mutation,
    Programs,
    at_a_site,
    brings_double,
    brings_less,
    erase,
    hoist,
    needs,
    nodes_of,
    only_with_two_axes,
    set_kwargs,
)
from tests.ir.faults.ring import CYCLE, ENDED, SHAPES


def at_a_meeting(
    mutate: Callable[[Program, fx.Node, random.Random], None], *kinds: str
) -> Mutation:
    """A mutation at one collective of one rank, of these kinds."""
    wanted = kinds or tuple(COLLECTIVES)
    return at_a_site(lambda programs: [(p, n) for p in programs for n in nodes_of(p, *wanted)],
                     mutate)


def missing(program: Program, node: fx.Node, rng: random.Random) -> None:
    erase(program, node)


def twice(program: Program, node: fx.Node, rng: random.Random) -> None:
    with program.graph.inserting_after(node):
        program.graph.node_copy(node, lambda n: n)


def ends_early(program: Program, node: fx.Node, rng: random.Random) -> None:
    meetings = nodes_of(program, *COLLECTIVES)
    for late in meetings[meetings.index(node) :]:
        erase(program, late)


def along_another_dim(program: Program, node: fx.Node, rng: random.Random) -> None:
    name = rng.choice(["split", "concat"]) if str(node.target) == ALL_TO_ALL else "dim"
    dims = range(len(type_of(node.args[0]).shape))  # type: ignore[arg-type]
    set_kwargs(node, **{name: rng.choice([d for d in dims if d != node.kwargs[name]])})


def of_another_length(program: Program, node: fx.Node, rng: random.Random) -> None:
    limit: Any = node.kwargs["limit"]
    set_kwargs(node, limit=None if limit is not None else 7)


def over_another_axis(program: Program, node: fx.Node, rng: random.Random) -> None:
    assert program.mesh is not None
    others = [axis for axis in program.mesh.names if axis != node.kwargs["axis"]]
    set_kwargs(node, axis=rng.choice(others))


def over_no_axis(program: Program, node: fx.Node, rng: random.Random) -> None:
    set_kwargs(node, axis="dp")


def of_another_kind(program: Program, node: fx.Node, rng: random.Random) -> None:
    axis: Any = {"axis": node.kwargs["axis"]}
    kinds = {
        ALL_REDUCE: ("gather", {"dim": 0, "limit": None}),
        REDUCE_SCATTER: ("all_reduce", {}),
        ALL_TO_ALL: ("all_reduce", {}),
        GATHER: ("all_reduce", {}),
    }
    name, how = kinds[str(node.target)]
    node.target, node.kwargs = op(name), {**axis, **how}


def swapped(programs: Programs, rng: random.Random) -> bool:
    """Two of the same kind and shape, neither computed from the other, in the other order."""
    sites = [
        (a, b)
        for program in programs
        for a, b in combinations(nodes_of(program, *COLLECTIVES), 2)
        if a.target is b.target and a.kwargs == b.kwargs
        and type_of(a).shape == type_of(b).shape and not needs(b, a)
    ]
    if sites:
        first, second = rng.choice(sites)
        hoist(second, first)
    return bool(sites)


def groups_in_another_order(programs: Programs, rng: random.Random) -> bool:
    """Every other rank meets its group along one axis first, the others that along the other."""
    mesh = programs[0].mesh
    assert mesh is not None
    if len(mesh.names) < 2:
        return False
    for program in programs:
        assert program.coordinates is not None
        turned = sum(program.coordinates.values()) % 2
        first = next(node for node in program.graph.nodes if node.op == "call_function")
        for axis in reversed(mesh.names) if turned else mesh.names:
            value = next(n for n in program.graph.nodes if n.op == "placeholder")
            with program.graph.inserting_before(first):
                made = program.graph.create_node(
                    "call_function", op("all_reduce"), (value,), {"axis": axis}, f"over_{axis}"
                )
            made.meta["type"] = type_of(value)
    return True


_ONE = r"\w+ of (float|int)\d\d\[.*\].* in %\w+"
DIFFER = rf"rank \d asks for {_ONE}, rank \d for {_ONE}"
UNMATCHED = "|".join([DIFFER, ENDED, CYCLE])
MODELS = ("gather", "llama in groups", "paths in groups", "experts in groups")
KINDS: dict[str, Kind] = {
    "a missing collective": Kind(at_a_meeting(missing), UNMATCHED, MODELS),
    "a collective too many": Kind(at_a_meeting(twice), UNMATCHED, MODELS),
    "a rank that meets nobody any more": Kind(
        at_a_meeting(ends_early), rf"{UNMATCHED}|{SHAPES}", MODELS
    ),
    "a collective along another dim": Kind(
        at_a_meeting(along_another_dim, GATHER, REDUCE_SCATTER, ALL_TO_ALL), DIFFER, MODELS
    ),
    "a gather of another length": Kind(at_a_meeting(of_another_length, GATHER), DIFFER, MODELS,
                                       steps=False),
    "a collective over another axis": Kind(
        only_with_two_axes(at_a_meeting(over_another_axis)), UNMATCHED, MODELS
    ),
    "a collective over an axis that is not there": Kind(
        at_a_meeting(over_no_axis),
        r"rank \d asks for \w+ over axis 'dp' in %\w+, which the mesh \S+ does not have", MODELS,
    ),
    "a collective of another kind": Kind(at_a_meeting(of_another_kind), DIFFER, MODELS),
    "a collective of another shape": Kind(at_a_meeting(brings_less), DIFFER, MODELS),
    "a collective of another dtype": Kind(at_a_meeting(brings_double), DIFFER, MODELS),
    "equal collectives in the wrong order": Kind(swapped, DIFFER, ("paths in groups",)),
    "groups met in another order": Kind(
        groups_in_another_order, CYCLE, ("llama in groups", "paths in groups")
    ),
}
