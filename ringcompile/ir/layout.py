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

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import takewhile
from typing import Any

from ringcompile.axes import ONLY_SEQUENCE, AxisRef, base_axis, refs, size_of
from ringcompile.ir.expr import Size, divide, equal, product, to_text


@dataclass(frozen=True)
class Atom:
    """A factor of a dim: its global size, and the axes that split it.

    Attributes:
        sequence: whether this is the sequence, whose shares are padded: it stays one atom.
        features: whether axes that divide sequences elsewhere divide features here, as a program
            for the next tokens has it, in which no sequence is divided.
    """

    size: Size
    axes: tuple[str, ...] = ()
    sequence: bool = False
    features: bool = False

    def __post_init__(self) -> None:
        of_sequence = not ONLY_SEQUENCE.isdisjoint(self.axes)
        if of_sequence and not self.features:
            object.__setattr__(self, "sequence", True)
        if not of_sequence:
            object.__setattr__(self, "features", False)


# A whole dim is the empty tuple; a split one lists all its atoms.
DimLayout = tuple[Atom, ...]
WHOLE: DimLayout = ()


def merge(atoms: Iterable[Atom]) -> list[Atom]:
    """Join neighbours that one atom says as well; size-1 atoms are dropped."""
    merged: list[Atom] = []
    for atom in atoms:
        if equal(atom.size, 1):
            continue
        if merged and not atom.axes and not merged[-1].sequence:
            merged[-1] = replace(merged[-1], size=product([merged[-1].size, atom.size]))
        else:
            merged.append(atom)
    return merged


def normalise(atoms: Iterable[Atom]) -> DimLayout:
    """Merge what an equal placement may write in two ways; an unsplit dim becomes `WHOLE`."""
    merged = merge(atoms)
    return tuple(merged) if any(atom.axes for atom in merged) else WHOLE


@dataclass(frozen=True)
class Layout:
    """The placement of one tensor.

    Attributes:
        dims: a DimLayout for each dim.
        partial: the mesh axes over which ranks hold terms of a sum: the tensor is the sum of them.
    """

    dims: tuple[DimLayout, ...]
    partial: tuple[str, ...] = ()

    def __hash__(self) -> int:
        """Computed once: layouts are keys of many tables."""
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.dims, self.partial))

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone: a hash of texts is another one in another process."""
        return {"dims": self.dims, "partial": self.partial}

    @classmethod
    def whole(cls, rank: int) -> Layout:
        """Every rank holds all of a tensor with `rank` dims."""
        return cls((WHOLE,) * rank)

    @classmethod
    def split(
        cls, rank: int, dim: int, size: Size, axes: tuple[str, ...], sequence: bool = False
    ) -> Layout:
        """One dim of that size split over `axes`, the others whole."""
        atom = Atom(size, axes, sequence)
        return cls(tuple((atom,) if i == dim else WHOLE for i in range(rank)))

    def with_dim(self, dim: int, layout: DimLayout) -> Layout:
        """The same placement with one dim placed otherwise."""
        dim %= len(self.dims)
        return Layout((*self.dims[:dim], layout, *self.dims[dim + 1 :]), self.partial)

    def without(self, axis: str) -> Layout:
        """The same placement with nothing split, or summed, over this axis or parts of it."""
        dims = (
            normalise(
                replace(atom, axes=tuple(a for a in atom.axes if base_axis(a) != axis))
                for atom in dim
            )
            for dim in self.dims
        )
        return Layout(tuple(dims), tuple(a for a in self.partial if a != axis))

    @property
    def is_whole(self) -> bool:
        """Whether every rank holds all of the tensor: no dim is split, and it is no partial sum."""
        return not any(self.dims) and not self.partial

    @property
    def axes(self) -> tuple[str, ...]:
        """All mesh axes that split some dim."""
        return tuple(axis for dim in self.dims for atom in dim for axis in atom.axes)

    @property
    def has_conflict(self) -> bool:
        """Whether one axis would split two dims, or split and sum."""
        axes = [*self.axes, *self.partial]
        whole = {axis for axis in axes if axis == base_axis(axis)}
        return len(set(axes)) < len(axes) or any(
            axis not in whole and base_axis(axis) in whole for axis in axes
        )

    @property
    def partial_text(self) -> str:
        """` partial(tp)` behind the dims of a partial sum, else nothing."""
        return f" partial({','.join(self.partial)})" if self.partial else ""

    def __str__(self) -> str:
        dims = ", ".join(format_dim(None, dim) for dim in self.dims)
        return f"[{dims}]{self.partial_text}"


def format_dim(size: Size | None, dim: DimLayout) -> str:
    """`4096/ring`, `2*(s/ring)`, or the bare size of a whole dim."""
    if not dim:
        return "*" if size is None else to_text(size)
    sizes = [to_text(atom.size) for atom in dim]
    if len(dim) == 1:
        text = f"({sizes[0]})" if "+" in sizes[0] else sizes[0]
        return "/".join([text, *dim[0].axes])
    return "*".join(
        f"({size}/{'/'.join(atom.axes)})" if atom.axes else size
        for size, atom in zip(sizes, dim, strict=True)
    )


def regroup(
    sizes: Sequence[Size],
    layout: Layout,
    out_sizes: Sequence[Size],
    axis_sizes: Mapping[str, int],
) -> Layout | None:
    """The layout behind a view from `sizes` to `out_sizes`, or None where it cuts a split atom.

    The atoms of all dims, read in order, are the same before and after a view; only where the
    dims begin and end changes. An atom that is split may be cut in two only if its major part
    still divides over its axes.
    """
    return _regrouped(
        tuple(sizes), layout, tuple(out_sizes), tuple(sorted(axis_sizes.items()))
    )


@lru_cache(maxsize=65536)  # views repeat from layer to layer
def _regrouped(
    sizes: tuple[Size, ...],
    layout: Layout,
    out_sizes: tuple[Size, ...],
    axes: tuple[tuple[str, int], ...],
) -> Layout | None:
    first = _alike(sizes, out_sizes)
    last = _alike(sizes[first:][::-1], out_sizes[first:][::-1])
    between = slice(first, len(sizes) - last)
    dims = _regrouped_dims(
        sizes[between], layout.dims[between], out_sizes[first : len(out_sizes) - last], dict(axes)
    )
    if dims is None:
        return None
    end = layout.dims[len(sizes) - last :]
    return Layout((*layout.dims[:first], *dims, *end), layout.partial)


def _alike(sizes: tuple[Size, ...], out_sizes: tuple[Size, ...]) -> int:
    """How many dims both shapes begin with."""
    pairs = zip(sizes, out_sizes, strict=False)
    return len(list(takewhile(lambda pair: equal(*pair), pairs)))


def _regrouped_dims(
    sizes: Sequence[Size],
    dims: Sequence[DimLayout],
    out_sizes: Sequence[Size],
    axis_sizes: Mapping[str, int],
) -> list[DimLayout] | None:
    """The dims behind a view of all elements; sizes need no proof where nothing is split."""
    if not any(atom.axes for dim in dims for atom in dim):
        return [WHOLE] * len(out_sizes)
    atoms = _rejoined(
        merge(
            atom
            for size, dim in zip(sizes, dims, strict=True)
            for atom in (dim or (Atom(size),))
        ),
        axis_sizes,
    )
    found = []
    for size in out_sizes:
        taken = _take(atoms, size, axis_sizes)
        if taken is None:
            return None
        found.append(normalise(taken))
    return found if not atoms else None


def _rejoined(atoms: list[Atom], axis_sizes: Mapping[str, int]) -> list[Atom]:
    """Undo `_cut` where both parts of an axis stand side by side: 2/(tp//4), 8/(tp%4) is 16/tp."""
    joined: list[Atom] = []
    for atom in atoms:
        whole = _of_both_parts(joined[-1], atom, axis_sizes) if joined else None
        if whole is None:
            joined.append(atom)
        else:
            joined[-1] = whole
    return joined


def _of_both_parts(before: Atom, atom: Atom, axis_sizes: Mapping[str, int]) -> Atom | None:
    """One atom for two, if the first is over the runs of an axis and the second within a run."""
    if len(atom.axes) != 1:
        return None
    (within,) = refs(atom.axes[0])
    runs = replace(within, part="//")
    if within.part != "%" or before != Atom(runs.size(axis_sizes), (str(runs),)):
        return None
    return Atom(product([before.size, atom.size]), (within.name,))


def _take(atoms: list[Atom], size: Size, axis_sizes: Mapping[str, int]) -> list[Atom] | None:
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


def _cut(atom: Atom, major: Size, axis_sizes: Mapping[str, int]) -> tuple[Atom, Atom] | None:
    """Cut an atom into `major` x the rest.

    The axes stay with the major part where it still divides over them. A single axis that is longer
    than the major part is cut as well: 16 heads over tp=8 are 2 groups over `tp//4` x 8 heads of a
    group over `tp%4`.
    """
    minor = divide(atom.size, major)
    if minor is None:
        return None
    if not atom.axes:
        return Atom(major), Atom(minor)
    if atom.sequence:
        return None
    ways = product(size_of(axis_sizes, axis) for axis in atom.axes)
    if divide(major, ways) is not None:
        return Atom(major, atom.axes), Atom(minor)
    run = divide(ways, major)
    if len(atom.axes) > 1 or not isinstance(run, int) or divide(minor, run) is None:
        return None
    (ref,) = refs(atom.axes[0])
    if ref.part:
        return None
    over = [(str(AxisRef(ref.name, part, run)),) for part in ("//", "%")]
    return Atom(major, over[0]), Atom(minor, over[1])
