"""Whole outputs of a job: shares come from their ranks in pieces, each put in its place at once.

A process that received all shares first would hold the outputs twice. All ranks walk through the
outputs, the parts of the batch and the ranks in one order (that of `whole_outputs`), so that each
knows what is sent next.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from ringcompile.ir.expr import bind
from ringcompile.ir.nodes import layout_of, type_of
from ringcompile.ir.program import Program
from ringcompile.ir.types import local_shape
from ringcompile.mesh import Mesh
from ringcompile.runtime.data import owners
from ringcompile.runtime.exchange import Exchange
from ringcompile.runtime.pieces import Share
from ringcompile.runtime.tail import RowsByRank, rows_by_rank
from ringcompile.runtime.tasks import RankRun

# Bytes that are sent at a time, where a dim can be cut so small.
_PIECE = 1 << 22


@dataclass(frozen=True)
class Arriving:
    """A rank's share of an output, which is sent while it is taken.

    Attributes:
        exchange: of this rank.
        owner: the rank that holds the share.
        everywhere: whether it is sent to all ranks, or to rank 0 alone.
        shape: of the share.
        dtype: likewise.
        dim: the dim along which it is cut into pieces; None where it is sent in one.
        share: the share itself on its owner, None elsewhere.
    """

    exchange: Exchange
    owner: int
    everywhere: bool
    shape: tuple[int, ...]
    dtype: torch.dtype
    dim: int | None
    share: torch.Tensor | None

    @property
    def device(self) -> torch.device:
        """Where pieces arrive."""
        return self.exchange.rank.device

    def taken(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Each piece with the index at which it begins along `dim`; the next overwrites it."""
        pieces = list(self._pieces())
        most = max((math.prod(shape) for _, shape in pieces), default=0)
        room = torch.empty(0 if self.share is not None else most, dtype=self.dtype,
                           device=self.device)
        for start, shape in pieces:
            piece = room[: math.prod(shape)].view(shape) if self.share is None else (
                self._own(self.share, start, shape))
            yield start, self.exchange.pass_on(piece, self.owner, self.everywhere)

    def _own(self, share: torch.Tensor, start: int, shape: tuple[int, ...]) -> torch.Tensor:
        if self.dim is not None:
            share = share.narrow(self.dim, start, shape[self.dim])
        return share.contiguous()

    def _pieces(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        if 0 in self.shape:
            return
        if self.dim is None:
            yield 0, self.shape
            return
        rows = self.shape[self.dim]
        each = max(1, _PIECE // _row_bytes(self.shape, self.dim, self.dtype))
        for start in range(0, rows, each):
            size = min(each, rows - start)
            yield start, (*self.shape[: self.dim], size, *self.shape[self.dim + 1 :])


@dataclass(frozen=True)
class Collecting:
    """The outputs of one run of all ranks.

    Attributes:
        exchange: of this rank.
        program: that of the last rank, which is one of the last stage.
        run: what this rank kept.
        last: the number of last positions that were kept; None for all.
        everywhere: give all ranks the whole outputs, not rank 0 alone.
    """

    exchange: Exchange
    program: Program
    run: RankRun
    last: int | None
    everywhere: bool

    @property
    def _mesh(self) -> Mesh:
        return self.exchange.mesh

    def everyones(self) -> list[list[tuple[Share, ...]]]:
        """For each rank, of each of its microbatches, its share of every output."""
        return [
            [
                tuple(self._share(rank, i, j) for j in range(len(self.program.outputs)))
                for i in range(len(hand))
            ]
            for rank in range(self._mesh.world_size)
            for hand in (self.run.dealt.hands[self._replica(rank)],)
        ]

    def hand_over(self) -> None:
        """Send this rank's shares, in the order in which they are taken."""
        me = self.exchange.rank.index
        for j, node in enumerate(self.program.outputs):
            if me in owners(self._mesh, type_of(node)):
                for i in range(len(self.run.microbatches)):
                    share = self._share(me, i, j)
                    if isinstance(share, Arriving):
                        for _ in share.taken():
                            pass

    def _share(self, rank: int, microbatch: int, output: int) -> Share:
        """A rank's share of an output; of what all ranks hold whole, this rank's own."""
        me, node = self.exchange.rank.index, self.program.outputs[output]
        mine = self.run.microbatches[microbatch]
        alone = rank == me == 0 and not self.everywhere
        replicated = self._mesh.size("dp") * self._mesh.size("pp") == 1
        if self._mesh.world_size == 1 or alone or (replicated and layout_of(node).is_whole):
            return mine[output] if mine else torch.empty(0)  # a stage that returns nothing
        type_, shape = type_of(node), self._shape(rank, microbatch, output)
        single = [dim for dim, atoms in enumerate(type_.layout.dims) if len(atoms) < 2]
        return Arriving(
            self.exchange, rank, self.everywhere, shape, type_.dtype,
            _cut_dim(shape, type_.dtype, single), mine[output] if rank == me and mine else None,
        )

    def _shape(self, rank: int, microbatch: int, output: int) -> tuple[int, ...]:
        type_ = type_of(self.program.outputs[output])
        lengths = self.run.dealt.hands[self._replica(rank)][microbatch].lengths
        local = local_shape(type_, self._mesh, self.program.sequence)
        shape = [int(bind(size, lengths)) for size in local]
        if (rows := self._rows[output]) is not None:
            shape[rows.dim] = rows.counts[rank]
        return tuple(shape)

    @cached_property
    def _rows(self) -> list[RowsByRank | None]:
        """Of each output, how many of the last positions each rank holds."""
        lengths = self.run.dealt.hands[0][0].lengths
        return [
            None if self.last is None
            else rows_by_rank(self.program, type_of(node), lengths, self.last)
            for node in self.program.outputs
        ]

    def _replica(self, rank: int) -> int:
        return self._mesh.coordinates(rank).get("dp", 0)


def _cut_dim(shape: tuple[int, ...], dtype: torch.dtype, dims: list[int]) -> int | None:
    """The first of these dims along which pieces are small enough, or else the longest."""
    small = [dim for dim in dims if _row_bytes(shape, dim, dtype) <= _PIECE]
    return min(small, default=max(dims, key=shape.__getitem__, default=None))


def _row_bytes(shape: tuple[int, ...], dim: int, dtype: torch.dtype) -> int:
    """The bytes of all entries with one index along a dim."""
    others = torch.Size(shape[:dim] + shape[dim + 1 :]).numel()
    return max(1, others * dtype.itemsize)
