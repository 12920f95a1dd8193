"""Meshes, layouts and shares with which rules are tried: what a rank holds of a tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from ringcompile.ir.expr import Size, bind, symbol
from ringcompile.ir.layout import WHOLE, Atom, DimLayout, Layout, normalise
from ringcompile.ir.types import SequenceSplit, TensorType, local_shape
from ringcompile.mesh import Mesh
from ringcompile.ops.sequence import positions

S = symbol("s")
RING = "ring"


@dataclass(frozen=True)
class World:
    """A mesh, and the length that its ring splits.

    Attributes:
        length: the true length; it need not divide.
        symbolic: whether types call it `s`, or the model fixes it.
    """

    mesh: Mesh
    order: str
    length: int
    symbolic: bool

    @property
    def axis_sizes(self) -> dict[str, int]:
        return dict(self.mesh.axes)

    @property
    def sequence(self) -> SequenceSplit:
        return SequenceSplit(
            ((RING, self.mesh.size(RING)),), self.order, S if self.symbolic else self.length
        )

    def symbolised(self, shape: Sequence[int]) -> tuple[Size, ...]:
        """A shape as types write it: a size that the length divides has a factor `s`."""
        return tuple(map(self._symbolised, shape)) if self.symbolic else tuple(shape)

    def _symbolised(self, size: int) -> Size:
        if size == 0 or size % self.length:
            return size
        return S * self._symbolised(size // self.length)

    def bound(self, size: Size) -> int:
        return int(bind(size, self.sequence.bindings({"s": self.length})))

    def type_of(self, x: Tensor) -> TensorType:
        return TensorType.whole(x.dtype, self.symbolised(x.shape))

    def local_shape(self, type_: TensorType) -> list[int]:
        return [self.bound(size) for size in local_shape(type_, self.mesh, self.sequence)]

    # -- layouts -----------------------------------------------------------------------------------

    def dim_layouts(self, size: int, axis: str) -> Iterator[DimLayout]:
        """Every way to split a dim of that size over one axis."""
        (written,) = self.symbolised((size,))
        if axis == RING:
            rest, over = divmod(size, self.length)
            if over == 0 and not (self.symbolic and rest % self.length == 0):
                for before in _divisors(rest):
                    atoms = (Atom(before), Atom(self.sequence.length, (RING,)))
                    yield normalise((*atoms, Atom(rest // before)))
        elif isinstance(written, int):
            for before in _divisors(size):
                if size // before % self.mesh.size(axis) == 0:
                    yield normalise((Atom(before), Atom(size // before, (axis,))))

    def splits(self, shape: Sequence[int], axis: str) -> list[tuple[int, DimLayout]]:
        """Every way to split one dim of a tensor over one axis."""
        return [
            (dim, made) for dim, size in enumerate(shape) if size
            for made in self.dim_layouts(size, axis)
        ]

    # -- shares ------------------------------------------------------------------------------------

    def ranks(self) -> Iterator[dict[str, int]]:
        return map(self.mesh.coordinates, range(self.mesh.world_size))

    def share(self, x: Tensor, layout: Layout, here: dict[str, int]) -> Tensor:
        """One rank's share; padding repeats the last position."""
        for dim, atoms in enumerate(layout.dims):
            if atoms:
                x = self._share_of_dim(x, dim, atoms, here)
        return x

    def is_token(self, shape: Sequence[int], layout: Layout, here: dict[str, int]) -> Tensor:
        """Bool, in the shape of the share: False where it is padding."""
        found = torch.ones([], dtype=torch.bool)
        for dim, (size, atoms) in enumerate(zip(shape, layout.dims, strict=True)):
            if any(atom.axes == (RING,) for atom in atoms):
                here_too = self._share_of_dim(
                    torch.ones(size, dtype=torch.bool), 0, atoms, here, padding=False
                )
                found = found & here_too.view(-1, *[1] * (len(shape) - dim - 1))
        return found

    def poisoned(self, x: Tensor, layout: Layout, here: dict[str, int]) -> Tensor:
        """One rank's share in which padding is what must not matter: NaN, or another's value."""
        made = self.share(x, layout, here)
        token = self.is_token(x.shape, layout, here)
        if bool(token.all()):
            return made
        if made.dtype == torch.bool:
            return torch.where(token, made, ~made)
        if made.is_floating_point() or made.is_complex():
            return torch.where(token, made, torch.tensor(math.nan, dtype=made.dtype))
        return torch.where(token, made, x.flatten()[0])

    def _share_of_dim(
        self, x: Tensor, dim: int, atoms: DimLayout, here: dict[str, int], padding: bool = True
    ) -> Tensor:
        sizes = [self.bound(atom.size) for atom in atoms]
        opened = x.reshape(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])
        for i, atom in enumerate(atoms, dim):
            if atom.axes == (RING,):
                opened = self._tokens(opened, i, here[RING], padding)
            elif atom.axes:
                (axis,) = atom.axes
                opened = opened.chunk(self.mesh.size(axis), i)[here[axis]]
        return opened.flatten(dim, dim + len(atoms) - 1)

    def _tokens(self, x: Tensor, dim: int, rank: int, padding: bool) -> Tensor:
        sequence = self.sequence
        chunk = sequence.local_length(self.length) // sequence.chunks_per_rank
        held = [int(index) for index in sequence.chunks(rank)]
        taken = x.index_select(dim, positions(held, chunk, self.length))
        if padding:
            return taken
        true = positions(held, chunk, self.length + chunk * sequence.num_chunks) < self.length
        return taken & true.view(-1, *[1] * (x.dim() - dim - 1))


def single(rank: int, dim: int, made: DimLayout) -> Layout:
    """A layout with one split dim."""
    return Layout(tuple(made if i == dim else WHOLE for i in range(rank)))


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


WORLDS = [
    World(Mesh.parse(spec), order, length, symbolic)
    for spec, order, length, symbolic in product(
        ("ring=2", "ring=3", "ring=4", "tp=2", "tp=3", "ring=2,tp=2"),
        ("contiguous", "zigzag"), (3, 5, 7, 11), (True, False),
    )
    if "ring" in spec or (order, length, symbolic) == ("contiguous", 7, False)
]
