"""Cuts some of the chunks of tokens out of a tensor, each cut once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from ringcompile.ir.expr import Size, simplify
from ringcompile.ir.nodes import type_of
from ringcompile.ir.types import SequenceSplit, TensorType, local_shape
from ringcompile.mesh import Mesh
from ringcompile.passes.base import Builder

aten = torch.ops.aten
_Slots = tuple[int, ...]


@dataclass
class ChunkCuts:
    """Writes cuts of tensors along the dim that is their tokens.

    Attributes:
        builder: the graph that is written.
        mesh: the mesh.
        sequence: how the sequence is divided.
    """

    builder: Builder
    mesh: Mesh
    sequence: SequenceSplit
    made: dict[tuple[fx.Node, _Slots], fx.Node] = field(default_factory=dict, init=False)

    def of(
        self, x: fx.Node, have: _Slots, kept: _Slots, unit: Size, dim: int = 2
    ) -> fx.Node:
        """Some of the chunks of a tensor.

        Args:
            x: the tensor.
            have: the chunks that it holds.
            kept: those that are wanted, in the same order.
            unit: the tokens of a chunk.
            dim: which dim the tokens are.
        """
        if kept == have:
            return x
        if (x, kept) not in self.made:
            parts = [self._slice(x, have, run, unit, dim) for run in runs_of(have, kept)]
            self.made[x, kept] = parts[0] if len(parts) == 1 else self.builder.call(
                aten.cat.default, (parts, dim), self._type(x, len(kept) * unit, dim),
                name="chunks",
            )
        return self.made[x, kept]

    def _slice(self, x: fx.Node, have: _Slots, run: _Slots, unit: Size, dim: int) -> fx.Node:
        """Chunks that lie side by side in a tensor."""
        first = have.index(run[0])
        start, end = simplify(first * unit), simplify((first + len(run)) * unit)
        return self.builder.call(
            aten.slice.Tensor, (x, dim, start, end), self._type(x, len(run) * unit, dim),
            name="chunks",
        )

    def local(self, type_: TensorType) -> tuple[Size, ...]:
        """The shape of this rank's share."""
        return local_shape(type_, self.mesh, self.sequence)

    def _type(self, x: fx.Node, rows: Size, dim: int) -> TensorType:
        local = self.local(type_of(x))
        return TensorType.whole(type_of(x).dtype, (*local[:dim], rows, *local[dim + 1 :]))


def runs_of(have: Sequence[int], kept: _Slots) -> list[_Slots]:
    """Some of the slots of a tensor's chunks, in runs that lie side by side."""
    runs: list[list[int]] = []
    for slot in kept:
        if runs and have.index(slot) == have.index(runs[-1][-1]) + 1:
            runs[-1].append(slot)
        else:
            runs.append([slot])
    return [tuple(run) for run in runs]
