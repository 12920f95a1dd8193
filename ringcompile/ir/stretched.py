"""A graph with many alike blocks, written out from a program that has few of them.

What is repeated, and what stands for what in each repetition, is a `Repeat`; `shortened` finds
them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import fx
from torch.fx.node import map_aggregate

from ringcompile.errors import SourceLocation
from ringcompile.ir.calls import append
from ringcompile.ir.program import Program
from ringcompile.ir.repeats import Repeats

# Of each run, the first three blocks and the last one are kept.
HEAD = 3
KEPT = HEAD + 1
_NOWHERE = SourceLocation()
_NUMBER = re.compile(r"(.*?)(?:_(\d+))?", re.DOTALL)


class UnclearError(Exception):
    """The blocks of a rank's program are not alike, or not as the names of the model's are."""


class Images:
    """For the names and lines of a run's first blocks, those that stand for them further on."""

    def __init__(self, run: Repeats) -> None:
        self.run = run
        self._places: dict[str, list[fx.Node]] = {}
        for index in range(HEAD):
            for offset, node in enumerate(run.block(index)):
                across = [run.block(i)[offset] for i in range(index, run.count - HEAD + index)]
                self._places[node.name] = across
                for others in _operands(across):
                    if self._places.setdefault(others[0].name, others) != others:
                        raise UnclearError  # two weights in one block, one in another

    def name(self, name: str, ahead: int) -> str | None:
        """What has this name so many blocks ahead; None for names that no block has."""
        found = self._places.get(name)
        return None if found is None else found[ahead].name

    @cached_property
    def lines(self) -> dict[SourceLocation, list[SourceLocation] | None]:
        """For each source line of the first blocks the same further on; None where it differs."""
        lines: dict[SourceLocation, list[SourceLocation] | None] = {}
        for across in self._places.values():
            own = [node.meta.get("loc", _NOWHERE) for node in across]
            if own[0] is not _NOWHERE:
                known = lines.setdefault(own[0], own)
                if known != own:
                    lines[own[0]] = None
        return lines


def _operands(across: list[fx.Node]) -> Iterator[list[fx.Node]]:
    """The placeholders that a call of each block reads, those that differ."""
    read = [node.all_input_nodes for node in across]
    if len({len(nodes) for nodes in read}) > 1:
        raise UnclearError
    for values in zip(*read, strict=True):
        if values[0].op == "placeholder" and values[0] is not values[-1]:
            yield list(values)


@dataclass(frozen=True, eq=False)
class Repeat:
    """A block of a rank's program that stands for all that were left out behind it.

    Attributes:
        images: of the run that it comes from.
        start, end: where it lies among the calls of the rank's program.
        steps: what is added from block to block to the number in a made-up name, by what stands
            before the number.
    """

    images: Images
    start: int
    end: int
    steps: dict[str, int]

    @property
    def times(self) -> int:
        """How many blocks were left out."""
        return self.images.run.count - KEPT


def split(name: str) -> tuple[str, int]:
    """A name without the number that makes it unique, and that number."""
    found = _NUMBER.fullmatch(name)
    assert found is not None
    return found[1], int(found[2] or 0)


class StretchedGraph(fx.Graph):
    """A graph that is written when something of it is asked for: most ranks' are never looked at.

    Attributes:
        short: the program of the rank with few blocks.
    """

    def __init__(self, short: Program, parts: Sequence[Repeat], heads: Sequence[fx.Node]) -> None:
        self.short, self._parts, self._heads = short, parts, heads

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_root" in self.__dict__:
            raise AttributeError(name)
        super().__init__()
        _Writer(self, self.short, self._parts, self._heads).write()
        return getattr(self, name)


class _Writer:
    """Writes a stretched graph."""

    def __init__(
        self, graph: fx.Graph, short: Program, parts: Sequence[Repeat], heads: Sequence[fx.Node]
    ) -> None:
        self.graph, self.short, self.parts, self.heads = graph, short, parts, heads
        self.calls = [node for node in short.graph.nodes if node.op == "call_function"]
        self.env: dict[fx.Node, fx.Node] = {}
        self.placeholders: dict[str, fx.Node] = {}
        self.given = {node.name for images in parts for node in images.images.run.calls}
        # What was added so far to the number in a made-up name.
        self.added: Counter[str] = Counter()

    def write(self) -> None:
        self._write_placeholders()
        at = 0
        for part in self.parts:
            self._copy(self.calls[at : part.end])
            for ahead in range(1, part.times + 1):
                self._repeat(part, ahead)
            self.added.update({base: step * part.times for base, step in part.steps.items()})
            at = part.end
        self._copy([*self.calls[at:], self.short.output_node])

    def _write_placeholders(self) -> None:
        own = {node.name: node for node in self.short.graph.nodes if node.op == "placeholder"}
        for head in self.heads:
            new = self._append(head, (), {}, head.name)
            self.placeholders[head.name] = new
            new.meta.update(head.meta)
            if head.name in own:
                self.env[own[head.name]] = new

    def _append(self, node: fx.Node, args: Any, kwargs: Any, name: str) -> fx.Node:
        new = append(self.graph, node.op, node.target, args, kwargs, name)
        assert new.name == name, f"two nodes are called {name}"
        return new

    def _copy(self, nodes: Sequence[fx.Node]) -> None:
        for node in nodes:
            args, kwargs = fx.map_arg((node.args, node.kwargs), self.env.__getitem__)
            new = self.env[node] = self._append(node, args, kwargs, self._name(node, self.added))
            new.meta.update(node.meta)

    def _name(self, node: fx.Node, added: Mapping[str, int]) -> str:
        if node.op != "call_function" or node.name in self.given:
            return node.name
        base, number = split(node.name)
        return f"{base}_{number + added[base]}" if added.get(base) else node.name

    def _repeat(self, part: Repeat, ahead: int) -> None:
        """Write a block as it is so many blocks ahead; `env` then holds its nodes."""
        size, images = part.end - part.start, part.images
        steps = {base: self.added[base] + step * ahead for base, step in part.steps.items()}
        behind = {self.calls[i - size]: self.env[self.calls[i]]
                  for i in range(part.start, part.end)}

        def value(found: Any) -> Any:
            if isinstance(found, str):
                return images.name(found, ahead) or found
            if not isinstance(found, fx.Node):
                return found
            if found.op == "placeholder":
                name = images.name(found.name, ahead)
                return self.env[found] if name is None else self.placeholders[name]
            return behind[found] if found in behind else self.env[found]

        for node in self.calls[part.start : part.end]:
            args, kwargs = map_aggregate((node.args, node.kwargs), value)
            name = images.name(node.name, ahead) or self._name(node, steps)
            new = self.env[node] = self._append(node, args, kwargs, name)
            new.meta.update(node.meta)
            if (lines := images.lines.get(node.meta.get("loc", _NOWHERE))) is not None:
                new.meta["loc"] = lines[ahead]
