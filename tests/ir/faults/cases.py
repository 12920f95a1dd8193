"""Compiled programs that faults are put into, and tools to put them there."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from ringcompile.capture.export import capture
from ringcompile.compiler import transform
from ringcompile.errors import RingCompileError
from ringcompile.ir.communication import WAIT
from ringcompile.ir.crosscheck import cross_check
from ringcompile.ir.nodes import type_of
from ringcompile.ir.program import Program
from ringcompile.ir.types import TensorType, local_shape
from ringcompile.models import zoo
from ringcompile.ops.schemas import op
from ringcompile.parallel_program import ParallelProgram
from ringcompile.runtime.inprocess import run_lockstep
from tests.support import tensors, zoo_program
from tests.test_ops_across_the_sequence import H, Lambda

aten = torch.ops.aten
LENGTH = 13


def two_attentions(x: torch.Tensor, heads: tuple[int, int]) -> torch.Tensor:
    """Independent of each other; the shapes of their keys and values differ as the heads do."""
    a, b = (x.view(*x.shape[:2], n, H // n).transpose(1, 2) for n in heads)
    first = F.scaled_dot_product_attention(a, a, a + 1).transpose(1, 2)
    second = F.scaled_dot_product_attention(b, b, b * 2).transpose(1, 2)
    return first.reshape(x.shape) - second.reshape(x.shape)


class TwoPaths(nn.Module):
    """Two paths of the same shapes through numbered layers: what crosses, and sums, looks alike."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Both() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        for layer in self.layers:
            x, y = layer(x, y)
        return x - y


class _Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Sequential(nn.Linear(H, 8), nn.ReLU(), nn.Linear(8, H)) for _ in "ab")

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        attended = F.scaled_dot_product_attention(*[x.unsqueeze(1)] * 3).squeeze(1)
        return self.a(attended).tanh(), self.b(y).tanh()


FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "two attentions": lambda x: two_attentions(x, (3, 2)),
    "equal attentions": lambda x: two_attentions(x, (3, 3)),
    "gather": lambda x: x.cumsum(1) * 2,
}
Plan = tuple[str, dict[str, Any]]
RINGS: tuple[Plan, ...] = tuple(
    (f"ring={ranks}", {"order": order})
    for ranks in (2, 3, 4) for order in ("contiguous", "zigzag")
)
# By name, the model and the plans that it is compiled for.
PLANS: dict[str, tuple[str, tuple[Plan, ...]]] = {
    "llama": ("llama-tiny", RINGS),
    **{name: (name, RINGS) for name in FUNCTIONS},
    "llama in groups": ("llama-tiny", (
        ("tp=2", {}), ("tp=3", {}), ("tp=2", {"tp_sequence": True}), ("ulysses=2", {}),
        ("ring=2,tp=2", {}), ("ring=2,tp=2", {"ring": "gather"}),
    )),
    "paths in groups": ("two paths", (("tp=2", {}), ("tp=4", {}), ("ring=2,tp=2", {}))),
    "experts in groups": ("moe-4l-tiny", (("ep=2", {}), ("ring=2,ep=2", {}))),
    "gpt in stages": ("gpt-tiny", (("pp=2", {}), ("pp=2,tp=2", {}), ("pp=2,ring=2", {}))),
    "paths in stages": ("two paths", (("pp=2", {}), ("pp=4", {}), ("pp=2,tp=2", {}))),
    "gpt with shares": ("gpt-tiny", (("tp=4", {}), ("pp=2,tp=2", {}), ("ring=2,tp=2", {}))),
}


@cache
def captured(name: str) -> tuple[Program, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    if name.endswith("-tiny"):
        return zoo_program(name, sequence=24), zoo.build(name, sequence=LENGTH)[1]
    module = TwoPaths() if name == "two paths" else Lambda(FUNCTIONS[name])
    return capture(module.eval(), (torch.randn(2, 17, H),)), (torch.randn(2, LENGTH, H),)


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

    def checked(self, programs: list[Program]) -> str | None:
        """What the cross-check says of them."""
        try:
            cross_check(programs, self.parallel.mesh)
        except RingCompileError as error:
            return error.message
        return None

    def stepped(self, programs: list[Program]) -> str:
        """ "refused", "right", "wrong", or the kind of Python error that came out."""
        try:
            found = run_lockstep(
                programs, self.parallel.mesh, self.parallel.source, self.inputs
            ).shares
        except RingCompileError:
            return "refused"
        except (IndexError, RuntimeError, ValueError) as error:
            return type(error).__name__
        pairs = zip(tensors(found), tensors(self.shares), strict=True)
        return "right" if all(torch.equal(a, b) for a, b in pairs) else "wrong"


@cache
def cases(name: str) -> tuple[Case, ...]:
    model, plans = PLANS[name]
    program, inputs = captured(model)
    made = []
    for spec, options in plans:
        parallel = transform(program, spec, **options)
        found = run_lockstep(parallel.ranks(), parallel.mesh, parallel.source, inputs)
        text = " ".join([name, spec, *(f"{k}={v}" for k, v in options.items())])
        made.append(Case(text, parallel, inputs, found.shares))
    return tuple(made)


# -- kinds of faults -------------------------------------------------------------------------------

Programs = list[Program]
# Damages the programs in place and says whether there was a site.
Mutation = Callable[[Programs, random.Random], bool]


@dataclass(frozen=True)
class Kind:
    """A way to damage programs, the cases to do it to, and what the cross-check says then.

    Attributes:
        steps: whether a lock-step run of it may only be refused, or be right.
    """

    mutation: Mutation
    says: str
    models: tuple[str, ...]
    steps: bool = True


def at_a_site(
    sites: Callable[[Programs], list[tuple[Program, fx.Node]]],
    mutate: Callable[[Program, fx.Node, random.Random], None],
) -> Mutation:
    """A mutation at one node of one rank, of those that fit."""

    def mutation(programs: Programs, rng: random.Random) -> bool:
        found = sites(programs)
        if found:
            mutate(*rng.choice(found), rng)
        return bool(found)

    return mutation


def only_with_two_axes(mutation: Mutation) -> Mutation:
    """The mutation, of programs for a mesh with several axes."""

    def mutate(programs: Programs, rng: random.Random) -> bool:
        mesh = programs[0].mesh
        return mesh is not None and len(mesh.names) > 1 and mutation(programs, rng)

    return mutate


# -- tools -----------------------------------------------------------------------------------------


def copied(program: Program) -> Program:
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.graph, {}))
    return program.with_graph(graph)


def nodes_of(program: Program, *targets: str) -> list[fx.Node]:
    return [node for node in program.graph.nodes if str(node.target) in targets]


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
    program: Program, after: fx.Node, x: fx.Node, to: int | None, source: int | None,
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


def instead(program: Program, node: fx.Node, target: Any, rest: tuple[Any, ...]) -> fx.Node:
    """Let a communication bring `target(brought, *rest)` instead."""
    brought: Any = node.args[0]
    with program.graph.inserting_before(node):
        made = program.graph.call_function(target, (brought, *rest))
    node.args = (made,)
    return made


def brings_less(program: Program, node: fx.Node, rng: random.Random) -> None:
    """One fewer along the last dim."""
    brought: Any = node.args[0]
    *shape, last = local_type(program, brought).shape
    made = instead(program, node, aten.slice.Tensor, (len(shape), 0, last - 1))
    made.meta["type"] = TensorType.whole(type_of(brought).dtype, (*shape, last - 1))


def brings_double(program: Program, node: fx.Node, rng: random.Random) -> None:
    brought: Any = node.args[0]
    made = instead(program, node, aten.to.dtype, (torch.float64,))
    made.meta["type"] = double(local_type(program, brought))


def longer(type_: TensorType) -> TensorType:
    return TensorType.whole(type_.dtype, (*type_.shape[:-1], type_.shape[-1] + 1))


def double(type_: TensorType) -> TensorType:
    return TensorType.whole(torch.float64, type_.shape)


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


def needs(node: fx.Node, other: fx.Node) -> bool:
    """Whether a node is computed from another."""
    return other in _above(node)


def _above(node: fx.Node) -> Iterator[fx.Node]:
    queue, seen = [node], {node}
    while queue:
        for operand in queue.pop().all_input_nodes:
            if operand not in seen:
                seen.add(operand)
                queue.append(operand)
                yield operand
