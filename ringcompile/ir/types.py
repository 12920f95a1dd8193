"""What is known of a value while compiling: dtype, global shape, and layout over the mesh."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import prod
from typing import Any

import sympy
import torch

from ringcompile.axes import TIME
from ringcompile.ir.expr import (
    LOCAL,
    SEQUENCE,
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

    @classmethod
    def whole(cls, dtype: torch.dtype, shape: tuple[Size, ...]) -> TensorType:
        """The type of a tensor that every rank holds all of."""
        return cls(dtype, shape, Layout.whole(len(shape)))

    def with_layout(self, layout: Layout) -> TensorType:
        """The same tensor placed otherwise; `layout` has as many dims."""
        return replace(self, layout=layout)

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

    The sequence is padded to a multiple of `num_chunks`, cut into that many equal chunks, and each
    rank holds one chunk (`contiguous`) or two (`zigzag`: along the first axis, place r holds a run
    of chunks and its mirror, so that causal attention costs every rank the same). The other axes
    divide what a place of the first one holds, in order. `n` is a rank's share.

    Attributes:
        axes: the mesh axes and their sizes, outermost first.
        order: "contiguous" or "zigzag".
        length: the true length, padding not included: `s`, the length of the inputs, unless the
            model attends over another one (`s + 4` behind prefix tokens, 197 patches of an image).
        inner: the number of ranks that hold a share together, on axes that are left out; see
            `level`.
    """

    axes: tuple[tuple[str, int], ...]
    order: str = "contiguous"
    length: Size = field(default_factory=lambda: symbol(SEQUENCE))
    inner: int = 1

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
        """Whether every rank has all of the sequence, a share (`n`, one chunk) at a time."""
        return TIME in self.names

    @property
    def num_ranks(self) -> int:
        """The number of shares."""
        return prod(size for _, size in self.axes)

    @property
    def chunks_per_rank(self) -> int:
        """Two for zigzag, an early chunk and its mirror; else one."""
        return 2 if self.order == "zigzag" else 1

    @property
    def num_chunks(self) -> int:
        """Chunks of the whole sequence; its padded length is a multiple of this."""
        return self.num_ranks * self.chunks_per_rank

    @property
    def local(self) -> Size:
        """The length of one share: `n`, padding included, or a multiple of it on a level above."""
        return simplify(symbol(LOCAL) * self.inner)

    @property
    def chunk(self) -> Size:
        """The length of one chunk."""
        return simplify(sympy.sympify(self.local) / self.chunks_per_rank)

    def level(self, names: Sequence[str]) -> SequenceSplit:
        """The division over the first axes only; ranks on the others hold its shares together.

        Args:
            names: the first axes, in order.
        """
        kept, left = self.axes[: len(names)], self.axes[len(names) :]
        assert tuple(names) == self.names[: len(names)], f"{names} are not the first of {self.axes}"
        return replace(self, axes=kept, inner=self.inner * prod(size for _, size in left))

    @property
    def of_tokens(self) -> SequenceSplit:
        """The division over the axes that give ranks tokens of their own: all but `tp`."""
        return self.level(tuple(name for name in self.names if name != "tp"))

    def chunks(self, rank: Size) -> tuple[Size, ...]:
        """The indices of the chunks of one share, increasing.

        Args:
            rank: its number, row-major over `axes`; with one axis, a coordinate may stand for it.
        """
        below = prod(size for _, size in self.axes[1:])
        return self._held(rank // below, rank % below) if below > 1 else self._held(rank, 0)

    def own_chunks(self, coordinates: Mapping[str, int] | None = None) -> tuple[Size, ...]:
        """The chunks of the rank at these coordinates; symbols stand for those not given."""
        places: list[Any] = [
            coordinate(name) if coordinates is None else coordinates[name] for name in self.names
        ] or [0]
        below: Any = 0
        for place, (_, size) in zip(places[1:], self.axes[1:], strict=True):
            below = below * size + place
        return self._held(places[0], below)

    def _held(self, first: Any, below: Any) -> tuple[Size, ...]:
        """The chunks at a place of the first axis, and a place among the ranks that share it."""
        if not self.axes:
            return tuple(range(self.chunks_per_rank))
        num_places, width = self.axes[0][1], self.num_ranks // self.axes[0][1]
        if self.order != "zigzag":
            return (simplify(first * width + below),)
        mirror = (2 * num_places - 2 - first) * width  # a place's second run begins at `width` more
        held = []
        for index in (2 * below, 2 * below + 1):
            late = index // width if isinstance(index, int) else sympy.floor(index / width)
            held.append(simplify(index + (1 - late) * first * width + late * mirror))
        return tuple(held)

    def local_length(self, length: int) -> int:
        """The number of tokens in each share of a sequence of `length`, padding included."""
        return -(-length // (self.num_chunks * self.inner)) * self.chunks_per_rank * self.inner

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
        if self.in_time:
            return total
        held = (bind(index, {}) for index in split.own_chunks(coordinates))
        return sum(min(max(total - index * chunk, 0), chunk) for index in held)

    def bindings(self, length: int | None = None) -> dict[str, int]:
        """The values of `s` and `n` for inputs of `length`; None where the model fixes it."""
        known = {} if length is None else {SEQUENCE: length}
        total = bind(self.length, known)
        assert isinstance(total, int), f"{self.length} needs the length of the inputs"
        return {**known, LOCAL: self.local_length(total) // self.inner}


def local_size(atom: Atom, mesh: Mesh | None, sequence: SequenceSplit | None) -> Size | None:
    """The size of one rank's piece of an atom, or None where it cannot be cut evenly."""
    if not atom.axes:
        return atom.size
    if sequence is not None and atom.sequence and equal(atom.size, sequence.length):
        return sequence.level(atom.axes).local
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
