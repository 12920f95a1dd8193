"""Layouts: for every tensor dim, the mesh axes that split it.

A dim is a sequence of atoms, major to minor, each a size and the axes that split it. One atom is
the ordinary case. Several arise where a view flattens dims of which one is split: `[2, s/ring, 64]`
viewed as `[2*s, 64]` is no longer one contiguous piece on a rank, but it is still exactly "2, then
s split over ring", and a later view takes it apart again. Adjacent unsplit atoms are merged, and an
unsplit atom behind a split one is absorbed by it, so equal placements compare equal. Not so where
the sequence is split: such an atom is always the one whole length, because it is padded before it
is split.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ringcompile.ir.expr import Size, divide, equal, product
from ringcompile.mesh import SEQUENCE_AXES


@dataclass(frozen=True)
class Atom:
    """A factor of a dim: its global size, and the axes that split it."""

    size: Size
    axes: tuple[str, ...] = ()

    @property
    def is_sequence(self) -> bool:
        """Whether this is the sequence, whose shares are padded: it stays one atom."""
        return not SEQUENCE_AXES.isdisjoint(self.axes)


# A whole dim is the empty tuple; a split one lists all its atoms.
DimLayout = tuple[Atom, ...]
WHOLE: DimLayout = ()


def merge(atoms: Iterable[Atom]) -> list[Atom]:
    """Join neighbours that one atom says as well; size-1 atoms are dropped."""
    merged: list[Atom] = []
    for atom in atoms:
        if equal(atom.size, 1):
            continue
        if merged and not atom.axes and not merged[-1].is_sequence:
            merged[-1] = Atom(product([merged[-1].size, atom.size]), merged[-1].axes)
        else:
            merged.append(atom)
    return merged


def normalise(atoms: Iterable[Atom]) -> DimLayout:
    """Merge what an equal placement may write in two ways; an unsplit dim becomes `WHOLE`."""
    merged = merge(atoms)
    return tuple(merged) if any(atom.axes for atom in merged) else WHOLE


@dataclass(frozen=True)
class Layout:
    """The placement of one tensor: a DimLayout for each dim."""

    dims: tuple[DimLayout, ...]

    @classmethod
    def whole(cls, rank: int) -> Layout:
        """Every rank holds all of a tensor with `rank` dims."""
        return cls((WHOLE,) * rank)

    @classmethod
    def split(cls, rank: int, dim: int, size: Size, axes: tuple[str, ...]) -> Layout:
        """One dim of that size split over `axes`, the others whole."""
        return cls(tuple((Atom(size, axes),) if i == dim else WHOLE for i in range(rank)))

    @property
    def is_whole(self) -> bool:
        """Whether no axis splits any dim, so that every rank holds all of the tensor."""
        return not any(self.dims)

    @property
    def axes(self) -> tuple[str, ...]:
        """All mesh axes that split some dim."""
        return tuple(axis for dim in self.dims for atom in dim for axis in atom.axes)

    def __str__(self) -> str:
        return "[" + ", ".join(format_dim(None, dim) for dim in self.dims) + "]"


def format_dim(size: Size | None, dim: DimLayout) -> str:
    """`4096/ring`, `2*(s/ring)`, or the bare size of a whole dim."""
    if not dim:
        return "*" if size is None else str(size)
    if len(dim) == 1:
        text = f"({dim[0].size})" if "+" in str(dim[0].size) else str(dim[0].size)
        return "/".join([text, *dim[0].axes])
    return "*".join(f"({a.size}/{'/'.join(a.axes)})" if a.axes else str(a.size) for a in dim)


def regroup(
    sizes: Sequence[Size],
    layout: Layout,
    out_sizes: Sequence[Size],
    axis_sizes: dict[str, int],
) -> Layout | None:
    """The layout behind a view from `sizes` to `out_sizes`, or None where it cuts a split atom.

    The atoms of all dims, read in order, are the same before and after a view; only where the
    dims begin and end changes. An atom that is split may be cut in two only if its major part
    still divides over its axes.
    """
    atoms = merge(
        atom
        for size, dim in zip(sizes, layout.dims, strict=True)
        for atom in (dim or (Atom(size),))
    )
    dims = []
    for size in out_sizes:
        taken = _take(atoms, size, axis_sizes)
        if taken is None:
            return None
        dims.append(normalise(taken))
    return Layout(tuple(dims)) if not atoms else None


def _take(atoms: list[Atom], size: Size, axis_sizes: dict[str, int]) -> list[Atom] | None:
    """Remove atoms whose product is `size` from the front of the list."""
    taken: list[Atom] = []
    rest = size
    while not equal(rest, 1):
        if not atoms:
            return None
        atom = atoms.pop(0)
        left = divide(rest, atom.size)
        if left is not None:
            taken.append(atom)
            rest = left
            continue
        cut = _cut(atom, rest, axis_sizes)
        if cut is None:
            return None
        taken.append(cut[0])
        atoms.insert(0, cut[1])
        rest = 1
    return taken


def _cut(atom: Atom, major: Size, axis_sizes: dict[str, int]) -> tuple[Atom, Atom] | None:
    """Cut an atom into `major` x the rest; the axes stay with the major part."""
    minor = divide(atom.size, major)
    if minor is None:
        return None
    if atom.axes:
        ways = product(axis_sizes[axis] for axis in atom.axes)
        if atom.is_sequence or divide(major, ways) is None:
            return None
    return Atom(major, atom.axes), Atom(minor)
