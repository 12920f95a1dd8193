"""A scan along the split sequence, as an exclusive scan over the chunks of all ranks.

Each rank scans its own chunks, and all exchange one total a chunk: what a chunk starts from is the
total of all chunks before it in the sequence (Blelloch, "Prefix sums and their applications").
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ringcompile.ir.expr import Size, product, simplify
from ringcompile.ir.layout import WHOLE, Atom, DimLayout, Layout
from ringcompile.ir.nodes import type_of
from ringcompile.ir.types import SequenceSplit, TensorType
from ringcompile.ops.running import Running
from ringcompile.ops.schemas import op
from ringcompile.passes.base import Builder

aten = torch.ops.aten


@dataclass
class Chunks:
    """What every scan does with its operands: takes chunks apart, hides padding, exchanges totals.

    Attributes:
        builder: the graph that is written.
        sequence: how the dim is divided.
        shape: the argument that spells out a type's local shape.
        dim: the dim scanned along.
        atoms: its layout, (before, s/ring, behind), of which the outer ones may be missing.
    """

    builder: Builder
    sequence: SequenceSplit
    shape: Callable[[TensorType], list[Any]]
    dim: int
    atoms: DimLayout

    def __post_init__(self) -> None:
        where = next(i for i, atom in enumerate(self.atoms) if atom.axes)
        axes = self.atoms[where].axes
        if axes != self.sequence.names:
            self.sequence = self.sequence.level(axes)
        self.before = product(atom.size for atom in self.atoms[:where])
        self.behind = product(atom.size for atom in self.atoms[where + 1 :])

    def opened(self, x: fx.Node) -> fx.Node:
        """A share with `dim` taken apart into (before, chunks/ring, run of a chunk's entries)."""
        run = product([self.sequence.chunk, self.behind])
        return self.reshape(x, self._opened(type_of(x), run))

    def _opened(self, type_: TensorType, *inner: Any) -> TensorType:
        dim, chunks = self.dim, self.sequence.num_chunks
        split = (Atom(chunks, self.sequence.names, sequence=True),)
        shape = (*type_.shape[:dim], self.before, chunks, *inner, *type_.shape[dim + 1 :])
        dims = (
            *type_.layout.dims[:dim], WHOLE, split, *(WHOLE,) * len(inner),
            *type_.layout.dims[dim + 1 :],
        )
        return TensorType(type_.dtype, shape, Layout(dims))

    def without_padding(self, rows: fx.Node, fill: float) -> fx.Node:
        """Rows that `opened` gave, with this number where an entry is no token."""
        padding = self._padding(len(type_of(rows).shape) - self.dim - 3)
        return self.call(
            aten.masked_fill.Scalar, (rows, padding, fill), rows, why="without padding"
        )

    def _padding(self, trailing: int) -> fx.Node:
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
        here = self.call(aten.ge.Scalar, (place, sequence.length), place, torch.bool)
        open_ = TensorType(
            torch.bool, (*places.shape, 1), Layout((*layout.dims, WHOLE))
        )
        grown = TensorType(torch.bool, (*places.shape, self.behind), open_.layout)
        wide = self.builder.call(
            aten.expand.default, (self.reshape(here, open_), self.shape(grown)), grown
        )
        shape = (sequence.num_chunks, product([chunk, self.behind]), *(1,) * trailing)
        dims = (layout.dims[0], *(WHOLE,) * (1 + trailing))
        return self.reshape(wide, TensorType(torch.bool, shape, Layout(dims)))

    def everywhere(self, total: fx.Node) -> fx.Node:
        """Totals [.., before, chunks/ring, 1, ..] of all ranks, in order.

        They are [.., before * chunks, 1, ..] then.
        """
        dim, chunks, own = self.dim, self.sequence.num_chunks, type_of(total)
        whole = self.builder.call(
            op("gather"), (total,), own.with_layout(self._whole(own)), dim=dim + 1,
            axis=self.sequence.axis, limit=chunks, why="totals of all ranks",
        )
        shape = (*own.shape[:dim], product([self.before, chunks]), *own.shape[dim + 2 :])
        dims = (*own.layout.dims[:dim], WHOLE, *own.layout.dims[dim + 2 :])
        return self.reshape(whole, TensorType(own.dtype, shape, Layout(dims)))

    def starts(self, up_to: fx.Node, own: TensorType, identity: float) -> fx.Node:
        """For each chunk of this rank, what all chunks before it come to, rows before included.

        Args:
            up_to: what all totals up to each chunk come to, in the order of `everywhere`.
            own: the type of the totals of this rank's chunks, and of the result.
            identity: where nothing is before.
        """
        chunks = self.sequence.num_chunks
        # Moved on by one, not less its own total: that would leave nothing of inf, little of 1e9.
        by_one = [0, 0] * (len(type_of(up_to).shape) - self.dim - 1) + [1, -1]
        before_it = self.call(aten.constant_pad_nd.default, (up_to, by_one, identity), up_to)
        opened = self.reshape(before_it, own.with_layout(self._whole(own)))
        layout = Layout.split(1, 0, chunks, self.sequence.names, sequence=True)
        held = self.builder.call(
            op("positions"), (list(self.sequence.own_chunks()),),
            TensorType(torch.int64, (chunks,), layout),
            chunk=1, limit=chunks, why="this rank's chunks",
        )
        return self.builder.call(aten.index_select.default, (opened, self.dim + 1, held), own)

    def _whole(self, own: TensorType) -> Layout:
        return own.layout.with_dim(self.dim + 1, WHOLE)

    def reshape(self, x: fx.Node, type_: TensorType) -> fx.Node:
        """A share in another shape."""
        return self.builder.call(aten.reshape.default, (x, self.shape(type_)), type_)

    def call(
        self, target: Any, args: tuple[Any, ...], like: fx.Node, result: torch.dtype | None = None,
        **kwargs: Any,
    ) -> fx.Node:
        """An op whose result has the shape and layout of `like`, and its dtype unless told."""
        type_ = type_of(like)
        made = TensorType(result or type_.dtype, type_.shape, type_.layout)
        return self.builder.call(target, args, made, **kwargs)


def write_scan(chunks: Chunks, kind: Running, x: fx.Node, type_: TensorType) -> fx.Node:
    """The scan of one rank's share x along a split dim: of sums, products, logarithms of sums.

    Args:
        chunks: how the dim is divided.
        kind: what is computed.
        x: [.., before * n * behind, ..].
        type_: of the result.
    """
    dim, dtype = chunks.dim, type_.dtype
    typed = kind.dtype(dtype)
    rows = chunks.opened(x)
    scanned = chunks.call(kind.scan, (rows, dim + 2), rows, dtype, **typed)
    kept = chunks.without_padding(rows, kind.identity)
    one = _one_a_chunk(chunks, kept, dtype)
    total = chunks.builder.call(
        kind.total, (kept, *kind.over(dim + 2)), one, why="total of each chunk", **typed
    )
    flat = chunks.everywhere(total)
    up_to = chunks.call(kind.scan, (flat, dim), flat, **typed)
    start = chunks.starts(up_to, one, kind.identity)
    return chunks.reshape(chunks.call(kind.combine, (scanned, start), scanned), type_)


def write_recurrence(
    chunks: Chunks, factor: fx.Node, term: fx.Node, type_: TensorType
) -> fx.Node:
    """y[t] = factor[t] * y[t - 1] + term[t] along a split dim, of which each rank has a share.

    A chunk that starts from y is y times the product of its factors, and what it comes to from 0.

    Args:
        chunks: how the dim is divided.
        factor: [.., before * n * behind, ..].
        term: likewise.
        type_: of the result.
    """
    dim, dtype, builder = chunks.dim, type_.dtype, chunks.builder
    factors, terms = (
        chunks.without_padding(chunks.opened(x), fill) for x, fill in ((factor, 1), (term, 0))
    )
    states = chunks.call(op("recurrence"), (factors, terms), terms, dim=dim + 2)
    products = chunks.call(aten.cumprod.default, (factors, dim + 2), factors)
    one = _one_a_chunk(chunks, states, dtype)
    totals = [
        builder.call(
            aten.slice.Tensor, (x, dim + 2, -1, sys.maxsize), one, why="total of each chunk"
        )
        for x in (products, states)
    ]
    flat = [chunks.everywhere(total) for total in totals]
    up_to = chunks.call(op("recurrence"), tuple(flat), flat[1], dim=dim)
    start = chunks.starts(up_to, one, 0)
    carried = chunks.call(aten.mul.Tensor, (products, start), states)
    return chunks.reshape(chunks.call(aten.add.Tensor, (states, carried), states), type_)


def write_linear_attention(
    chunks: Chunks, operands: Mapping[str, fx.Node], type_: TensorType
) -> fx.Node:
    """Linear attention along a split dim: each chunk starts from the state that others leave it.

    A chunk that starts from a state leaves what its tokens do to it, and the state it comes to
    from 0. Its tokens read both what it starts from and what it takes in itself.

    Args:
        chunks: how the dim is divided.
        operands: q, k, v, decay and perhaps beta, [.., before * n * behind, ..].
        type_: of the result.
    """
    rows = {name: chunks.opened(x) for name, x in operands.items()}
    for name in rows.keys() & {"k", "decay", "beta"}:
        # A token that is none leaves the state as it is.
        rows[name] = chunks.without_padding(rows[name], 0)
    size, features = type_of(rows["k"]), type_of(rows["v"])
    state = _behind(
        size, chunks.dim, torch.promote_types(type_.dtype, torch.float32),
        (size.shape[-1], features.shape[-1]), (WHOLE, features.layout.dims[-1]),
    )
    up_to = (_differences if "beta" in rows else _decaying)(chunks, rows, state)
    start = chunks.starts(up_to, state, 0)
    given = tuple(map(rows.get, ("q", "k", "v", "decay", "beta")))
    y = chunks.call(op("linear_attention"), (*given, start), rows["v"])
    return chunks.reshape(y, type_)


def _decaying(chunks: Chunks, rows: Mapping[str, fx.Node], state: TensorType) -> fx.Node:
    """The states behind all chunks of all ranks: what is left of the one before, and its own."""
    dim, builder, decay = chunks.dim, chunks.builder, rows["decay"]
    width = type_of(decay).shape[dim + 3 :]
    one = _behind(type_of(decay), dim, state.dtype, width, (WHOLE,) * len(width))
    total = builder.call(
        op("linear_state"), (rows["k"], rows["v"], decay), state, why="state behind each chunk"
    )
    over = builder.call(
        aten.sum.dim_IntList, (decay, [dim + 2]), one, why="decay over each chunk",
        dtype=state.dtype,
    )
    states, decays = chunks.everywhere(total), chunks.everywhere(over)
    kept = chunks.call(aten.exp.default, (decays,), decays)
    more = 2 - len(width)
    opened = TensorType(
        state.dtype, (*type_of(kept).shape, *(1,) * more),
        Layout((*type_of(kept).layout.dims, *(WHOLE,) * more)),
    )
    factors = chunks.call(
        aten.expand.default, (chunks.reshape(kept, opened), chunks.shape(type_of(states))), states
    )
    return chunks.call(op("recurrence"), (factors, states), states, dim=dim)


def _differences(chunks: Chunks, rows: Mapping[str, fx.Node], state: TensorType) -> fx.Node:
    """The same by the delta rule: a matrix that the state before is multiplied by, and its own."""
    size, features = state.shape[-2:]
    shape = (*state.shape[:-1], simplify(size + features))
    made = TensorType(state.dtype, shape, state.layout.with_dim(len(shape) - 1, WHOLE))
    total = chunks.builder.call(
        op("linear_state"), tuple(rows[name] for name in ("k", "v", "decay", "beta")), made,
        why="what each chunk does to a state",
    )
    totals = chunks.everywhere(total)
    wide = type_of(totals)
    type_ = TensorType(wide.dtype, (*wide.shape[:-1], features), wide.layout)
    return chunks.builder.call(op("chained_states"), (totals,), type_)


def _behind(
    rows: TensorType, dim: int, dtype: torch.dtype, shape: tuple[Size, ...],
    dims: tuple[DimLayout, ...],
) -> TensorType:
    """The type of one [.., *shape] for each chunk, of rows [.., before, chunks/ring, run, ..]."""
    layout = Layout((*rows.layout.dims[: dim + 2], *dims))
    return TensorType(dtype, (*rows.shape[: dim + 2], *shape), layout)


def _one_a_chunk(chunks: Chunks, rows: fx.Node, dtype: torch.dtype) -> TensorType:
    """The type of one entry for each chunk, with a size-1 dim for its run."""
    type_, place = type_of(rows), chunks.dim + 2
    shape = (*type_.shape[:place], 1, *type_.shape[place + 1 :])
    return TensorType(dtype, shape, type_.layout)
