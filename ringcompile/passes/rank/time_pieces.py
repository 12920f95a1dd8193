"""The axis `time`: pieces of the sequence, one behind the other, that ranks compute in turn.

A query sees keys of its own piece and of earlier ones (of later ones too, without a causal mask).
Of its own piece they lie as on a ring without `time`; those of other pieces go round the same ring
once more for it, since keeping them would take the memory that the ring saves. So attention of a
piece is one `ring_attention` over its own keys and those of the others that it sees, by position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
import torch
from torch import fx

from ringcompile.axes import TIME
from ringcompile.errors import RingCompileError
from ringcompile.ir.calls import Call, symbols_in, target_name
from ringcompile.ir.communication import COLLECTIVES, GATHER, short_name
from ringcompile.ir.expr import (
    LOCAL,
    OWN,
    Size,
    bind,
    coordinate,
    divide,
    is_symbolic,
    product,
    simplify,
    symbol,
)
from ringcompile.ir.layout import WHOLE, Atom, DimLayout, Layout, normalise
from ringcompile.ir.nodes import results_of, type_of
from ringcompile.ir.program import Program
from ringcompile.ir.types import SequenceSplit, TensorType, local_shape, local_size
from ringcompile.ops.blocks import Band
from ringcompile.ops.schemas import op
from ringcompile.passes.base import Builder

aten = torch.ops.aten
# What stands for a node of the program in a piece.
Value = Callable[[fx.Node, int], fx.Node]


@dataclass
class TimePieces:
    """How values of a program lie along `time`.

    Attributes:
        program: of one rank; `time` is a symbol in it.
        builder: of the program without `time`.
    """

    program: Program
    builder: Builder
    axis: ClassVar[str] = TIME
    suffix: ClassVar[str] = "t"

    def __post_init__(self) -> None:
        assert self.program.sequence is not None
        assert self.program.mesh is not None
        self.mesh = self.program.mesh
        self.sequence: SequenceSplit = self.program.sequence
        self.count = self.mesh.size(TIME)
        self.unrolled = self.sequence.unrolled()

    def changes(self) -> dict[str, Any]:
        """What else of a program is another one without `time`."""
        return {"sequence": self.unrolled}

    # -- what depends on the piece -------------------------------------------------------------

    def varies(self, node: fx.Node) -> bool:
        """Whether a node by itself, whatever it reads, is another one for every piece."""
        return _holds_time(node) or ("type" in node.meta and any(map(_is_timed, results_of(node))))

    def joins(self, node: fx.Node) -> bool:
        """Whether a node makes one value of all pieces."""
        collective = target_name(node.target) in COLLECTIVES
        return collective and TIME in str(node.kwargs["axis"]).split(",")

    def others(self, node: fx.Node, piece: int) -> Iterator[tuple[fx.Node, int]]:
        """What a node of a piece reads of other pieces."""
        if self.joins(node):
            (operand,) = node.all_input_nodes
            yield from ((operand, other) for other in range(self.count))
        elif self._borders(node):
            yield from ((node.args[0], other) for other in self._beside(node, piece).values())  # type: ignore[misc]
        elif self._attends(node):
            call = Call(node)
            yield from (
                (call[name], other) for other in self._seen(node, piece) for name in ("k", "v")
            )

    def at(self, size: Size, piece: int) -> Size:
        """An expression for one piece."""
        if not is_symbolic(size):
            return size
        known: dict[Any, Any] = {coordinate(TIME): sympy.Integer(piece)}
        if symbol(OWN) in size.free_symbols:
            known[symbol(OWN)] = self._own(piece)
        return simplify(size.xreplace(known))

    def _own(self, piece: int) -> Any:
        """How many tokens of a piece are this rank's, padding not counted."""
        split = self.unrolled.of_tokens
        each = split.chunks_per_piece
        held = split.own_chunks(self.program.coordinates)[piece * each : (piece + 1) * each]
        return sum(
            sympy.Min(sympy.Max(split.length - index * split.chunk, 0), split.chunk)
            for index in held
        )

    # -- types ---------------------------------------------------------------------------------

    def inside(self, type_: TensorType, piece: int) -> TensorType:
        """The type of what one piece has of a value, by itself."""
        shape, dims = [], []
        for size, dim in zip(type_.shape, type_.layout.dims, strict=True):
            atoms = [self._atom(atom, piece) for atom in dim] or [Atom(self.at(size, piece))]
            shape.append(product(atom.size for atom in atoms))
            dims.append(normalise(atoms))
        partial = tuple(axis for axis in type_.layout.partial if axis != TIME)
        return TensorType(type_.dtype, tuple(shape), Layout(tuple(dims), partial))

    def _atom(self, atom: Atom, piece: int) -> Atom:
        if TIME not in atom.axes:
            return Atom(self.at(atom.size, piece), atom.axes, atom.sequence)
        size = local_size(atom, self.mesh, self.sequence)
        assert size is not None, f"{atom} cannot be cut evenly"
        rest = _without_time(atom.axes)
        return Atom(product([size, *(self.mesh.size(axis) for axis in rest)]), rest)

    def outside(self, type_: TensorType) -> TensorType:
        """The type of a value of all pieces together."""
        return type_.with_layout(type_.layout.without(TIME))

    # -- inputs and outputs --------------------------------------------------------------------

    def part(self, whole: fx.Node, node: fx.Node, piece: int, name: str) -> fx.Node:
        """What a piece takes of an input."""
        (dim,) = (i for i, atoms in enumerate(type_of(node).layout.dims) if atoms)
        type_, why = self.inside(type_of(node), piece), f"piece {piece}"
        if _without_time(type_of(node).layout.dims[dim][0].axes):
            width = local_shape(type_, self.mesh, None)[dim]
            ends = [simplify(width * place) for place in (piece, piece + 1)]
            return self.builder.call(
                aten.slice.Tensor, (whole, dim, *ends), type_, name=name, why=why
            )
        chunk = self.sequence.level((TIME,))
        where = self.builder.call(
            op("positions"), (list(chunk.chunks(piece)),),
            TensorType.whole(torch.int64, (chunk.local,)), chunk=chunk.chunk, limit=chunk.length,
            why=f"positions of piece {piece}",
        )
        return self.builder.call(
            aten.index_select.default, (whole, dim, where), type_, name=name, why=why
        )

    def whole(self, parts: Sequence[fx.Node], node: fx.Node) -> fx.Node:
        """An output, of all pieces."""
        type_ = type_of(node)
        dims: list[list[Atom]] = [
            list(dim or (Atom(size),))
            for size, dim in zip(type_.shape, type_.layout.dims, strict=True)
        ]
        flat = [atom for dim in dims for atom in dim]
        (place,) = (i for i, atom in enumerate(flat) if TIME in atom.axes)
        piece = self._atom(flat[place], 0)
        opened = [self._opened(part, flat, piece, place) for part in parts]
        joined = self._joined(opened, place)
        rest = Atom(flat[place].size, piece.axes, flat[place].sequence)
        made = self._of_atoms(type_.dtype, flat, rest, place)
        if piece.axes:
            joined.meta["type"] = made
        else:
            joined = self._in_order(joined, place, flat[place], made)
        whole = self.outside(type_)
        if len(flat) == len(dims):
            return joined
        return self.builder.call(aten.reshape.default, (joined, self._local(whole)), whole)

    def _in_order(self, x: fx.Node, dim: int, atom: Atom, type_: TensorType) -> fx.Node:
        """All pieces joined, in order of position and without padding."""
        split = self.sequence.level(atom.axes)
        if atom.sequence and split.mirrored > 1:
            held = [int(index) for piece in range(self.count) for index in split.chunks(piece)]
            unit = divide(self._atom(atom, 0).size, split.chunks_per_piece)
            assert unit is not None
            width = simplify(unit * len(held))
            places = self.builder.call(
                op("positions"), ([held.index(chunk) for chunk in range(len(held))],),
                TensorType.whole(torch.int64, (width,)), chunk=unit, limit=width,
                why="chunks in order",
            )
            x = self.builder.call(aten.index_select.default, (x, dim, places), type_of(x))
        return self.builder.call(
            aten.slice.Tensor, (x, dim, 0, atom.size), type_, why="without padding"
        )

    def _opened(self, part: fx.Node, flat: list[Atom], piece: Atom, place: int) -> fx.Node:
        """A piece of an output with a dim for each atom."""
        if len(flat) == len(type_of(part).shape):
            return part
        type_ = self._of_atoms(type_of(part).dtype, flat, piece, place)
        return self.builder.call(aten.reshape.default, (part, self._local(type_)), type_)

    def _of_atoms(
        self, dtype: torch.dtype, flat: list[Atom], one: Atom, place: int
    ) -> TensorType:
        atoms = [*flat[:place], one, *flat[place + 1 :]]
        dims: list[DimLayout] = [(atom,) if atom.axes else WHOLE for atom in atoms]
        return TensorType(dtype, tuple(atom.size for atom in atoms), Layout(tuple(dims)))

    def _local(self, type_: TensorType) -> list[Size]:
        sizes = (
            [local_size(atom, self.mesh, self.unrolled) for atom in dim] or [size]
            for size, dim in zip(type_.shape, type_.layout.dims, strict=True)
        )
        return [product(pieces) for pieces in sizes]

    def _joined(self, parts: Sequence[fx.Node], dim: int) -> fx.Node:
        """Pieces one behind the other."""
        if len(parts) == 1:
            return parts[0]
        first = type_of(parts[0])
        size = simplify(sum(type_of(part).shape[dim] for part in parts))
        axes = first.layout.dims[dim][0].axes if first.layout.dims[dim] else ()
        rows = (Atom(size, axes),) if axes else WHOLE
        shape = (*first.shape[:dim], size, *first.shape[dim + 1 :])
        return self.builder.call(
            aten.cat.default, (list(parts), dim),
            TensorType(first.dtype, shape, first.layout.with_dim(dim, rows)),
        )

    # -- ops that read other pieces ------------------------------------------------------------

    def write(self, node: fx.Node, piece: int, value: Value, name: str) -> fx.Node | None:
        """The node of a piece; None for one that is copied as it is."""
        if self.joins(node):
            return self._gather(node, value)
        if self._borders(node):
            return self._halo(node, piece, value, name)
        return self._attention(node, piece, value, name) if self._attends(node) else None

    def _gather(self, node: fx.Node, value: Value) -> fx.Node:
        """What a collective along `time` brings: the pieces of its operand are all here."""
        if target_name(node.target) != GATHER:
            raise RingCompileError(
                f"{short_name(node)} is not supported along {TIME}",
                hint=f"split the sequence over ring instead of {TIME}",
            )
        dim, limit = node.kwargs["dim"], node.kwargs["limit"]
        assert isinstance(dim, int)
        (operand,) = node.all_input_nodes
        joined = self._joined([value(operand, piece) for piece in range(self.count)], dim)
        type_ = self.inside(type_of(node), 0)
        rest = _without_time(str(node.kwargs["axis"]).split(","))
        if rest:
            return self.builder.call(
                op("gather"), (joined,), type_, name=node.name, why=node.meta.get("why"),
                dim=dim, axis=",".join(rest), limit=limit,
            )
        (atom,) = type_of(operand).layout.dims[dim]
        return joined if limit is None else self._in_order(joined, dim, atom, type_)

    def _borders(self, node: fx.Node) -> bool:
        """Whether a node takes the ends of other pieces."""
        return node.target is op("halo") and TIME in Call(node)["axis"].split(",")

    def _beside(self, node: fx.Node, piece: int) -> dict[str, int]:
        """The pieces whose ends a piece takes, by the operand that they are."""
        call = Call(node)
        sides = (("past", piece - 1, call["before"]), ("later", piece + 1, call["after"]))
        return {name: other for name, other, size in sides if size and 0 <= other < self.count}

    def _halo(self, node: fx.Node, piece: int, value: Value, name: str) -> fx.Node:
        """A piece's windows, which begin in the piece before it and may end in the one behind."""
        call, beside = Call(node), self._beside(node, piece)
        others = [value(call["x"], beside[side]) if side in beside else None
                  for side in ("past", "later")]
        return self.builder.call(
            op("halo"), (value(call["x"], piece), *others), self.inside(type_of(node), piece),
            name=name, why=node.meta.get("why"), piece=piece,
            axis=",".join(_without_time(call["axis"].split(","))),
            **{x: call[x] for x in ("dim", "before", "after")},
        )

    def _attends(self, node: fx.Node) -> bool:
        """Whether a node is attention over keys that lie along `time`."""
        return node.target is op("ring_attention") and TIME in Call(node)["axis"].split(",")

    def _seen(self, node: fx.Node, piece: int) -> list[int]:
        """The other pieces whose keys a piece's queries see, in order."""
        call, length = Call(node), self._piece_length()
        band = Band(call["lower"], call["upper"])
        return [other for other in range(self.count)
                if other != piece and band.chunk_relation(piece, other, length) != "empty"]

    def _piece_length(self) -> int | None:
        length = bind(self.sequence.level((TIME,)).local, self.program.lengths)
        return length if isinstance(length, int) else None

    def _attention(self, node: fx.Node, piece: int, value: Value, name: str) -> fx.Node:
        """A piece's queries over its own keys, and over those of the others that they see."""
        call, others = Call(node), self._seen(node, piece)
        own = [None if call[x] is None else value(call[x], piece)
               for x in ("q", "k", "v", "key_mask", "mask", "sink")]
        past = [self._joined([value(call[x], other) for other in others], 2)
                for x in ("k", "v")] if others else [None, None]
        made = self.builder.call(
            op("ring_attention"), (*own, *past), self.inside(type_of(node), piece), name=name,
            why=f"piece {piece}" + (f" over {', '.join(map(str, others))}" if others else ""),
            axis=",".join(_without_time(call["axis"].split(","))), piece=piece, past=others or None,
            **{x: call[x] for x in ("scale", "softcap", "lower", "upper", "tile")},
        )
        if "mask_kind" in node.meta:
            made.meta["mask_kind"] = node.meta["mask_kind"]
        return made


def _without_time(axes: Sequence[str]) -> tuple[str, ...]:
    return tuple(axis for axis in axes if axis != TIME)


def _holds_time(node: fx.Node) -> bool:
    """Whether an argument tells one piece from another."""
    return not symbols_in(node).isdisjoint((coordinate(TIME), symbol(OWN)))


def _is_timed(type_: TensorType) -> bool:
    """Whether a type is split over `time`, or as long as a piece or a window of one."""
    if TIME in (*type_.layout.axes, *type_.layout.partial):
        return True
    lengths = {symbol(LOCAL), symbol(OWN)}
    return any(is_symbolic(size) and lengths & size.free_symbols for size in type_.shape)
