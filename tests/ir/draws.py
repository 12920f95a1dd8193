"""What calls are drawn from: sizes, shapes, dims and tensors, small and often split."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from hypothesis import strategies as st
from torch import Tensor

from ringcompile.ir.layout import WHOLE, Layout
from tests.ir.sharding import RING, WORLDS, World

T = TypeVar("T")
Shape = tuple[int, ...]
_MOST_ELEMENTS = 3000


class Draws:
    """One example's draws, in one world."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.world: World = draw(st.sampled_from(WORLDS))
        length, axes = self.world.length, self.world.axis_sizes
        split = [length, length, 2 * length] if RING in axes else []
        split += [axes["tp"], 4, 6] if "tp" in axes else []
        self.sizes = [1, 2, 3, 4, 5, *split * 3]
        self.data = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def pick(self, options: Sequence[T]) -> T:
        return self.draw(st.sampled_from(options))

    def flag(self) -> bool:
        return self.draw(st.booleans())

    def number(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def size(self) -> int:
        return self.pick(self.sizes)

    def shape(self, low: int = 0, high: int = 4) -> Shape:
        """Sizes of low to high dims, seldom of the fewest."""
        found: list[int] = []
        for _ in range(self.pick([low, *2 * list(range(low + 1, high + 1))])):
            size = self.size()
            found.append(size if math.prod(found) * size <= _MOST_ELEMENTS else 1)
        return tuple(found)

    def dim(self, rank: int) -> int:
        """A dim, counted from the front or the end; of a tensor without dims 0 or -1."""
        return self.number(-max(rank, 1), max(rank, 1) - 1)

    def permutation(self, size: int) -> list[int]:
        return self.draw(st.permutations(range(size)))

    def dims(self, rank: int, least: int = 0) -> list[int]:
        """Several dims, each once."""
        chosen = self.permutation(rank)[: self.pick([*range(least, rank + 1), 1, 1])]
        return [dim - rank if self.flag() else dim for dim in chosen]

    def narrower(self, shape: Shape) -> Shape:
        """A shape that broadcasts to `shape`."""
        kept = shape[self.number(0, len(shape)) if self.flag() else 0 :]
        return tuple(1 if self.number(0, 3) == 0 else size for size in kept)

    def smaller(self, shape: Shape, but: int | None = None) -> Shape:
        """A shape of the same rank that is nowhere larger, of any size in dim `but`."""
        return tuple(
            self.size() if but is not None and i == but % len(shape)
            else (self.number(1, size) if self.number(0, 2) == 0 else size)
            for i, size in enumerate(shape)
        )

    def some_ones(self, shape: Shape) -> Shape:
        """The same rank, some dims of size 1."""
        return tuple(1 if self.number(0, 2) == 0 else size for size in shape)

    # -- tensors -----------------------------------------------------------------------------------

    def real(self, shape: Shape) -> Tensor:
        return torch.randn(shape, generator=self.data, dtype=torch.float64)

    def positive(self, shape: Shape) -> Tensor:
        return self.real(shape).abs() + 0.1

    def at_least_one(self, shape: Shape) -> Tensor:
        return self.real(shape).abs() + 1

    def unit(self, shape: Shape) -> Tensor:
        """Between -1 and 1."""
        return self.real(shape).tanh()

    def rough(self, shape: Shape) -> Tensor:
        """Numbers of which some are equal, infinite or none."""
        x = self.integers(shape, -2, 4).double()
        return torch.where(x == 3, math.nan, torch.where(x == 4, -math.inf, x))

    def complex(self, shape: Shape) -> Tensor:
        return torch.complex(self.real(shape), self.real(shape))

    def integers(self, shape: Shape, low: int = -9, high: int = 9) -> Tensor:
        """From low to high."""
        return torch.randint(low, high + 1, shape, generator=self.data)

    def small(self, shape: Shape) -> Tensor:
        """Integers from 0 to 5."""
        return self.integers(shape, 0, 5)

    def flags(self, shape: Shape) -> Tensor:
        return self.integers(shape, 0, 1).bool()

    def order(self, size: int) -> Tensor:
        """0 to size-1, each once, in any order."""
        return torch.randperm(size, generator=self.data)

    def mixed(self, shape: Shape) -> Tensor:
        """Of any of the common dtypes."""
        return self.pick([self.real, self.integers, self.flags])(shape)

    # -- layouts -----------------------------------------------------------------------------------

    def layout(self, shape: Shape) -> Layout:
        """Whole, or dims split over the axes of the mesh, one each."""
        dims = [WHOLE] * len(shape)
        for axis, _ in self.world.mesh.axes:
            chosen = self.pick([None, *self.world.splits(shape, axis)])
            if chosen is not None and not dims[chosen[0]]:
                dims[chosen[0]] = chosen[1]
        return Layout(tuple(dims))
