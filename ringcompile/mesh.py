"""The device mesh: ordered named axes with sizes, written as `ring=4,tp=2`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod

from ringcompile.errors import RingCompileError

AXIS_KINDS = {
    "ring": "splits the sequence; keys and values rotate",
    "ulysses": "splits the sequence; attention is split by heads",
    "tp": "splits heads and features",
    "ep": "splits experts",
    "pp": "splits layers",
    "dp": "splits the batch",
}
SEQUENCE_AXES = frozenset({"ring", "ulysses"})


@dataclass(frozen=True)
class Mesh:
    """Named axes in order, outermost first; ranks are numbered row-major.

    Args:
        axes: pairs of axis name and size.

    Raises:
        RingCompileError: an unknown or repeated axis, or a size below 1.
    """

    axes: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        names = self.names
        for name, size in self.axes:
            if name not in AXIS_KINDS:
                raise RingCompileError(
                    f"unknown mesh axis '{name}'", hint=f"axes are: {', '.join(AXIS_KINDS)}"
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

    @property
    def world_size(self) -> int:
        """The number of ranks: the product of all axis sizes."""
        return prod(size for _, size in self.axes)

    def size(self, axis: str) -> int:
        """Size of one axis; an axis the mesh does not have has size 1."""
        return dict(self.axes).get(axis, 1)

    def coordinates(self, rank: int) -> dict[str, int]:
        """The coordinates of a rank, by axis name."""
        coordinates = {}
        for name, size in reversed(self.axes):
            rank, coordinates[name] = divmod(rank, size)
        return coordinates

    def rank(self, coordinates: dict[str, int]) -> int:
        """The rank at these coordinates."""
        rank = 0
        for name, size in self.axes:
            rank = rank * size + coordinates[name]
        return rank

    def groups(self, axis: str) -> Iterator[list[int]]:
        """The ranks that differ only in their coordinate on `axis`, in its order, by group."""
        others = [range(size) if name != axis else (0,) for name, size in self.axes]
        for corner in product(*others):
            base = dict(zip(self.names, corner, strict=True))
            yield [self.rank({**base, axis: i}) for i in range(self.size(axis))]

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in self.axes)
