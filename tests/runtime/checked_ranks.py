"""What ranks do, one of them otherwise than the others, while they check each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ringcompile import artifact
from ringcompile.errors import SourceLocation
from ringcompile.ir.communication import ALL_REDUCE
from ringcompile.ir.program import Program
from ringcompile.mesh import Mesh
from ringcompile.passes.base import Builder
from ringcompile.runtime.collectives import Collective
from ringcompile.runtime.distributed import Peer
from ringcompile.runtime.exchange import Exchange
from ringcompile.runtime.executor import Request, Shift, Wait
from ringcompile.runtime.join import Rank
from ringcompile.runtime.runner import Settings

LINES = {name: SourceLocation(f"models/{name}.py", 7, f"layers.{name}") for name in "abcdxy"}


def send(
    node: str, size: int = 3, dtype: torch.dtype = torch.float32, of: str = "k",
    chunks: tuple[int, ...] = (0,), to: int | None = 1, source: int | None = 1,
) -> Shift:
    tensor = torch.ones(size, dtype=dtype) if to is not None else None
    return Shift(node, "ring", tensor, to, source, (size,), dtype, chunks, chunks, of)


def reduce(node: str, size: int = 3, kind: str = "all_reduce", detail: str = "") -> Collective:
    return Collective(node, kind, "ring", torch.ones(size), detail)


def rows(node: str, sends: tuple[int, int], takes: tuple[int, int], width: int = 2) -> Collective:
    tensor = torch.ones(sum(sends), width)
    return Collective(node, "dispatch", "ring", tensor, sends=sends, takes=takes)


# What each of two ranks does, in order; a shift is waited for at once.
CASES: dict[str, tuple[list[Request], list[Request]]] = {
    "alike": (
        [send("a"), reduce("x"), send("a", 5), rows("y", (1, 2), (1, 4)), reduce("x")],
        [send("b"), reduce("x"), send("c", 5), rows("y", (4, 1), (2, 1)), reduce("x")],
    ),
    "a shorter message": ([send("a", 3)], [send("b", 2)]),
    "another dtype of as many bytes": (
        [send("a", 4, torch.float16)], [send("b", 4, torch.bfloat16)]
    ),
    "values for keys": ([send("a", of="k")], [send("b", of="v")]),
    "another chunk": ([send("a", chunks=(0,))], [send("b", chunks=(1,))]),
    "two messages swapped": (
        [send("a", of="k"), send("c", of="v")], [send("b", of="v"), send("d", of="k")]
    ),
    "a message nobody takes": (
        [send("a", source=None), reduce("x")], [send("b", to=None, source=None), reduce("x")]
    ),
    "another shape": ([reduce("x", 4)], [reduce("x", 2)]),
    "another collective": ([reduce("x")], [reduce("x", kind="gather")]),
    "another dim": (
        [reduce("x", kind="gather", detail="along dim 0")],
        [reduce("x", kind="gather", detail="along dim 1")],
    ),
    "two collectives swapped": ([reduce("x"), reduce("y")], [reduce("y"), reduce("x")]),
    "one collective left out": ([reduce("x"), reduce("y")], [reduce("x")]),
    "one collective doubled": ([reduce("x")], [reduce("x"), reduce("x")]),
    "a message for a collective": ([send("a")], [reduce("x")]),
    "fewer rows than announced": (
        [rows("y", (1, 2), (1, 3))], [rows("y", (2, 1), (2, 1))]
    ),
}


def act(rank: Rank, case: str) -> None:
    """Do what a rank does in a case."""
    exchange = Exchange(Mesh.parse("ring=2"), rank, locations=LINES, check=True)
    for request in CASES[case][rank.index]:
        _do(exchange, _seen_by(request, rank.index))
    exchange.end()


def _seen_by(request: Request, index: int) -> Request:
    """The cases name rank 1 as the peer; for rank 1 it is rank 0."""
    if not isinstance(request, Shift):
        return request
    other = 1 - index
    return replace(
        request, to=None if request.to is None else other,
        source=None if request.source is None else other,
    )


def _do(exchange: Exchange, request: Request) -> None:
    answer = exchange.answer(request)
    if isinstance(request, Shift):
        exchange.answer(Wait(request.node, answer))


def out_of_order(rank: Rank) -> tuple[list[float], int]:
    """Messages that are waited for in another order than they are sent in."""
    exchange = Exchange(Mesh.parse("ring=2"), rank, check=True)
    other = 1 - rank.index
    shifts = [replace(send(str(i), of=str(i), to=other, source=other),
                      tensor=torch.full((3,), 10.0 * rank.index + i)) for i in range(3)]
    handles = [exchange.answer(shift) for shift in shifts]
    got = [float(exchange.answer(Wait("w", handles[i]))[0]) for i in (2, 0, 1)]
    exchange.end()
    return got, exchange.bytes_sent


class _Changed:
    """An artifact, in which one rank's program is another one."""

    def __init__(self, found: artifact.Artifact, rank: int, change: Callable[[Program], Program]):
        self.found, self.changed, self.change = found, rank, change
        self.mesh, self.source, self.identity = found.mesh, found.source, found.identity
        self.carried = self.prefill = None

    def rank(self, rank: int) -> Program:
        program = self.found.rank(rank)
        return self.change(program) if rank == self.changed else program


def _without_a_sum(program: Program) -> Program:
    """The last all-reduce is left out, which no type tells."""
    builder = Builder()
    nodes = list(program.graph.nodes)
    last = next(node for node in reversed(nodes) if str(node.target) == ALL_REDUCE)
    for node in nodes:
        builder.env[node] = builder.env[node.args[0]] if node is last else builder.copy(node)
    return program.with_graph(builder.graph)


def run_with_one_sum_less(rank: Rank, folder: str | Path, inputs: Any) -> None:
    """Run an artifact of which rank 1 leaves one all-reduce out."""
    found = _Changed(artifact.load(folder), 1, _without_a_sum)
    Peer(found, rank, settings=Settings(check_finite=True)).run(inputs)
