"""What is known of a value while compiling: dtype, global shape, and layout over the mesh."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import chain, takewhile
from math import prod
from typing import Any

import sympy
import torch

from ringcompile.axes import AXES, TIME
from ringcompile.ir.expr import (
    LOCAL,
    SEQUENCE,
    SHARES,
    Size,
    bind,
    coordinate,
    divide,
    equal,
    product,
    simplify,
    symbol,
)
from ringcompile.ir.layout import Atom, Layout, format_dim
from ringcompile.mesh import Mesh

DTYPE_NAMES = {
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float32: "f32",
    torch.float64: "f64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
    torch.complex64: "c64",
}
DTYPES_BY_NAME = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class TensorType:
    """dtype, global shape and layout of a tensor; prints as `f16[1, 4096/ring, 8192]`."""

    dtype: torch.dtype
    shape: tuple[Size, ...]
    layout: Layout

    def __hash__(self) -> int:
        """Computed once: types are keys of many tables."""
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.dtype, self.shape, self.layout))

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone: a hash of texts is another one in another process."""
        return {"dtype": self.dtype, "shape": self.shape, "layout": self.layout}

    @classmethod
    def whole(cls, dtype: torch.dtype, shape: tuple[Size, ...]) -> TensorType:
        """The type of a tensor that every rank holds all of."""
        return cls(dtype, shape, Layout.whole(len(shape)))

    def with_layout(self, layout: Layout) -> TensorType:
        """The same tensor placed otherwise; `layout` has as many dims."""
        return TensorType(self.dtype, self.shape, layout)

    def __str__(self) -> str:
        return _text(self)


@lru_cache(maxsize=65536)  # types repeat from layer to layer, and from rank to rank
def _text(type_: TensorType) -> str:
    sizes = zip(type_.shape, type_.layout.dims, strict=True)
    dims = ", ".join(format_dim(size, dim) for size, dim in sizes)
    dtype = DTYPE_NAMES.get(type_.dtype, str(type_.dtype))
    return f"{dtype}[{dims}]{type_.layout.partial_text}"


@lru_cache(maxsize=65536)
def state_type(out: TensorType) -> tuple[TensorType, TensorType]:
    """The type of a state (out, lse) of attention whose result is `out` [B,H,S,E]."""
    dtype = torch.float64 if out.dtype == torch.float64 else torch.float32
    return out, TensorType(dtype, out.shape[:3], Layout(out.layout.dims[:3]))


@lru_cache(maxsize=65536)
def accumulator_type(out: TensorType) -> tuple[TensorType, TensorType]:
    """The type of a state that blocks were merged into: out is as precise as lse."""
    lse = state_type(out)[1]
    return replace(out, dtype=lse.dtype), lse


# A node's type: one tensor, or the several an op returns.
ValueType = TensorType | tuple[TensorType, ...]


def format_type(value: ValueType) -> str:
    """The text of a node's type."""
    if isinstance(value, TensorType):
        return str(value)
    return "(" + ", ".join(map(str, value)) + ")"


@dataclass(frozen=True)
class SequenceSplit:
    """How one length of the model is divided over mesh axes.

    The sequence is padded to a multiple of `num_chunks`. Along `time` it is cut into pieces, one
    behind the other, each of which all ranks compute together. A piece is cut into equal chunks,
    and each rank holds one of them (`contiguous`) or two (`zigzag`: along the first axis of ranks,
    place r holds a run of chunks and its mirror, so that causal attention costs every rank the
    same). The other axes divide what a place of the first one holds, in order. `n` is a rank's
    share of a piece.

    Attributes:
        axes: the mesh axes and their sizes, outermost first; `time` before the axes of ranks.
        order: "contiguous" or "zigzag".
        length: the true length, padding not included: `s`, the length of the inputs, unless the
            model attends over another one (`s + 4` behind prefix tokens, 197 patches of an image).
        inner: the number of ranks that hold a share together, on axes that are left out; see
            `level`.
        pieces: of how many pieces in time a share holds its part, one behind the other; see
            `unrolled`.
        mirrored: in a level in zigzag order that keeps `time` and no axis of ranks, the size of
            the first of these, tiles included: its places' chunks lie side by side.
        least: tokens that a chunk has at least, padding included: what its neighbours take of it.
        share: the symbol that stands for a rank's share.
        others: how further lengths of the model are divided, each padded for itself; an encoder's
            tokens beside a decoder's. A dim says by its size which length it is.
    """

    axes: tuple[tuple[str, int], ...]
    order: str = "contiguous"
    length: Size = field(default_factory=lambda: symbol(SEQUENCE))
    inner: int = 1
    pieces: int = 1
    mirrored: int = 1
    least: int = 1
    share: str = LOCAL
    others: tuple[SequenceSplit, ...] = ()

    def of(self, length: Size) -> SequenceSplit:
        """The division of one length of the model: this one, if it is none of the others."""
        return next((other for other in self.others if equal(other.length, length)), self)

    def at(self, atom: Atom) -> SequenceSplit:
        """The division that an atom of a layout says: of its length, over its axes."""
        return self.of(atom.size).level(atom.axes)

    @property
    def lengths(self) -> tuple[Size, ...]:
        """All lengths that are divided, the main one first."""
        return (self.length, *(other.length for other in self.others))

    @property
    def names(self) -> tuple[str, ...]:
        """The axes, outermost first."""
        return tuple(name for name, _ in self.axes)

    @property
    def axis(self) -> str:
        """The axes as a collective names them: `ring,ulysses`."""
        return ",".join(self.names)

    @property
    def in_time(self) -> bool:
        """Whether a share is that of one piece in time, which a coordinate tells."""
        return TIME in self.names

    @property
    def num_pieces(self) -> int:
        """The number of pieces in time, one of which a share is of, or all."""
        return self.axes[0][1] if self.in_time else self.pieces

    @property
    def across(self) -> tuple[tuple[str, int], ...]:
        """The axes that ranks lie along: all but `time`."""
        return self.axes[1:] if self.in_time else self.axes

    @property
    def mirroring(self) -> tuple[tuple[str, int], ...]:
        """The axes along which zigzag order mirrors, as if they were one: the first, and tiles."""
        others = takewhile(lambda axis: AXES[axis[0]].gathers_queries, self.across[1:])
        return (*self.across[:1], *others)

    @property
    def num_ranks(self) -> int:
        """The number of shares."""
        return prod(size for _, size in self.axes)

    @property
    def chunks_per_piece(self) -> int:
        """Of one share in one piece: two for zigzag, an early chunk and its mirror; else one."""
        return 2 * self.mirrored if self.order == "zigzag" else 1

    @property
    def chunks_per_rank(self) -> int:
        """The chunks of one share."""
        return self.chunks_per_piece * self.pieces

    @property
    def num_chunks(self) -> int:
        """Chunks of the whole sequence; its padded length is a multiple of this."""
        return self.num_ranks * self.chunks_per_rank

    @property
    def local(self) -> Size:
        """The length of one share: `n` a piece, padding included; a multiple on a level above."""
        return simplify(symbol(self.share) * (self.inner * self.pieces))

    @property
    def chunk(self) -> Size:
        """The length of one chunk."""
        return simplify(sympy.sympify(symbol(self.share) * self.inner) / self.chunks_per_piece)

    def level(self, names: Sequence[str]) -> SequenceSplit:
        """The division over the first axes only; ranks on the others hold its shares together.

        Args:
            names: the first axes, in order.
        """
        kept, left = self.axes[: len(names)], self.axes[len(names) :]
        assert tuple(names) == self.names[: len(names)], f"{names} are not the first of {self.axes}"
        assert not any(AXES[name].gathers_queries for name, _ in left if set(names) - {TIME}), (
            f"{self.axes} are mirrored as one axis"
        )
        inner = self.inner * prod(size for _, size in left)
        mirrored = self.mirrored if not left else 1
        if left and self.order == "zigzag" and tuple(names) == (TIME,):
            mirrored = prod(size for _, size in self.mirroring)
        return replace(self, axes=kept, inner=inner, mirrored=mirrored)

    def unrolled(self) -> SequenceSplit:
        """The division between ranks that each hold their part of all pieces in time."""
        return replace(self, axes=self.across, pieces=self.num_pieces)

    @property
    def of_tokens(self) -> SequenceSplit:
        """The division over the axes that give ranks tokens of their own: all but `tp`."""
        return self.level(tuple(name for name in self.names if name != "tp"))

    def chunks(self, rank: Size) -> tuple[Size, ...]:
        """The indices of the chunks of one share, piece by piece.

        Args:
            rank: its number, row-major over `axes`; with one axis, a coordinate may stand for it.
        """
        places: list[Size] = []
        for _, size in reversed(self.axes[1:]):
            places.insert(0, rank % size)
            rank = rank // size
        return self._held([rank, *places] if self.axes else [])

    def own_chunks(self, coordinates: Mapping[str, int] | None = None) -> tuple[Size, ...]:
        """The chunks of the rank at these coordinates; symbols stand for those not given."""
        known = coordinates or {}
        return self._held([known.get(name, coordinate(name)) for name in self.names])

    def _held(self, places: list[Any]) -> tuple[Size, ...]:
        """The chunks of the share at these places of all axes."""
        piece = places[:1] if self.in_time else range(self.pieces)
        own = self._in_piece(places[1:] if self.in_time else places)
        width = self.chunks_per_piece * prod(size for _, size in self.across)
        return tuple(simplify(number * width + index) for number in piece for index in own)

    def _in_piece(self, places: list[Any]) -> tuple[Any, ...]:
        """The chunks of the share at these places of the axes of ranks, within a piece."""
        if not places:
            last = 2 * self.mirrored - 1
            runs = [(place, last - place) for place in range(self.mirrored)]
            return tuple(chain(*runs)) if self.order == "zigzag" else (0,)
        count = len(self.mirroring)
        others = self.across[count:]
        num_places, width = (prod(size for _, size in axes) for axes in (self.mirroring, others))
        first, below = 0, 0
        for place, (_, size) in zip(places[:count], self.mirroring, strict=True):
            first = first * size + place
        for place, (_, size) in zip(places[count:], others, strict=True):
            below = below * size + place
        if self.order != "zigzag":
            return (first * width + below,)
        mirror = (2 * num_places - 2 - first) * width  # a place's second run begins at `width` more
        held = []
        for index in (2 * below, 2 * below + 1):
            late = index // width if isinstance(index, int) else sympy.floor(index / width)
            held.append(index + (1 - late) * first * width + late * mirror)
        return tuple(held)

    def local_length(self, length: int) -> int:
        """The number of tokens in each share of a sequence of `length`, padding included."""
        shares = self.inner // self.mirrored  # of a chunk, on a level above
        each = max(-(-length // (self.num_chunks * shares)), self.least)
        return each * self.chunks_per_rank * shares

    def own_length(self, coordinates: Mapping[str, int], lengths: Mapping[str, int]) -> int:
        """`m`, the tokens that are one rank's own, padding not counted; see `of_tokens`.

        Args:
            coordinates: the rank's place on the mesh.
            lengths: from `bindings`.
        """
        split = self.of_tokens
        total, chunk = bind(split.length, lengths), bind(split.chunk, lengths)
        assert isinstance(total, int)
        assert isinstance(chunk, int)
        held = (bind(index, {}) for index in split.own_chunks(coordinates))
        return sum(min(max(total - index * chunk, 0), chunk) for index in held)

    def bindings(self, known: Mapping[str, int]) -> dict[str, int]:
        """The lengths that are known, and a rank's share of each: `s` and `n`, `s2` and `n2`.

        Args:
            known: lengths by symbol; those that the model fixes need none.
        """
        found = {name: known[name] for name in SHARES if name in known}
        for split in (self, *self.others):
            total = bind(split.length, known)
            if isinstance(total, int):
                found[split.share] = split.local_length(total) // (split.inner * split.pieces)
        assert self.share in found, f"{self.length} needs the length of the inputs"
        return found


def local_size(atom: Atom, mesh: Mesh | None, sequence: SequenceSplit | None) -> Size | None:
    """The size of one rank's piece of an atom, or None where it cannot be cut evenly."""
    if not atom.axes:
        return atom.size
    if sequence is not None and atom.sequence and any(
        equal(atom.size, length) for length in sequence.lengths
    ):
        return sequence.at(atom).local
    assert mesh is not None
    return divide(atom.size, product(mesh.size(axis) for axis in atom.axes))


@lru_cache(maxsize=65536)
def local_shape(
    type_: TensorType, mesh: Mesh | None, sequence: SequenceSplit | None
) -> tuple[Size, ...]:
    """The shape of the piece that one rank holds."""
    shape = []
    for size, dim in zip(type_.shape, type_.layout.dims, strict=True):
        pieces = [local_size(atom, mesh, sequence) for atom in dim] if dim else [size]
        assert None not in pieces, f"{type_} cannot be cut evenly"
        shape.append(product(pieces))
    return tuple(shape)


def bind_type(type_: ValueType, values: dict[str, int]) -> ValueType:
    """Fill known lengths into a type."""
    if isinstance(type_, tuple):
        return tuple(bind_type(t, values) for t in type_)  # type: ignore[misc]
    return _bound(type_, tuple(sorted(values.items())))


@lru_cache(maxsize=65536)
def _bound(type_: TensorType, values: tuple[tuple[str, int], ...]) -> TensorType:
    known = dict(values)
    dims = tuple(
        tuple(replace(atom, size=bind(atom.size, known)) for atom in dim)
        for dim in type_.layout.dims
    )
    layout = Layout(dims, type_.layout.partial)
    return TensorType(type_.dtype, tuple(bind(s, known) for s in type_.shape), layout)
