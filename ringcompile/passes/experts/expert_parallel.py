"""Expert parallelism: each rank along `ep` has some of the experts, and rows travel to them.

Ranks along `ep` have tokens of their own (`place` divides the sequence over it), so that every row
is wanted by one expert only. Two ways in which models run experts are understood:

    rows, each with the index of its expert (`expert_linear`): dropless; rows are sorted by owner,
    as many as there are go to each, and their results come back to where they were
        r = route(expert)  x' = dispatch(x, r)  ... on this rank's experts ...  y = combine(y', r)

    a buffer of slots for each expert [E, C, D] (GShard): one exchange of equal parts each way
        x' = all_to_all(x)  [E/ep, ep*C, D]     ... on this rank's experts ...  y = all_to_all(y')

Experts that are written in another way stay whole on every rank, and a note says so.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, ClassVar

import torch
from torch import fx

from ringcompile.ir.calls import Call, map_values, replace_operands
from ringcompile.ir.expr import (
    OWN,
    Size,
    coordinate,
    equal,
    is_symbolic,
    product,
    simplify,
    symbol,
    unbacked,
)
from ringcompile.ir.layout import Atom, Layout
from ringcompile.ir.nodes import error_at, results_of, type_of
from ringcompile.ir.program import Program
from ringcompile.ir.rules import find_rule
from ringcompile.ir.types import TensorType, local_shape
from ringcompile.mesh import Mesh
from ringcompile.ops.schemas import op
from ringcompile.passes.base import Builder, Pass
from ringcompile.passes.experts.expert_groups import Group, groups_of_buffers, groups_of_rows
from ringcompile.passes.experts.expert_weights import EP, ExpertWeights, experts_of_rank, no_experts
from ringcompile.passes.requests import placeholders_first

aten = torch.ops.aten

@dataclass(frozen=True)
class ExpertParallel(Pass):
    """Split experts over `ep`, in a program whose layouts along the sequence are chosen.

    Attributes:
        mesh: the parallel plan.
    """

    name: ClassVar[str] = "expert-parallel"
    mesh: Mesh

    def run(self, program: Program) -> Program:
        """Write the program anew; what is not understood stays as it is.

        Raises:
            RingCompileError: the experts do not divide over `ep`.
        """
        if self.mesh.size(EP) == 1:
            return program
        return _ExpertWriter(program, self.mesh).run()


@dataclass
class _ExpertWriter:
    program: Program
    mesh: Mesh
    builder: Builder = field(default_factory=Builder)
    notes: list[str] = field(default_factory=list)
    unknown: Any = field(default_factory=count)

    def run(self) -> Program:
        assert self.program.sequence is not None
        self.sequence, self.ways = self.program.sequence, self.mesh.size(EP)
        self.weights = dict(self.program.weights)
        self.share = ExpertWeights(self.builder, self.mesh, self.weights).share
        groups = [*groups_of_rows(self.program), *groups_of_buffers(self.program)]
        last = {group.nodes[-1]: group for group in groups}
        inside = {node for group in groups for node in group.nodes}
        for node in self.program.graph.nodes:
            self.builder.at(node)
            if node in last:
                self._write(last[node])
            elif node not in inside:
                self.builder.env[node] = self.builder.copy(node)
        if not groups:
            self.notes.append(no_experts(self.mesh, "its own tokens"))
        return self.program.with_graph(
            placeholders_first(self.builder.graph),
            weights=self.weights,
            notes=(*self.program.notes, *self.notes),
        )

    def _write(self, group: Group) -> None:
        if group.expert is not None:
            _Rows(self, group, group.expert).write()
        else:
            _Buffers(self, group).write()

    def local(self, type_: TensorType) -> tuple[Size, ...]:
        """The shape of one rank's share."""
        return local_shape(type_, self.mesh, self.sequence)

    def call(
        self, target: Any, args: tuple[Any, ...], type_: Any, why: str | None = None, **how: Any
    ) -> fx.Node:
        """Append a call; see `Builder.call`."""
        return self.builder.call(target, args, type_, why=why, **how)


# -- rows -----------------------------------------------------------------------------------------


@dataclass
class _Rows:
    """Writes a group of rows: route, dispatch, run, combine."""

    writer: _ExpertWriter
    group: Group
    expert: fx.Node
    env: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def write(self) -> None:
        writer, builder = self.writer, self.writer.builder
        self.rows = unbacked(f"u{900 + next(writer.unknown)}")
        self.lead = len(type_of(self.expert).shape)
        expert = builder.env[self.expert]
        each = experts_of_rank(self.group, writer.mesh)
        num_rows = product(writer.local(type_of(self.expert)))
        numbers = TensorType.whole(torch.int64, (writer.ways,))
        self.order, self.sends = self._route(expert, each, num_rows, numbers)
        self.takes = writer.call(
            op("all_to_all"), (self.sends,), numbers, "how many rows come from each rank",
            split=0, concat=0, axis=EP,
        )
        arrived = self._dispatch(self.expert)
        first = simplify(coordinate(EP) * each)
        self.env[self.expert] = writer.call(
            aten.sub.Scalar, (arrived, first), type_of(arrived), "among this rank's experts"
        )
        for node in self.group.entering:
            self.env[node] = self._dispatch(node)
        for node in self.group.weights:
            self.env[node] = writer.share(node)
        for node in self.group.nodes:
            self._copy(node)
        for node in self.group.leaving:
            builder.env[node] = writer.call(
                op("combine"), (self.env[node], self.order, self.sends, self.takes),
                type_of(node), "back to their tokens", axis=EP,
            )

    def _route(
        self, expert: fx.Node, each: int, num_rows: Size, numbers: TensorType
    ) -> tuple[fx.Node, fx.Node]:
        writer = self.writer
        order = TensorType.whole(torch.int64, (num_rows,))
        routed = writer.call(
            op("route"), (expert,), (order, numbers), "rows by the rank of their expert",
            each=each, ways=writer.ways,
        )
        return (
            writer.call(operator.getitem, (routed, 0), order),
            writer.call(operator.getitem, (routed, 1), numbers),
        )

    def _arrived(self, type_: TensorType) -> TensorType:
        """The type of rows that came from all ranks: [u, 1, ..., features]."""
        lead = (self.rows, *(1,) * (self.lead - 1))
        return TensorType.whole(type_.dtype, (*lead, *type_.shape[self.lead :]))

    def _dispatch(self, node: fx.Node) -> fx.Node:
        writer = self.writer
        x, type_ = writer.builder.env[node], type_of(node)
        rows = type_of(self.expert)
        if type_.shape[: self.lead] != rows.shape:  # one for all choices of a token
            shape = (*rows.shape, *type_.shape[self.lead :])
            dims = (*rows.layout.dims, *type_.layout.dims[self.lead :])
            type_ = TensorType(type_.dtype, shape, Layout(dims))
            x = writer.call(aten.expand.default, (x, list(shape)), type_)
        return writer.call(
            op("dispatch"), (x, self.order, self.sends, self.takes), self._arrived(type_),
            "rows to their experts", axis=EP, lead=self.lead,
        )

    def _copy(self, node: fx.Node) -> None:
        """A node of the group, on the rows that arrived."""
        builder = self.writer.builder
        operands = [self.env.get(n) or builder.env[n] for n in Call(node).operands]
        args, kwargs = replace_operands(node, operands)
        types = tuple(map(self._arrived, results_of(node)))
        single = isinstance(node.meta["type"], TensorType)
        rule = find_rule(node.target)
        if rule is not None and rule.shape_argument is not None:
            raise error_at(
                node, "experts that reshape their rows between their matmuls cannot be split over "
                      "ep"
            )
        new = builder.call(node.target, args, types[0] if single else types, **kwargs)
        new.meta["loc"] = node.meta.get("loc")
        self.env[node] = new


# -- buffers --------------------------------------------------------------------------------------


@dataclass
class _Buffers:
    """Writes a group of buffers: exchange, run, exchange back."""

    writer: _ExpertWriter
    group: Group
    env: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def write(self) -> None:
        writer = self.writer
        experts_of_rank(self.group, writer.mesh)
        self.slots = type_of(self.group.nodes[0]).shape[1]
        share = writer.sequence.of_tokens.local
        # Ranks with padding have fewer tokens, and need as many slots as the others.
        self.full = simplify(self.slots.xreplace({symbol(OWN): share}))  # type: ignore[union-attr]
        self.all = simplify(self.full * writer.ways)
        for node in self.group.entering:
            self.env[node] = self._to_experts(node)
        for node in self.group.weights:
            self.env[node] = writer.share(node)
        for node in self.group.nodes:
            self._copy(node)
        for node in self.group.leaving:
            writer.builder.env[node] = self._from_experts(node)

    def _to_experts(self, node: fx.Node) -> fx.Node:
        writer, type_ = self.writer, type_of(node)
        x = writer.builder.env[node]
        padded = self._sized(type_, self.full)
        behind = [0, 0] * (len(type_.shape) - 2)
        x = writer.call(
            aten.constant_pad_nd.default, (x, [*behind, 0, simplify(self.full - self.slots)], 0),
            padded, "as many slots on every rank",
        )
        return writer.call(
            op("all_to_all"), (x,), self._on_experts(type_), "slots to their experts",
            split=0, concat=1, axis=EP,
        )

    def _from_experts(self, node: fx.Node) -> fx.Node:
        writer, type_ = self.writer, type_of(node)
        x = writer.call(
            op("all_to_all"), (self.env[node],), self._sized(type_, self.full),
            "back to their ranks", split=1, concat=0, axis=EP,
        )
        return writer.call(aten.slice.Tensor, (x, 1, 0, self.slots), type_)

    def _sized(self, type_: TensorType, slots: Size) -> TensorType:
        return replace(type_, shape=(type_.shape[0], slots, *type_.shape[2:]))

    def _on_experts(self, type_: TensorType) -> TensorType:
        """This rank's experts, with the slots of all ranks."""
        type_ = self._sized(type_, self.all)
        return type_.with_layout(type_.layout.with_dim(0, (Atom(type_.shape[0], (EP,)),)))

    def _copy(self, node: fx.Node) -> None:
        builder = self.writer.builder
        operands = [self.env.get(n) or builder.env[n] for n in Call(node).operands]
        args, kwargs = map_values(replace_operands(node, operands), self._argument)
        new = builder.call(node.target, args, self._on_experts(type_of(node)), **kwargs)
        new.meta["loc"] = node.meta.get("loc")
        self.env[node] = new

    def _argument(self, value: Any) -> Any:
        return self.all if is_symbolic(value) and equal(value, self.slots) else value

