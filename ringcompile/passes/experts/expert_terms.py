"""Experts over `ep` where every rank has all tokens, as in a program for the next tokens.

Such a call has few tokens: each rank runs its own experts on those that chose them, and the
results are summed over `ep`, once a layer. Nothing is sent to the experts.

    y = expert_linear(x, e, w)     ->  e' = e - first, or no expert   w[E/ep]
                                       y = expert_linear(x, e', w)    [..] partial(ep)
    y = bmm(x, w)      [E, C, F]   ->  y = bmm(x[E/ep, C, D], w)      [E/ep, C, F], then gathered

A row whose expert another rank has gives 0, a term of the sum. What follows is linear in it (the
weights of a token's experts, and the sum over them), so that one row a token is summed, not one for
each of its experts.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from ringcompile.ir.calls import Call
from ringcompile.ir.expr import coordinate, simplify
from ringcompile.ir.layout import WHOLE, Atom, Layout
from ringcompile.ir.nodes import layout_of, type_of
from ringcompile.ir.program import Program
from ringcompile.ir.rules import find_rule
from ringcompile.ir.types import TensorType
from ringcompile.mesh import Mesh
from ringcompile.ops.schemas import op
from ringcompile.passes.base import Builder, Pass
from ringcompile.passes.experts.expert_groups import Group, groups_of_buffers, groups_of_rows
from ringcompile.passes.experts.expert_weights import EP, ExpertWeights, experts_of_rank, no_experts
from ringcompile.passes.requests import placeholders_first

aten = torch.ops.aten


@dataclass(frozen=True)
class ExpertTerms(Pass):
    """Split experts over `ep`, in a program whose ranks along `ep` have the same tokens.

    Attributes:
        mesh: of the program that is written: the one that it is placed on, and `ep`.
    """

    name: ClassVar[str] = "expert-terms"
    mesh: Mesh

    def run(self, program: Program) -> Program:
        """Write the program anew; experts that are not understood stay whole, with a note.

        Raises:
            RingCompileError: the experts do not divide over `ep`.
        """
        return _Writer(program, self.mesh).run()


def with_experts(placed: Mesh, mesh: Mesh) -> Mesh:
    """The mesh of a program whose experts are split: `ep` beside the axes that it is placed on.

    Args:
        placed: what the program is placed on.
        mesh: the parallel plan.
    """
    return placed if mesh.size(EP) == 1 else placed.with_axis(EP, mesh.size(EP))


class _Writer:
    def __init__(self, program: Program, mesh: Mesh) -> None:
        self.program, self.mesh, self.builder = program, mesh, Builder()
        self.weights = dict(program.weights)
        self.requests = ExpertWeights(self.builder, mesh, self.weights)
        groups = [*groups_of_rows(program), *groups_of_buffers(program)]
        self.groups = {node: group for group in groups for node in group.nodes}
        self.index: dict[fx.Node, fx.Node] = {}  # by expert of a group: among this rank's
        self.inside: dict[fx.Node, fx.Node] = {}  # rows as the nodes of their group read them

    def run(self) -> Program:
        for node in self.program.graph.nodes:
            self.builder.at(node)
            if node.op == "output":
                self.builder.output(tuple(self._summed(self._value(n)) for n in node.args[0]))
            else:
                self.builder.env[node] = self._written(node)
        notes = [] if self.groups else [no_experts(self.mesh, "all new tokens")]
        return self.program.with_graph(
            placeholders_first(self.builder.graph), weights=self.weights, mesh=self.mesh,
            notes=(*self.program.notes, *notes),
        )

    def _written(self, node: fx.Node) -> fx.Node:
        if node.op == "placeholder":
            return self.builder.copy(node)
        group = self.groups.get(node)
        if group is None:
            return self._behind(node)
        return self._row(node, group) if group.expert is not None else self._slots(node, group)

    def _value(self, node: fx.Node) -> fx.Node:
        found: fx.Node = self.builder.env[node]
        return found

    def _summed(self, x: fx.Node) -> fx.Node:
        """A value that is no partial sum."""
        if not isinstance(x.meta["type"], TensorType) or not layout_of(x).partial:
            return x
        return self.requests.redistributed(x, replace(layout_of(x), partial=()))

    # -- rows, each with the index of its expert ---------------------------------------------------

    def _row(self, node: fx.Node, group: Group) -> fx.Node:
        """A node of a group, on all rows; those of other ranks' experts have none here."""
        operands = [self._operand(n, group) for n in Call(node).operands]
        new = self.inside[node] = self.requests.emit(node, operands, layout_of(node))
        return self._leaving(node, new, group) if node in group.leaving else new

    def _operand(self, node: fx.Node, group: Group) -> fx.Node:
        if node is group.expert:
            return self._expert(node, group)
        if node in group.weights:
            return self.requests.share(node)
        return self.inside.get(node) or self._summed(self._value(node))

    def _expert(self, node: fx.Node, group: Group) -> fx.Node:
        """Each row's expert among those of this rank; behind the last of them, if it is none."""
        if node not in self.index:
            each = experts_of_rank(group, self.mesh)
            first = simplify(coordinate(EP) * each)
            type_ = type_of(node)
            here = self.builder.call(
                aten.sub.Scalar, (self._value(node), first), type_, why="among this rank's experts"
            )
            before = self.builder.call(
                aten.lt.Scalar, (here, 0), replace(type_, dtype=torch.bool)
            )
            self.index[node] = self.builder.call(
                aten.masked_fill.Scalar, (here, before, each), type_, why="none of them"
            )
        return self.index[node]

    def _leaving(self, node: fx.Node, x: fx.Node, group: Group) -> fx.Node:
        """Rows for use outside of their group: 0 where the row's expert is on another rank."""
        assert group.expert is not None
        expert, type_ = self._expert(group.expert, group), type_of(x)
        type_ = type_.with_layout(replace(type_.layout, partial=(EP,)))
        if node.target is op("expert_linear") and set(group.nodes).isdisjoint(node.users):
            x.meta["type"] = type_  # it gives 0 for a row that has no expert
            return x
        none = self.builder.call(
            aten.ge.Scalar, (expert, experts_of_rank(group, self.mesh)),
            replace(type_of(expert), dtype=torch.bool),
        )
        more = len(type_.shape) - len(type_of(expert).shape)
        opened = TensorType(
            torch.bool, (*type_of(expert).shape, *(1,) * more),
            Layout((*layout_of(expert).dims, *(WHOLE,) * more)),
        )
        none = self.builder.call(aten.reshape.default, (none, list(opened.shape)), opened)
        return self.builder.call(
            aten.masked_fill.Scalar, (x, none, 0), type_, why="rows of other ranks' experts"
        )

    # -- buffers of slots: [E, C, ...] -------------------------------------------------------------

    def _slots(self, node: fx.Node, group: Group) -> fx.Node:
        """A node of a group, for this rank's experts; what leaves the group is gathered."""
        experts_of_rank(group, self.mesh)
        operands = [self._of_experts(n, group) for n in Call(node).operands]
        new = self.requests.emit(node, operands, self._divided(node, group))
        return new

    def _of_experts(self, node: fx.Node, group: Group) -> fx.Node:
        if node in group.weights:
            return self.requests.share(node)
        x = self._value(node)
        if node in group.nodes:
            return x
        return self.requests.request(self._summed(x), self._divided(node, group))

    @staticmethod
    def _divided(node: fx.Node, group: Group) -> Layout:
        return layout_of(node).with_dim(0, (Atom(group.num_experts, (EP,)),))

    # -- what follows ------------------------------------------------------------------------------

    def _behind(self, node: fx.Node) -> fx.Node:
        """A node outside of groups: the same on whole values, or linear in a partial sum."""
        if node.target is operator.getitem:
            source, index = node.args
            return self.requests.pick(self._value(source), index, node.name)  # type: ignore[arg-type]
        call = Call(node)
        operands = [self._joined(n) for n in call.operands]
        partial = self._passes(call, operands)
        if not partial:
            operands = list(map(self._summed, operands))
            if operands == [self._value(n) for n in call.operands]:
                return self.builder.copy(node)
        return self.requests.emit(node, operands, replace(layout_of(node), partial=partial))

    def _joined(self, node: fx.Node) -> fx.Node:
        """An operand; what several ops read is summed once, for all of them."""
        x, group = self._value(node), self.groups.get(node)
        if group is not None and group.expert is None:
            return self.requests.request(x, layout_of(node))
        return self._summed(x) if len(node.users) > 1 else x

    @staticmethod
    def _passes(call: Call, operands: Sequence[fx.Node]) -> tuple[str, ...]:
        """The axes over which a cheap op leaves a sum to be made."""
        rule = find_rule(call.target)
        if rule is None or rule.linear is None or not rule.cheap:
            return ()
        return rule.linear.axes(call, [layout_of(x).partial for x in operands])
