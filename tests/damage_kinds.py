"""Kinds of damage to a graph: where each can be done, and what it does there.

Only what changes the meaning counts: operands that commute are not swapped, a number is not changed
where the op does not use it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from ringcompile.ir.expr import is_symbolic, simplify
from ringcompile.ir.nodes import results_of
from ringcompile.ir.program import Program
from ringcompile.ir.serialize import op_name
from ringcompile.ir.types import TensorType


@dataclass(frozen=True)
class Site:
    """A place in a graph, and what damages it; the text says what was done."""

    node: fx.Node
    do: Callable[[random.Random], str]

    @property
    def op(self) -> str:
        """The short name of the op."""
        return op_name(self.node.target).split(".")[1]

    def damage(self, rng: random.Random) -> str:
        """Do it, and say where and what."""
        return f"%{self.node.name} ({self.op}): {self.do(rng)}"


Kind = Callable[[Program, fx.Node], Iterator[Site]]
KINDS: dict[str, Kind] = {}


def kind(run: Kind) -> Kind:
    """Register a kind under its name in words."""
    KINDS[run.__name__.strip("_").replace("_", " ")] = run
    return run


def sites(program: Program, name: str) -> list[Site]:
    """All places for a kind of damage, in the part of the graph that the outputs depend on."""
    live = _live(program)
    return [
        site for node in program.graph.nodes if node.op == "call_function" and node in live
        for site in KINDS[name](program, node)
    ]


def _live(program: Program) -> set[fx.Node]:
    live: set[fx.Node] = set()
    for node in reversed(program.graph.nodes):
        sends = str(node.target) == "ringcompile.shift_start.default"
        if node.op == "output" or node in live or sends:
            live.add(node)
            live.update(node.all_input_nodes)
    return live


def _name(node: fx.Node) -> str:
    return op_name(node.target)


def _short(node: fx.Node) -> str:
    """The op's own name; empty for what is no call."""
    return _name(node).split(".")[1] if node.op == "call_function" else ""


def _keyword(node: fx.Node, name: str, new: Callable[[Any, random.Random], Any]) -> Site:
    def do(rng: random.Random) -> str:
        before = node.kwargs[name]
        node.kwargs = {**node.kwargs, name: new(before, rng)}
        return f"{name} {before} -> {node.kwargs[name]}"
    return Site(node, do)


def _argument(node: fx.Node, place: int, new: Callable[[Any, random.Random], Any]) -> Site:
    def do(rng: random.Random) -> str:
        before = node.args[place]
        changed = new(before, rng)
        node.args = (*node.args[:place], changed, *node.args[place + 1 :])
        return f"argument {place}: {before} -> {changed}"
    return Site(node, do)


def _scaled(value: Any, rng: random.Random) -> Any:
    return value * rng.choice((0.5, 0.97, 1.01, 2.0))


def _beside(value: Any, rng: random.Random) -> Any:
    return simplify(value + rng.choice((-1, 1)))


@kind
def scale(program: Program, node: fx.Node) -> Iterator[Site]:
    if isinstance(node.kwargs.get("scale"), float):
        yield _keyword(node, "scale", _scaled)


@kind
def band(program: Program, node: fx.Node) -> Iterator[Site]:
    """An edge of what a query sees, by one; `lower` of attention that is causal hides the key 0."""
    for name in ("lower", "upper"):
        if isinstance(node.kwargs.get(name), int):
            yield _keyword(node, name, _beside)


@kind
def mask_dropped(program: Program, node: fx.Node) -> Iterator[Site]:
    for name in ("key_mask", "mask"):
        if isinstance(node.kwargs.get(name), fx.Node):
            yield _keyword(node, name, lambda before, rng: None)
    if "attention" in _name(node) or "attend" in _name(node):
        for place, value in enumerate(node.args):
            if place > 1 and isinstance(value, fx.Node) and "mask" in _operand(node, place):
                yield _argument(node, place, lambda before, rng: None)


def _operand(node: fx.Node, place: int) -> str:
    schema: Any = node.target
    return str(schema._schema.arguments[place].name)


@kind
def epsilon(program: Program, node: fx.Node) -> Iterator[Site]:
    """A small number that is added, or that a norm takes."""
    for place, value in enumerate(node.args):
        if isinstance(value, float) and 0 < abs(value) < 1e-3:
            yield _argument(node, place, lambda before, rng: before * rng.choice((0.1, 3.0, 10.0)))


@kind
def factor(program: Program, node: fx.Node) -> Iterator[Site]:
    """A number that the op adds, multiplies with, or raises to."""
    if _short(node) in ("mul", "add", "sub", "div", "pow", "rsub"):
        for place, value in enumerate(node.args):
            if isinstance(value, float) and abs(value) >= 1e-3 and abs(value) < 1e4:
                yield _argument(node, place, _scaled)


@kind
def offset(program: Program, node: fx.Node) -> Iterator[Site]:
    """A whole number that is added or compared with: positions, ids, slots."""
    if _short(node) in ("add", "sub", "rsub", "lt", "le", "gt", "ge", "eq", "ne"):
        for place, value in enumerate(node.args):
            if type(value) is int or is_symbolic(value):
                yield _argument(node, place, _beside)


@kind
def clamp_bound(program: Program, node: fx.Node) -> Iterator[Site]:
    if "clamp" in _name(node):
        for place, value in enumerate(node.args):
            if place and type(value) is int:
                yield _argument(node, place, lambda before, rng: 1 if before != 1 else 2)


@kind
def piece_moved(program: Program, node: fx.Node) -> Iterator[Site]:
    """A slice begins and ends one further, or one before."""
    if _name(node) != "aten.slice.Tensor" or len(node.args) < 4:
        return
    source: Any = node.args[0]
    size = results_of(source)[0].shape[node.args[1]]  # type: ignore[index]
    begin, end = node.args[2:4]
    if type(begin) is int and type(end) is int and type(size) is int and end - begin < size:
        step = 1 if end < size else -1

        def do(rng: random.Random) -> str:
            node.args = (*node.args[:2], begin + step, end + step, *node.args[4:])
            return f"{begin}:{end} -> {begin + step}:{end + step}"
        yield Site(node, do)


@kind
def positions_moved(program: Program, node: fx.Node) -> Iterator[Site]:
    """Positions of tokens, or of the queries or keys of a block, belong to another chunk."""
    if _name(node) == "ringcompile.positions.default":
        yield _argument(node, 0, _other_chunk)
    for name in ("queries", "keys"):
        if node.kwargs.get(name):
            yield _keyword(node, name, _other_chunk)


def _other_chunk(chunks: Any, rng: random.Random) -> Any:
    place = rng.randrange(len(chunks))
    return [simplify(c + 1) if i == place else c for i, c in enumerate(chunks)]


@kind
def operands_swapped(program: Program, node: fx.Node) -> Iterator[Site]:
    """Of an op that does not commute, two operands of one type."""
    if _short(node) in ("add", "mul", "logical_and", "__and__", "bitwise_and",
                                     "maximum", "minimum", "logical_or", "eq", "ne"):
        return
    tensors = [(i, a) for i, a in enumerate(node.args) if isinstance(a, fx.Node)]
    for (i, a), (j, b) in pairwise(tensors):
        if a is not b and a.meta.get("type") == b.meta.get("type"):
            def do(rng: random.Random, i: int = i, j: int = j) -> str:
                args = list(node.args)
                args[i], args[j] = args[j], args[i]
                node.args = tuple(args)
                return f"operands {i} and {j} swapped"
            yield Site(node, do)


@kind
def op_left_out(program: Program, node: fx.Node) -> Iterator[Site]:
    """What is read is the first operand, where that has the same type."""
    first = node.args[0] if node.args else None
    communicates = _name(node).startswith("ringcompile.")
    if communicates or not isinstance(first, fx.Node) or not node.users:
        return
    if first.meta.get("type") != node.meta.get("type") or _idle(node):
        return

    def do(rng: random.Random) -> str:
        node.replace_all_uses_with(first)
        return f"left out: {first.name} is read instead"
    yield Site(node, do)


def _idle(node: fx.Node) -> bool:
    """Ops that may well change nothing."""
    return _short(node) in ("reshape", "expand", "clamp", "to", "positive", "slice",
                                         "clone", "unsqueeze", "view", "contiguous", "copy")


@kind
def another_value_read(program: Program, node: fx.Node) -> Iterator[Site]:
    """An operand is another value of the same type, computed before."""
    before = list(_before(node))
    for place, value in enumerate(node.args):
        if not isinstance(value, fx.Node) or not isinstance(value.meta.get("type"), TensorType):
            continue
        others = [n for n in before if n is not value and n.meta.get("type") == value.meta["type"]
                  and not _same(n, value)]
        if others:
            yield _argument(node, place, lambda old, rng, others=others: rng.choice(others))


def _before(node: fx.Node) -> Iterator[fx.Node]:
    for other in node.graph.nodes:
        if other is node:
            return
        started = "shift_start" in _name(other)
        if isinstance(other.meta.get("type"), TensorType) and not started:
            yield other


def _same(a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes may hold the same numbers: one op over the same arguments, or an alias."""
    return (a.target, a.args, a.kwargs) == (b.target, b.args, b.kwargs) or (
        (_idle(a) and a.args[0] is b) or (_idle(b) and b.args[0] is a)
    )


@kind
def dim(program: Program, node: fx.Node) -> Iterator[Site]:
    """A reduction, a softmax or a running sum along another dim of the same size."""
    first = node.args[0] if node.args else None
    if not isinstance(first, fx.Node) or not isinstance(first.meta.get("type"), TensorType):
        return
    shape = results_of(first)[0].shape
    if _short(node) in ("softmax", "cumsum", "argmax", "sort", "flip") and (
        len(node.args) > 1 and type(node.args[1]) is int
    ):
        here = node.args[1] % len(shape)
        others = [d for d in range(len(shape)) if d != here and shape[d] != 1]
        if others:
            yield _argument(node, 1, lambda before, rng: rng.choice(others))


@kind
def fill(program: Program, node: fx.Node) -> Iterator[Site]:
    """What is written where a mask says so."""
    if _name(node) in ("aten.masked_fill.Scalar", "aten.where.ScalarOther", "aten.full.default"):
        place = 1 if _name(node) == "aten.full.default" else 2
        if len(node.args) > place and isinstance(node.args[place], float):
            yield _argument(node, place, lambda before, rng: 0.0 if before or math.isinf(before)
                            else 1.0)


@kind
def weight_of_another(program: Program, node: fx.Node) -> Iterator[Site]:
    """A weight is read in the place of another one of the same type."""
    held = [n for n in program.graph.nodes if n.op == "placeholder" and n.name in program.weights]
    for place, value in enumerate(node.args):
        if isinstance(value, fx.Node) and value in held:
            others = [n for n in held if n is not value and n.meta["type"] == value.meta["type"]]
            if others:
                yield _argument(node, place, lambda old, rng, others=others: rng.choice(others))


@kind
def rounding(program: Program, node: fx.Node) -> Iterator[Site]:
    """A float is rounded to whole numbers on the way."""
    types = results_of(node) if "type" in node.meta else ()
    started = _name(node).startswith("ringcompile.")
    if started or len(types) != 1 or types[0].dtype != torch.float32 or not node.users:
        return

    def do(rng: random.Random) -> str:
        with node.graph.inserting_after(node):
            new = node.graph.call_function(torch.ops.aten.round.default, (node,))
        new.meta.update(node.meta)
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        return "rounded"
    yield Site(node, do)
