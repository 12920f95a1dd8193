"""What a value costs in another layout under tensor parallelism, and how it is had.

A request for heads or features runs backwards by the op rules. It gains something where it ends
at a weight, through a product: then the product is computed on each rank's part, from its share of
the weight. Otherwise what is whole is cut, and what is split stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import fx

from ringcompile.axes import base_axis
from ringcompile.ir.calls import Call, target_name
from ringcompile.ir.expr import equal
from ringcompile.ir.layout import Atom, DimLayout, Layout
from ringcompile.ir.nodes import layout_of, location_of, type_of
from ringcompile.ir.plan import model_plan
from ringcompile.ir.program import Program
from ringcompile.ir.rules import ConflictError, Placement, Rule, find_rule
from ringcompile.ir.types import TensorType, local_size
from ringcompile.mesh import Mesh
from ringcompile.ops.running import dim_along, is_scan
from ringcompile.ops.schemas import op
from ringcompile.passes.base import Builder
from ringcompile.passes.requests import REDISTRIBUTE, Requests, origin_of
from ringcompile.passes.unpacked import Unpacked, fitting_size, why_unpacked_whole

TP = "tp"


class TensorRequests(Requests):
    """Requests that may split products and read shares of weights.

    Args:
        program: placed, without `tp`.
        mesh: the parallel plan.
        told: for weights of which the user says so, the dim that is split; None for whole.
        single: names of values that are computed in one layout only.
        run_of_heads: so many neighbours on `tp` compute the same heads of attention.
    """

    def __init__(
        self,
        program: Program,
        mesh: Mesh,
        told: Mapping[str, int | None],
        single: frozenset[str] = frozenset(),
        run_of_heads: int = 1,
    ) -> None:
        super().__init__(Builder(), dict(mesh.axes), single)
        assert program.sequence is not None
        self.program, self.mesh, self.sequence = program, mesh, program.sequence
        self.weights = dict(program.weights)
        self.told, self.allowed = told, {**model_plan(program), **told}
        self.size, self.run_of_heads = mesh.size(TP), run_of_heads
        self.ranks_text = f"{TP}={self.size}" if run_of_heads == 1 else f"{self.size} ranks"
        self.notes: list[str] = []
        self.why = ""  # what asked for the shares of weights that are read now
        self.gaining: dict[tuple[fx.Node, Layout], bool] = {}
        self.products: dict[fx.Node, frozenset[fx.Node]] = {}
        self.unpacked = Unpacked(lambda node: node.name in self.weights)

    def summed(self, node: fx.Node, over: tuple[str, ...] = ()) -> fx.Node:
        """A value that is no partial sum: summed over the ranks, and with tp_sequence split.

        Args:
            node: the value.
            over: the axes over which it may stay a partial sum.
        """
        if not isinstance(node.meta["type"], TensorType) or layout_of(node).partial == over:
            return node
        layout = replace(layout_of(node), partial=over)
        return self.request(node, self._over_tp(type_of(node), layout))

    def _over_tp(self, type_: TensorType, layout: Layout) -> Layout:
        """The layout with the sequence split over tp as well, where that is asked for."""
        if TP not in self.sequence.names:
            return layout
        full = (Atom(self.sequence.length, self.sequence.names, sequence=True),)
        above = self.sequence.names[:-1]
        for dim, (size, have) in enumerate(zip(type_.shape, layout.dims, strict=True)):
            is_sequence = have == (replace(full[0], axes=above),) if above else (
                not have and dim < len(type_.shape) - 1 and equal(size, self.sequence.length)
            )
            if is_sequence:
                return layout.with_dim(dim, full)
        return layout

    def obtain(self, node: fx.Node, wanted: Layout) -> fx.Node:
        """`node` in the wanted layout; what splits a product on the way is computed again so."""
        if layout_of(node) == wanted:
            return node
        if layout_of(node).partial:
            return self.obtain(self.summed(node), wanted)
        key = (node, wanted)
        if self.known.get(key) is None and self.gains(node, wanted):
            wants = self._wants(node, wanted)
            assert wants is not None
            self.known[key] = self.emit(
                node, [self.obtain(*pair) for pair in zip(operands_of(node), wants, strict=True)],
                wanted,
            )
        found = self.known.get(key)
        return found if found is not None else self.request(node, wanted)

    def gains(self, node: fx.Node, wanted: Layout) -> bool:
        """Whether a layout is had by splitting a product on its way, rather than by cutting."""
        key = (node, wanted)
        if key not in self.gaining:
            self.gaining[key] = False  # while it is found out
            self.gaining[key] = self._gains(node, wanted)
        return self.gaining[key]

    def _gains(self, node: fx.Node, wanted: Layout) -> bool:
        if layout_of(node) == wanted or node.op == "placeholder" or not has_tp(wanted):
            return False
        if self._is_residual(node) or origin_of(node) in self.single:
            return False
        wants = self._wants(node, wanted)
        if wants is None:
            return False
        rule = find_rule(node.target)
        heavy = rule is not None and not rule.cheap
        return any(
            has_tp(want) and ((heavy and self.is_weight(operand)) or self.gains(operand, want))
            for operand, want in zip(operands_of(node), wants, strict=True)
        )

    def _is_residual(self, node: fx.Node) -> bool:
        """Whether something is added to what others read as well, from other products.

        Split there, the residual stream would be split everywhere, and every product would sum.
        """
        if target_name(node.target) != "aten.add.Tensor":
            return False
        terms = [n for n in node.all_input_nodes if not self.is_weight(n)]
        return len(terms) == 2 and any(_is_read_elsewhere(n, node) for n in terms) and (
            self._products(terms[0]) != self._products(terms[1])
        )

    def _products(self, node: fx.Node) -> frozenset[fx.Node]:
        """The products that a value comes from by cheap ops, itself if it is one."""
        if node not in self.products:
            rule = find_rule(node.target) if node.op == "call_function" else None
            cheap = rule is not None and rule.cheap
            of = map(self._products, node.all_input_nodes) if cheap else [{node}]
            self.products[node] = frozenset().union(*of)
        return self.products[node]

    def _wants(self, node: fx.Node, wanted: Layout) -> tuple[Layout, ...] | None:
        """What a node's operands have to be for it to be computed in that layout."""
        if not isinstance(node.meta["type"], TensorType):
            return None
        if node.target is REDISTRIBUTE:
            return self._source_of(node, wanted)
        rule = find_rule(node.target)
        if rule is None or node.target is op("attention") or layout_of(node).partial:
            return None
        if cuts_running_sum(node, wanted):
            return None
        wants = rule.backward(Call(node), wanted, self.axis_sizes)
        if wants is None or not all(self.divides(dim) for want in wants for dim in want.dims):
            return None
        return wants

    def _source_of(self, node: fx.Node, wanted: Layout) -> tuple[Layout, ...] | None:
        """What a redistribution has to start from, for its result to be split over tp too."""
        source: Layout = layout_of(node.args[0])  # type: ignore[arg-type]
        if source.partial:
            return None
        dims = []
        for dim, (before, now, then) in enumerate(
            zip(source.dims, layout_of(node).dims, wanted.dims, strict=True)
        ):
            if then == now:
                dims.append(before)
            elif len(then) == 1 and then[0].axes[0] == TP and len(before) <= 1:
                if before and before[0].sequence:
                    return None  # tokens lie in chunks, over axes in an order of their own
                size = type_of(node).shape[dim]
                dims.append((Atom(size, (TP, *(before[0].axes if before else ()))),))
            else:
                return None
        return (Layout(tuple(dims)),)

    def may_split(self, node: fx.Node, wanted: Layout) -> bool:
        """Whether a value is a weight that nobody wants split otherwise, or whole."""
        if node.op != "placeholder":
            return self.is_weight(node)
        name = self.weights[node.name].name if node.name in self.weights else None
        if name is None or name not in self.allowed:
            return name is not None
        dims = [i for i, dim in enumerate(wanted.dims) for a in dim for x in a.axes
                if base_axis(x) == TP]
        return dims == [self.allowed[name]]

    def is_weight(self, node: fx.Node) -> bool:
        """Whether a value is a weight: read as it is, seen through views, or unpacked."""
        return bool(self.unpacked.weights(node))

    def input_again(self, node: fx.Node, wanted: Layout) -> fx.Node | None:
        """A weight by its share; each rank reads nothing else of it."""
        if node.name not in self.weights:
            return super().input_again(node, wanted)
        if not all(map(self.divides, wanted.dims)) or not self.may_split(node, wanted):
            return None
        if any(atom.sequence for dim in wanted.dims for atom in dim):
            return None  # rows of positions (of a fixed length) are cut, with padding, not read
        again = self.builder.placeholder(
            f"{node.name}_share", type_of(node).with_layout(wanted)
        )
        name = self.weights[node.name].name
        again.meta["why"] = "plan" if name in self.told else self.why
        self.weights[again.name] = self.weights[node.name]
        return again

    def redistributed(self, node: fx.Node, wanted: Layout) -> fx.Node:
        """As elsewhere; the user is told of a packed weight that could not be cut itself."""
        cut = has_tp(wanted) and not has_tp(layout_of(node)) and not _has_tokens(wanted)
        if cut and node.op != "placeholder" and self.is_weight(node):
            self._note_unpacked_whole(node, wanted)
        return super().redistributed(node, wanted)

    def _note_unpacked_whole(self, node: fx.Node, wanted: Layout) -> None:
        fits = fitting_size(node, wanted, TP, self.axis_sizes)
        held = [self.weights[n.name] for n in self.unpacked.weights(node)]
        names = ", ".join(f"'{w.name.rpartition('.')[2]}' {list(w.shape)}" for w in held)
        self.note(
            node,
            f"{self.ranks_text} does not divide the tensors that a packed weight is unpacked "
            f"from, {names}: "
            f"{why_unpacked_whole(node)}. Each rank unpacks all of it and keeps its part; "
            + (f"{TP}={fits} would divide it" if fits > 1 else f"no size of {TP} would divide it"),
        )

    def may_recompute(self, node: fx.Node, wanted: Layout) -> bool:
        """Only cheap ops: products are split by `obtain`, where that gains something."""
        rule = find_rule(node.target)
        even = all(map(self.divides, wanted.dims))
        return rule is not None and rule.cheap and even and not layout_of(node).partial

    def forward(
        self, node: fx.Node, rule: Rule | None, layouts: Sequence[Layout]
    ) -> Placement | None:
        """The rule's placement, where it keeps the program's own and divides evenly."""
        if rule is None:
            return None
        try:
            placement = rule.forward(Call(node), layouts, self.axis_sizes)
        except ConflictError:
            return None
        same = placement.output.without(TP) == layout_of(node)
        layouts = (*placement.operands, placement.output)
        even = all(self.divides(dim) for layout in layouts for dim in layout.dims)
        whole = not cuts_running_sum(node, placement.output)
        return placement if same and even and whole else None

    def note(self, node: fx.Node, text: str) -> None:
        """Tell the user something about the layer of a node."""
        self.notes.append(f"{location_of(node).short}: {text}".lstrip(": "))

    def divides(self, dim: DimLayout) -> bool:
        """Whether every rank gets an equal part of each atom of a dim."""
        return all(local_size(atom, self.mesh, self.sequence) is not None for atom in dim)


def _has_tokens(layout: Layout) -> bool:
    return any(atom.sequence for dim in layout.dims for atom in dim)


def _is_read_elsewhere(node: fx.Node, sum_: fx.Node) -> bool:
    """Whether anything reads a term of a sum, but for cheap ops that only lead to the sum."""
    for user in node.users:
        rule = find_rule(user.target)
        cheap = user.op == "call_function" and rule is not None and rule.cheap
        if user is not sum_ and (not cheap or not user.users or _is_read_elsewhere(user, sum_)):
            return True
    return False


def operands_of(node: fx.Node) -> list[fx.Node]:
    """The operands of a call, in order."""
    return Call(node).operands


def cuts_running_sum(node: fx.Node, layout: Layout) -> bool:
    """Whether a layout would split features that are scanned one after another."""
    if not is_scan(node):
        return False
    atoms = layout.dims[dim_along(node)]
    return any(base_axis(axis) == TP and not atom.sequence for atom in atoms for axis in atom.axes)


def has_tp(layout: Layout) -> bool:
    """Whether `tp`, or a part of it, splits some dim."""
    return any(base_axis(axis) == TP for axis in layout.axes)
