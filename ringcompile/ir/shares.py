"""Do the shares of every weight make up the whole? Seen as boxes: in each dim some runs of indices.

    [64/tp, 32] over tp=2       rank 0: rows 0..31       rank 1: rows 32..63
    [3*(64/tp), 32] (fused)     rank 0: rows 0..31, 64..95, 128..159     rank 1: the rows between

Ranks that differ on an axis that splits a weight hold different parts, which leave nothing out;
ranks that differ on other axes only hold the same. Each stage of a pipeline that holds any of a
weight holds all of it: it computes with nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, combinations, pairwise, product
from math import prod
from typing import NoReturn

from ringcompile.axes import base_axis
from ringcompile.errors import RingCompileError
from ringcompile.ir.expr import Size
from ringcompile.ir.layout import DimLayout
from ringcompile.ir.nodes import type_of
from ringcompile.ir.program import Program, Weight
from ringcompile.ir.types import TensorType
from ringcompile.mesh import Mesh

Run = tuple[int, int]  # from, up to
Box = tuple[tuple[Run, ...], ...]  # for each dim the runs of indices


@dataclass(frozen=True)
class _Share:
    """What a rank holds of a weight.

    Attributes:
        place: its place on each axis that splits the weight, by the rank's own program.
    """

    rank: int
    box: Box
    place: tuple[tuple[str, int], ...]


def check_shares(programs: Sequence[Program], mesh: Mesh) -> None:
    """Check what all ranks hold of every weight, in order of rank.

    Raises:
        RingCompileError: naming the weight, ranks and indices: a part that nobody holds, or that
            two hold who should not; ranks that should hold the same.
    """
    checker = _Checker(mesh)
    holders: dict[str, list[int]] = {}
    types = []
    for rank, program in enumerate(programs):
        types.append({n.name: type_of(n) for n in program.graph.nodes if n.op == "placeholder"})
        for name in program.weights:
            holders.setdefault(name, []).append(rank)
    for name, ranks in holders.items():
        weight = programs[ranks[0]].weights[name]
        for rank in ranks:
            if programs[rank].weights[name] != weight:
                raise RingCompileError(
                    f"rank {rank} takes {_named(programs[rank].weights[name])} for %{name}, "
                    f"rank {ranks[0]} {_named(weight)}"
                )
        checker.check(weight, {rank: types[rank][name] for rank in ranks})


@dataclass
class _Checker:
    mesh: Mesh
    _boxes: dict[tuple[TensorType, tuple[tuple[str, int], ...]], Box] = field(default_factory=dict)
    _fine: set[tuple[object, ...]] = field(default_factory=set)
    _groups: dict[str, list[list[int]]] = field(default_factory=dict)

    def check(self, weight: Weight, types: dict[int, TensorType]) -> None:
        """Check one weight, with the types in which ranks take it."""
        seen = (weight.shape, *types, *types.values())
        if seen in self._fine:  # the weights of one layer lie as those of another
            return
        self._fine.add(seen)
        names = {base_axis(axis) for type_ in types.values() for axis in type_.layout.axes}
        splitting = ",".join(axis for axis in self.mesh.names if axis in names)
        first: list[_Share] = []
        for group in self._groups_along(splitting):
            holding = [rank for rank in group if rank in types]
            if not holding:
                continue
            if len(holding) < len(group):
                raise RingCompileError(
                    f"{_named(weight)} is split over {splitting}, and of the ranks "
                    f"{_listed(group)} only {_listed(holding)} hold a share"
                )
            shares = [self._share(weight, rank, types[rank]) for rank in group]
            _tile(weight, splitting, shares)
            first = first or shares
            for mine, theirs in zip(shares, first, strict=True):
                if mine.box != theirs.box:
                    raise RingCompileError(
                        f"rank {mine.rank} holds {_format(mine.box)} of {_named(weight)}, "
                        f"rank {theirs.rank} {_format(theirs.box)}: they should hold the same"
                    )

    def _groups_along(self, axes: str) -> list[list[int]]:
        if axes not in self._groups:
            every = [[rank] for rank in range(self.mesh.world_size)]
            self._groups[axes] = list(self.mesh.groups(axes)) if axes else every
        return self._groups[axes]

    def _share(self, weight: Weight, rank: int, type_: TensorType) -> _Share:
        coordinates = self.mesh.coordinates(rank)
        place = tuple((axis, self.mesh.index(coordinates, axis)) for axis in type_.layout.axes)
        if (type_, place) not in self._boxes:
            dims = zip(weight.shape, type_.shape, type_.layout.dims, strict=True)
            self._boxes[type_, place] = tuple(
                self._runs(weight, rank, size, dim, dict(place))
                if typed == size
                else _refused(weight, f"rank {rank} takes it as {type_}")
                for size, typed, dim in dims
            )
        return _Share(rank, self._boxes[type_, place], place)

    def _runs(
        self, weight: Weight, rank: int, size: int, dim: DimLayout, place: dict[str, int]
    ) -> tuple[Run, ...]:
        """The indices of a dim that a rank holds, as runs that do not touch."""
        inner, runs = 1, [(0, 1)]
        for atom in reversed(dim):
            ways, at = 1, 0
            for axis in atom.axes:
                ways, at = ways * self.mesh.size(axis), at * self.mesh.size(axis) + place[axis]
            width = _number(weight, atom.size) // ways
            if atom.sequence:
                _refused(weight, f"rank {rank} divides it as the sequence, which is data")
            if width * ways != atom.size:
                _refused(weight, f"rank {rank} takes {atom.size} of {size} over {ways}")
            runs = _joined([
                (index * inner + start, index * inner + end)
                for index in range(at * width, (at + 1) * width)
                for start, end in runs
            ]) if runs != [(0, inner)] else [(at * width * inner, (at + 1) * width * inner)]
            inner *= _number(weight, atom.size)
        if dim and inner != size:
            _refused(weight, f"rank {rank} takes {size} as {inner}")
        return tuple(runs) if dim else ((0, size),)


def _tile(weight: Weight, splitting: str, shares: Sequence[_Share]) -> None:
    """Different places hold different parts, and together everything."""
    by_place = {share.place: share for share in shares}
    for share, other in combinations(by_place.values(), 2):
        common = _common(share.box, other.box)
        if common is not None:
            raise RingCompileError(
                f"rank {share.rank} and rank {other.rank} both hold {_format(common)} of "
                f"{_named(weight)}, which is split over {splitting}"
            )
    whole = prod(weight.shape)
    if sum(map(_volume, (share.box for share in by_place.values()))) != whole:
        gap = _gap(weight.shape, [share.box for share in by_place.values()])
        raise RingCompileError(
            f"none of the ranks {_listed([share.rank for share in shares])} holds {_format(gap)} "
            f"of {_named(weight)}"
        )


def _common(a: Box, b: Box) -> Box | None:
    """The indices that two boxes have in common."""
    both = tuple(
        tuple(
            (max(x[0], y[0]), min(x[1], y[1]))
            for x in mine for y in theirs
            if max(x[0], y[0]) < min(x[1], y[1])
        )
        for mine, theirs in zip(a, b, strict=True)
    )
    return both if all(both) else None


def _volume(box: Box) -> int:
    return prod(sum(end - start for start, end in runs) for runs in box)


def _gap(shape: Sequence[int], boxes: Sequence[Box]) -> Box:
    """The first cell that no box covers, of those that the boxes' edges make."""
    return next(cell for cell in _cells(shape, boxes) if not any(_common(cell, b) for b in boxes))


def _cells(shape: Sequence[int], boxes: Sequence[Box]) -> Iterator[Box]:
    edges = [
        sorted({0, size, *chain.from_iterable(run for box in boxes for run in box[dim])})
        for dim, size in enumerate(shape)
    ]
    for cell in product(*(pairwise(edge) for edge in edges)):
        yield tuple((run,) for run in cell)


def _joined(runs: Sequence[Run]) -> list[Run]:
    """Runs in order, those that touch made one."""
    joined: list[Run] = []
    for start, end in runs:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


def _number(weight: Weight, size: Size) -> int:
    return size if isinstance(size, int) else _refused(weight, f"{size} is no number")


def _refused(weight: Weight, why: str) -> NoReturn:
    raise RingCompileError(f"{_named(weight)} cannot be shared out: {why}")


def _named(weight: Weight) -> str:
    dtype = str(weight.dtype).removeprefix("torch.")
    return f"weight '{weight.name}' {dtype}{list(weight.shape)}"


def _format(box: Box) -> str:
    """`[0..31 64..95, 0..63]`, both ends of each run included."""
    dims = (" ".join(f"{start}..{end - 1}" for start, end in runs) for runs in box)
    return f"[{', '.join(dims)}]"


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
