"""Sorts rows by expert once, for all matmuls that they go through.

A matmul with each row's own matrix (`expert_linear`) sorts rows by expert, multiplies the rows of
each expert, and puts them back. Between the matmuls of an expert nothing asks where a row was: so
rows are sorted before the first one and put back behind the last one, and where a model repeats
tokens for their choices, sorted rows are read from the tokens.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from ringcompile.ir.calls import Call, replace_operands
from ringcompile.ir.expr import Size, equal, product, spelled
from ringcompile.ir.layout import WHOLE, Layout
from ringcompile.ir.nodes import results_of, type_of
from ringcompile.ir.program import Program
from ringcompile.ir.rules import FactorRule, find_rule
from ringcompile.ir.types import TensorType, local_shape
from ringcompile.ops.schemas import op
from ringcompile.passes.base import Builder, Pass
from ringcompile.passes.experts.expert_groups import Group, groups_of_rows
from ringcompile.passes.experts.repeated_rows import RepeatedRows

aten = torch.ops.aten


@dataclass(frozen=True)
class SortRows(Pass):
    """Sort rows by expert once for all matmuls of a mixture, in a program of shares.

        h = expert_linear(x, e, w); g = gelu(h); o = expert_linear(g, e, v)
    ->  order, place, ends = sort_rows(e); h = grouped_linear(index(x, order), ends, w)
        g = gelu(h); o = where(e < E, index(grouped_linear(g, ends, v), place), 0)
    """

    name: ClassVar[str] = "sort-rows"

    def run(self, program: Program) -> Program:
        """Rewrite what lies between matmuls of the same rows; other nodes are copied."""
        groups = [group for group in groups_of_rows(program) if _keeps_rows(group)]
        return _RowSorter(program, groups).run() if groups else program


def _keeps_rows(group: Group) -> bool:
    """Whether every node makes each of its rows of the same row of what it reads."""
    assert group.expert is not None
    lead = len(type_of(group.expert).shape)
    rows = {*group.nodes, *group.entering}
    return all(_by_row(node, rows, group.expert, lead) for node in group.nodes)


def _by_row(node: fx.Node, rows: set[fx.Node], expert: fx.Node, lead: int) -> bool:
    rule = find_rule(node.target)
    if not isinstance(rule, FactorRule) or rule.shape_argument is not None:
        return False
    if len(results_of(node)) > 1:
        return False
    names, shape = rule.factors(Call(node)), type_of(node).shape
    of_rows = names.output[:lead]
    for operand, dims in zip(Call(node).operands, names.operands, strict=True):
        if operand is expert:
            continue
        if operand in rows:
            given = type_of(operand).shape
            aligned = all(
                a == b or equal(n, 1) for a, b, n in zip(dims, of_rows, given, strict=False)
            )
            if len(given) < lead or not aligned:
                return False
        elif set(dims) & set(of_rows):
            return False
    return None not in of_rows and shape[:lead] == type_of(expert).shape


@dataclass
class _InOrder:
    """The rows of one group in order.

    Attributes:
        order: the rows' numbers.
        place: of each row in that order.
        ends: behind each expert's last row.
        mask: which rows have an expert; None if all do.
        count: of rows.
        expert: in the old graph, the index of each row's expert.
        through: by steps, which row of what they are read from each row is, in order.
    """

    order: fx.Node
    place: fx.Node
    ends: fx.Node
    mask: fx.Node | None
    count: Size
    expert: fx.Node
    through: dict[tuple[int | fx.Node, ...], fx.Node] = field(default_factory=dict)

    @property
    def lead(self) -> int:
        """How many dims rows have in the model."""
        return len(type_of(self.expert).shape)

    def type_of(self, type_: TensorType, count: Size | None = None) -> TensorType:
        """The type of rows [..., features] in order: [count, 1, ..., features]."""
        count = self.count if count is None else count
        shape = (count, *(1,) * (self.lead - 1), *type_.shape[self.lead :])
        dims = ((WHOLE,) * self.lead + type_.layout.dims[self.lead :])
        return TensorType(type_.dtype, shape, Layout(dims, type_.layout.partial))


class _RowSorter:
    def __init__(self, program: Program, groups: list[Group]) -> None:
        self.program, self.builder = program, Builder()
        self.repeated = RepeatedRows(self.builder, self._spelled)
        self.group_of = {node: group for group in groups for node in group.nodes}
        self.picked = {
            pick: node for group in groups for node in group.leaving for pick in _picks_of(node)
        }
        self.sorted: dict[fx.Node, _InOrder] = {}  # by the index of each row's expert
        self.env: dict[Any, fx.Node] = {}  # in order: nodes of groups, and by index what enters

    def run(self) -> Program:
        for node in self.program.graph.nodes:
            self.builder.at(node)
            if node in self.picked:
                rows = self._rows_of(self.group_of[self.picked[node]])
                self.builder.env[node] = self._put_back(self.picked[node], rows, node)
                continue
            if node not in self.group_of:
                if all(n in self.builder.env for n in node.all_input_nodes):
                    self.builder.env[node] = self.builder.copy(node)
                continue
            group = self.group_of[node]
            rows = self._rows_of(group)
            self.env[node] = self._in_order(node, group, rows)
            if node in group.leaving and not _picks_of(node):
                self.builder.env[node] = self._put_back(node, rows)
        return self.program.with_graph(self.builder.graph)

    def _in_order(self, node: fx.Node, group: Group, rows: _InOrder) -> fx.Node:
        """A node of a group, on rows in order."""
        call, type_, why = Call(node), rows.type_of(type_of(node)), node.meta.get("why")
        if node.target is op("expert_linear"):
            weight, bias = call["weight"], call["bias"]
            return self.builder.call(
                op("grouped_linear"),
                (self._operand(call["x"], group, rows), rows.ends, self.builder.env[weight],
                 self.builder.env.get(bias)),
                type_, why=why, transposed=call["transposed"],
            )
        operands = [self._operand(x, group, rows) for x in call.operands]
        args, kwargs = replace_operands(node, operands)
        return self.builder.call(node.target, args, type_, why=why, **kwargs)

    def _operand(self, x: fx.Node, group: Group, rows: _InOrder) -> fx.Node:
        if self.group_of.get(x) is group:
            return self.env[x]
        if x not in group.entering:
            return self.builder.env[x]
        if (x, rows.expert) not in self.env:
            self.env[x, rows.expert] = self._taken(x, rows)
        return self.env[x, rows.expert]

    def _rows_of(self, group: Group) -> _InOrder:
        expert = group.expert
        assert expert is not None
        if expert not in self.sorted:
            weight = next(n for n in group.nodes if n.target is op("expert_linear"))
            experts = self._local(type_of(Call(weight)["weight"]))[0]
            self.sorted[expert] = self._sort(expert, int(experts))
        return self.sorted[expert]

    def _sort(self, expert: fx.Node, num_experts: int) -> _InOrder:
        type_ = type_of(expert)
        count = product(self._local(type_))
        numbers = TensorType.whole(torch.int64, (count,))
        ends = TensorType.whole(torch.int32, (num_experts,))
        types = (numbers, numbers, ends)
        made = self.builder.call(
            op("sort_rows"), (self.builder.env[expert],), types, why="rows by expert",
            num_experts=num_experts,
        )
        order, place, end = (
            self.builder.call(operator.getitem, (made, i), t) for i, t in enumerate(types)
        )
        mask = None
        if not _all_have_one(expert, num_experts):
            known = TensorType(torch.bool, type_.shape, type_.layout)
            mask = self.builder.call(
                aten.lt.Scalar, (self.builder.env[expert], num_experts), known,
                why="rows that have an expert",
            )
        return _InOrder(order, place, end, mask, count, expert)

    def _taken(self, x: fx.Node, rows: _InOrder) -> fx.Node:
        """The rows of a value that enters a group, in order."""
        type_, lead = type_of(x), rows.lead
        source, index, count = self.builder.env[x], rows.order, rows.count
        alike = type_.shape[:lead] == type_of(rows.expert).shape
        found = self.repeated.of(x) if alike and len(type_.shape) == lead + 1 else None
        if found is not None:
            source, count = found.rows, product(self._local(type_of(found.rows))[:-1])
            index = self._through(rows, found.steps)
        elif not alike:
            type_ = self._full(type_, rows)
            source = self.builder.call(aten.expand.default, (source, self._spelled(type_)), type_)
        source = self._reshaped(source, rows.type_of(type_, count))
        return self.builder.call(
            aten.index.Tensor, (source, [index]), rows.type_of(type_), why="rows by expert"
        )

    def _through(self, rows: _InOrder, steps: tuple[int | fx.Node, ...]) -> fx.Node:
        """Which row of what they are read from each row is, in order."""
        if not steps:
            return rows.order
        if steps not in rows.through:
            before, step = self._through(rows, steps[:-1]), steps[-1]
            target, args, why = (
                (aten.floor_divide.Scalar, (before, step), "which token a row is of")
                if isinstance(step, int) else
                (aten.index.Tensor, (self._reshaped(step, self._flat(type_of(step))), [before]), "")
            )
            rows.through[steps] = self.builder.call(target, args, type_of(rows.order), why=why)
        return rows.through[steps]

    def _full(self, type_: TensorType, rows: _InOrder) -> TensorType:
        """The type of what is one for all choices of a token, once for each."""
        of_rows, lead = type_of(rows.expert), rows.lead
        return TensorType(
            type_.dtype, (*of_rows.shape, *type_.shape[lead:]),
            Layout((*of_rows.layout.dims, *type_.layout.dims[lead:]), type_.layout.partial),
        )

    def _put_back(self, node: fx.Node, rows: _InOrder, pick: fx.Node | None = None) -> fx.Node:
        """Rows as the model has them after a node of a group, or those that it picks of them."""
        type_ = type_of(pick or node)
        place, mask, lead = rows.place, rows.mask, rows.type_of(type_of(node))
        if pick is not None:
            at = self.builder.env[Call(pick)["indices"][0]]
            place = self.builder.call(aten.index.Tensor, (place, [at]), type_of(at))
            lead = TensorType(
                type_.dtype, (*type_of(at).shape, *lead.shape[1:]),
                Layout((*type_of(at).layout.dims, *lead.layout.dims[1:]), lead.layout.partial),
            )
            if mask is not None:
                flat = self._reshaped(mask, self._flat(type_of(mask)))
                known = TensorType(torch.bool, type_of(at).shape, type_of(at).layout)
                mask = self.builder.call(aten.index.Tensor, (flat, [at]), known)
        back = self.builder.call(
            aten.index.Tensor, (self.env[node], [place]), lead, why="back in their places"
        )
        return self._masked(self._reshaped(back, type_), mask, type_, (pick or node).name)

    def _masked(
        self, rows: fx.Node, mask: fx.Node | None, type_: TensorType, name: str
    ) -> fx.Node:
        if mask is None:
            return rows
        of_rows = type_of(mask)
        behind = len(type_.shape) - len(of_rows.shape)
        wide = TensorType(
            torch.bool, (*of_rows.shape, *(1,) * behind),
            Layout((*of_rows.layout.dims, *(WHOLE,) * behind)),
        )
        return self.builder.call(
            aten.where.ScalarOther, (self._reshaped(mask, wide), rows, 0.0), type_, name=name,
            why="rows without an expert give 0",
        )

    def _flat(self, type_: TensorType) -> TensorType:
        """The type with all of a rank's entries in one dim."""
        return TensorType.whole(type_.dtype, (product(self._local(type_)),))

    def _reshaped(self, x: fx.Node, type_: TensorType) -> fx.Node:
        if self._local(type_of(x)) == self._local(type_):
            return x
        return self.builder.call(aten.reshape.default, (x, self._spelled(type_)), type_)

    def _local(self, type_: TensorType) -> tuple[Size, ...]:
        return local_shape(type_, self.program.mesh, self.program.sequence)

    def _spelled(self, type_: TensorType) -> list[Size]:
        return spelled(self._local(type_))


def _picks_of(node: fx.Node) -> tuple[fx.Node, ...]:
    """What picks rows of a node by an index, if that is all that reads it."""
    work, found = list(node.users), list[fx.Node]()
    while work:
        user = work.pop()
        width = type_of(node).shape[-1:]
        if user.target is aten.reshape.default and type_of(user).shape[1:] == width:
            work += user.users
        elif user.target is aten.index.Tensor and len(type_of(Call(user)["self"]).shape) == 2 and (
                len(Call(user)["indices"]) == 1):
            found.append(user)
        else:
            return ()
    return tuple(found)


def _all_have_one(expert: fx.Node, num_experts: int) -> bool:
    """Whether indices are those of the best among as many scores as there are experts."""
    node = expert
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        source = node.all_input_nodes[0]
        chosen = node.target is operator.getitem and node.args[1] == 1
        if chosen and source.target is aten.topk.default:
            call = Call(source)
            return bool(type_of(call["self"]).shape[call["dim"]] == num_experts)
        rule = find_rule(node.target)
        if rule is None or rule.cost != "view":
            return False
        node = source
    return False
