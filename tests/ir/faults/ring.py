"""Faults of the ring: transfers between neighbours, in every way that a pass could go wrong."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import combinations
from typing import Any

from torch import fx

from ringcompile.ir.communication import SHIFT
from ringcompile.ir.nodes import type_of
from ringcompile.ir.program import Program
from ringcompile.ir.types import TensorType
from ringcompile.ops.schemas import op
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
    local_type,
    longer,
    needs,
    nodes_of,
    set_kwargs,
    transfer,
    wait_of,
)


def at_a_start(
    mutate: Callable[[Program, fx.Node, random.Random], None],
    fits: Callable[[fx.Node], bool] = lambda start: True,
) -> Mutation:
    """A mutation at one transfer of one rank."""
    return at_a_site(
        lambda programs: [(p, n) for p in programs for n in nodes_of(p, SHIFT) if fits(n)], mutate
    )


def sends(start: fx.Node) -> bool:
    return start.kwargs["to"] is not None


def receives(start: fx.Node) -> bool:
    return start.kwargs["source"] is not None


def one_way(start: fx.Node) -> bool:
    return start.kwargs["to"] != start.kwargs["source"]


def another(program: Program, peer: Any, rng: random.Random) -> int:
    assert program.mesh is not None
    return rng.choice([r for r in range(program.mesh.world_size) if r != peer])


def neighbour(program: Program, rng: random.Random) -> int:
    assert program.coordinates is not None
    return another(program, program.coordinates["ring"], rng)


def drop(program: Program, start: fx.Node, rng: random.Random) -> None:
    erase(program, wait_of(start))
    program.graph.erase_node(start)


def to_another(program: Program, start: fx.Node, rng: random.Random) -> None:
    set_kwargs(start, to=another(program, start.kwargs["to"], rng))


def from_another(program: Program, start: fx.Node, rng: random.Random) -> None:
    set_kwargs(start, source=another(program, start.kwargs["source"], rng))


def off_the_ring(program: Program, start: fx.Node, rng: random.Random) -> None:
    assert program.mesh is not None
    end = rng.choice([name for name in ("to", "source") if start.kwargs[name] is not None])
    set_kwargs(start, **{end: rng.choice([-1, program.mesh.world_size])})


def turned(program: Program, start: fx.Node, rng: random.Random) -> None:
    set_kwargs(start, to=start.kwargs["source"], source=start.kwargs["to"])


def retyped(change: Callable[[TensorType], TensorType]) -> Callable[..., None]:
    """What a rank expects is declared otherwise."""

    def mutate(program: Program, start: fx.Node, rng: random.Random) -> None:
        start.meta["type"] = wait_of(start).meta["type"] = change(local_type(program, start))

    return mutate


def one_send_more(program: Program, start: fx.Node, rng: random.Random) -> None:
    sent: Any = start.args[0]
    transfer(program, rng.choice([sent, start]), sent, neighbour(program, rng), None)


def one_receive_more(program: Program, start: fx.Node, rng: random.Random) -> None:
    sent: Any = start.args[0]
    transfer(program, rng.choice([sent, start]), sent, None, neighbour(program, rng))


def twice(program: Program, start: fx.Node, rng: random.Random) -> None:
    with program.graph.inserting_after(start):
        again = program.graph.node_copy(start, lambda n: n)
    with program.graph.inserting_after(again):
        wait = program.graph.call_function(op("wait"), (again,))
    wait.meta["type"] = again.meta["type"]


def ends_early(program: Program, start: fx.Node, rng: random.Random) -> None:
    """No communication from this one on."""
    starts = nodes_of(program, SHIFT)
    for late in starts[starts.index(start) :]:
        drop(program, late, rng)


def swapped_transfers(programs: Programs, rng: random.Random) -> bool:
    """Two transfers of one rank in the other order, unless no peer can tell by their shapes."""
    equal = not any(differ(p, a, b) for p in programs for a, b in in_order(p))
    sites = [
        (a, b)
        for program in programs
        for a, b in in_order(program)
        if (equal or differ(program, a, b)) and not needs(b, a)
    ]
    if sites:
        first, second = rng.choice(sites)
        hoist(second, first)
    return bool(sites)


def in_order(program: Program) -> list[tuple[fx.Node, fx.Node]]:
    return list(combinations(nodes_of(program, SHIFT), 2))


def differ(program: Program, a: fx.Node, b: fx.Node) -> bool:
    sent, received = (
        a.kwargs[end] is not None
        and a.kwargs[end] == b.kwargs[end]
        and local_type(program, x).shape != local_type(program, y).shape
        for end, x, y in (("to", a.args[0], b.args[0]), ("source", a, b))
    )
    return sent or received


def cycle_of(programs: Programs, rank: int, start: fx.Node) -> list[tuple[int, fx.Node]]:
    """The transfers around the ring that end in this one: whose message it takes, and so on."""
    found: list[tuple[int, fx.Node]] = []
    while (rank, start) not in found:
        found.append((rank, start))
        source = start.kwargs["source"]
        if source is None:
            return []
        taken = [n for n in nodes_of(programs[rank], SHIFT) if n.kwargs["source"] == source]
        given = [n for n in nodes_of(programs[source], SHIFT) if n.kwargs["to"] == rank]  # type: ignore[index]
        rank, start = source, given[taken.index(start)]  # type: ignore[assignment]
    return found


def one_half_first(half: str) -> Mutation:
    """All around the ring one half of a transfer is waited for before the other half starts."""

    def mutation(programs: Programs, rng: random.Random) -> bool:
        sites = [
            cycle
            for rank, program in enumerate(programs)
            for start in nodes_of(program, SHIFT)
            if (cycle := cycle_of(programs, rank, start))
        ]
        for rank, start in rng.choice(sites) if sites else ():
            take_apart(programs[rank], start, half)
        return bool(sites)

    return mutation


def take_apart(program: Program, start: fx.Node, first: str) -> None:
    """Send and receive one after the other, each waited for at once."""
    sent: Any = start.args[0]
    to, source = start.kwargs["to"], start.kwargs["source"]
    calls: dict[str, Any] = {"send": (to, None), "receive": (None, source)}
    after, wait = start, wait_of(start)
    for half in (first, *(calls.keys() - {first})):
        carried = {name: start.kwargs[name] for name in ("sends", "takes", "of")}
        after = transfer(program, after, sent, *calls[half], **carried)
        if half == "receive":
            after.meta["type"] = after.args[0].meta["type"] = type_of(start)  # type: ignore[union-attr]
            wait.replace_all_uses_with(after)
    program.graph.erase_node(wait)
    program.graph.erase_node(start)


def a_message_is_left_out(programs: Programs, rng: random.Random) -> bool:
    """On both sides, so that only what is done with it can tell."""
    sites = [
        (rank, start)
        for rank, program in enumerate(programs)
        for start in nodes_of(program, SHIFT)
        if receives(start)
    ]
    if not sites:
        return False
    rank, start = rng.choice(sites)
    source: Any = start.kwargs["source"]
    taken = [n for n in nodes_of(programs[rank], SHIFT) if n.kwargs["source"] == source]
    given = [n for n in nodes_of(programs[source], SHIFT) if n.kwargs["to"] == rank]
    set_kwargs(given[taken.index(start)], to=None)
    set_kwargs(start, source=None)
    return True


DTYPES = r"rank \d .* float(32|64)\[.*\].* in %.*float(64|32)\["
SHAPES = r"rank \d .* float32\[.*\].* in %.*float32\["
CYCLE = r"the ranks (\d -> )+\d wait for each other: rank \d waits in %"
ENDED = r"rank \d waits in %\w+ for rank \d(, \d)*, which has ended"
# What a dropped or added message leads to: another one takes its place, or a rank waits for ever.
UNMATCHED = "|".join(
    [
        r"rank \d (sends|expects) \w+\[.*\].* in %\w+, rank \d (expects|sends) \w+\[.*\].* in %\w+",
        r"rank \d \w+ \d+ messages (to|from) rank \d, which .* the first unmatched is %\w+",
        r"rank \d names itself as its peer in %\w+",
        r"rank \d reads what arrives in %\w+, and nobody sends it",
        CYCLE,
        ENDED,
    ]
)
BOTH = ("llama", "two attentions")
KINDS: dict[str, Kind] = {
    "a dropped transfer": Kind(at_a_start(drop), UNMATCHED, BOTH),
    "a wrong target": Kind(at_a_start(to_another, sends), UNMATCHED, BOTH),
    "a wrong source": Kind(at_a_start(from_another, receives), UNMATCHED, BOTH),
    "a peer that does not exist": Kind(
        at_a_start(off_the_ring), r"rank \d: %\w+ names -?\d on axis 'ring' of size \d", BOTH
    ),
    "the wrong direction": Kind(at_a_start(turned, one_way), UNMATCHED, BOTH),
    "transfers of different shapes in the wrong order": Kind(
        swapped_transfers, SHAPES, ("two attentions",)
    ),
    "transfers of the same shape in the wrong order": Kind(
        swapped_transfers, UNMATCHED, ("equal attentions",)
    ),
    "another shape expected": Kind(at_a_start(retyped(longer), receives), SHAPES, BOTH),
    "another dtype expected": Kind(at_a_start(retyped(double), receives), DTYPES, BOTH),
    "another shape sent": Kind(at_a_start(brings_less, sends), SHAPES, BOTH),
    "another dtype sent": Kind(at_a_start(brings_double, sends), DTYPES, BOTH),
    "one send too many": Kind(at_a_start(one_send_more), UNMATCHED, BOTH),
    "one receive too many": Kind(at_a_start(one_receive_more), UNMATCHED, BOTH),
    "a transfer twice": Kind(at_a_start(twice), UNMATCHED, BOTH),
    "a rank that ends early": Kind(at_a_start(ends_early), UNMATCHED, BOTH),
    "all receive before they send": Kind(one_half_first("receive"), CYCLE, BOTH),
    "all send before they receive": Kind(one_half_first("send"), CYCLE, BOTH),
    "a message left out on both sides": Kind(a_message_is_left_out, UNMATCHED, BOTH),
}
