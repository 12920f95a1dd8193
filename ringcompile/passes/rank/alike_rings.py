"""Ring attentions that are alike are written out once for a rank, and their steps repeated.

    a0 = ring_attention(q0, k0, v0) ... a1 = ring_attention(q1, k1, v1)    before lower-ring
    steps of a0                     ... a1 = ring_attention(q1, k1, v1)    what passes make of it
    steps of a0                     ... steps of a0, over q1, k1, v1       the rank's program

A ring of 128 ranks has a thousand nodes for each attention on each rank, and layers have the same
ones but for their names. The check across ranks sees the steps of the first: they end with no
transfer under way, and all ranks of a stage have the others in the same places.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from ringcompile.errors import SourceLocation
from ringcompile.ir.calls import Call
from ringcompile.ir.fused import Member, member_of
from ringcompile.ir.nodes import location_of
from ringcompile.ir.program import Program
from ringcompile.ir.repeats import Pairs
from ringcompile.ir.stretched import Section, StretchedGraph, split
from ringcompile.ops.schemas import op
from ringcompile.passes.base import Pass, Pipeline
from ringcompile.passes.rank.lower_ring import LowerRing

# Along a shorter ring there is little to repeat.
_LONG = 8


def alike_attentions(program: Program) -> dict[str, str]:
    """For each ring attention of the program for all ranks, the first one that is like it, by name.

    Empty where each is the only one of its kind, or the ring is short.
    """
    assert program.mesh is not None
    first: list[fx.Node] = []
    found: dict[str, str] = {}
    for node in program.graph.nodes:
        if node.target is op("ring_attention") and program.mesh.size(node.kwargs["axis"]) >= _LONG:
            like = next((other for other in first if _Form(program).alike(other, node)), None)
            first += [node] if like is None else []
            found[node.name] = node.name if like is None else like.name
    return found if len(first) < len(found) else {}


class _Form(Pairs):
    """Two attentions are alike if their operands have the same types, and are one value alike."""

    def __init__(self, program: Program) -> None:
        super().__init__(program, {}, 0)
        self.other: dict[fx.Node, fx.Node] = {}
        self.one: dict[fx.Node, fx.Node] = {}

    def _same_value(self, one: fx.Node, other: fx.Node) -> bool:
        return (
            one.meta.get("type") == other.meta.get("type")
            and self.other.setdefault(one, other) is other
            and self.one.setdefault(other, one) is one
        )


def _operands(node: fx.Node) -> list[fx.Node]:
    """What an attention reads, in the order of its op's arguments."""
    return [value for value in Call(node).arguments.values() if isinstance(value, fx.Node)]


@dataclass(frozen=True, eq=False)
class Outlined:
    """A rank's program, and the short one in which most attentions are not written out.

    Attributes:
        program: its graph is written when it is first looked at.
        short: what the check across ranks takes.
    """

    program: Program
    short: Program


def outlined(
    program: Program, alike: Mapping[str, str], passes: Sequence[Pass], verify: bool
) -> Outlined | None:
    """A rank's program, with the steps of attentions that are alike written once.

    None where the names of steps would not follow from those of the first attention.

    Args:
        program: the program for all ranks.
        alike: from `alike_attentions`.
        passes: those of the rank.
        verify: whether programs are checked behind every pass.
    """
    at = next(i for i, step in enumerate(passes) if isinstance(step, LowerRing))
    given = Pipeline(passes[:at], verify=verify).run(program)
    rings = [node for node in given.graph.nodes if node.name in alike]
    # The last step takes the attention's place in a fused group, so that has to be the same place.
    kinds = {node.name: (alike[node.name], member_of(node)) for node in rings}
    shown: dict[tuple[str, Member | None], str] = {}
    for node in rings:
        shown.setdefault(kinds[node.name], node.name)
    left = frozenset(node.name for node in rings) - set(shown.values())
    if not left:
        return None
    lowered = Pipeline([LowerRing(left)], verify=verify).run(given)
    short = Pipeline(passes[at + 1 :], verify=verify).run(lowered)
    writing = _Writing(given, lowered, short, {
        node.name: shown[kinds[node.name]] for node in rings
    })
    if not writing.is_clear:
        return None
    of_every_kind = [node for node in short.graph.nodes if node.name not in left]
    graph = StretchedGraph(of_every_kind, writing)
    return Outlined(short.with_graph(graph), short)


@dataclass(frozen=True, eq=False)
class _Steps:
    """The steps of the attention that is written out, as they stand for those of others.

    Attributes:
        nodes: in the short program; the last has the attention's name.
        given: the attention before it was written out.
        others: the attentions that they are shown for, itself among them, in order.
    """

    nodes: Sequence[fx.Node]
    given: fx.Node
    others: Sequence[fx.Node]

    @cached_property
    def lines(self) -> Mapping[SourceLocation, Sequence[SourceLocation]]:
        """The attentions' lines, those of their steps."""
        own = location_of(self.given)
        return {own: [own, *map(location_of, self.others)]}

    def name(self, name: str, ahead: int) -> str | None:
        """Transfers say the name of the attention that they are for."""
        return self.others[ahead - 1].name if name == self.given.name else None


class _Writing:
    """Goes through a rank's graph, and finds what each node of a step is called.

    Names that passes make up are numbered in order, so the steps of an attention have the numbers
    that follow on all steps before them.

    Args:
        given: the program before ring attentions are written out.
        lowered: the short program behind that.
        short: the short program behind all passes.
        shown: for each attention, the one whose steps are written out.
    """

    def __init__(
        self, given: Program, lowered: Program, short: Program, shown: Mapping[str, str]
    ) -> None:
        self.given = {node.name: node for node in given.graph.nodes}
        self.short, self.shown = short, shown
        made = {name: steps for name, steps in self._steps(lowered) if name in shown}
        # How many names of each kind the steps of an attention make up, and how many were made up
        # before them in the short program.
        self.counts = {
            name: Counter(split(node.name)[0] for node in steps[:-1])
            for name, steps in made.items()
        }
        self.before: dict[str, Counter[str]] = {}
        so_far: Counter[str] = Counter()
        for name, steps in self._steps(lowered):
            self.before[name] = so_far.copy()
            so_far.update(split(node.name)[0] for node in steps[:-1])
        self.other_names = {split(name)[0] for name in self.given}
        self.made_up = so_far
        self.axes = set(short.mesh.names if short.mesh is not None else ())

    def _steps(self, program: Program) -> Iterator[tuple[str, list[fx.Node]]]:
        """The steps of each attention that is written out, by its name."""
        steps: list[fx.Node] = []
        for node in program.graph.nodes:
            steps.append(node)
            if node.name in self.given or node.op == "output":
                if len(steps) > 1:
                    yield node.name, steps
                steps = []

    @property
    def is_clear(self) -> bool:
        """Whether all names follow: no name of the program is one that could be made up."""
        written = [name for name, _ in self._steps(self.short)]
        return (
            not self.other_names & self.made_up.keys()
            and not self.axes & self.shown.keys()
            and set(written) == set(self.before)
            and set(self.shown.values()) <= set(written)
        )

    def sections(self) -> Iterator[Section]:
        """All nodes in order."""
        steps = {name: self._shown_for(name, nodes) for name, nodes in self._steps(self.short)}
        so_far, ahead = Counter[str](), Counter[str]()
        plain: list[fx.Node] = []
        inside = {node for made in steps.values() for node in made.nodes}
        for node in self.short.graph.nodes:
            if node in inside and node.name not in self.shown:
                continue
            if node.name not in self.shown:
                plain.append(node)
                continue
            yield self._plain(plain)
            plain = []
            first = self.shown[node.name]
            ahead[first] += 1
            yield self._repeated(steps[first], ahead[first], so_far)
            so_far.update(self.counts[first])
        yield self._plain(plain)

    def num_nodes(self) -> int:
        """How many nodes there are."""
        steps = {name: len(nodes) for name, nodes in self._steps(self.short)}
        repeated = sum(steps[first] - 1 for name, first in self.shown.items() if name != first)
        return len(self.short.graph.nodes) + repeated

    def _shown_for(self, first: str, nodes: Sequence[fx.Node]) -> _Steps:
        others = [self.given[name] for name, shown in self.shown.items() if shown == first]
        return _Steps(nodes, self.given[first], others)

    @staticmethod
    def _plain(nodes: list[fx.Node]) -> Section:
        names = {read: read.name for node in nodes for read in node.all_input_nodes}
        return Section(nodes, names | {node: node.name for node in nodes})

    def _repeated(self, steps: _Steps, ahead: int, so_far: Counter[str]) -> Section:
        """The steps as those of one of the attentions that they are shown for."""
        first, other = steps.given.name, steps.others[ahead - 1]
        before = self.before[first]
        operands = zip(_operands(steps.given), _operands(other), strict=True)
        named = {one.name: two.name for one, two in operands}
        named[first] = other.name
        for node in steps.nodes[:-1]:
            base, number = split(node.name)
            number += so_far[base] - before[base]
            named[node.name] = f"{base}_{number}" if number else base
        names: dict[fx.Node, str] = {}
        for node in steps.nodes:
            for value in (node, *node.all_input_nodes):
                names[value] = named[value.name]
        return Section(steps.nodes, names, steps, ahead)
