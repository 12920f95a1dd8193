"""Parts of a model that each rank may run on its own tokens, as if there were no others.

Routing tokens to experts is written in ops that no layout fits: they sort, count and scatter all
tokens. Yet a token's result does not depend on other tokens, or only on how many slots of an expert
they took. Such a part (a region) is found here from the ops that by their rules would have to see
all tokens, and what lies between them. Whether it is token-wise is not guessed: `token_wise` runs
it whole and split on random data, and a region that differs is left to the rules.

With a capacity, `exact` drops the very tokens that a single device drops: whether a token finds a
slot is computed over all ranks (a running sum along the sequence, see scan.py) and enters the
region from outside; in it, slots are only addresses, and are counted by each rank alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import sympy
from torch import fx
from torch.utils import _pytree as pytree

from ringcompile.ir.calls import Call, aten_name
from ringcompile.ir.expr import OWN, SEQUENCE, Size, is_symbolic, product, simplify, symbol
from ringcompile.ir.layout import WHOLE, DimLayout, Layout
from ringcompile.ir.nodes import error_at, location_of, reached, results_of, type_of
from ringcompile.ir.program import Program
from ringcompile.ops.schemas import op

_S, _M = symbol(SEQUENCE), symbol(OWN)
# What chooses: experts are routed to behind one of these.
_CHOOSING = frozenset({"topk", "argmax", "max"})
_COMPARING = frozenset({"lt", "le", "gt", "ge"})
_ROUNDING = (sympy.floor, sympy.ceiling, sympy.Max, sympy.Min, sympy.Mod)


@dataclass(frozen=True)
class Region:
    """Nodes that run on each rank's own tokens.

    Attributes:
        nodes: all of them.
        entering: values from outside that hold tokens, with the layout that they are taken in.
        leaving: values that are used outside, with the layout that they are given back in.
        counted: of `nodes`, the comparisons with a capacity that are computed over all tokens, and
            the layout that they are taken in.
        slots: the largest number of slots an expert can need for one rank's tokens, where that is
            counted over all ranks.
        prefix: how many tokens the sequence has beyond those of the inputs.
        local: it has a capacity, which each rank counts alone: that changes the result, as asked.
        declared: the user says that it is token-wise.
        name: the layer.
    """

    nodes: frozenset[fx.Node]
    entering: Mapping[fx.Node, Layout]
    leaving: Mapping[fx.Node, Layout]
    counted: Mapping[fx.Node, Layout] = field(default_factory=dict)
    slots: Size | None = None
    prefix: int = 0
    local: bool = False
    declared: bool = False
    name: str = ""

    def own(self, size: Any) -> Any:
        """A size of all tokens as that of one rank's own."""
        if not is_symbolic(size) or _S not in size.free_symbols:
            return size
        if self.slots is not None:
            rounded = [a for a in size.atoms(*_ROUNDING) if _S in a.free_symbols]
            outermost = [a for a in rounded if not any(a != b and b.has(a) for b in rounded)]
            stands = {a: sympy.Dummy(integer=True, positive=True) for a in outermost}
            kept = {d: sympy.Min(a, self.slots) for a, d in stands.items()}
            return simplify(self._own(size.xreplace(stands)).xreplace(kept))
        return simplify(self._own(size))

    def _own(self, size: Any) -> Any:
        """Of all tokens there are s + prefix, of a rank's own ones m."""
        return size.xreplace({_S: _M - self.prefix})

    @cached_property
    def outside(self) -> frozenset[fx.Node]:
        """Nodes of the region that are computed outside as well, over all tokens."""
        wanted = set(self.counted)
        if not self.declared:
            wanted |= {
                node for node in self.nodes - self.leaving.keys()
                if any(user not in self.nodes for user in node.users)
            }
        return frozenset(_above(wanted, set(self.nodes)) - set(self.leaving))

    @property
    def has_capacity(self) -> bool:
        """Whether a size in it is rounded: shares of a capacity do not add up to the whole."""
        return any(_is_rounded(size) for node in self.nodes for size in sizes_of(node))


def sizes_of(node: fx.Node) -> list[Any]:
    """All sizes in a node's types and arguments."""
    shapes = [size for type_ in results_of(node) for size in type_.shape]
    return shapes + [leaf for leaf in pytree.tree_leaves((node.args, node.kwargs))
                     if is_symbolic(leaf)]


def describe(regions: Sequence[Region], by_call: bool = False) -> list[str]:
    """What becomes of each region, layers that are treated alike in one line.

    Args:
        regions: of a program.
        by_call: whether the program is for the next tokens, which every rank has.
    """
    alike: dict[str, list[str]] = {}
    for region in regions:
        alike.setdefault(_description(region, by_call), []).append(region.name or "the model")
    return [
        f"{names[0]}{f' and {len(names) - 1} layers like it' if len(names) > 1 else ''}: {text}"
        for text, names in alike.items()
    ]


def _description(region: Region, by_call: bool) -> str:
    what = "declared token-wise: runs" if region.declared else "experts run"
    if by_call:
        text = f"{what} on the new tokens of each call"
        return f"{text}; capacity is counted over these" if region.local else text
    text = f"{what} on each rank's own tokens"
    if region.counted:
        return f"{text}; capacity is counted over all ranks"
    return f"{text}; capacity is counted by each rank alone" if region.local else text


def _is_rounded(size: Any) -> bool:
    return is_symbolic(size) and any(_S in atom.free_symbols for atom in size.atoms(*_ROUNDING))


def grows(size: Any) -> bool:
    """Whether a size grows with the sequence."""
    return is_symbolic(size) and _S in size.free_symbols


def token_dims(node: fx.Node) -> list[int]:
    """The dims of a single result whose size grows with the sequence."""
    return [i for i, size in enumerate(results_of(node)[0].shape) if grows(size)]


@dataclass
class Finder:
    """Finds regions of a program that was placed once by rules alone.

    Attributes:
        program: before placement.
        layouts: the layout each node got.
        gathering: nodes for which a split operand was gathered.
        capacity: "exact" or "local".
        prefix: how many tokens the sequence has beyond those of the inputs.
    """

    program: Program
    layouts: Mapping[fx.Node, Layout]
    gathering: frozenset[fx.Node]
    capacity: str
    prefix: int = 0

    def __post_init__(self) -> None:
        nodes = list(self.program.graph.nodes)
        self.order = {node: i for i, node in enumerate(nodes)}
        self.calls = {node for node in nodes if node.op == "call_function"}
        self.of_tokens: set[fx.Node] = set()
        for node in nodes:
            is_input = node.op == "placeholder" and node.name in self.program.placeholders
            if is_input or any(n in self.of_tokens for n in node.all_input_nodes):
                self.of_tokens.add(node)

    def find(self) -> list[Region]:
        """What is declared, and a region for each router that would have tokens gathered.

        Raises:
            RingCompileError: something other than tokens goes into what is declared, or out of it.
        """
        found = self._declared()
        seeds: dict[fx.Node, set[fx.Node]] = {}
        for node, router in self._routers().items():
            if node in self.gathering:
                seeds.setdefault(router, set()).add(node)
        for nodes in seeds.values():
            region = self._grown(nodes)
            if region is None or any(node.target is op("attention") for node in region.nodes):
                continue
            if any(region.nodes & other.nodes & self.of_tokens for other in found):
                continue
            region = self._with_capacity(region)
            if region is not None:
                found.append(region)
        return found

    def _routers(self) -> dict[fx.Node, fx.Node]:
        """For each node the last choice of experts that it depends on."""
        router: dict[fx.Node, fx.Node] = {}
        for node in self.program.graph.nodes:
            above = [router[n] for n in node.all_input_nodes if n in router]
            if _short(node) in _CHOOSING and node in self.of_tokens:
                router[node] = node
            elif above:
                router[node] = max(above, key=self.order.__getitem__)
        return router

    def _declared(self) -> list[Region]:
        """What the user marked with `tokenwise`, from where tokens enter to where they leave."""
        marks: dict[int, set[fx.Node]] = {}
        for node in filter(is_mark, self.program.graph.nodes):
            marks.setdefault(Call(node)["region"], set()).add(node)
        found = []
        for nodes in marks.values():
            region = self._grown(nodes)
            if region is None:
                first = min(nodes, key=self.order.__getitem__)
                raise error_at(
                    first,
                    "a function declared token-wise takes or returns something that has no entry "
                    "for each token",
                    hint="pass in and return tensors with one dim that is the tokens",
                )
            region = replace(region, declared=True)
            found.append(self._with_capacity(region) or region)
        return found

    def _grown(self, seeds: set[fx.Node]) -> Region | None:
        """The smallest region around the seeds that tokens alone cross."""
        nodes = set(seeds)
        while True:
            before = len(nodes)
            held = nodes & self.of_tokens  # constants may serve several layers
            nodes |= _below(held, self.calls) & _above(held, self.calls)
            entering = self._pull(nodes)
            leaving = self._push(seeds, nodes, entering) if entering is not None else None
            if entering is None or leaving is None:
                return None
            if len(nodes) == before:
                first = min(nodes, key=self.order.__getitem__)
                return Region(
                    frozenset(nodes), entering, leaving, prefix=self.prefix,
                    name=location_of(first).layer,
                )

    def _pull(self, nodes: set[fx.Node]) -> dict[fx.Node, Layout] | None:
        """Take in what feeds the nodes, up to tokens of features; None where it is something else.

        Counts and choices are taken in: they mean something only beside what made them. So are
        positions and constants that grow with the sequence.
        """
        entering: dict[fx.Node, Layout] = {}
        work = list(nodes)
        while work:
            node = work.pop()
            for operand in node.all_input_nodes:
                if operand in nodes or operand in entering or not self._matters(operand):
                    continue
                if self._may_enter(operand, by_mark=is_mark(node)):
                    entering[operand] = self.layouts[operand]
                elif operand in self.calls:
                    nodes.add(operand)
                    work.append(operand)
                else:
                    return None
        return entering

    def _may_enter(self, node: fx.Node, by_mark: bool) -> bool:
        """Whether a value is features with an entry for each token, or any such that is marked."""
        types, layout = results_of(node), self.layouts[node]
        one_dim = sum(map(bool, layout.dims)) == 1 == len(token_dims(node))
        features = len(types) == 1 and types[0].dtype.is_floating_point
        return node in self.of_tokens and one_dim and (features or by_mark)

    def _matters(self, node: fx.Node) -> bool:
        """Whether a value differs when there are fewer tokens."""
        if node in self.of_tokens:
            return any(map(grows, sizes_of(node)))
        return node.op != "placeholder" and any(map(grows, sizes_of(node)))

    def _push(
        self,
        seeds: set[fx.Node],
        nodes: set[fx.Node],
        entering: Mapping[fx.Node, Layout],
    ) -> dict[fx.Node, Layout] | None:
        """Take in the users of what only means something inside; None where they lie outside.

        Features with an entry for each token may leave. What does not depend on other tokens can
        be had outside as well, and need not.
        """
        known = {
            results_of(node)[0].shape[dim]: layout.dims[dim]
            for node, layout in entering.items() for dim in token_dims(node)
        }
        sums = {node for node in nodes if _short(node) == "cumsum"}
        inside = _below(seeds | sums, nodes)
        leaving: dict[fx.Node, Layout] = {}
        work = sorted(inside, key=self.order.__getitem__)
        while work:
            node = work.pop(0)
            outside = [user for user in node.users if user not in nodes]
            if not outside:
                continue
            layout = self._as_tokens(node, known)
            if layout is not None:
                leaving[node] = layout
            elif all(user in self.calls for user in outside):
                nodes.update(outside)
                work += outside
            else:
                return None
        return {node: layout for node, layout in leaving.items()
                if any(user not in nodes for user in node.users)}

    def _as_tokens(
        self, node: fx.Node, known: Mapping[Size, DimLayout]
    ) -> Layout | None:
        """The layout of features with an entry for each token, as those that entered; or None."""
        dims, types = token_dims(node), results_of(node)
        if len(types) != 1 or len(dims) != 1 or types[0].shape[dims[0]] not in known:
            return None
        if not types[0].dtype.is_floating_point and not is_mark(node):
            return None
        atoms = known[types[0].shape[dims[0]]]
        return Layout(tuple(atoms if i == dims[0] else WHOLE for i in range(len(types[0].shape))))

    def _with_capacity(self, region: Region) -> Region | None:
        """The region with its capacity counted as the user asks; None where that cannot be had."""
        if not region.has_capacity:
            return region
        return self._exact(region) if self.capacity == "exact" else replace(region, local=True)

    def _exact(self, region: Region) -> Region | None:
        """Whether a token finds a slot is counted over all ranks."""
        sums = [node for node in region.nodes if _short(node) == "cumsum"]
        counts = _below(sums, set(region.nodes))
        tests = {
            node for node in region.nodes
            if _short(node) in _COMPARING and node.all_input_nodes[0] in counts
            and any(map(_is_rounded, pytree.tree_leaves((node.args, node.kwargs))))
        }
        if not tests or any(sum(map(bool, self.layouts[t].dims)) != 1 for t in tests):
            return None
        slots = region._own(sympy.sympify(self._most_slots(sums)))
        counted = {test: self.layouts[test] for test in tests}
        return replace(region, counted=counted, slots=slots)

    def _most_slots(self, sums: list[fx.Node]) -> Size:
        """How often an expert can be chosen: once by each token where `topk` chooses."""
        above = _above(sums, set(self.order))
        choices = [node for node in above if _short(node) == "topk"]
        if not choices:
            return product([
                len(sums), sum(results_of(node)[0].shape[Call(node)["dim"]] for node in sums)
            ])
        last = max(choices, key=self.order.__getitem__)
        scores = type_of(last.all_input_nodes[0]).shape
        dim = Call(last)["dim"] % len(scores)
        return product([size for i, size in enumerate(scores) if i != dim])


def may_route(program: Program) -> bool:
    """Whether there is anything that a region could be made of."""
    return any(_short(node) in _CHOOSING or is_mark(node) for node in program.graph.nodes)


def is_mark(node: fx.Node) -> bool:
    """Whether tokens enter or leave here what the user declared token-wise."""
    return node.target is op("tokenwise")


def _short(node: fx.Node) -> str:
    return aten_name(node.target)


def _below(nodes: Iterable[fx.Node], group: set[fx.Node]) -> set[fx.Node]:
    """The nodes and all that depends on them, as far as it goes through the group."""
    return reached(nodes, lambda node: [user for user in node.users if user in group])


def _above(nodes: Iterable[fx.Node], group: set[fx.Node]) -> set[fx.Node]:
    """The nodes and all that they depend on, as far as it goes through the group."""
    return reached(nodes, lambda node: [n for n in node.all_input_nodes if n in group])
