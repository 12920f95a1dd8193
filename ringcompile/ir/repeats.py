"""Blocks of a program that are alike: a model with 80 equal layers holds one of them 80 times.

What counts is the graph alone, not the names of layers. Position `i` of a program's calls and
position `i + period` are alike if they are the same op with the same arguments and type, where each
reads the calls of its own block or of the block before it in the same places, weights of the same
shape, or one and the same value from before the first block. A block may begin in the middle of a
layer: the first layer reads the embedding where others read the layer before them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
from torch import fx

from ringcompile.ir.program import Program

# Fewer alike blocks than this gain nothing.
FEWEST = 6
_SAID = (int, str, sympy.Expr, type(None))
_NOTES = ("why", "why_not", "mask_kind", "stage", "fused")


@dataclass(frozen=True, eq=False)
class Repeats:
    """Calls `start` to `start + period * count` of a program: `count` blocks that are alike.

    Attributes:
        calls: all calls of the program, in order.
        start: where the first block begins.
        period: the number of calls in a block.
        count: the number of blocks.
    """

    calls: Sequence[fx.Node]
    start: int
    period: int
    count: int

    @property
    def end(self) -> int:
        """The position behind the last block."""
        return self.start + self.period * self.count

    def block(self, index: int) -> Sequence[fx.Node]:
        """The calls of a block."""
        first = self.start + index * self.period
        return self.calls[first : first + self.period]


def find_runs(program: Program) -> list[Repeats]:
    """The runs of at least `FEWEST` blocks that make up most of a program; none where none do."""
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    found: list[Repeats] = []
    for period in _periods(calls):
        runs = _runs(program, calls, period)
        if sum(run.period * run.count for run in runs) > sum(r.period * r.count for r in found):
            found = runs
    return found


def _periods(calls: Sequence[fx.Node]) -> list[int]:
    """How far apart calls of the same op with the same type lie, the most frequent first."""
    last: dict[Any, int] = {}
    gaps: dict[Any, Counter[int]] = defaultdict(Counter)
    for i, node in enumerate(calls):
        said = tuple(v for v in node.kwargs.values() if isinstance(v, _SAID))  # a window's width
        key = (node.target, node.meta.get("type"), said, len(node.args))
        if key in last:
            gaps[key][i - last[key]] += 1
        last[key] = i
    often = Counter[int]()
    for counts in gaps.values():
        if len(counts) <= 3 or counts.most_common(1)[0][1] > sum(counts.values()) / 2:
            often.update({gap: n for gap, n in counts.items() if n >= FEWEST - 2})
    return [gap for gap, _ in sorted(often.items(), key=lambda item: -item[0] * item[1])[:4]]


def _runs(program: Program, calls: Sequence[fx.Node], period: int) -> list[Repeats]:
    places = {node: i for i, node in enumerate(calls)}
    pairs = Pairs(program, places, period)
    runs: list[Repeats] = []
    at = 0
    while at + period < len(calls):
        end = at
        while end + period < len(calls) and pairs.alike(calls[end], calls[end + period]):
            end += 1
        count = (end - at) // period + 1
        if count >= FEWEST:
            run = Repeats(calls, at, period, count)
            runs += [run] if _is_closed(run, places, program) else []
            at = run.end
        else:
            at = end + 1
    return runs


class Pairs:
    """Whether two calls a period apart are alike.

    Attributes:
        program: which they belong to.
        places: the position of each call.
        period: how far apart.
    """

    def __init__(self, program: Program, places: dict[fx.Node, int], period: int) -> None:
        self.program, self.places, self.period = program, places, period

    def alike(self, one: fx.Node, other: fx.Node) -> bool:
        """Whether they are the same but for the block that they stand in."""
        return (
            one.target is other.target
            and one.meta.get("type") == other.meta.get("type")
            and all(one.meta.get(key) == other.meta.get(key) for key in _NOTES)
            and _same_line(one, other)
            and self.match(one.args, other.args)
            and self.match(one.kwargs, other.kwargs)
        )

    def match(self, one: Any, other: Any) -> bool:
        """Whether two arguments are the same but for the block."""
        if isinstance(one, fx.Node):
            return isinstance(other, fx.Node) and self._same_value(one, other)
        if type(one) is not type(other):
            return False
        if isinstance(one, dict):
            return one.keys() == other.keys() and all(
                self.match(value, other[key]) for key, value in one.items()
            )
        if isinstance(one, list | tuple):
            return len(one) == len(other) and all(map(self.match, one, other))
        return bool(one == other)

    def _same_value(self, one: fx.Node, other: fx.Node) -> bool:
        if one is other:
            return True
        if one in self.places and other in self.places:
            return self.places[other] == self.places[one] + self.period
        tables = (self.program.weights, self.program.state)
        return (
            one.op == other.op == "placeholder"
            and one.meta.get("type") == other.meta.get("type")
            and any(one.name in table and other.name in table for table in tables)
            and self._same_data(one, other)
        )

    def _same_data(self, one: fx.Node, other: fx.Node) -> bool:
        weights, state = self.program.weights, self.program.state
        if one.name in state:
            return state[one.name] == state[other.name]
        first, second = weights[one.name], weights[other.name]
        return (first.dtype, first.shape) == (second.dtype, second.shape)


def _same_line(one: fx.Node, other: fx.Node) -> bool:
    first, second = one.meta.get("loc"), other.meta.get("loc")
    if first is None or second is None:
        return first is second
    return (first.file, first.line) == (second.file, second.line)


def _is_closed(run: Repeats, places: dict[fx.Node, int], program: Program) -> bool:
    """Whether blocks read the block before them at most, and what follows reads the last one."""
    inside = range(run.start, run.end)
    for node in [*run.calls[run.start :], program.output_node]:
        place = places.get(node, len(run.calls))
        block = (min(place, run.end) - run.start) // run.period
        for operand in node.all_input_nodes:
            at = places.get(operand, -1)
            if at in inside and (at - run.start) // run.period < block - 1:
                return False
    return True
