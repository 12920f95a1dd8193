"""Give every tensor a layout: seeded at the inputs, carried by the op rules, changed only in sight.

The graph keeps its global meaning. Where an op needs an operand in another layout, `place` first
tries to compute it there directly (a slice of positions, of a table, of a mask costs nothing), and
otherwise writes a `redistribute` node, which `partition` turns into a local slice or a collective.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import fx

from ringcompile.axes import AXES, TIME
from ringcompile.errors import RingCompileError
from ringcompile.ir.calls import Call
from ringcompile.ir.expr import SEQUENCE, SHARES, Size, equal, is_symbolic, simplify, symbol
from ringcompile.ir.layout import WHOLE, Atom, DimLayout, Layout
from ringcompile.ir.nodes import error_at, layout_of, location_of, type_of
from ringcompile.ir.program import Program
from ringcompile.ir.pure_ops import drawing, draws, is_pure
from ringcompile.ir.rules import ConflictError, FactorRule, Placement, Rule, all_whole, find_rule
from ringcompile.ir.types import SequenceSplit
from ringcompile.mesh import Mesh
from ringcompile.ops.schemas import op
from ringcompile.options import ORDERS
from ringcompile.passes.base import Builder, Pass
from ringcompile.passes.experts.own_tokens import OwnTokens
from ringcompile.passes.experts.regions import Finder, Region, describe, may_route
from ringcompile.passes.experts.token_wise import TokenWise
from ringcompile.passes.requests import REDISTRIBUTE, Requests, placeholders_first
from ringcompile.passes.sequence.attention_rows import (
    Rows,
    given_operands,
    head_counts,
    repeat_heads,
    repeats,
)
from ringcompile.passes.sequence.one_origin import with_one_origin
from ringcompile.passes.sequence.split_sequence import order_of, other_lengths, sequence_length
from ringcompile.passes.sequence.token_pairs import note_of_pairs, rows_of_pairs
from ringcompile.passes.windows.windows import Windows, with_one_halo

_ATTENTION = op("attention")


@dataclass(frozen=True)
class Place(Pass):
    """Choose for every value how it is split along the sequence, over `ring` and the other axes.

    Attributes:
        mesh: the parallel plan.
        order: which positions a rank holds; `auto` is zigzag if all attention is causal.
        gather_unknown: compute what has no rule on whole operands, on every rank, instead of
            refusing it.
        capacity: whose tokens count where experts have a capacity, "exact" or "local"; see
            regions.py.
        ring: how keys and values reach the ranks along `ring`: they "rotate", or are gathered all
            at once ("gather"), which is faster for short sequences.
        tp_sequence: between the layers that `tp` splits, it divides the sequence.
        windows: convolutions and shifts take a few tokens from the neighbours, see windows.py;
            otherwise they get all tokens.
        checked: what is known of regions from placing the same model before; added to.
    """

    name: ClassVar[str] = "place"
    mesh: Mesh
    order: str = "auto"
    gather_unknown: bool = False
    capacity: str = "exact"
    ring: str = "rotate"
    tp_sequence: bool = False
    checked: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    windows: bool = field(default=True, repr=False)

    def run(self, program: Program) -> Program:
        """Give every node a layout; a redistribute stands where an operand is wanted in another."""
        sequence = self._sequence(program)
        regions = self._regions(program, sequence)
        return with_one_halo(with_one_origin(
            lambda single: _Placer(
                program, sequence, self, self.gather_unknown, regions, single
            ).run()
        ))

    def _sequence(self, program: Program) -> SequenceSplit:
        axes = tuple(
            (axis, self.mesh.size(axis))
            for axis, row in AXES.items()
            if self.mesh.size(axis) > 1
            and row.divides_sequence
            and (axis != "tp" or self.tp_sequence)
        )
        length = sequence_length(program)
        if not axes:  # nothing divides it: any length will do where there is none
            return SequenceSplit((), "contiguous", 1 if length is None else length)
        if length is None:
            raise RingCompileError(
                "there is no sequence to split: no supported attention was found in the model, "
                "and its code fixes the length",
                hint="; ".join(program.notes) or None,
            )
        if axes[0][0] == TIME:
            self._check_time(axes)
        across = [AXES[name] for name, _ in axes if AXES[name].has_ranks]
        balances = bool(across) and across[0].balances
        order = self._order(program) if balances else "contiguous"
        return SequenceSplit(
            axes, order, length, others=self._others(program, length, axes, order)
        )

    def _others(
        self, program: Program, length: Size, axes: tuple[tuple[str, int], ...], order: str
    ) -> tuple[SequenceSplit, ...]:
        """How further lengths are divided: over the same ranks, which hold them in the same order.

        With pieces in time they are replicated: a piece would need all of them.
        """
        if axes[0][0] == TIME:
            return ()
        over = tuple(axis for axis in axes if axis[0] != "tp")
        shares = list(SHARES.values())[1:]
        return tuple(
            SequenceSplit(over, order, other, share=share)
            for other, share in zip(other_lengths(program, length), shares, strict=False)
        ) if over else ()

    def routing(self, program: Program) -> list[Region]:
        """The regions of a program that is not placed yet; see regions.py.

        Empty without a sequence, since regions are found where tokens would be gathered.
        """
        if sequence_length(program) is None:
            return []
        return self._regions(program, self._sequence(program))

    def _check_time(self, axes: Sequence[tuple[str, int]]) -> None:
        if self.capacity == "local" and self.windows:
            raise RingCompileError(
                f"--capacity local cannot be combined with {TIME}: one rank runs all pieces and "
                "counts all tokens",
                hint="leave --capacity out",
            )
        if self.order == "zigzag" and len(axes) == 1:
            raise RingCompileError(
                f"order zigzag has no use along {TIME} alone, because there is only one rank to "
                "balance",
                hint="leave --order out",
            )

    def _regions(self, program: Program, sequence: SequenceSplit) -> list[Region]:
        """What each rank runs on its own tokens; by rules alone the model is placed first."""
        prefix = simplify(sequence.length - symbol(SEQUENCE))
        if not sequence.axes or not isinstance(prefix, int) or not may_route(program):
            return []
        known = ("regions", program.graph, sequence, self.capacity, self.ring)
        if known not in self.checked:
            scout = _Placer(program, sequence, self, gather_unknown=True, regions=[])
            scout.run()
            layouts = {node: layout_of(new) for node, new in scout.builder.env.items()}
            for node in scout.windows.pending.keys() - layouts.keys():
                layouts[node] = Layout.whole(len(type_of(node).shape))
            finder = Finder(program, layouts, frozenset(scout.gathering), self.capacity, prefix)
            holds = TokenWise(program, self.checked).holds
            self.checked[known] = list(filter(holds, finder.find()))
        return self.checked[known]

    def _order(self, program: Program) -> str:
        return self.order if self.order in ORDERS else order_of(program)


class _Placer(Requests):
    def __init__(
        self,
        program: Program,
        sequence: SequenceSplit,
        options: Place,
        gather_unknown: bool,
        regions: Sequence[Region],
        single: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(Builder(), dict(options.mesh.axes), single)
        self.program, self.mesh, self.sequence = program, options.mesh, sequence
        self.options, self.gather_unknown = options, gather_unknown
        self.names = tuple(axis for axis in sequence.names if axis != "tp")
        self.notes: list[str] = []
        self.without_rule: list[str] = []
        self.routing = describe(regions, by_call=not options.windows)
        self.gathering: set[fx.Node] = set()
        self.writers: dict[fx.Node, list[OwnTokens]] = {}
        self.windows = Windows(self.builder, sequence, self._value, self.request, single)
        for region in regions:
            writer = OwnTokens(region, self.builder, self._wanted, sequence.of_tokens.local)
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
                    self._write(node)
            else:
                self.builder.output(tuple(map(self._value, node.args[0])))
        return self.program.with_graph(
            placeholders_first(self.builder.graph),
            placeholders=self.placeholders,
            mesh=self.mesh,
            sequence=self.sequence,
            notes=tuple(dict.fromkeys(
                (*self.program.notes, *self.routing, *self.notes, *self.without_rule)
            )),
            without_rule=tuple(dict.fromkeys(self.without_rule)),
        )

    def _placeholder(self, node: fx.Node) -> fx.Node:
        type_ = type_of(node)
        if node.name in self.program.weights:
            return self.builder.placeholder(node.name, type_)
        self.placeholders[node.name] = self.program.placeholders[node.name]
        layout = Layout.whole(len(type_.shape))
        dims = [i for i, size in enumerate(type_.shape) if self._is_divided(size)]
        if dims:
            layout = layout.with_dim(dims[0], self._rows(self.names, type_.shape[dims[0]]))
        return self.builder.placeholder(node.name, type_.with_layout(layout))

    def _is_divided(self, size: Size) -> bool:
        """Whether a size is one of the lengths that vary; an equal number may be any size."""
        return is_symbolic(size) and any(equal(size, x) for x in self.sequence.lengths)

    def _rows(self, names: Sequence[str], length: Size) -> DimLayout:
        """The sequence of that length over these axes; whole if it is none that is divided."""
        whole = not names or not any(equal(length, x) for x in self.sequence.lengths)
        return WHOLE if whole else (Atom(length, tuple(names), sequence=True),)

    def _write(self, node: fx.Node) -> None:
        """A call, now or, if it may lie between tokens and an entry for each, when it is read."""
        if not self.options.windows or not self.windows.takes(node):
            self.builder.env[node] = self._call(node)

    def _call(self, node: fx.Node) -> fx.Node:
        if node.target is operator.getitem:
            source, index = node.args
            return self.pick(self._value(source), index, node.name)  # type: ignore[arg-type]
        call = Call(node)
        operands = list(map(self._value, call.operands))
        rule = self._rule(node, operands)
        if node.target is _ATTENTION:
            return self._attention(node, operands)
        placement, pairs = self._placement(rule, call, [layout_of(n) for n in operands])
        new = [
            self.request(n, wanted) for n, wanted in zip(operands, placement.operands, strict=True)
        ]
        gathered = [n for n in new if n.target is REDISTRIBUTE and layout_of(n).is_whole]
        if gathered:
            self.gathering.add(node)
        if gathered and pairs and any(type_of(n).dtype.is_floating_point for n in gathered):
            self.notes.append(note_of_pairs(node, gathered))
        return self.emit(node, new, placement.output)

    def _value(self, node: fx.Node) -> fx.Node:
        """What stands for a node of the model in the new graph."""
        if node in self.windows.pending and node not in self.builder.env:
            self.builder.env[node] = self.windows.whole(node) or self._call(node)
        if node not in self.builder.env:
            (writer,) = self.writers[node]
            self.builder.env[node] = writer.leave(node)
        return self.builder.env[node]

    def _wanted(self, node: fx.Node, layout: Layout) -> fx.Node:
        return self.request(self._value(node), layout)

    def _rule(self, node: fx.Node, operands: Sequence[fx.Node]) -> Rule:
        """The op's row; one that has none needs none where nothing that it reads is split."""
        rule = find_rule(node.target)
        if rule is not None:
            return rule
        if draws(node.target):
            raise drawing(node)
        split = not all(layout_of(operand).is_whole for operand in operands)
        if self.gather_unknown and split and "type" in node.meta:
            place = f"{location_of(node).short}: %{node.name}".lstrip(": ")
            self.without_rule.append(
                f"{place}: {node.target} has no sharding rule: every rank computes all of it"
            )
            return _WHOLE_RULE
        if is_pure(node.target) and not split and "type" in node.meta:
            return _WHOLE_RULE
        raise error_at(
            node,
            f"{node.target} has no sharding rule, and its inputs are split",
            hint="say with rc.register_op how its dims correspond, or pass --gather-unknown to "
            "compute it whole on every rank",
        )

    def _placement(
        self, rule: Rule, call: Call, layouts: Sequence[Layout]
    ) -> tuple[Placement, bool]:
        """The row for these layouts; and whether it is one rank's rows of pairs of tokens."""
        try:
            return rule.forward(call, layouts, self.axis_sizes), False
        except ConflictError:
            return rule.forward(call, rows_of_pairs(rule, call, layouts), self.axis_sizes), True

    # -- attention: see attention_rows.py for the table -------------------------------------------

    def _attention(self, node: fx.Node, operands: list[fx.Node]) -> fx.Node:
        """Attention on what its row asks for; its result is back on all axes of the sequence."""
        call = Call(node)
        q, k, v = (self._taken(n) for n in operands[:3])
        rows = Rows(next(filter(None, (x.dims[0] for x in (q, k, v))), WHOLE), queries=q.dims[2])
        if q.dims[2] and (k.dims[2] or v.dims[2]) and self._may_travel(node):
            rows = self._over_split_keys(node, rows)
        if rows.heads:
            times = repeats(*head_counts(call), self._ways(call))
            operands[1:3] = [repeat_heads(self.builder, x, times) for x in operands[1:3]]
        placement = rows.placement(given_operands(call, operands))
        new = [
            self.request(n, wanted) for n, wanted in zip(operands, placement.operands, strict=True)
        ]
        out = self.emit(node, new, placement.output)
        return self.request(out, Layout((rows.batch, WHOLE, q.dims[2], WHOLE)))

    def _may_travel(self, node: fx.Node) -> bool:
        """Whether a rank may attend to keys chunk by chunk: these are as long as those of queries.

        Over keys of another length it may if it sees all of them.
        """
        call = Call(node)
        queries, keys = (type_of(call[name]).shape[2] for name in ("q", "k"))
        return equal(queries, keys) or (call["lower"] is None and call["upper"] is None)

    def _over_split_keys(self, node: fx.Node, rows: Rows) -> Rows:
        """The row for queries, keys and values that are all split along their sequences."""
        call = Call(node)
        of_queries, of_keys = (type_of(call[name]).shape[2] for name in ("q", "k"))
        rotating = tuple(name for name in self.names if AXES[name].rotates)
        tiles = tuple(name for name in self.names if AXES[name].gathers_queries)
        if self.options.ring == "gather":
            if tiles:
                raise RingCompileError(
                    "--ring gather cannot be combined with an axis along which queries are "
                    f"gathered: {tiles[0]}",
                    hint="leave --ring out",
                )
            rotating = tuple(name for name in rotating if name == TIME)
        rows = replace(rows, keys=self._rows((*rotating, *tiles), of_keys))
        if "ulysses" not in self.names:
            return rows
        queries, _ = head_counts(call)
        if queries % self.mesh.size("ulysses"):
            self.notes.append(
                f"{location_of(node).short}: {queries} heads do not divide over ulysses="
                f"{self.mesh.size('ulysses')}: its ranks gather keys and values instead"
            )
            return rows
        kept = [axis for axis in self.names if axis != "ulysses"]
        return replace(rows, heads=("ulysses",), queries=self._rows(kept, of_queries))

    def _ways(self, call: Call) -> int:
        """Over how many ranks the heads will be divided, tensor parallelism included."""
        ulysses, tp = self.mesh.size("ulysses"), self.mesh.size("tp")
        return ulysses * tp if head_counts(call)[0] % (ulysses * tp) == 0 else ulysses

    def _taken(self, operand: fx.Node) -> Layout:
        """What attention takes of an operand's rows: the sequence itself, or whole.

        Queries, keys and values of the sequence's length are split, even if they came whole. Rows
        that hold the sequence several times over are not a run of positions, and are gathered.
        """
        layout = layout_of(operand)
        sequence = self._rows(self.names, type_of(operand).shape[2])
        if layout.is_whole:
            return layout.with_dim(2, sequence)
        return layout if layout.dims[2] in (WHOLE, sequence) else layout.with_dim(2, WHOLE)

    def may_recompute(self, node: fx.Node, wanted: Layout) -> bool:
        """Attention in pieces only where its rows are the sequence itself, or whole."""
        if node.target is not _ATTENTION:
            return True
        rows = self._rows(self.names, type_of(node).shape[2])
        return wanted.dims[2] in (WHOLE, rows) and not wanted.dims[1]


_WHOLE_RULE = FactorRule(all_whole, cheap=False)
