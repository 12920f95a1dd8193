"""Whether the sequences of a batch know of each other: only then may a batch be taken apart.

Data parallelism, microbatches and halves of a batch all compute some rows of it as a batch by
themselves. That gives what the whole batch gives where every op keeps the rows apart, by its rule;
or where it belongs to a region that routes tokens (`regions.py`), which is known to be token-wise
but for a capacity: that counts the tokens of each part alone, and is said so.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import fx

from ringcompile.errors import RingCompileError
from ringcompile.ir.calls import Call
from ringcompile.ir.layout import WHOLE, Layout
from ringcompile.ir.nodes import error_at, results_of, type_of
from ringcompile.ir.program import Program
from ringcompile.ir.rules import ConflictError, Placement, find_rule
from ringcompile.mesh import Mesh
from ringcompile.passes.base import Pass
from ringcompile.passes.place import Place
from ringcompile.passes.regions import Region

_AXIS = "dp"
_UNKNOWN = (
    "captured with one sequence: that sequences of a batch do not change each other's results is "
    "taken for granted"
)
# Running sums go from rank to rank, and so from row to row.
_RUNNING = frozenset({"aten.cumsum.default"})


@dataclass(frozen=True)
class CheckBatch(Pass):
    """Refuse to deal out a batch whose sequences are mixed.

    Attributes:
        mesh: the parallel plan; only with `dp` or `pp` are batches dealt.
        checked: as for `Place`.
    """

    name: ClassVar[str] = "check-batch"
    mesh: Mesh
    checked: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def run(self, program: Program) -> Program:
        """The same program, with a note where a capacity is counted by each part.

        Raises:
            RingCompileError: with `dp`, at the op that mixes sequences.
        """
        if program.batch == 1:
            return program.with_graph(program.graph, notes=(*program.notes, _UNKNOWN))
        regions = routing(program, self.checked)
        error = mixed(program, regions)
        if error is None:
            counted = [f"{r.name}: with {self.mesh}, the capacity of experts is counted for each "
                       f"batch of {program.batch} alone" for r in regions if r.has_capacity]
            notes = (*program.notes, *dict.fromkeys(counted))
            return program.with_graph(program.graph, notes=notes)
        if self.mesh.size("dp") > 1:
            raise RingCompileError(
                error.message, hint="leave dp out", location=error.location, node=error.node
            )
        return program.with_graph(program.graph, fixed_batch=True)


def routing(program: Program, checked: dict[Any, Any]) -> list[Region]:
    """The regions that route tokens to experts."""
    return Place(Mesh((("ring", 2),)), capacity="local", checked=checked).routing(program)


def mixed(program: Program, regions: Sequence[Region]) -> RingCompileError | None:
    """At the first op, outside of these regions, that needs more than one sequence has of them.

    Args:
        program: for two or more sequences, prepared.
        regions: whose ops are known to be token-wise.
    """
    reader = _Reader(program, {node for region in regions for node in region.nodes})
    for node in program.graph.nodes:
        if node.op != "output" and "type" in node.meta:
            found = reader.layout(node)
            if found is None:
                return error_at(node, "sequences of a batch are mixed here")
            reader.layouts[node] = found
    return None


class _Reader:
    """Says along which dim the sequences of a batch lie in each value.

    Args:
        program: the program.
        inside: nodes that are token-wise, whatever their ops are.
    """

    def __init__(self, program: Program, inside: set[fx.Node]) -> None:
        self.program, self.inside = program, inside
        self.layouts: dict[fx.Node, Layout] = {}
        # Values that number the sequences, 0 to B - 1, and along which dim they do.
        self.numbers: dict[fx.Node, Layout] = {}

    def layout(self, node: fx.Node) -> Layout | None:
        """The rows of a value; None if it needs more of its operands than a row has."""
        if node.op == "placeholder":
            given = node.name in self.program.placeholders and len(type_of(node).shape) > 1
            return _rows(node) if given else Layout.whole(len(type_of(node).shape))
        if node in self.inside:
            return _rows(node)
        if node.target is operator.getitem:
            return self.layouts[node.args[0]]  # type: ignore[index]
        return self._called(node, Call(node))

    def _called(self, node: fx.Node, call: Call) -> Layout | None:
        self._number(node, call)
        given = [self.layouts[operand] for operand in call.operands]
        if all(layout.is_whole for layout in given):
            return Layout.whole(len(results_of(node)[0].shape))
        if str(node.target) == "aten.index.Tensor" and call["indices"][0] in self.numbers:
            return self._looked_up(node, call)
        if str(node.target) in _RUNNING and given[0].dims[call["dim"]]:
            return None
        placed = self._forward(node, call, given)
        if placed is None or any(
            not have.is_whole and have != need
            for have, need in zip(given, placed.operands, strict=True)
        ):
            return None
        return placed.output

    def _number(self, node: fx.Node, call: Call) -> None:
        """Note what numbers the sequences: a range, seen through views."""
        operands = call.operands
        if str(node.target) == "aten.arange.start_step":
            whole = (call["start"], call["end"], call["step"]) == (0, self.program.batch, 1)
            if whole:
                self.numbers[node] = _rows(node)
        elif len(operands) == 1 and operands[0] in self.numbers and str(node.target) in _VIEWS:
            placed = self._forward(node, call, [self.numbers[operands[0]]])
            if placed is not None:
                self.numbers[node] = placed.output

    def _forward(self, node: fx.Node, call: Call, given: Sequence[Layout]) -> Placement | None:
        rule, ways = find_rule(node.target), {_AXIS: self.program.batch}
        try:
            return None if rule is None else rule.forward(call, given, ways)
        except ConflictError:
            return None

    def _looked_up(self, node: fx.Node, call: Call) -> Layout | None:
        """Of a table of each sequence, entries of that very sequence."""
        table, indices = self.layouts[call["self"]], [i for i in call["indices"] if i is not None]
        others = [self.layouts[i] for i in indices[1:]]
        if table != _rows(call["self"]) or not all(layout.is_whole for layout in others):
            return None
        rank = max(len(type_of(i).shape) for i in indices)
        number = self.numbers[indices[0]].dims
        behind = len(results_of(node)[0].shape) - rank
        return Layout((WHOLE,) * (rank - len(number)) + number + (WHOLE,) * behind)


# What a number of a sequence is seen through.
_VIEWS = frozenset({
    "aten.reshape.default", "aten.expand.default", "aten.to.dtype", "aten.permute.default",
})


def _rows(node: fx.Node) -> Layout:
    """A value with rows of each sequence, or of its tokens."""
    shape = results_of(node)[0].shape
    return Layout.split(len(shape), 0, shape[0], (_AXIS,)) if shape else Layout.whole(0)
