"""A scan along the split sequence, as an exclusive scan over the chunks of all ranks.

Each rank scans its own chunks, and all exchange one total a chunk: what a chunk starts from is the
total of all chunks before it in the sequence (Blelloch, "Prefix sums and their applications").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ringcompile.ir.expr import product
from ringcompile.ir.layout import WHOLE, Atom, Layout
from ringcompile.ir.nodes import type_of
from ringcompile.ir.types import SequenceSplit, TensorType
from ringcompile.ops.running import Running
from ringcompile.ops.schemas import op
from ringcompile.passes.base import Builder

aten = torch.ops.aten


@dataclass
class Scan:
    """Writes the nodes of one scan: of sums, products, or logarithms of sums.

    Attributes:
        kind: what is computed.
        builder: the graph that is written.
        sequence: how the dim is divided.
        shape: the argument that spells out a type's local shape.
    """

    kind: Running
    builder: Builder
    sequence: SequenceSplit
    shape: Callable[[TensorType], list[Any]]

    def write(self, x: fx.Node, dim: int, type_: TensorType) -> fx.Node:
        """The scan of x along `dim`, whose split atom may stand between whole ones.

        Args:
            x: one rank's share, [.., before * n * behind, ..].
            dim: the dim scanned along.
            type_: of the result; `dim` is laid out as (before, s/ring, behind).
        """
        atoms = type_.layout.dims[dim]
        if any(atom.sequence and atom.axes != self.sequence.names for atom in atoms):
            split = next(atom for atom in atoms if atom.sequence)
            level = replace(self, sequence=self.sequence.level(split.axes))
            return level.write(x, dim, type_)
        where = next(i for i, atom in enumerate(atoms) if atom.axes)
        before = product(atom.size for atom in atoms[:where])
        behind = product(atom.size for atom in atoms[where + 1 :])
        run = product([self.sequence.chunk, behind])  # a run of entries that lie side by side

        source = type_of(x)
        rows = self._reshape(x, self._opened(source, dim, before, (run,)))
        dtype = type_.dtype
        scanned = self._scanned(rows, dim + 2, dtype)
        total = self._totals(rows, dim, dtype, behind)
        start = self._starts(total, dim, before)
        made = self._call(self.kind.combine, (scanned, start), dtype, scanned)
        return self._reshape(made, type_)

    def _scanned(self, x: fx.Node, dim: int, dtype: torch.dtype) -> fx.Node:
        return self._call(self.kind.scan, (x, dim), dtype, x, **self.kind.dtype(dtype))

    def _opened(
        self, type_: TensorType, dim: int, before: Any, inner: tuple[Any, ...]
    ) -> TensorType:
        """The type with `dim` taken apart into (before, chunks/ring, *inner)."""
        chunks = self.sequence.num_chunks
        split = (Atom(chunks, self.sequence.names, sequence=True),)
        shape = (*type_.shape[:dim], before, chunks, *inner, *type_.shape[dim + 1 :])
        dims = (
            *type_.layout.dims[:dim], WHOLE, split, *(WHOLE,) * len(inner),
            *type_.layout.dims[dim + 1 :],
        )
        return TensorType(type_.dtype, shape, Layout(dims))

    def _totals(self, rows: fx.Node, dim: int, dtype: torch.dtype, behind: Any) -> fx.Node:
        """What every chunk of this rank comes to without padding, with a size-1 dim for it."""
        padding = self._padding(len(type_of(rows).shape) - dim - 3, behind)
        kept = self._call(
            aten.masked_fill.Scalar, (rows, padding, self.kind.identity), type_of(rows).dtype, rows,
            why="without padding",
        )
        summed = type_of(rows)
        shape = (*summed.shape[: dim + 2], 1, *summed.shape[dim + 3 :])
        return self.builder.call(
            self.kind.total, (kept, *self.kind.over(dim + 2)),
            TensorType(dtype, shape, summed.layout), why="total of each chunk",
            **self.kind.dtype(dtype),
        )

    def _padding(self, trailing: int, behind: Any) -> fx.Node:
        """Bool [chunks/ring, run, 1, ...]: whether an entry is padding, not a token."""
        sequence = self.sequence
        chunk = sequence.chunk
        runs = [
            self.builder.call(
                aten.arange.start_step, (index * chunk, (index + 1) * chunk, 1),
                TensorType.whole(torch.int64, (chunk,)), dtype=torch.int64,
            )
            for index in sequence.own_chunks()
        ]
        layout = Layout.split(2, 0, sequence.num_chunks, sequence.names, sequence=True)
        places = TensorType(torch.int64, (sequence.num_chunks, chunk), layout)
        place = self.builder.call(aten.stack.default, (runs,), places)
        here = self._call(aten.ge.Scalar, (place, sequence.length), torch.bool, place)
        open_ = TensorType(
            torch.bool, (*places.shape, 1), Layout((*layout.dims, WHOLE))
        )
        grown = TensorType(torch.bool, (*places.shape, behind), open_.layout)
        wide = self.builder.call(
            aten.expand.default, (self._reshape(here, open_), self.shape(grown)), grown
        )
        shape = (sequence.num_chunks, product([chunk, behind]), *(1,) * trailing)
        dims = (layout.dims[0], *(WHOLE,) * (1 + trailing))
        return self._reshape(wide, TensorType(torch.bool, shape, Layout(dims)))

    def _starts(self, total: fx.Node, dim: int, before: Any) -> fx.Node:
        """For each chunk of this rank, the total of all chunks before it, rows before included."""
        sequence, own = self.sequence, type_of(total)
        chunks = sequence.num_chunks
        everywhere = Layout(
            (*own.layout.dims[: dim + 1], WHOLE, *own.layout.dims[dim + 2 :])
        )
        whole = self.builder.call(
            op("gather"), (total,), own.with_layout(everywhere), dim=dim + 1,
            axis=sequence.axis, limit=chunks, why="totals of all ranks",
        )
        flat_shape = (*own.shape[:dim], product([before, chunks]), *own.shape[dim + 2 :])
        flat_dims = (*everywhere.dims[:dim], WHOLE, *everywhere.dims[dim + 2 :])
        flat = self._reshape(whole, TensorType(own.dtype, flat_shape, Layout(flat_dims)))
        up_to = self._scanned(flat, dim, own.dtype)
        # Moved on by one, not less its own total: that would leave nothing of inf, little of 1e9.
        by_one = [0, 0] * (len(flat_shape) - dim - 1) + [1, -1]
        before_it = self._call(
            aten.constant_pad_nd.default, (up_to, by_one, self.kind.identity), own.dtype, flat
        )
        opened = self._reshape(before_it, own.with_layout(everywhere))
        layout = Layout.split(1, 0, chunks, sequence.names, sequence=True)
        held = self.builder.call(
            op("positions"), (list(sequence.own_chunks()),),
            TensorType(torch.int64, (chunks,), layout),
            chunk=1, limit=chunks, why="this rank's chunks",
        )
        return self.builder.call(aten.index_select.default, (opened, dim + 1, held), own)

    def _reshape(self, x: fx.Node, type_: TensorType) -> fx.Node:
        return self.builder.call(aten.reshape.default, (x, self.shape(type_)), type_)

    def _call(
        self, target: Any, args: tuple[Any, ...], result: torch.dtype, like: fx.Node, **kwargs: Any
    ) -> fx.Node:
        """An op whose result has the shape and layout of `like`."""
        type_ = TensorType(result, type_of(like).shape, type_of(like).layout)
        return self.builder.call(target, args, type_, **kwargs)
