"""A value that exists in one layout, wanted in another: computed there directly, or moved.

Passes that place values write a new graph from left to right. Where an op wants an operand in
another layout, a request is pushed backwards through the op rules, to what the operand was computed
from: a rank's positions, its rows of a table or a mask, its rows of a weight, cost nothing. What
cannot be had that way becomes a `redistribute`, which `partition` turns into a slice or a
collective.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping

from torch import fx

from ringcompile.ir.calls import Call, replace_operands
from ringcompile.ir.layout import Layout
from ringcompile.ir.nodes import layout_of, type_of
from ringcompile.ir.rules import find_rule
from ringcompile.ir.types import TensorType
from ringcompile.ops.schemas import op
from ringcompile.passes.base import Builder

REDISTRIBUTE = op("redistribute")


class Requests:
    """The graph that is written, and every value's forms in it.

    Attributes:
        builder: writes the graph.
        placeholders: placeholder name -> input, of the new graph.
        axis_sizes: of the mesh.
        single: names of values that are computed in one layout only; see one_origin.py.
    """

    def __init__(
        self,
        builder: Builder,
        axis_sizes: Mapping[str, int],
        single: frozenset[str] = frozenset(),
    ) -> None:
        self.builder, self.axis_sizes, self.single = builder, dict(axis_sizes), single
        self.placeholders: dict[str, str] = {}
        self.known: dict[tuple[fx.Node, Layout], fx.Node | None] = {}

    def request(self, node: fx.Node, wanted: Layout) -> fx.Node:
        """`node` (of the new graph) in the wanted layout."""
        if layout_of(node) == wanted:
            return node
        found = self.recomputed(node, wanted)
        return found if found is not None else self.redistributed(node, wanted)

    def recomputed(self, node: fx.Node, wanted: Layout) -> fx.Node | None:
        """The node computed in the wanted layout from operands that are to be had without sending.

        From whole to split this always saves work; from split to whole only cheap ops on
        token-sized inputs are computed again.
        """
        key = (node, wanted)
        if key not in self.known:
            self.known[key] = self._recompute(node, wanted)
        return self.known[key]

    def _recompute(self, node: fx.Node, wanted: Layout) -> fx.Node | None:
        have = layout_of(node)
        if have == wanted:
            return node
        if node.op == "placeholder":
            return self.input_again(node, wanted)
        if node.target is operator.getitem:
            return self._pick_again(node, wanted)
        rule, shrinking = find_rule(node.target), have.is_whole
        if origin_of(node) in self.single:
            return None
        if rule is None or not (rule.cheap or shrinking) or not self.may_recompute(node, wanted):
            return None
        call = Call(node)
        wants = rule.backward(call, wanted, self.axis_sizes)
        if wants is None:
            return None
        operands = []
        for operand, want in zip(call.operands, wants, strict=True):
            found = self.recomputed(operand, want)
            if found is None and shrinking:
                found = self.redistributed(operand, want)
            if found is None:
                return None
            operands.append(found)
        return self.emit(node, operands, wanted)

    def may_recompute(self, node: fx.Node, wanted: Layout) -> bool:
        """Whether a pass allows an op to be computed in that layout."""
        return True

    def _pick_again(self, node: fx.Node, wanted: Layout) -> fx.Node | None:
        """One of several results, of an op computed again; they have one layout, the first's."""
        source, index = node.args
        if len(wanted.dims) != len(layout_of(source).dims):  # type: ignore[arg-type]
            return None
        again = self.recomputed(source, wanted)  # type: ignore[arg-type]
        return again and self.pick(again, index, node.name)  # type: ignore[arg-type]

    def input_again(self, node: fx.Node, wanted: Layout) -> fx.Node | None:
        """An input the caller passes can be passed in a second layout, if it is small."""
        large = type_of(node).dtype.is_floating_point and len(type_of(node).shape) > 2
        if node.name not in self.placeholders or large:
            return None
        again = self.builder.placeholder(
            f"{node.name}_{'whole' if wanted.is_whole else 'split'}",
            type_of(node).with_layout(wanted),
        )
        self.placeholders[again.name] = self.placeholders[node.name]
        return again

    def redistributed(self, node: fx.Node, wanted: Layout) -> fx.Node:
        """The node moved to the wanted layout, once for all that want it."""
        key = (node, wanted)
        if self.known.get(key) is None:
            have = layout_of(node)
            self.known[key] = self.builder.call(
                REDISTRIBUTE,
                (node,),
                type_of(node).with_layout(wanted),
                layout=str(wanted),
                why=_how(have, wanted),
            )
        found = self.known[key]
        assert found is not None
        return found

    def emit(self, node: fx.Node, operands: list[fx.Node], layout: Layout) -> fx.Node:
        """The same call on these operands, in this layout."""
        args, kwargs = replace_operands(node, operands)
        types = node.meta["type"]
        placed = (
            types.with_layout(layout)
            if isinstance(types, TensorType)
            else tuple(type_.with_layout(_of_rank(layout, len(type_.shape))) for type_ in types)
        )
        new = self.builder.call(node.target, args, placed, name=node.name, **kwargs)
        new.meta.update(loc=node.meta.get("loc"), origin=origin_of(node))
        for key in ("why", "mask_kind"):
            if key in node.meta:
                new.meta[key] = node.meta[key]
        return new

    def pick(self, source: fx.Node, index: int, name: str) -> fx.Node:
        """One of several results, in the layout that they have."""
        type_ = source.meta["type"][index]
        return self.builder.call(operator.getitem, (source, index), type_, name=name)


def origin_of(node: fx.Node) -> str:
    """The name that a value had before layouts; its forms in several layouts share it."""
    origin: str = node.meta.get("origin", node.name)
    return origin


def _how(have: Layout, wanted: Layout) -> str:
    """What a redistribution does, in a word."""
    if have.partial:
        return "summed"
    lost, won = set(have.axes) - set(wanted.axes), set(wanted.axes) - set(have.axes)
    if not lost and not won:
        return "exchanged"
    return "sliced" if not lost else "gathered"


def _of_rank(layout: Layout, rank: int) -> Layout:
    """The layout of an op's first result, for one of the others: of another rank they are whole."""
    assert layout.is_whole or rank == len(layout.dims), f"{layout} for {rank} dims"
    return layout if rank == len(layout.dims) else Layout.whole(rank)


def placeholders_first(graph: fx.Graph) -> fx.Graph:
    """Placeholders that were added where they were wanted are moved to the front."""
    nodes = list(graph.nodes)
    first_call = next(node for node in nodes if node.op != "placeholder")
    for node in nodes[nodes.index(first_call) :]:
        if node.op == "placeholder":
            first_call.prepend(node)
    return graph
