"""Layouts along the batch: which dim of each value is its sequences, by the op rules.

The same mechanism as for the sequence (requests.py), on an axis of its own: a batch is cut into
parts. Inputs come in parts, each op gets its operands as its rule asks, and what is the same for
all sequences stays whole or is computed for a part where it meets one. Nothing may be gathered
along this axis: an op that would need the sequences of other parts mixes them.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence

from torch import fx

from ringcompile.errors import RingCompileError
from ringcompile.ir.calls import Call, aten_name, target_name
from ringcompile.ir.expr import BATCH, PART_AXIS, Size, divide, equal, is_symbolic, symbol
from ringcompile.ir.layout import WHOLE, Atom, Layout
from ringcompile.ir.nodes import error_at, layout_of, results_of, type_of
from ringcompile.ir.program import Program
from ringcompile.ir.pure_ops import drawing, draws
from ringcompile.ir.rules import ConflictError, Placement, find_rule
from ringcompile.ops.running import dim_along, is_scan
from ringcompile.passes.base import Builder
from ringcompile.passes.requests import Requests, placeholders_first

_B = symbol(BATCH)
_AXES = (PART_AXIS,)
_INDEXED = frozenset({"aten.index.Tensor", "aten.index_put.default"})
_RANGE = "aten.arange.start_step"
# What the numbers of sequences are seen through.
_VIEWS = frozenset({
    "aten.reshape.default", "aten.expand.default", "aten.to.dtype", "aten.permute.default",
})
# Where a size among the arguments is a number, and not how much of something there is.
_ARITHMETIC = frozenset({"mul", "div", "add", "sub", "rsub", "pow", "floor_divide", "remainder"})


class BatchLayouts(Requests):
    """Writes a program in which every value has its layout along the batch.

    Args:
        program: for any batch, prepared.
        inside: nodes of regions that route tokens: what they compute of some tokens depends on
            these alone.
    """

    def __init__(self, program: Program, inside: Collection[fx.Node]) -> None:
        super().__init__(Builder(), {})
        self.axis_sizes = {PART_AXIS: _B}
        self.program, self.inside = program, inside
        # Values that number the sequences, 0 to b - 1, and where they do.
        self.numbers: dict[fx.Node, Layout] = {}
        self.node: fx.Node | None = None

    def run(self) -> Program:
        """The program with layouts.

        Raises:
            RingCompileError: at the first op that mixes the sequences of a batch.
        """
        for node in self.program.graph.nodes:
            self.builder.at(node)
            self.node = node
            if node.op == "placeholder":
                self.builder.env[node] = self._placeholder(node)
            elif node.op == "call_function":
                self.builder.env[node] = self._call(node)
            else:
                self.builder.output(tuple(self.builder.env[n] for n in node.args[0]))
        return self.program.with_graph(
            placeholders_first(self.builder.graph), placeholders=self.placeholders
        )

    def redistributed(self, node: fx.Node, wanted: Layout) -> fx.Node:
        """A part of what is whole; anything else would bring other sequences."""
        if layout_of(node).is_whole:
            return super().redistributed(node, wanted)
        assert self.node is not None
        raise mixing(self.node)

    def _placeholder(self, node: fx.Node) -> fx.Node:
        type_ = type_of(node)
        if node.name in self.program.weights:
            return self.builder.placeholder(node.name, type_)
        self.placeholders[node.name] = self.program.placeholders[node.name]
        dims = [i for i, size in enumerate(type_.shape) if size == _B]
        layout = Layout.whole(len(type_.shape))
        if dims:
            layout = layout.with_dim(dims[0], (Atom(_B, _AXES),))
        return self.builder.placeholder(node.name, type_.with_layout(layout))

    def _call(self, node: fx.Node) -> fx.Node:
        if node.target is operator.getitem:
            source, index = node.args
            return self.pick(self.builder.env[source], index, node.name)  # type: ignore[index, arg-type]
        call = Call(node)
        self._number(node, call)
        operands = [self.builder.env[n] for n in call.operands]
        if node in self.inside:
            return self._of_tokens(node, operands)
        if all(layout_of(n).is_whole for n in operands):
            return self.emit(node, operands, Layout.whole(len(results_of(node)[0].shape)))
        if is_scan(node) and layout_of(operands[0]).dims[dim_along(node)]:
            raise mixing(node)
        rows = self._by_number(node, call)
        if rows is not None:
            return rows
        placement = self._forward(node, call, [layout_of(n) for n in operands])
        if placement is None:
            raise mixing(node)
        new = [self.request(n, want) for n, want in zip(operands, placement.operands, strict=True)]
        return self.emit(node, new, placement.output)

    def _forward(self, node: fx.Node, call: Call, given: Sequence[Layout]) -> Placement | None:
        rule = find_rule(node.target)
        try:
            return None if rule is None else rule.forward(call, given, self.axis_sizes)
        except ConflictError:
            return None

    # -- routing to experts ------------------------------------------------------------------------

    def _of_tokens(self, node: fx.Node, operands: list[fx.Node]) -> fx.Node:
        """An op on tokens, for those of a part alone: every size of it is that of a part."""
        of_batch = any(is_symbolic(arg) and _B in arg.free_symbols for arg in node.args)
        if of_batch and aten_name(node.target) in _ARITHMETIC:
            raise error_at(
                node, "a number that depends on the batch is used where tokens go to experts"
            )
        new = [self.request(n, rows_of(n)) for n in operands]
        made = self.emit(node, new, rows_of(node))
        made.meta["of_part"] = True
        return made

    # -- entries by the number of their sequence: x[arange(b), places] ----------------------------

    def _number(self, node: fx.Node, call: Call) -> None:
        """Note what numbers the sequences: a range, seen through views."""
        operands = call.operands
        if target_name(node.target) == _RANGE:
            ends = (call["start"], call["end"], call["step"])
            if ends == (0, _B, 1):
                self.numbers[node] = Layout(((Atom(_B, _AXES),),))
        elif (target_name(node.target) in _VIEWS and len(operands) == 1
                and operands[0] in self.numbers):
            placed = self._forward(node, call, [self.numbers[operands[0]]])
            if placed is not None and placed.operands[0] == self.numbers[operands[0]]:
                self.numbers[node] = placed.output

    def _by_number(self, node: fx.Node, call: Call) -> fx.Node | None:
        """Of a part's sequences the entries of these very sequences; None for other indices."""
        if target_name(node.target) not in _INDEXED:
            return None
        source, indices = self.builder.env[call["self"]], list(call["indices"])
        number = self._number_among(indices, layout_of(source))
        if number is None:
            return None
        given = [index for index in indices if index is not None]
        place = next(i - len(dims) for dims in [self.numbers[number].dims]
                     for i, atoms in enumerate(dims) if atoms)
        new = [
            self._own_number(index) if index is number
            else self.request(self.builder.env[index], _along(index, place))
            for index in given
        ]
        positions = [i for i, index in enumerate(indices) if index is not None]
        adjacent = positions == list(range(positions[0], positions[-1] + 1))
        width = max(len(type_of(index).shape) for index in given)
        dim = (positions[0] if adjacent else 0) + width + place
        rank = len(type_of(node).shape)
        if target_name(node.target) == "aten.index.Tensor":
            return self.emit(node, [source, *new], _split(rank, dim))
        from_end = dim - (rank - len(given) + width)
        values = self.request(self.builder.env[call["values"]], _along(call["values"], from_end))
        return self.emit(node, [source, *new, values], layout_of(source))

    def _number_among(self, indices: Sequence[fx.Node | None], source: Layout) -> fx.Node | None:
        """The index that numbers the sequences, where it is the one into the batch dim."""
        where = [dim for dim, atoms in enumerate(source.dims) if atoms]
        if len(where) != 1 or where[0] >= len(indices) or indices[where[0]] not in self.numbers:
            return None
        number = indices[where[0]]
        assert number is not None
        (atoms,) = filter(None, self.numbers[number].dims)
        return number if atoms == source.dims[where[0]] else None

    def _own_number(self, node: fx.Node) -> fx.Node:
        """The numbers of a part's sequences among themselves, 0 to k - 1."""
        call, layout = Call(node), self.numbers[node]
        made = self.emit(node, [self._own_number(n) for n in call.operands], layout)
        if target_name(node.target) == _RANGE:
            made.meta["of_part"] = True
        return made


def mixing(node: fx.Node) -> RingCompileError:
    """The refusal of an op that needs more than one part has."""
    if draws(node.target):
        return drawing(node)
    if find_rule(node.target) is None:
        return error_at(
            node, f"{node.target} has no sharding rule, so it may mix the sequences of a batch"
        )
    if target_name(node.target) in _INDEXED:
        return error_at(
            node, "sequences of the batch are looked up here by an index that may name any of them"
        )
    return error_at(node, "this mixes the sequences of a batch")


def rows_of(node: fx.Node) -> Layout:
    """The layout of values with an entry for each sequence or token, in the first dim that has."""
    shape = results_of(node)[0].shape
    for dim, size in enumerate(shape):
        if is_symbolic(size) and _B in size.free_symbols and divide(size, _B) is not None:
            return _split(len(shape), dim, size)
    return Layout.whole(len(shape))


def _split(rank: int, dim: int, size: Size = _B) -> Layout:
    return Layout(tuple((Atom(size, _AXES),) if i == dim else WHOLE for i in range(rank)))


def _along(node: fx.Node, place: int) -> Layout:
    """The layout of an index or a value whose dim at that place, from the end, is the batch."""
    shape = type_of(node).shape
    dim = len(shape) + place
    return _split(len(shape), dim if dim >= 0 and equal(shape[dim], _B) else -1)
