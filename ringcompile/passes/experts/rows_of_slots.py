"""Experts on the rows that are in their slots, in place of all slots.

A capacity gives each expert as many slots as it may need, a quarter more than rows are sent to it
on average: to multiply a buffer [E, C, D] is to multiply empty slots too, and to write it is to
move rows twice. Here rows keep their places and get the index of their expert, from the slot that
they are in; a row that found none, or that another one took the slot of, has no expert.

Which row is in which slot is computed by the model's own ops, on numbers of rows (`slot_maps`), so
that nothing is assumed of how slots are counted. What is read of an empty slot is 0. Where an
expert makes something else of zeros, there is a row of zeros for each expert behind the others,
which is in all empty slots of that expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from ringcompile.ir.calls import Call, replace_operands
from ringcompile.ir.expr import Size, product, simplify
from ringcompile.ir.nodes import results_of, type_of
from ringcompile.ir.program import Program
from ringcompile.ir.types import TensorType
from ringcompile.ops.schemas import op
from ringcompile.passes.base import Builder, Pass
from ringcompile.passes.experts.expert_groups import Group, groups_of_buffers, with_what_follows
from ringcompile.passes.experts.slot_maps import Numbers, Put, Read, is_whole, put_into, reads_of
from ringcompile.passes.experts.slot_ops import gives_zeros, product_of, runs_by_slot

aten = torch.ops.aten


@dataclass(frozen=True)
class RowsOfSlots(Pass):
    """Write buffers of experts' slots as rows with the index of their expert.

        b = index_put(0, [e, c], x)[:, :C]; y = bmm(b, w); o = index(y, [e, d])
    ->  n = index_put(none, [e, c], arange)[:, :C]; f = index_put(E, [n], 0..E-1)
        y = expert_linear(x, f, w); r = index(n, [e, d]); o = where(r < none, index(y, [r]), 0)
    """

    name: ClassVar[str] = "rows-of-slots"

    def run(self, program: Program) -> Program:
        """Rewrite buffers that are filled from rows and read by rows; others stay as they are."""
        groups = groups_of_buffers(program, of_own_tokens=False)
        found = [made for group in groups
                 if (made := _slotted(with_what_follows(program, group))) is not None]
        return _SlotReader(program, found).run() if found else program


@dataclass(frozen=True)
class _Slotted:
    """A group of which it is known which rows enter it, and which are read of it.

    Attributes:
        group: the nodes that run on slots.
        put: which rows enter it.
        reads: of each node that leaves it.
        keeps_zeros: whether an empty slot gives zeros.
    """

    group: Group
    put: Put
    reads: dict[fx.Node, list[Read]]
    keeps_zeros: bool


def _slotted(group: Group) -> _Slotted | None:
    if len(group.entering) != 1 or not all(map(is_whole, group.nodes)):
        return None
    if not runs_by_slot(group):
        return None
    put = put_into(group.entering[0])
    if put is None:
        return None
    reads: dict[fx.Node, list[Read]] = {}
    for node in group.leaving:
        inside = [user for user in node.users if user in group.nodes]
        found = None if inside else reads_of(node)
        if found is None:
            return None
        reads[node] = found
    return _Slotted(group, put, reads, gives_zeros(group))


class _SlotReader:
    def __init__(self, program: Program, found: list[_Slotted]) -> None:
        self.program, self.builder = program, Builder()
        self.reads = {
            read.node: (rows, node, read)
            for slotted in found for rows in [_SlotRows(self.builder, slotted)]
            for node, reads in slotted.reads.items() for read in reads
        }

    def run(self) -> Program:
        """What read slots reads rows; buffers, which nothing reads then, are left to clean-up."""
        for node in self.program.graph.nodes:
            self.builder.at(node)
            if node in self.reads:
                rows, leaving, read = self.reads[node]
                self.builder.env[node] = rows.read(leaving, read)
            else:
                self.builder.env[node] = self.builder.copy(node)
        return self.program.with_graph(self.builder.graph)


class _SlotRows:
    """One group on rows: [N', 1, F] where the model has [E, C, F].

    Args:
        builder: of the new graph.
        slotted: the group.
    """

    def __init__(self, builder: Builder, slotted: _Slotted) -> None:
        self.builder, self.slotted, self.group = builder, slotted, slotted.group
        self.num_experts, self.capacity = type_of(self.group.nodes[0]).shape[:2]
        self.given = product(type_of(slotted.put.rows).shape[:-1])
        self.count = simplify(self.given + (0 if slotted.keeps_zeros else self.num_experts))
        self.numbers = Numbers(builder, self.count)
        self.env: dict[fx.Node, fx.Node] = {}

    def read(self, leaving: fx.Node, read: Read) -> fx.Node:
        """What is read of the slots of a node that leaves the group."""
        if not self.env:
            self._write()
            self.builder.at(read.node)
        type_ = type_of(read.node)
        width = type_.shape[-1]
        rows = self._call(
            aten.reshape.default, (self.env[leaving], [self.count, width]),
            TensorType.whole(type_.dtype, (self.count, width)),
        )
        number = self.numbers.read(self.slots, read)
        last = simplify(self.count - 1)
        at = self._call(aten.clamp.default, (number,), type_of(number), max=last)
        taken = self._call(aten.index.Tensor, (rows, [at]), type_)
        return self._call(
            aten.where.ScalarOther, (self._column(self._below(number, self.count)), taken, 0.0),
            type_, name=read.node.name, why="empty slots give 0",
        )

    def _write(self) -> None:
        self.slots = self._filled()
        experts = self._experts()
        self.env[self.group.entering[0]] = self._entering()
        for node in self.group.nodes:
            self.builder.at(node)
            self.env[node] = self._row_by_row(node, experts)

    def _filled(self) -> fx.Node:
        """The number of the row in each slot [E, C]; an empty one has its expert's row of zeros."""
        slots = self.numbers.put(self.slotted.put)
        if self.slotted.keeps_zeros:
            return slots
        zeros = self._range(self.given, simplify(self.given + self.num_experts))
        return self._call(
            aten.where.self, (self._below(slots, self.given), slots, self._column(zeros)),
            type_of(slots), why="empty slots",
        )

    def _experts(self) -> fx.Node:
        """The index of each row's expert, [N', 1]; E for a row that is in no slot."""
        of_slots = type_of(self.slots)
        experts = self._call(
            aten.where.ScalarOther,
            (self._below(self.slots, self.count),
             self._column(self._range(0, self.num_experts)), self.num_experts),
            of_slots,
        )
        flat = product(of_slots.shape)
        at, experts = (
            self._call(aten.reshape.default, (x, [flat]), _ints(flat))
            for x in (self.slots, experts)
        )
        known = simplify(self.count + 1)  # the last: of empty slots
        nobody = self._call(
            aten.full.default, ([known], self.num_experts), _ints(known), dtype=torch.int64
        )
        found = self._call(
            aten.index_put.default, (nobody, [at], experts), _ints(known),
            why="which row has which expert",
        )
        found = self._call(aten.slice.Tensor, (found, 0, 0, self.count), _ints(self.count))
        return self._column(found)

    def _entering(self) -> fx.Node:
        """The rows that are put into slots, and those of zeros behind them: [N', 1, D]."""
        put = self.slotted.put.rows
        dtype, width = type_of(put).dtype, type_of(put).shape[-1]
        rows = self._call(
            aten.reshape.default, (self.builder.env[put], [self.given, width]),
            TensorType.whole(dtype, (self.given, width)),
        )
        if not self.slotted.keeps_zeros:
            shape = (self.num_experts, width)
            zeros = self._call(
                aten.full.default, (list(shape), 0.0), TensorType.whole(dtype, shape), dtype=dtype
            )
            made = TensorType.whole(dtype, (self.count, width))
            rows = self._call(aten.cat.default, ([rows, zeros], 0), made, why="rows of zeros")
        alone = TensorType.whole(dtype, (self.count, 1, width))
        return self._call(aten.reshape.default, (rows, list(alone.shape)), alone)

    def _row_by_row(self, node: fx.Node, experts: fx.Node) -> fx.Node:
        (type_,) = results_of(node)
        made = TensorType.whole(type_.dtype, (self.count, 1, *type_.shape[2:]))
        found = product_of(node, self.group)
        if found is None:
            operands = [self._operand(x, experts) for x in Call(node).operands]
            args, kwargs = replace_operands(node, operands)
            return self._call(node.target, args, made, **kwargs)
        out = self._call(
            op("expert_linear"),
            (self.env[found.slots], experts, self.builder.env[found.weight], None), made,
            transposed=found.transposed,
        )
        if found.bias is None:
            return out
        return self._call(aten.add.Tensor, (out, self._operand(found.bias, experts)), made)

    def _operand(self, x: fx.Node, experts: fx.Node) -> fx.Node:
        """Rows, or what is one for all slots of an expert [E, 1, F] for each row of it."""
        if x in self.env:
            return self.env[x]
        type_ = type_of(x)
        last = int(self.num_experts) - 1
        at = self._call(aten.reshape.default, (experts, [self.count]), _ints(self.count))
        at = self._call(aten.clamp.default, (at,), _ints(self.count), max=last)
        made = TensorType.whole(type_.dtype, (self.count, *type_.shape[1:]))
        return self._call(
            aten.index.Tensor, (self.builder.env[x], [at]), made, why="of each row's expert"
        )

    # -- numbers ----------------------------------------------------------------------------------

    def _range(self, start: Size, end: Size) -> fx.Node:
        made = _ints(simplify(end - start))
        return self._call(aten.arange.start_step, (start, end, 1), made, dtype=torch.int64)

    def _below(self, numbers: fx.Node, bound: Size) -> fx.Node:
        made = TensorType.whole(torch.bool, type_of(numbers).shape)
        return self._call(aten.lt.Scalar, (numbers, bound), made)

    def _column(self, x: fx.Node) -> fx.Node:
        type_ = type_of(x)
        shape = (*type_.shape, 1)
        made = TensorType.whole(type_.dtype, shape)
        return self._call(aten.reshape.default, (x, list(shape)), made)

    def _call(self, target: Any, args: tuple[Any, ...], type_: TensorType, **how: Any) -> fx.Node:
        return self.builder.call(target, args, type_, **how)


def _ints(count: Size) -> TensorType:
    return TensorType.whole(torch.int64, (count,))
