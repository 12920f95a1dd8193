"""From one layout to another: slices, gathers, sums and exchanges, in an order that is right.

A dim may be of several atoms; such a dim is taken apart first, so that each split atom is a dim of
its own, and put together again at the end. Then, for the axes that change:

    partial sum -> whole          all_reduce
    partial sum -> split          reduce_scatter
    split dim -> another dim      all_to_all
    split -> whole                gather, innermost axes first
    whole -> split                a slice; the sequence by the positions of the rank's tokens

What is whole along the sequence has no padding; what is split over its first axes has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from ringcompile.axes import TIME
from ringcompile.errors import RingCompileError
from ringcompile.ir.expr import Size, coordinate_on, simplify
from ringcompile.ir.layout import WHOLE, Atom, DimLayout, Layout, normalise
from ringcompile.ir.nodes import type_of
from ringcompile.ir.types import SequenceSplit, TensorType, local_shape
from ringcompile.mesh import Mesh
from ringcompile.ops.schemas import op
from ringcompile.passes.base import Builder

aten = torch.ops.aten


@dataclass
class Mover:
    """Writes the nodes of redistributions.

    Attributes:
        builder: the graph that is written.
        mesh: the mesh.
        sequence: how the sequence is divided.
        shape: the argument that spells out a type's local shape.
    """

    builder: Builder
    mesh: Mesh
    sequence: SequenceSplit
    shape: Callable[[TensorType], list[Any]]
    why: str | None = None
    _positions: dict[Atom, fx.Node] = field(default_factory=dict)

    def move(self, x: fx.Node, source: TensorType, target: TensorType, why: str | None) -> fx.Node:
        """`x`, laid out as `source` says, laid out as `target` says.

        Raises:
            RingCompileError: an atom is split in ways that no step takes into one another.
        """
        self.why = why
        opened = [_atoms(*pair) for pair in zip(
            source.shape, source.layout.dims, target.layout.dims, strict=True
        )]
        here = _opened(source, [have for have, _ in opened])
        there = _opened(target, [want for _, want in opened])
        if here.shape != source.shape:
            x = self._reshape(x, here)
        x = self._steps(x, here, there)
        return self._reshape(x, target) if there.shape != target.shape else x

    def _steps(self, x: fx.Node, here: TensorType, there: TensorType) -> fx.Node:
        over = [axis for axis in here.layout.partial if axis not in there.layout.partial]
        if len(over) > 1 and all(_dim_with(there.layout, axis) is None for axis in over):
            x, here = self._summed_at_once(x, here, over)
            over = []
        for axis in over:
            x, here = self._summed(x, here, there.layout, axis)
        for dim in range(len(here.shape)):
            x, here = self._exchanged(x, here, there.layout, dim)
        for dim in range(len(here.shape)):
            x, here = self._gathered(x, here, there.layout, dim)
        for dim in range(len(here.shape)):
            x, here = self._sliced(x, here, there.layout, dim)
        if here.layout != there.layout:
            raise RingCompileError(
                f"ringcompile cannot redistribute a tensor from {here.layout} to {there.layout}",
                hint="this is a gap of ringcompile; please report it with the model",
            )
        return x

    # -- steps: each returns the node and its type ------------------------------------------------

    def _summed(
        self, x: fx.Node, here: TensorType, wanted: Layout, axis: str
    ) -> tuple[fx.Node, TensorType]:
        rest = tuple(a for a in here.layout.partial if a != axis)
        layout = replace(here.layout, partial=rest)
        dim = _dim_with(wanted, axis)
        if dim is None or here.layout.dims[dim] != _without_last(wanted.dims[dim], axis):
            type_ = here.with_layout(layout)
            return self._call("all_reduce", x, type_, axis=axis), type_
        x = self.padded(x, here, dim, wanted.dims[dim])
        type_ = here.with_layout(layout.with_dim(dim, wanted.dims[dim]))
        return self._call("reduce_scatter", x, type_, dim=dim, axis=axis), type_

    def _summed_at_once(
        self, x: fx.Node, here: TensorType, over: Sequence[str]
    ) -> tuple[fx.Node, TensorType]:
        """One sum over all ranks of several axes."""
        rest = tuple(axis for axis in here.layout.partial if axis not in over)
        type_ = here.with_layout(replace(here.layout, partial=rest))
        return self._call("all_reduce", x, type_, axis=",".join(over)), type_

    def _exchanged(
        self, x: fx.Node, here: TensorType, wanted: Layout, dim: int
    ) -> tuple[fx.Node, TensorType]:
        """An axis that splits this dim last, and shall split another dim last.

        Along `time` nothing is exchanged: the pieces are at hand, and are joined and cut.
        """
        axis = _last_axis(here.layout.dims[dim])
        to = None if axis in (None, TIME) else _dim_with(wanted, axis)
        if axis is None or to is None or to == dim:
            return x, here
        left = _without_last(here.layout.dims[dim], axis)
        if here.layout.dims[to] != _without_last(wanted.dims[to], axis):
            return x, here
        x = self.padded(x, here, to, wanted.dims[to])
        layout = here.layout.with_dim(dim, left).with_dim(to, wanted.dims[to])
        type_ = here.with_layout(layout)
        atom = here.layout.dims[dim][0]
        padded = not left and atom.sequence
        made = self._call("all_to_all", x, self._of_padded(type_, dim, atom) if padded else type_,
                          split=to, concat=dim, axis=axis)
        if not padded:
            return made, type_
        return self._cut(made, type_, dim, atom), type_

    def _gathered(
        self, x: fx.Node, here: TensorType, wanted: Layout, dim: int
    ) -> tuple[fx.Node, TensorType]:
        """Axes that shall not split this dim any more, all at once."""
        have, want = here.layout.dims[dim], wanted.dims[dim]
        kept = _axes(want) if _axes(have)[: len(_axes(want))] == _axes(want) else ()
        dropped = _axes(have)[len(kept) :]
        if not dropped:
            return x, here
        atom = have[0]
        rest = normalise([replace(atom, axes=kept)])
        type_ = here.with_layout(here.layout.with_dim(dim, rest))
        limit = self.sequence.of(atom.size).length if atom.sequence and not kept else None
        return self._call(
            "gather", x, type_, dim=dim, axis=",".join(dropped), limit=limit
        ), type_

    def _sliced(
        self, x: fx.Node, here: TensorType, wanted: Layout, dim: int
    ) -> tuple[fx.Node, TensorType]:
        have, want = here.layout.dims[dim], wanted.dims[dim]
        added = _axes(want)[len(_axes(have)) :]
        if not added:
            return x, here
        type_ = here.with_layout(here.layout.with_dim(dim, want))
        if want[0].sequence and not have:
            places = self.positions(want[0])
            made = self.builder.call(
                aten.index_select.default, (x, dim, places), type_, why=self.why
            )
            return made, type_
        width = local_shape(type_, self.mesh, self.sequence)[dim]
        place = coordinate_on(dict(self.mesh.axes), added)
        made = self.builder.call(
            aten.slice.Tensor,
            (x, dim, simplify(place * width), simplify((place + 1) * width)),
            type_,
            why=self.why,
        )
        return made, type_

    # -- the sequence -----------------------------------------------------------------------------

    def positions(self, atom: Atom) -> fx.Node:
        """The positions of the tokens in this rank's share of a sequence, made once."""
        if atom not in self._positions:
            level = self.sequence.at(atom)
            self._positions[atom] = self.builder.call(
                op("positions"),
                (list(level.own_chunks()),),
                TensorType(
                    torch.int64,
                    (level.length,),
                    Layout.split(1, 0, level.length, atom.axes, sequence=True),
                ),
                chunk=level.chunk,
                limit=level.length,
                why="positions of this rank's tokens",
            )
        return self._positions[atom]

    def padded(self, x: fx.Node, here: TensorType, dim: int, want: DimLayout) -> fx.Node:
        """A sequence that is whole, made ready to be cut into equal shares in order of ranks."""
        if here.layout.dims[dim] or not want or not want[0].sequence:
            return x
        level = self.sequence.at(want[0])
        chunks = [chunk for rank in range(level.num_ranks) for chunk in level.chunks(rank)]
        everyone = self.builder.call(
            op("positions"), (chunks,),
            TensorType.whole(torch.int64, (self._padded_length(want[0]),)),
            chunk=level.chunk, limit=level.length, why="positions of all ranks' tokens",
        )
        return self.builder.call(
            aten.index_select.default, (x, dim, everyone),
            self._of_padded(type_of(x), dim, want[0]), why="padding",
        )

    def _cut(self, x: fx.Node, type_: TensorType, dim: int, atom: Atom) -> fx.Node:
        """The sequence in order, without padding, behind an exchange that made it whole.

        What came lies in the order of ranks, each with its own chunks.
        """
        level, padded = self.sequence.at(atom), self._padded_length(atom)
        held = [chunk for rank in range(level.num_ranks) for chunk in level.chunks(rank)]
        places = [held.index(chunk) for chunk in range(len(held))]
        if held != sorted(held):
            ordered = self.builder.call(
                op("positions"), (places,), TensorType.whole(torch.int64, (padded,)),
                chunk=level.chunk, limit=padded, why="chunks in order",
            )
            x = self.builder.call(
                aten.index_select.default, (x, dim, ordered), self._of_padded(type_, dim, atom)
            )
        return self.builder.call(
            aten.slice.Tensor, (x, dim, 0, level.length), type_, why="without padding"
        )

    def _padded_length(self, atom: Atom) -> Size:
        split = self.sequence.of(atom.size)
        return simplify(split.local * split.num_ranks)

    def _of_padded(self, type_: TensorType, dim: int, atom: Atom) -> TensorType:
        shape = (*type_.shape[:dim], self._padded_length(atom), *type_.shape[dim + 1 :])
        return replace(type_, shape=shape)

    def _call(self, name: str, x: fx.Node, type_: TensorType, **how: Any) -> fx.Node:
        self._check_axis(name, how["axis"])
        return self.builder.call(op(name), (x,), type_, why=self.why, **how)

    def _check_axis(self, name: str, axis: str) -> None:
        """Raise RingCompileError for an exchange that ranks, or pieces in time, cannot make."""
        if TIME in axis.split(",") and name != "gather":
            raise RingCompileError(
                f"{name} is not supported along {TIME}",
                hint=f"split the sequence over ring instead of {TIME}",
            )
        if not self.mesh.has(axis):
            raise RingCompileError(
                f"heads that are repeated for groups of ranks ({axis}) would have to be "
                "redistributed between these groups, which is not supported",
                hint="use fewer ranks along tp: the number of KV heads, or a divisor of it",
            )

    def _reshape(self, x: fx.Node, type_: TensorType) -> fx.Node:
        return self.builder.call(aten.reshape.default, (x, self.shape(type_)), type_)


def _atoms(size: Size, have: DimLayout, want: DimLayout) -> tuple[list[Atom], list[Atom]]:
    """The atoms of a dim in both layouts, of the same sizes; one atom where nothing changes."""
    if have == want and len(have) > 1:
        return list(have), list(want)
    sizes = [a.size for a in (have if len(have) >= len(want) else want)] or [size]

    def spread(dim: DimLayout) -> list[Atom]:
        if not dim:
            return [Atom(part) for part in sizes]
        if [a.size for a in dim] != sizes:
            raise RingCompileError(
                f"a dim of {size} would have to be split into other parts: {sizes}, not "
                f"{[a.size for a in dim]}"
            )
        return list(dim)

    return spread(have), spread(want)


def _opened(type_: TensorType, dims: list[list[Atom]]) -> TensorType:
    """The type with each atom of every dim as a dim of its own."""
    shape = tuple(atom.size for dim in dims for atom in dim)
    layout = tuple((atom,) if atom.axes else WHOLE for dim in dims for atom in dim)
    return replace(type_, shape=shape, layout=Layout(layout, type_.layout.partial))


def _axes(dim: DimLayout) -> tuple[str, ...]:
    return dim[0].axes if dim else ()


def _last_axis(dim: DimLayout) -> str | None:
    return _axes(dim)[-1] if dim else None


def _without_last(dim: DimLayout, axis: str) -> DimLayout:
    """A dim of one atom that `axis` does not split any more; None of them equals what is not so."""
    if _last_axis(dim) != axis:
        return (Atom(-1),)
    return normalise([replace(dim[0], axes=dim[0].axes[:-1])])


def _dim_with(layout: Layout, axis: str) -> int | None:
    return next((i for i, dim in enumerate(layout.dims) if axis in _axes(dim)), None)


def local_type(type_: TensorType, mesh: Mesh, sequence: SequenceSplit) -> TensorType:
    """The type of one rank's share by itself, as if it were a whole tensor."""
    return TensorType.whole(type_.dtype, local_shape(type_, mesh, sequence))
