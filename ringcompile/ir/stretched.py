"""A graph with many parts that are alike, written out from a program that has few of them.

Parts are blocks of layers, of which `shortened` finds out what is repeated (a `Repeat`), or the
steps of ring attentions (`passes/rank/alike_rings.py`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Protocol

from torch import fx
from torch.fx.node import map_aggregate

from ringcompile.errors import SourceLocation
from ringcompile.ir.calls import append

if TYPE_CHECKING:
    from ringcompile.ir.program import Program
    from ringcompile.ir.repeats import Repeats

# Of each run, the first three blocks and the last one are kept.
HEAD = 3
KEPT = HEAD + 1
_NOWHERE = SourceLocation()
_NUMBER = re.compile(r"(.*?)(?:_(\d+))?", re.DOTALL)


class UnclearError(Exception):
    """The blocks of a rank's program are not alike, or not as the names of the model's are."""


class StandIns(Protocol):
    """What stands, in a part that is left out, for the names and lines of the part that is there.

    Attributes:
        lines: for a source line, those in the parts ahead, by how many parts; None where they
            differ.
    """

    @property
    def lines(self) -> Mapping[SourceLocation, Sequence[SourceLocation] | None]:  # noqa: D102
        ...

    def name(self, name: str, ahead: int) -> str | None:
        """What has this name so many parts ahead; None for names that no part has."""


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


@lru_cache(maxsize=65536)  # the same names in every rank's program
def split(name: str) -> tuple[str, int]:
    """A name without the number that makes it unique, and that number."""
    found = _NUMBER.fullmatch(name)
    assert found is not None
    return found[1], int(found[2] or 0)


@dataclass(frozen=True, eq=False)
class Section:
    """A run of nodes of a graph, each shown by a node that is like it but for names and line.

    Attributes:
        nodes: in the order of the graph.
        names: what these nodes, and those that they read, are called in the graph.
        images: of a part that was left out, what stands for what.
        ahead: how many parts ahead of `nodes` it stands; 0 where `nodes` are shown only once.
    """

    nodes: Sequence[fx.Node]
    names: Mapping[fx.Node, str]
    images: StandIns | None = None
    ahead: int = 0

    def text(self, text: str) -> str:
        """A text argument: the name of a state of this block in place of the other block's."""
        return (self.images and self.images.name(text, self.ahead)) or text

    def location(self, location: SourceLocation) -> SourceLocation:
        """The user's line behind a node, where `location` is behind the one that shows it."""
        lines = self.images.lines.get(location) if self.images else None
        return location if lines is None else lines[self.ahead]


def sections_of(graph: fx.Graph) -> list[Section]:
    """All nodes of a graph, in order; of a stretched graph without writing it."""
    if isinstance(graph, StretchedGraph) and not graph.is_written:
        return _sections(graph)
    return [section_of(graph)]


@lru_cache(maxsize=1)  # a program is written in several forms, one after another
def _sections(graph: StretchedGraph) -> list[Section]:
    return graph.sections()


def num_nodes(graph: fx.Graph) -> int:
    """How many nodes a graph has; a stretched graph is not written for it."""
    if isinstance(graph, StretchedGraph) and not graph.is_written:
        return graph.writing.num_nodes()
    return len(graph.nodes)


def section_of(graph: fx.Graph) -> Section:
    """All nodes of a graph as they are; a stretched graph is written."""
    nodes = list(graph.nodes)
    return Section(nodes, {node: node.name for node in nodes})


class Writing(Protocol):
    """Knows what a graph consists of."""

    def sections(self) -> Iterator[Section]:
        """All nodes in order, found anew at every call."""

    def num_nodes(self) -> int:
        """How many nodes there are."""


class StretchedGraph(fx.Graph):
    """A graph that is written when something of it is asked for: most ranks' are never looked at.

    Attributes:
        kinds: nodes of every kind that it has.
        writing: knows what it consists of.
    """

    def __init__(self, kinds: Sequence[fx.Node], writing: Writing) -> None:
        self.kinds, self.writing = kinds, writing

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or self.is_written:
            raise AttributeError(name)
        found = self.sections()
        super().__init__()
        _write(self, found)
        return getattr(self, name)

    @property
    def is_written(self) -> bool:
        """Whether its nodes are there, and count."""
        return "_root" in self.__dict__

    def sections(self) -> list[Section]:
        """What it has or would have, in order."""
        return list(self.writing.sections())


def _write(graph: fx.Graph, sections: Sequence[Section]) -> None:
    """Write the nodes of all sections to an empty graph."""
    written: dict[str, fx.Node] = {}
    for section in sections:
        names, text = section.names, section.text

        def value(found: Any, names: Any = names, text: Any = text) -> Any:
            if isinstance(found, fx.Node):
                return written[names[found]]
            return text(found) if isinstance(found, str) else found

        for node in section.nodes:
            name = names[node]
            args, kwargs = map_aggregate((node.args, node.kwargs), value)
            new = written[name] = append(graph, node.op, node.target, args, kwargs, name)
            assert new.name == name, f"two nodes are called {name}"
            new.meta.update(node.meta)
            if "loc" in node.meta:
                new.meta["loc"] = section.location(node.meta["loc"])


class Stretching:
    """Goes through a graph of which blocks were left out, and finds what each node is called.

    Args:
        short: the program with few blocks.
        parts: the blocks that are repeated.
        heads: the placeholders of the whole program.
    """

    def __init__(
        self, short: Program, parts: Sequence[Repeat], heads: Sequence[fx.Node]
    ) -> None:
        self.short, self.parts, self.heads = short, parts, heads
        self.calls = [node for node in short.graph.nodes if node.op == "call_function"]
        self.given = {node.name for images in parts for node in images.images.run.calls}
        self.names: dict[fx.Node, str] = {}
        # What was added so far to the number in a made-up name.
        self.added: Counter[str] = Counter()

    def sections(self) -> Iterator[Section]:
        """All nodes in order."""
        nodes = self.short.graph.nodes
        self.names = {node: node.name for node in nodes if node.op == "placeholder"}
        self.added = Counter()
        yield Section(self.heads, {head: head.name for head in self.heads})
        at = 0
        for part in self.parts:
            yield self._copy(self.calls[at : part.end])
            for ahead in range(1, part.times + 1):
                yield self._repeat(part, ahead)
            self.added.update({base: step * part.times for base, step in part.steps.items()})
            at = part.end
        yield self._copy([*self.calls[at:], self.short.output_node])

    def num_nodes(self) -> int:
        """How many nodes there are."""
        repeated = sum((part.end - part.start) * part.times for part in self.parts)
        return len(self.heads) + len(self.calls) + repeated + 1

    def _copy(self, nodes: Sequence[fx.Node]) -> Section:
        self.names.update({node: self._name(node, self.added) for node in nodes})
        return Section(nodes, self._said(nodes))

    def _said(self, nodes: Sequence[fx.Node]) -> dict[fx.Node, str]:
        """The names of these nodes and of those that they read."""
        said = {node: self.names[node] for node in nodes}
        said.update({read: self.names[read] for node in nodes for read in node.all_input_nodes})
        return said

    def _name(self, node: fx.Node, added: Mapping[str, int]) -> str:
        if node.op != "call_function" or node.name in self.given:
            return node.name
        base, number = split(node.name)
        return f"{base}_{number + added[base]}" if added.get(base) else node.name

    def _repeat(self, part: Repeat, ahead: int) -> Section:
        """A block as it is so many blocks ahead; `names` then holds what its nodes are called."""
        size, images, nodes = part.end - part.start, part.images, self.calls[part.start : part.end]
        steps = {base: self.added[base] + step * ahead for base, step in part.steps.items()}
        behind = {before: self.names[node] for before, node
                  in zip(self.calls[part.start - size : part.start], nodes, strict=True)}
        self.names.update({
            node: images.name(node.name, ahead) or self._name(node, steps) for node in nodes
        })
        said = self._said(nodes)
        for read in said:
            if read.op == "placeholder":
                said[read] = images.name(read.name, ahead) or said[read]
            elif read in behind:
                said[read] = behind[read]
        return Section(nodes, said, images, ahead)
