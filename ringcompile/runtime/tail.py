"""The last positions of a sequence alone: what is behind the layers is computed for no others.

A head that makes 152,000 logits of every token costs more memory than all that comes before it. Who
wants the last token's logits needs one row of hidden states. So rows are taken as early as the
graph allows, in front of the ops that treat every position on its own (the last norm, the head,
casts, soft caps), on each rank from what it holds; nothing is gathered for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ringcompile.errors import RingCompileError
from ringcompile.ir.calls import Call, replace_operands
from ringcompile.ir.expr import SEQUENCE, Size, bind, equal, symbol
from ringcompile.ir.fused import groups_of, mark_group
from ringcompile.ir.nodes import type_of
from ringcompile.ir.program import Program
from ringcompile.ir.rules import FactorRule, find_rule
from ringcompile.ir.rules.table import scan
from ringcompile.ir.types import TensorType, local_shape
from ringcompile.ops import schemas

# Where rows lie in a dim, in order.
Rows = tuple[range, ...]
_CAT, _SLICE = "aten.cat.default", "aten.slice.Tensor"


def take_rows(x: torch.Tensor, dim: int, rows: Rows) -> torch.Tensor:
    """Some runs of a dim of x [...], one behind the other; a view where it is one run."""
    parts = [x.narrow(dim, run.start, len(run)) for run in rows] or [x.narrow(dim, 0, 0)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def sequence_dim(program: Program, type_: TensorType) -> int | None:
    """The dim of an output that is the sequence, or one of several, or None where it has none.

    Raises:
        RingCompileError: several dims could be, or the sequence is one of several factors of one.
    """
    assert program.sequence is not None
    lengths = program.sequence.lengths
    split = [i for i, dim in enumerate(type_.layout.dims) if any(atom.sequence for atom in dim)]
    found = split or [
        i for i, size in enumerate(type_.shape) if i and any(equal(size, x) for x in lengths)
    ]
    if len(found) > 1 or any(len(type_.layout.dims[i]) > 1 for i in found):
        raise RingCompileError(
            f"the output {type_} has no dim that is the sequence alone: its last positions cannot "
            "be taken as one piece",
            hint="leave out --last (`last=` in Python)",
        )
    return found[0] if found else None


def has_last_positions(program: Program) -> bool:
    """Whether the last positions of every output are one piece of it."""
    try:
        for node in program.outputs:
            sequence_dim(program, type_of(node))
    except RingCompileError:
        return False
    return True


def windows(type_: TensorType, dim: int, lengths: Mapping[str, int], last: int) -> range:
    """The last positions of a dim that is a sequence, `last` of them or all."""
    total = int(bind(type_.shape[dim], lengths))
    return range(max(0, total - last), total)


def own_rows(
    program: Program, type_: TensorType, dim: int, window: range, lengths: Mapping[str, int]
) -> Rows:
    """Where the positions of a window lie in this rank's share of a dim; nowhere, it may be."""
    if not type_.layout.dims[dim]:
        return (window,)
    sequence, coordinates = program.sequence, program.coordinates
    assert sequence is not None
    assert coordinates is not None
    level = sequence.at(type_.layout.dims[dim][0])
    width = int(bind(level.chunk, lengths))
    rows = []
    for place, chunk in enumerate(level.own_chunks(coordinates)):
        start = int(bind(chunk, {})) * width
        low, high = max(window.start, start), min(window.stop, start + width)
        if low < high:
            moved = place * width - start
            rows.append(range(low + moved, high + moved))
    return tuple(rows)


@dataclass(frozen=True)
class RowsByRank:
    """How many of the last positions each rank holds of an output.

    Attributes:
        dim: the dim of the sequence.
        counts: one a rank, in order.
    """

    dim: int
    counts: tuple[int, ...]


def rows_by_rank(
    program: Program, type_: TensorType, lengths: Mapping[str, int], last: int
) -> RowsByRank | None:
    """How many of the last positions each rank holds; None for an output without a sequence."""
    dim = sequence_dim(program, type_)
    if dim is None:
        return None
    assert program.mesh is not None
    window, everyone = windows(type_, dim, lengths, last), range(program.mesh.world_size)
    ranks = (
        program.with_graph(program.graph, coordinates=program.mesh.coordinates(rank))
        for rank in everyone
    )
    rows = (own_rows(rank, type_, dim, window, lengths) for rank in ranks)
    return RowsByRank(dim, tuple(sum(map(len, held)) for held in rows))


def last_positions(program: Program, lengths: Mapping[str, int], last: int) -> Program:
    """One rank's program for these lengths, returning the last positions it holds, and no others.

    Args:
        program: of one rank.
        lengths: of the run.
        last: how many positions, counted over the whole sequence. Outputs without a dim of the
            sequence stay as they are.

    Raises:
        RingCompileError: see `sequence_dim`.
    """
    graph: fx.Graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(program.graph, copies)
    groups = groups_of(graph.nodes)
    tail = _Tail(program, graph, lengths)
    outputs = []
    for node in program.outputs:
        dim = sequence_dim(program, type_of(node))
        if dim is None:
            outputs.append(copies[node])
            continue
        window = windows(type_of(node), dim, lengths, last)
        rows = own_rows(program, type_of(node), dim, window, lengths)
        outputs.append(tail.reduced(copies[node], dim, rows))
    graph.output(tuple(outputs))
    _drop_unused(graph)
    left = set(graph.nodes)
    for group in groups:
        mark_group([node for node in group if node in left])
    return program.with_graph(graph)


class _Tail:
    """Rewrites values to some of their rows, from the outputs backwards."""

    def __init__(self, program: Program, graph: fx.Graph, lengths: Mapping[str, int]) -> None:
        self.program, self.graph, self.lengths = program, graph, lengths
        self.made: dict[tuple[fx.Node, int, Rows], fx.Node] = {}

    def reduced(self, node: fx.Node, dim: int, rows: Rows) -> fx.Node:
        """These rows of a value: computed from rows of what it is made of, or else taken."""
        key = (node, dim, rows)
        if key not in self.made:
            made = self._through(node, dim, rows) if len(node.users) <= 1 else None
            self.made[key] = made or self._taken(node, dim, rows)
        return self.made[key]

    def _taken(self, node: fx.Node, dim: int, rows: Rows) -> fx.Node:
        made = self.graph.call_function(take_rows, (node, dim, rows))
        made.meta = {**node.meta, "rows": (dim, sum(map(len, rows)))}
        mark_group([made])
        return made

    def _through(self, node: fx.Node, dim: int, rows: Rows) -> fx.Node | None:
        if node.op != "call_function" or schemas.name_of(node.target) is not None:
            return None
        special = _SPECIAL.get(str(node.target))
        if special is not None and Call(node)["dim"] % len(type_of(node).shape) == dim:
            return special(self, node, dim, rows)
        return self._by_factors(node, dim, rows)

    def _by_factors(self, node: fx.Node, dim: int, rows: Rows) -> fx.Node | None:
        """An op that works on every index of the dim alone works on these rows alone."""
        rule = find_rule(node.target)
        if not isinstance(rule, FactorRule) or rule.shape_argument or rule.factors is scan:
            return None
        names, call = rule.factors(Call(node)), Call(node)
        factor = names.output[dim]
        if factor is None or list(names.output).count(factor) > 1:
            return None
        dims = [
            [i for i, name in enumerate(operand) if name == factor] for operand in names.operands
        ]
        if not any(dims) or any(len(found) > 1 for found in dims):
            return None
        operands = [
            self.reduced(operand, found[0], rows) if found else operand
            for operand, found in zip(call.operands, dims, strict=True)
        ]
        args, kwargs = replace_operands(node, operands)
        made = self._made(node, args, kwargs)
        made.meta["rows"] = dim, sum(map(len, rows))
        return made

    def _made(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        """The op of a node, of other arguments."""
        made = self.graph.create_node("call_function", node.target, args, kwargs)
        made.meta = {**node.meta, "copy_of": node.name}
        mark_group([made])
        return made

    def from_start(self, node: fx.Node, dim: int, rows: Rows) -> fx.Node | None:
        """Rows of what cuts padding off: they are rows of the whole."""
        call = Call(node)
        if call["start"] not in (None, 0) or call["step"] != 1:
            return None
        return self.reduced(call.operands[0], dim, rows)

    def joined(self, node: fx.Node, dim: int, rows: Rows) -> fx.Node | None:
        """Rows of pieces, each from the piece that holds it; other pieces are not made at all."""
        parts: list[fx.Node] = []
        start = 0
        for piece in Call(node).operands:
            width = int(bind(self._local(piece)[dim], self.lengths))
            held = tuple(
                range(max(run.start, start) - start, min(run.stop, start + width) - start)
                for run in rows
                if max(run.start, start) < min(run.stop, start + width)
            )
            start += width
            if held:
                parts.append(self.reduced(piece, dim, held))
        if not parts:
            return None
        made = self._made(node, (parts, dim), {})
        made.meta["rows"] = dim, sum(map(len, rows))
        return made

    def _local(self, node: fx.Node) -> tuple[Size, ...]:
        return local_shape(type_of(node), self.program.mesh, self.program.sequence)


_SPECIAL: dict[str, Callable[[_Tail, fx.Node, int, Rows], fx.Node | None]] = {
    _SLICE: _Tail.from_start,
    _CAT: _Tail.joined,
}


def _drop_unused(graph: fx.Graph) -> None:
    """Remove what nothing reads any more; what communicates stays, for the ranks it meets."""
    for node in reversed(list(graph.nodes)):
        talks = schemas.name_of(node.target) in schemas.COMMUNICATION
        if node.op == "call_function" and not node.users and not talks:
            graph.erase_node(node)


def last_rows(
    program: Program, outputs: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    """A rank's share of its outputs, of the last of the new tokens only."""
    made = []
    for node, x in zip(program.outputs, outputs, strict=True):
        for dim, size in enumerate(type_of(node).shape):
            if equal(size, symbol(SEQUENCE)):
                x = x.narrow(dim, x.shape[dim] - 1, 1).clone()
        made.append(x)
    return tuple(made)
