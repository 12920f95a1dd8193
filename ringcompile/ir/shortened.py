"""A program with a few of many alike blocks, and the same program with all of them again.

    prefix  B0 B1 B2 B3 ... B78 B79  suffix      the program for all ranks
    prefix  B0 B1 B2 B79  suffix                 shortened: what passes for one rank see
    prefix' B0' B1' B2' B79' suffix'             what they make of it
    prefix' B0' B1' B2' B3' ... B78' B79' suffix'    stretched: B2' again for every block left out

Passes that treat each block by itself give the same program for a rank either way; tests compare
the two to the byte. Whatever a rank's program does not show to be alike is not stretched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import fx

from ringcompile.errors import SourceLocation
from ringcompile.ir.calls import append
from ringcompile.ir.program import Program
from ringcompile.ir.repeats import Pairs, Repeats, find_runs
from ringcompile.ir.stretched import (
    HEAD,
    Images,
    Repeat,
    StretchedGraph,
    Stretching,
    UnclearError,
    split,
)


@dataclass(frozen=True, eq=False)
class Shortened:
    """A program for all ranks, and the same with few of its alike blocks.

    Attributes:
        whole: the program.
        runs: its alike blocks.
        program: the short one.
    """

    whole: Program
    runs: tuple[Repeats, ...]
    program: Program

    def stretched(self, rank: Program) -> Program | None:
        """The program of a rank with all blocks, from what passes made of the short program.

        None where the rank's blocks do not show how those left out would look.
        """
        try:
            return _Stretch(self, rank).program()
        except UnclearError:
            return None

    @cached_property
    def images(self) -> list[Images]:
        """For each run, what stands for what in later blocks."""
        return [Images(run) for run in self.runs]


def shorten(program: Program) -> Shortened | None:
    """Find blocks that are alike and leave most of them out; None where there are too few."""
    runs = tuple(find_runs(program))
    if not runs:
        return None
    left_out: set[fx.Node] = set()
    stands_in: dict[fx.Node, fx.Node] = {}
    for run in runs:
        for index in range(HEAD, run.count - 1):
            left_out.update(run.block(index))
        stands_in.update(zip(run.block(run.count - 2), run.block(HEAD - 1), strict=True))
    graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in program.graph.nodes:
        unread = node.op == "placeholder" and node.users and all(u in left_out for u in node.users)
        if node in left_out or unread:
            continue
        args, kwargs = fx.map_arg(
            (node.args, node.kwargs), lambda n: env[stands_in[n] if n in left_out else n]
        )
        env[node] = append(graph, node.op, node.target, args, kwargs, node.name)
        env[node].meta.update(node.meta)
    names = {node.name for node in graph.nodes if node.op == "placeholder"}
    return Shortened(program, runs, _with_placeholders(program, graph, names))


def _with_placeholders(program: Program, graph: fx.Graph, names: set[str]) -> Program:
    """The program over another graph, with what belongs to placeholders of these names."""
    tables = ("placeholders", "weights", "state")
    changes = {
        table: {k: v for k, v in getattr(program, table).items() if k in names} for table in tables
    }
    return program.with_graph(graph, **changes)


class _Stretch:
    """Finds, in a rank's program, the block of each run that is to be repeated."""

    def __init__(self, shortened: Shortened, rank: Program) -> None:
        self.shortened, self.rank = shortened, rank
        self.calls = [node for node in rank.graph.nodes if node.op == "call_function"]
        self.places = {node: i for i, node in enumerate(self.calls)}
        self.by_name = {node.name: i for i, node in enumerate(self.calls)}
        self.given = {node.name for node in shortened.whole.graph.nodes}
        self.bases = {split(name)[0] for name in self.given}

    def program(self) -> Program:
        """The stretched program; its graph is written when it is looked at."""
        parts = [part for images in self.shortened.images if (part := self._part(images))]
        added = [part for part in parts if part.times]
        names = {n.name for n in self.rank.graph.nodes if n.op == "placeholder"}
        for part in added:
            names |= self._placeholders(part)
        whole = self.shortened.whole
        heads = [n for n in whole.graph.nodes if n.op == "placeholder" and n.name in names]
        known = {node.name: node.meta for node in heads}
        kinds = [node.op == "placeholder" for node in self.rank.graph.nodes]
        same = all(node.meta == known[node.name] for node in self.rank.graph.nodes
                   if node.op == "placeholder" and node.name in known)
        if len(heads) != len(names) or kinds != sorted(kinds, reverse=True) or not same:
            raise UnclearError
        graph = StretchedGraph(
            list(self.rank.graph.nodes), Stretching(self.rank, added, heads)
        )
        tables = _with_placeholders(whole, graph, names)
        return self.rank.with_graph(
            graph, placeholders=tables.placeholders, weights=tables.weights, state=tables.state
        )

    def _part(self, images: Images) -> Repeat | None:
        """The block to repeat; None for a run of another stage."""
        run = images.run
        marks = [
            (run.block(run.count - 1)[i], run.block(HEAD - 1)[i], run.block(HEAD - 2)[i])
            for i in range(run.period)
        ]
        mark = next((m for m in marks if m[0].name in self.by_name), None)
        if mark is None:
            return None
        places = [self.by_name.get(node.name) for node in mark]
        end, start, before = (-1 if place is None else place for place in places)
        if before < 0 or end - start != start - before or end <= start:
            raise UnclearError
        steps = self._steps(images, before, start, end)
        self._check_around(before, start, end)
        return Repeat(images, start, end, steps)

    def _steps(self, images: Images, before: int, start: int, end: int) -> dict[str, int]:
        """What is added to the numbers in made-up names from one block to the next."""
        pairs = _Named(self.rank, self.places, start - before, lambda n: images.name(n, 1))
        steps: dict[str, int] = {}
        lines = images.lines
        for place in range(start, end):
            one, other = self.calls[place - pairs.period], self.calls[place]
            if not pairs.alike(one, other) or not self._lines_follow(lines, one, other):
                raise UnclearError
            if one.name in self.given:
                if images.name(one.name, 1) != other.name:
                    raise UnclearError
                continue
            (base, first), (other_base, second) = split(one.name), split(other.name)
            step = steps.setdefault(base, second - first)
            if base != other_base or base in self.bases or not 0 < step == second - first:
                raise UnclearError
        return steps

    @staticmethod
    def _lines_follow(
        lines: dict[SourceLocation, list[SourceLocation] | None], one: fx.Node, other: fx.Node
    ) -> bool:
        here, there = one.meta.get("loc"), other.meta.get("loc")
        if here not in lines:
            return bool(here == there)
        return (known := lines[here]) is not None and known[1] == there

    def _check_around(self, before: int, start: int, end: int) -> None:
        """Blocks read one block back at most, and what follows reads the last one."""
        for place in range(start, end):
            shared = self.calls[place - (end - start)].all_input_nodes
            for operand in self.calls[place].all_input_nodes:
                at = self.places.get(operand)
                if at is not None and (at < before) != (operand in shared):
                    raise UnclearError
        inner = set(self.calls[before:start])
        for node in [*self.calls[end:], self.rank.output_node]:
            if any(operand in inner for operand in node.all_input_nodes):
                raise UnclearError

    def _placeholders(self, part: Repeat) -> set[str]:
        read = {
            operand.name for node in self.calls[part.start : part.end]
            for operand in node.all_input_nodes if operand.op == "placeholder"
        }
        found = {
            part.images.name(name, ahead) for name in read for ahead in range(1, part.times + 1)
        }
        return {name for name in found if name is not None}


class _Named(Pairs):
    """Pairs of which texts may be names of nodes, each of its own block."""

    def __init__(
        self, program: Program, places: dict[fx.Node, int], period: int,
        next_name: Callable[[str], str | None],
    ) -> None:
        super().__init__(program, places, period)
        self.next_name = next_name

    def match(self, one: Any, other: Any) -> bool:
        """As for all pairs; a text may be the name of what stands in the block."""
        if isinstance(one, str) and isinstance(other, str):
            return other == (self.next_name(one) or one)
        return super().match(one, other)

    def _same_value(self, one: fx.Node, other: fx.Node) -> bool:
        named = self.next_name(one.name) if one.op == "placeholder" else None
        if named is not None:
            return other.name == named
        return super()._same_value(one, other)
