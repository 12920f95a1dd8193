"""Give every tensor a layout: seeded at the inputs, carried by the op rules, changed only in sight.

The graph keeps its global meaning. Where an op needs an operand in another layout, `place` first
tries to compute it there directly (a slice of positions, of a table, of a mask costs nothing), and
otherwise writes a `redistribute` node, which `partition` turns into a local slice or a collective.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from ringcompile.errors import RingCompileError
from ringcompile.ir.calls import Call, replace_operands
from ringcompile.ir.expr import SEQUENCE, Size, equal, is_symbolic, simplify, symbol
from ringcompile.ir.layout import WHOLE, Layout
from ringcompile.ir.nodes import error_at, layout_of, type_of
from ringcompile.ir.program import Program
from ringcompile.ir.rules import ConflictError, FactorRule, Placement, Rule, all_whole, find_rule
from ringcompile.ir.types import SequenceSplit, TensorType
from ringcompile.mesh import Mesh
from ringcompile.ops.schemas import op
from ringcompile.passes.base import Builder, Pass
from ringcompile.passes.own_tokens import OwnTokens
from ringcompile.passes.regions import CAPACITIES, Finder, Region, describe, may_route
from ringcompile.passes.token_wise import TokenWise

_ATTENTION, _REDISTRIBUTE = op("attention"), op("redistribute")
_SUPPORTED_AXES = ("ring",)
ORDERS = ("contiguous", "zigzag")


@dataclass(frozen=True)
class Place(Pass):
    """Layouts for a mesh.

    Attributes:
        mesh: the parallel plan.
        order: which positions a rank holds; `auto` is zigzag where all attention is causal.
        gather_unknown: compute what has no rule on whole operands, on every rank, instead of
            refusing it.
        capacity: whose tokens count where experts have a capacity, "exact" or "local"; see
            regions.py.
    """

    name: ClassVar[str] = "place"
    mesh: Mesh
    order: str = "auto"
    gather_unknown: bool = False
    capacity: str = "exact"

    def run(self, program: Program) -> Program:
        """Give every node a layout; a redistribute stands where an operand is wanted in another."""
        sequence = SequenceSplit(
            (("ring", self.mesh.size("ring")),), self._order(program), _sequence_length(program)
        )
        self._check_mesh()
        regions = self._regions(program, sequence)
        return _Placer(program, self.mesh, sequence, self.gather_unknown, regions).run()

    def _regions(self, program: Program, sequence: SequenceSplit) -> list[Region]:
        """What each rank runs on its own tokens; by rules alone the model is placed first."""
        if self.capacity not in CAPACITIES:
            raise RingCompileError(
                f"unknown capacity '{self.capacity}'", hint=f"one of: {', '.join(CAPACITIES)}"
            )
        prefix = simplify(sequence.length - symbol(SEQUENCE))
        if not isinstance(prefix, int) or not may_route(program):
            return []
        scout = _Placer(program, self.mesh, sequence, gather_unknown=True, regions=[])
        scout.run()
        layouts = {node: layout_of(new) for node, new in scout.builder.env.items()}
        finder = Finder(program, layouts, frozenset(scout.gathering), self.capacity, prefix)
        return list(filter(TokenWise(program).holds, finder.find()))

    def _check_mesh(self) -> None:
        for axis, size in self.mesh.axes:
            if axis not in _SUPPORTED_AXES and size > 1:
                raise RingCompileError(
                    f"mesh axis '{axis}' has no placement rules yet",
                    hint=f"axes that work: {', '.join(_SUPPORTED_AXES)}",
                )

    def _order(self, program: Program) -> str:
        if self.order in ORDERS:
            return self.order
        if self.order != "auto":
            raise RingCompileError(
                f"unknown order '{self.order}'", hint=f"orders are: auto, {', '.join(ORDERS)}"
            )
        calls = [Call(node) for node in program.graph.nodes if node.target is _ATTENTION]
        causal = calls and all(c["lower"] == 0 and c["upper"] is None for c in calls)
        return "zigzag" if causal else "contiguous"


def _sequence_length(program: Program) -> Size:
    """The length that is split: the one that most self-attentions have, of those that may vary.

    It is not a length of the inputs where the model adds prefix tokens, or cuts patches.
    """
    lengths: Counter[Size] = Counter()
    for node in program.graph.nodes:
        if node.target is _ATTENTION:
            queries, keys = (type_of(n).shape[2] for n in Call(node).operands[:2])
            if equal(queries, keys):
                lengths[queries] += 1
    if not lengths:
        if not any(is_symbolic(size) for spec in program.inputs for size in spec.type.shape):
            raise RingCompileError(
                "there is no sequence to split: the model has no attention that is understood, and "
                "its code fixes the length",
                hint="; ".join(program.notes) or None,
            )
        return symbol(SEQUENCE)
    return max(lengths, key=lambda x: (is_symbolic(x), lengths[x], x == symbol(SEQUENCE)))


class _Placer:
    def __init__(
        self,
        program: Program,
        mesh: Mesh,
        sequence: SequenceSplit,
        gather_unknown: bool,
        regions: Sequence[Region],
    ) -> None:
        self.program, self.mesh, self.sequence = program, mesh, sequence
        self.gather_unknown = gather_unknown
        self.axis_sizes = dict(mesh.axes)
        self.builder = Builder()
        self.placeholders: dict[str, str] = {}
        self.requests: dict[tuple[fx.Node, Layout], fx.Node | None] = {}
        self.notes: list[str] = []
        self.routing = describe(regions)
        self.gathering: set[fx.Node] = set()
        self.writers: dict[fx.Node, list[OwnTokens]] = {}
        for region in regions:
            writer = OwnTokens(region, self.builder, self._wanted)
            for node in region.nodes:
                self.writers.setdefault(node, []).append(writer)

    def run(self) -> Program:
        for node in self.program.graph.nodes:
            self.builder.at(node)
            if node.op == "placeholder":
                self.builder.env[node] = self._placeholder(node)
            elif node.op == "call_function":
                writers = self.writers.get(node, [])
                for writer in writers:
                    writer.write(node)
                if not writers or any(node in writer.region.outside for writer in writers):
                    self.builder.env[node] = self._call(node)
            else:
                self.builder.output(tuple(map(self._value, node.args[0])))
        return self.program.with_graph(
            _placeholders_first(self.builder.graph),
            placeholders=self.placeholders,
            mesh=self.mesh,
            sequence=self.sequence,
            notes=tuple(dict.fromkeys((*self.program.notes, *self.routing, *self.notes))),
            without_rule=tuple(dict.fromkeys(self.notes)),
        )

    def _placeholder(self, node: fx.Node) -> fx.Node:
        type_ = type_of(node)
        if node.name in self.program.weights:
            return self.builder.placeholder(node.name, type_)
        self.placeholders[node.name] = self.program.placeholders[node.name]
        layout = Layout.whole(len(type_.shape))
        dims = [i for i, size in enumerate(type_.shape) if equal(size, self.sequence.length)]
        if dims and is_symbolic(self.sequence.length):  # an equal number may be any size
            layout = self._split(len(type_.shape), dims[0])
        return self.builder.placeholder(node.name, type_.with_layout(layout))

    def _split(self, rank: int, dim: int) -> Layout:
        return Layout.split(rank, dim, self.sequence.length, self.sequence.names, sequence=True)

    def _call(self, node: fx.Node) -> fx.Node:
        if node.target is operator.getitem:
            source, index = node.args
            return self._pick(self._value(source), index, node.name)  # type: ignore[arg-type]
        rule = self._rule(node)
        call = Call(node)
        operands = list(map(self._value, call.operands))
        layouts = [layout_of(n) for n in operands]
        placement = self._placement(node, rule, call, layouts)
        new = [
            self._request(n, wanted) for n, wanted in zip(operands, placement.operands, strict=True)
        ]
        if any(n.target is _REDISTRIBUTE and layout_of(n).is_whole for n in new):
            self.gathering.add(node)
        return self._emit(node, new, placement.output)

    def _value(self, node: fx.Node) -> fx.Node:
        """What stands for a node of the model in the new graph."""
        if node not in self.builder.env:
            (writer,) = self.writers[node]
            self.builder.env[node] = writer.leave(node)
        return self.builder.env[node]

    def _wanted(self, node: fx.Node, layout: Layout) -> fx.Node:
        return self._request(self._value(node), layout)

    def _rule(self, node: fx.Node) -> Rule:
        rule = find_rule(node.target)
        if rule is not None:
            return rule
        if self.gather_unknown and "type" in node.meta:
            self._note(node, f"{node.target} has no rule: computed whole on every rank")
            return _WHOLE_RULE
        raise error_at(
            node,
            f"{node.target} has no rule for split tensors",
            hint="add a row to ringcompile/ir/rules/table.py, or pass --gather-unknown to compute "
            "it whole on every rank",
        )

    def _placement(
        self, node: fx.Node, rule: Rule, call: Call, layouts: Sequence[Layout]
    ) -> Placement:
        if node.target is _ATTENTION:
            return self._attention(rule, call, layouts)
        try:
            return rule.forward(call, layouts, self.axis_sizes)
        except ConflictError:
            rows = _rows_of_pairs(node, layouts)
            if rule.cheap and rows is not None:
                return rule.forward(call, rows, self.axis_sizes)
            if self.gather_unknown:
                self._note(node, "rows and columns both along the sequence: gathered")
                kept = [layouts[0], *(Layout.whole(len(x.dims)) for x in layouts[1:])]
                return rule.forward(call, kept, self.axis_sizes)
            reason = node.meta.get("why_not", "both operands are split along the sequence")
            raise error_at(
                node,
                "this pairs every token with every other and is not an attention that is "
                f"understood ({reason})",
                hint="use torch.nn.functional.scaled_dot_product_attention, or pass "
                "--gather-unknown to gather the second operand whole on every rank",
            ) from None

    def _attention(self, rule: Rule, call: Call, layouts: Sequence[Layout]) -> Placement:
        """Keys and values may stay split along the sequence as queries are: that is the ring."""
        layouts = [self._rows(n, x) for n, x in zip(call.operands, layouts, strict=True)]
        q, k, v = layouts[:3]
        placement = rule.forward(call, layouts, self.axis_sizes)
        if not q.dims[2]:
            return placement
        wanted = list(placement.operands)
        length = type_of(call.operands[1]).shape[2]
        if q.dims[2] in (k.dims[2], v.dims[2]) and equal(length, self.sequence.length):
            for i in (1, 2):
                wanted[i] = Layout((*wanted[i].dims[:2], q.dims[2], wanted[i].dims[3]))
        return Placement(tuple(wanted), placement.output)

    def _rows(self, operand: fx.Node, layout: Layout) -> Layout:
        """What attention takes of an operand's rows: the sequence itself, or whole.

        Queries, keys and values of the sequence's length are split, even if they came whole. Rows
        that hold the sequence several times over are not a run of positions, and are gathered.
        """
        if len(layout.dims) != 4:
            return layout
        sequence = self._split(4, 2)
        rows = type_of(operand).shape[2]
        if layout.is_whole and equal(rows, self.sequence.length):
            return sequence
        if layout.dims[2] in (WHOLE, sequence.dims[2]):
            return layout
        return Layout((*layout.dims[:2], WHOLE, layout.dims[3]))

    def _note(self, node: fx.Node, text: str) -> None:
        place = node.meta["loc"].short if "loc" in node.meta else ""
        self.notes.append(f"{place}: %{node.name}: {text}".lstrip(": "))

    def _emit(self, node: fx.Node, operands: list[fx.Node], layout: Layout) -> fx.Node:
        args, kwargs = replace_operands(node, operands)
        types = node.meta["type"]
        placed = (
            types.with_layout(layout)
            if isinstance(types, TensorType)
            else tuple(type_.with_layout(_of_rank(layout, len(type_.shape))) for type_ in types)
        )
        new = self.builder.call(node.target, args, placed, name=node.name, **kwargs)
        new.meta["loc"] = node.meta.get("loc")
        if "mask_kind" in node.meta:
            new.meta["mask_kind"] = node.meta["mask_kind"]
        return new

    def _pick(self, source: fx.Node, index: int, name: str) -> fx.Node:
        """One of several results, in the layout that they have."""
        type_ = source.meta["type"][index]
        return self.builder.call(operator.getitem, (source, index), type_, name=name)

    # -- requests: a value that exists in one layout, wanted in another ---------------------------

    def _request(self, node: fx.Node, wanted: Layout) -> fx.Node:
        """`node` (of the new graph) in the wanted layout."""
        have = type_of(node).layout
        if have == wanted:
            return node
        found = self._recomputed(node, wanted)
        return found if found is not None else self._redistributed(node, wanted)

    def _recomputed(self, node: fx.Node, wanted: Layout) -> fx.Node | None:
        """The node computed in the wanted layout from operands that are to be had without sending.

        From whole to split this always saves work; from split to whole only cheap ops on
        token-sized inputs are computed again.
        """
        key = (node, wanted)
        if key not in self.requests:
            self.requests[key] = self._recompute(node, wanted)
        return self.requests[key]

    def _recompute(self, node: fx.Node, wanted: Layout) -> fx.Node | None:
        have = layout_of(node)
        if have == wanted:
            return node
        shrinking = have.is_whole
        if node.op == "placeholder":
            return self._input_again(node, wanted)
        if node.target is operator.getitem:
            return self._pick_again(node, wanted)
        rule = find_rule(node.target)
        if rule is None or not (rule.cheap or shrinking):
            return None
        if node.target is _ATTENTION and self._rows(node, wanted) != wanted:
            return None
        call = Call(node)
        wants = rule.backward(call, wanted, self.axis_sizes)
        if wants is None:
            return None
        operands = []
        for operand, want in zip(call.operands, wants, strict=True):
            found = self._recomputed(operand, want)
            if found is None and shrinking:
                found = self._redistributed(operand, want)
            if found is None:
                return None
            operands.append(found)
        return self._emit(node, operands, wanted)

    def _pick_again(self, node: fx.Node, wanted: Layout) -> fx.Node | None:
        """One of several results, of an op computed again; they have one layout, the first's."""
        source, index = node.args
        if len(wanted.dims) != len(layout_of(source).dims):  # type: ignore[arg-type]
            return None
        again = self._recomputed(source, wanted)  # type: ignore[arg-type]
        return again and self._pick(again, index, node.name)  # type: ignore[arg-type]

    def _input_again(self, node: fx.Node, wanted: Layout) -> fx.Node | None:
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

    def _redistributed(self, node: fx.Node, wanted: Layout) -> fx.Node:
        key = (node, wanted)
        if self.requests.get(key) is None:
            have = type_of(node).layout
            why = "sliced" if have.is_whole else "gathered"
            self.requests[key] = self.builder.call(
                _REDISTRIBUTE,
                (node,),
                type_of(node).with_layout(wanted),
                layout=str(wanted),
                why=why,
            )
        found = self.requests[key]
        assert found is not None
        return found


def _of_rank(layout: Layout, rank: int) -> Layout:
    """The layout of an op's first result, for one of the others: of another rank they are whole."""
    assert layout.is_whole or rank == len(layout.dims), f"{layout} for {rank} dims"
    return layout if rank == len(layout.dims) else Layout.whole(rank)


def _rows_of_pairs(node: fx.Node, layouts: Sequence[Layout]) -> list[Layout] | None:
    """Layouts for one rank's rows of flags or numbers of token pairs (equal documents, say).

    What varies along columns is one number a token: it is had whole. None for other pairs.
    """
    type_ = node.meta.get("type")
    if not isinstance(type_, TensorType) or type_.dtype.is_floating_point:
        return None
    splits = [
        {i - len(layout.dims) for i, dim in enumerate(layout.dims) if dim} for layout in layouts
    ]
    row = min(min(split) for split in splits if split)
    return [
        layout if split <= {row} else Layout.whole(len(layout.dims))
        for layout, split in zip(layouts, splits, strict=True)
    ]


def _placeholders_first(graph: fx.Graph) -> fx.Graph:
    """Inputs taken a second time were added where they were wanted; move them to the front."""
    nodes = list(graph.nodes)
    first_call = next(node for node in nodes if node.op != "placeholder")
    for node in nodes[nodes.index(first_call) :]:
        if node.op == "placeholder":
            first_call.prepend(node)
    return graph


_WHOLE_RULE = FactorRule(all_whole, cheap=False)
