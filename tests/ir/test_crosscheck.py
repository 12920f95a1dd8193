"""Programs that do not fit together are found, by their graphs alone and when they run.

Real compiled programs are damaged in one place, at random sites, in every way that a pass could go
wrong; then they are cross-checked, and run in lock-step.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import fx
from torch.nn import functional as F

from ringcompile.capture.export import capture
from ringcompile.compiler import ParallelProgram, transform
from ringcompile.errors import RingCompileError
from ringcompile.ir.communication import COMMUNICATION, GATHER, SHIFT, WAIT
from ringcompile.ir.crosscheck import cross_check
from ringcompile.ir.nodes import type_of
from ringcompile.ir.program import Program
from ringcompile.ir.types import TensorType, local_shape
from ringcompile.mesh import Mesh
from ringcompile.models import zoo
from ringcompile.ops.schemas import op
from ringcompile.runtime.inprocess import run_lockstep
from tests.support import tensors
from tests.test_ops_across_the_sequence import H, Lambda

aten = torch.ops.aten
ORDERS = ("contiguous", "zigzag")
RINGS = (2, 3, 4)
SEEDS = 3  # mutants of a kind, for each of the programs that have a site for it
LENGTH = 13


def two_attentions(x: torch.Tensor, heads: tuple[int, int]) -> torch.Tensor:
    """Independent of each other; the shapes of their keys and values differ as the heads do."""
    a, b = (x.view(*x.shape[:2], n, H // n).transpose(1, 2) for n in heads)
    first = F.scaled_dot_product_attention(a, a, a + 1).transpose(1, 2)
    second = F.scaled_dot_product_attention(b, b, b * 2).transpose(1, 2)
    return first.reshape(x.shape) - second.reshape(x.shape)


FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "two attentions": lambda x: two_attentions(x, (3, 2)),
    "equal attentions": lambda x: two_attentions(x, (3, 3)),
    "gather": lambda x: x.cumsum(1) * 2,
}


# -- programs --------------------------------------------------------------------------------------


@cache
def captured(name: str) -> tuple[Program, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    if name == "llama":
        module, example = zoo.build("llama-tiny", sequence=24)
        return capture(module, example), zoo.build("llama-tiny", sequence=LENGTH)[1]
    module = Lambda(FUNCTIONS[name]).eval()
    return capture(module, (torch.randn(2, 17, H),)), (torch.randn(2, LENGTH, H),)


@dataclass(frozen=True)
class Case:
    """A compiled model, inputs, and what each rank computes."""

    name: str
    parallel: ParallelProgram
    inputs: tuple[torch.Tensor, ...]
    shares: Any

    def mutable(self) -> list[Program]:
        """All ranks' programs, to be damaged."""
        return [copied(program) for program in self.parallel.ranks()]

    def run(self, programs: list[Program]) -> Any:
        return run_lockstep(programs, self.parallel.mesh, self.parallel.source, self.inputs).shares


@cache
def cases(name: str) -> tuple[Case, ...]:
    program, inputs = captured(name)
    made = []
    for ranks in RINGS:
        for order in ORDERS:
            parallel = transform(program, f"ring={ranks}", order=order)
            programs = parallel.ranks()
            found = run_lockstep(programs, parallel.mesh, parallel.source, inputs)
            made.append(Case(f"{name} ring={ranks} {order}", parallel, inputs, found.shares))
    return tuple(made)


def copied(program: Program) -> Program:
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.graph, {}))
    return program.with_graph(graph)


# -- tools -----------------------------------------------------------------------------------------


def nodes_of(program: Program, target: str) -> list[fx.Node]:
    return [node for node in program.graph.nodes if str(node.target) == target]


def wait_of(start: fx.Node) -> fx.Node:
    return next(user for user in start.users if str(user.target) == WAIT)


def local_type(program: Program, node: fx.Node) -> TensorType:
    type_ = type_of(node)
    return TensorType.whole(type_.dtype, local_shape(type_, program.mesh, program.sequence))


def zeros(program: Program, node: fx.Node) -> fx.Node:
    """A tensor of the node's type, in front of it."""
    type_ = local_type(program, node)
    with program.graph.inserting_before(node):
        made = program.graph.call_function(
            aten.full.default, (list(type_.shape), 0.0), {"dtype": type_.dtype}
        )
    made.meta["type"] = type_
    return made


def erase(program: Program, node: fx.Node) -> None:
    """Remove a communication; what reads it gets zeros."""
    if node.users:
        node.replace_all_uses_with(zeros(program, node))
    program.graph.erase_node(node)


def transfer(
    program: Program,
    after: fx.Node,
    x: fx.Node,
    to: int | None,
    source: int | None,
    **carried: Any,
) -> fx.Node:
    """A new transfer behind a node, waited for at once; returns the wait."""
    type_ = (
        local_type(program, x) if source is not None else TensorType.whole(type_of(x).dtype, (0,))
    )
    with program.graph.inserting_after(after):
        start = program.graph.call_function(
            op("shift_start"),
            (x,),
            {"axis": "ring", "to": to, "source": source, "sends": [], "takes": [], "of": "o"}
            | carried,
        )
    with program.graph.inserting_after(start):
        wait = program.graph.call_function(op("wait"), (start,))
    start.meta["type"] = wait.meta["type"] = type_
    return wait


def instead(program: Program, start: fx.Node, target: Any, rest: tuple[Any, ...]) -> fx.Node:
    """Send `target(sent, *rest)` instead."""
    sent: Any = start.args[0]
    with program.graph.inserting_before(start):
        made = program.graph.call_function(target, (sent, *rest))
    start.args = (made,)
    return made


def set_kwargs(node: fx.Node, **changes: Any) -> None:
    node.kwargs = {**node.kwargs, **changes}


def hoist(node: fx.Node, before: fx.Node) -> None:
    """Move a node, and what it needs, in front of another."""
    order = {n: i for i, n in enumerate(node.graph.nodes)}
    needed, queue = {node}, [node]
    while queue:
        for operand in queue.pop().all_input_nodes:
            if operand not in needed and order[operand] > order[before]:
                needed.add(operand)
                queue.append(operand)
    for moved in sorted(needed, key=order.__getitem__):
        before.prepend(moved)


# -- mutations: each damages the programs in place and says whether there was a site ---------------

Programs = list[Program]
Mutation = Callable[[Programs, random.Random], bool]


def at_a_start(
    mutate: Callable[[Program, fx.Node, random.Random], None],
    fits: Callable[[fx.Node], bool] = lambda start: True,
) -> Mutation:
    """A mutation at one transfer of one rank."""

    def mutation(programs: Programs, rng: random.Random) -> bool:
        sites = [(p, start) for p in programs for start in nodes_of(p, SHIFT) if fits(start)]
        if sites:
            mutate(*rng.choice(sites), rng)
        return bool(sites)

    return mutation


def at_a_gather(
    mutate: Callable[[Program, fx.Node, random.Random], None],
) -> Mutation:
    def mutation(programs: Programs, rng: random.Random) -> bool:
        sites = [(p, node) for p in programs for node in nodes_of(p, GATHER)]
        if sites:
            mutate(*rng.choice(sites), rng)
        return bool(sites)

    return mutation


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


def longer(type_: TensorType) -> TensorType:
    return TensorType.whole(type_.dtype, (*type_.shape[:-1], type_.shape[-1] + 1))


def double(type_: TensorType) -> TensorType:
    return TensorType.whole(torch.float64, type_.shape)


def sends_less(program: Program, start: fx.Node, rng: random.Random) -> None:
    sent: Any = start.args[0]
    *shape, last = local_type(program, sent).shape
    made = instead(program, start, aten.slice.Tensor, (3, 0, last - 1))
    made.meta["type"] = TensorType.whole(type_of(sent).dtype, (*shape, last - 1))


def sends_double(program: Program, start: fx.Node, rng: random.Random) -> None:
    sent: Any = start.args[0]
    made = instead(program, start, aten.to.dtype, (torch.float64,))
    made.meta["type"] = double(local_type(program, sent))


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


def needs(node: fx.Node, other: fx.Node) -> bool:
    """Whether a node is computed from another."""
    queue, seen = [node], {node}
    while queue:
        for operand in queue.pop().all_input_nodes:
            if operand is other:
                return True
            if operand not in seen:
                seen.add(operand)
                queue.append(operand)
    return False


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


def a_rank_is_missing(programs: Programs, rng: random.Random) -> bool:
    programs.pop(rng.randrange(len(programs)))
    return True


def ranks_are_swapped(programs: Programs, rng: random.Random) -> bool:
    a, b = rng.sample(range(len(programs)), 2)
    programs[a], programs[b] = programs[b], programs[a]
    return True


def gather_dim(program: Program, node: fx.Node, rng: random.Random) -> None:
    set_kwargs(node, dim=rng.choice([d for d in range(3) if d != node.kwargs["dim"]]))


def gather_axis(program: Program, node: fx.Node, rng: random.Random) -> None:
    set_kwargs(node, axis=rng.choice(["tp", "dp"]))


def gather_less(program: Program, node: fx.Node, rng: random.Random) -> None:
    operand: Any = node.args[0]
    shape = local_type(program, operand).shape
    made = instead(program, node, aten.slice.Tensor, (2, 0, H - 1))
    made.meta["type"] = TensorType.whole(type_of(operand).dtype, (*shape[:2], H - 1))


def gather_double(program: Program, node: fx.Node, rng: random.Random) -> None:
    operand: Any = node.args[0]
    made = instead(program, node, aten.to.dtype, (torch.float64,))
    made.meta["type"] = double(local_type(program, operand))


def no_gather(program: Program, node: fx.Node, rng: random.Random) -> None:
    erase(program, node)


def gather_twice(program: Program, node: fx.Node, rng: random.Random) -> None:
    with program.graph.inserting_after(node):
        program.graph.node_copy(node, lambda n: n)


@dataclass(frozen=True)
class Kind:
    """A way to damage programs, the models to do it to, and what the cross-check says then."""

    mutation: Mutation
    says: str
    models: tuple[str, ...] = ("llama", "two attentions")


DTYPES = r"rank \d .* float(32|64)\[.*\].* in %.*float(64|32)\["
SHAPES = r"rank \d .* float32\[.*\].* in %.*float32\["
CYCLE = r"the ranks (\d -> )+\d wait for each other: rank \d waits in %"
_GATHER = r"gather of float\d\d\[.*\] dim=.* in %\w+"
GATHERS = rf"rank \d asks for {_GATHER}, rank \d for {_GATHER}"
ENDED = r"rank \d waits in %\w+ for rank \d(, \d)*, which has ended"
# What a dropped or added message leads to: another one takes its place, or a rank waits for ever.
UNMATCHED = "|".join(
    [
        r"rank \d (sends|expects) \w+\[.*\].* in %\w+, rank \d (expects|sends) \w+\[.*\].* in %\w+",
        r"rank \d sends \d+ messages to rank \d, which expects \d+; the first unmatched is %\w+",
        r"rank \d names itself as its peer in %\w+",
        r"rank \d reads what arrives in %\w+, and nobody sends it",
        CYCLE,
        ENDED,
    ]
)
MODELS = ("llama", "two attentions", "gather")
GATHER_ONLY = ("gather",)
KINDS: dict[str, Kind] = {
    "a dropped transfer": Kind(at_a_start(drop), UNMATCHED),
    "a wrong target": Kind(at_a_start(to_another, sends), UNMATCHED),
    "a wrong source": Kind(at_a_start(from_another, receives), UNMATCHED),
    "a peer that does not exist": Kind(
        at_a_start(off_the_ring), r"rank \d: %\w+ names -?\d on axis 'ring' of size \d"
    ),
    "the wrong direction": Kind(at_a_start(turned, one_way), UNMATCHED),
    "transfers of different shapes in the wrong order": Kind(
        swapped_transfers, SHAPES, ("two attentions",)
    ),
    "transfers of the same shape in the wrong order": Kind(
        swapped_transfers, UNMATCHED, ("equal attentions",)
    ),
    "another shape expected": Kind(at_a_start(retyped(longer), receives), SHAPES),
    "another dtype expected": Kind(at_a_start(retyped(double), receives), DTYPES),
    "another shape sent": Kind(at_a_start(sends_less, sends), SHAPES),
    "another dtype sent": Kind(at_a_start(sends_double, sends), DTYPES),
    "one send too many": Kind(at_a_start(one_send_more), UNMATCHED),
    "one receive too many": Kind(at_a_start(one_receive_more), UNMATCHED),
    "a transfer twice": Kind(at_a_start(twice), UNMATCHED),
    "a rank that ends early": Kind(at_a_start(ends_early), UNMATCHED),
    "all receive before they send": Kind(one_half_first("receive"), CYCLE),
    "all send before they receive": Kind(one_half_first("send"), CYCLE),
    "a message left out on both sides": Kind(a_message_is_left_out, UNMATCHED),
    "a rank that is missing": Kind(
        a_rank_is_missing, r"\d programs for a mesh of \d ranks", MODELS
    ),
    "ranks in the wrong places": Kind(
        ranks_are_swapped, r"the program in the place of rank \d is for"
    ),
    "a gather along another dim": Kind(at_a_gather(gather_dim), GATHERS, GATHER_ONLY),
    "a gather over another axis": Kind(at_a_gather(gather_axis), ENDED, GATHER_ONLY),
    "a gather of another shape": Kind(at_a_gather(gather_less), GATHERS, GATHER_ONLY),
    "a gather of another dtype": Kind(at_a_gather(gather_double), GATHERS, GATHER_ONLY),
    "a missing gather": Kind(at_a_gather(no_gather), ENDED, GATHER_ONLY),
    "a gather too many": Kind(at_a_gather(gather_twice), ENDED, GATHER_ONLY),
}


def mutants(name: str) -> Iterator[tuple[Case, Programs]]:
    """Damaged programs of a kind, at random sites."""
    for model in KINDS[name].models:
        for case in cases(model):
            for seed in range(SEEDS):
                programs = case.mutable()
                rng = random.Random(f"{name} {case.name} {seed}")
                if KINDS[name].mutation(programs, rng):
                    yield case, programs


@dataclass
class Outcome:
    """What became of one mutant: the cross-check's words, and what lock-step did."""

    case: str
    said: str | None
    lockstep: str


def cross_checked(case: Case, programs: Programs) -> str | None:
    try:
        cross_check(programs, case.parallel.mesh)
    except RingCompileError as error:
        return error.message
    return None


def stepped(case: Case, programs: Programs) -> str:
    """ "refused", "right", "wrong", or the kind of Python error that came out."""
    try:
        found = case.run(programs)
    except RingCompileError:
        return "refused"
    except (IndexError, RuntimeError, ValueError) as error:
        return type(error).__name__
    pairs = zip(tensors(found), tensors(case.shares), strict=True)
    return "right" if all(torch.equal(a, b) for a, b in pairs) else "wrong"


@cache
def outcomes(name: str) -> tuple[Outcome, ...]:
    found = tuple(
        Outcome(case.name, cross_checked(case, programs), stepped(case, programs))
        for case, programs in mutants(name)
    )
    assert len(found) >= 2 * SEEDS, "sites for this kind"
    return found


@pytest.mark.parametrize("model", MODELS)
def test_compiled_programs_fit_together(model: str) -> None:
    for case in cases(model):
        cross_check(case.parallel.ranks(), case.parallel.mesh)
        programs = case.mutable()
        cross_check(programs, case.parallel.mesh)
        assert stepped(case, programs) == "right"
        for program in programs:
            assert any(str(node.target) in COMMUNICATION for node in program.graph.nodes)


@pytest.mark.parametrize("name", KINDS)
def test_found_by_the_cross_check(name: str) -> None:
    """Every mutant, with the ranks and nodes in the text."""
    for outcome in outcomes(name):
        assert outcome.said is not None, outcome.case
        assert re.search(KINDS[name].says, outcome.said), (outcome.case, outcome.said)


@pytest.mark.parametrize("name", KINDS)
def test_never_wrong_in_lockstep(name: str) -> None:
    """Nor does a rank wait for ever."""
    assert [outcome.case for outcome in outcomes(name) if outcome.lockstep == "wrong"] == []


@pytest.mark.parametrize("name", KINDS)
def test_refused_in_lockstep(name: str) -> None:
    """With an error of ours, unless the numbers are right after all."""
    assert {outcome.lockstep for outcome in outcomes(name)} <= {"refused", "right"}


@pytest.mark.parametrize("name", KINDS)
def test_mutants_are_graphs(name: str) -> None:
    """What is found wrong is the communication, not the graph."""
    for program in next(mutants(name))[1]:
        program.graph.lint()


def test_one_rank_may_receive_before_it_sends() -> None:
    """Only all around the ring is it a cycle; and the numbers are the same."""
    for case in cases("two attentions"):
        programs = case.mutable()
        take_apart(programs[0], nodes_of(programs[0], SHIFT)[0], "receive")
        cross_check(programs, case.parallel.mesh)
        assert stepped(case, programs) == "right"


def test_no_communication_is_fine() -> None:
    module = Lambda(lambda x: x * 2).eval()
    parallel = transform(capture(module, (torch.randn(2, 17, H),)), "ring=3")
    cross_check(parallel.ranks(), parallel.mesh)
    with pytest.raises(RingCompileError, match="3 programs for a mesh of 4 ranks"):
        cross_check(parallel.ranks(), Mesh.parse("ring=4"))
