"""What is known of a value while compiling: dtype, global shape, and layout over the mesh."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from ringcompile.ir.expr import LOCAL, SEQUENCE, Size, bind, divide, equal, product, symbol
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
        dims = (
            format_dim(size, dim) for size, dim in zip(self.shape, self.layout.dims, strict=True)
        )
        return f"{DTYPE_NAMES.get(self.dtype, str(self.dtype))}[{', '.join(dims)}]"


def state_type(out: TensorType) -> tuple[TensorType, TensorType]:
    """The type of a state (out, lse) of attention whose result is `out` [B,H,S,E]."""
    dtype = torch.float64 if out.dtype == torch.float64 else torch.float32
    return out, TensorType(dtype, out.shape[:3], Layout(out.layout.dims[:3]))


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
    rank holds one chunk (`contiguous`) or two (`zigzag`: rank r holds chunk r and its mirror, so
    that causal attention costs every rank the same). `n` is a rank's share.

    Attributes:
        length: the true length, padding not included: `s`, the length of the inputs, unless the
            model attends over another one (`s + 4` behind prefix tokens, 197 patches of an image).
    """

    axis: str
    num_ranks: int
    order: str = "contiguous"
    length: Size = field(default_factory=lambda: symbol(SEQUENCE))

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
        """The length of one rank's share, `n`; padding included."""
        return symbol(LOCAL)

    @property
    def chunk(self) -> Size:
        """The length of one chunk."""
        return symbol(LOCAL) / self.chunks_per_rank

    def chunks(self, rank: Size) -> tuple[Size, ...]:
        """The indices of the chunks that a rank (a number or a coordinate) holds, increasing."""
        if self.order == "zigzag":
            return (rank, self.num_chunks - 1 - rank)
        return (rank,)

    def local_length(self, length: int) -> int:
        """The number of tokens each rank holds of a sequence of `length`, padding included."""
        return -(-length // self.num_chunks) * self.chunks_per_rank

    def own_length(self, rank: int, lengths: Mapping[str, int]) -> int:
        """`m`, the tokens that one rank holds, padding not counted.

        Args:
            rank: its coordinate on the axis.
            lengths: from `bindings`.
        """
        total, chunk = bind(self.length, lengths), bind(self.chunk, lengths)
        assert isinstance(total, int)
        assert isinstance(chunk, int)
        held = (bind(index, {}) for index in self.chunks(rank))
        return sum(min(max(total - index * chunk, 0), chunk) for index in held)

    def bindings(self, length: int | None = None) -> dict[str, int]:
        """The values of `s` and `n` for inputs of `length`; None where the model fixes it."""
        known = {} if length is None else {SEQUENCE: length}
        total = bind(self.length, known)
        assert isinstance(total, int), f"{self.length} needs the length of the inputs"
        return {**known, LOCAL: self.local_length(total)}


def local_size(atom: Atom, mesh: Mesh | None, sequence: SequenceSplit | None) -> Size | None:
    """The size of one rank's piece of an atom, or None where it cannot be cut evenly."""
    if not atom.axes:
        return atom.size
    if sequence is not None and atom.axes == (sequence.axis,) and equal(atom.size, sequence.length):
        return sequence.local
    assert mesh is not None
    return divide(atom.size, product(mesh.size(axis) for axis in atom.axes))


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
    dims = tuple(
        tuple(Atom(bind(atom.size, values), atom.axes) for atom in dim) for dim in type_.layout.dims
    )
    return TensorType(type_.dtype, tuple(bind(s, values) for s in type_.shape), Layout(dims))
