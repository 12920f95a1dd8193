"""The device mesh: ordered named axes with sizes, written as `ring=4,tp=2`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod

from ringcompile.axes import AXES, refs, size_of
from ringcompile.errors import RingCompileError


@dataclass(frozen=True, init=False)
class Mesh:
    """A device mesh: named axes in order, outermost first.

    Ranks are numbered row-major over the axes. `time` and `halves` have no ranks.

    Args:
        axes: a parallel spec such as `ring=4,tp=2`, or pairs of axis name and size.

    Raises:
        RingCompileError: a malformed spec, an unknown or repeated axis, or a size below 1.
    """

    axes: tuple[tuple[str, int], ...]

    def __init__(self, axes: str | tuple[tuple[str, int], ...]) -> None:
        pairs = self.parse(axes).axes if isinstance(axes, str) else axes
        object.__setattr__(self, "axes", pairs)
        self._check()

    def _check(self) -> None:
        names = self.names
        for name, size in self.axes:
            if name not in AXES:
                raise RingCompileError(
                    f"unknown mesh axis '{name}'", hint=f"axes are: {', '.join(AXES)}"
                )
            if names.count(name) > 1:
                raise RingCompileError(f"mesh axis '{name}' is given twice")
            if size < 1:
                raise RingCompileError(f"mesh axis '{name}' has size {size}; it must be at least 1")

    @classmethod
    def parse(cls, spec: str) -> Mesh:
        """Read a parallel spec such as `ring=4,tp=2`; raises RingCompileError if malformed."""
        axes = []
        for part in spec.split(","):
            name, equals, size = (piece.strip() for piece in part.partition("="))
            if not equals or not size.isascii() or not size.isdigit():
                raise RingCompileError(
                    f"cannot read '{part.strip()}' in the parallel spec '{spec}'",
                    hint="write axis=size pairs separated by commas, for example ring=4",
                )
            axes.append((name, int(size)))
        return cls(tuple(axes))

    @property
    def names(self) -> list[str]:
        """The axes, outermost first: neighbouring ranks differ in the last one."""
        return [name for name, _ in self.axes]

    @cached_property
    def _sizes(self) -> dict[str, int]:
        """The size of each axis by its name, outermost first."""
        return dict(self.axes)

    @cached_property
    def across(self) -> tuple[tuple[str, int], ...]:
        """The axes that ranks lie along: all but `time` and `halves`."""
        return tuple((name, size) for name, size in self.axes if AXES[name].has_ranks)

    @property
    def world_size(self) -> int:
        """The number of ranks: the product of the sizes of the axes that ranks lie along."""
        return prod(size for _, size in self.across)

    def with_axis(self, axis: str, size: int) -> Mesh:
        """The mesh with one axis more, outermost, or with another size of one that it has."""
        if axis in self.names:
            return Mesh(tuple((name, size if name == axis else n) for name, n in self.axes))
        return Mesh(((axis, size), *self.axes))

    def size(self, axis: str) -> int:
        """Size of an axis, of several together (`ring,ulysses`), or of a part (`tp//4`, `tp%4`).

        An axis that the mesh does not have has size 1.
        """
        return size_of(self._sizes, axis)

    def index(self, coordinates: Mapping[str, int], axis: str) -> int:
        """The place on an axis, on several together (row-major), or on a part, see `size`."""
        index = 0
        for ref in refs(axis):
            index = index * ref.size(self._sizes) + ref.place(coordinates.get(ref.name, 0))
        return index

    def coordinates(self, rank: int) -> dict[str, int]:
        """The coordinates of a rank, by the names of the axes that ranks lie along."""
        coordinates = {}
        for name, size in reversed(self.across):
            rank, coordinates[name] = divmod(rank, size)
        return coordinates

    def rank(self, coordinates: dict[str, int]) -> int:
        """The rank at these coordinates."""
        rank = 0
        for name, size in self.across:
            rank = rank * size + coordinates[name]
        return rank

    def groups(self, axis: str) -> Iterator[list[int]]:
        """The ranks that differ only in their coordinates on `axis`, in its order, by group.

        Args:
            axis: one axis, or several (`ring,ulysses`), the first of which varies slowest.
        """
        along = axis.split(",")
        others = [range(size) if name not in along else (0,) for name, size in self.across]
        for corner in product(*others):
            base = dict(zip([name for name, _ in self.across], corner, strict=True))
            yield self._group(base, along)

    def group_of(self, rank: int, axis: str) -> list[int]:
        """The group of `groups` that a rank is in."""
        return self._group(self.coordinates(rank), axis.split(","))

    def peer(self, rank: int, axis: str, place: int) -> int:
        """The rank at another place on an axis, or on several together (row-major).

        Raises:
            RingCompileError: there is no such place.
        """
        if not 0 <= place < self.size(axis):
            raise RingCompileError(
                f"rank {rank} has no peer {place} along {axis}, whose places are 0 to "
                f"{self.size(axis) - 1}"
            )
        coordinates = self.coordinates(rank)
        for name in reversed(axis.split(",")):
            place, coordinates[name] = divmod(place, self.size(name))
        return self.rank(coordinates)

    def _group(self, base: dict[str, int], along: list[str]) -> list[int]:
        places = product(*(range(self.size(name)) for name in along))
        return [self.rank({**base, **dict(zip(along, place, strict=True))}) for place in places]

    def has(self, axis: str) -> bool:
        """Whether all axes that the text names are axes of this mesh."""
        return all(name in self.names for name in axis.split(","))

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in self.axes)

    def __repr__(self) -> str:
        return f"Mesh({str(self)!r})"

