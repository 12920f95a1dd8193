"""The grammar of `tests/random_modules.py`: what a random module is made of.

A piece takes `x` [B, S, D] and gives something of the same shape, which is added to `x`. Its
parameters stand beside its name, by the letters of their shapes. A head makes outputs of `x`.
Pieces register where they are imported: random_module_attention.py, random_module_parts.py.

Letters in shapes: B batch, S sequence, D width, H heads, E experts, V vocabulary, T table rows.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

Shape = tuple[str, ...]


@dataclass(frozen=True)
class Sizes:
    """The sizes that a seed draws, by their letters."""

    D: int
    H: int
    E: int
    V: int
    T: int

    def of(self, shape: Shape) -> tuple[int, ...]:
        """The sizes of a shape in letters; `2D` is twice the width."""
        return tuple(
            int(letter) if letter.isdigit()
            else int(letter[:-1] or 1) * getattr(self, letter[-1])
            for letter in shape
        )


@dataclass
class Context:
    """What pieces may read besides `x`."""

    tokens: Tensor | None  # [B, S]
    mask: Tensor | None  # [B, S], 1 for real tokens
    bias: Tensor | None  # [1 or B, H, S, S]


class Parts(nn.Module):
    """The parameters of one piece, and the choices that it draws, which stay as they are."""

    def __init__(self, shapes: dict[str, Shape], sizes: Sizes, seed: int, dtype: torch.dtype):
        super().__init__()
        self.sizes, draw = sizes, random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        for name, letters in shapes.items():
            shape = sizes.of(letters)
            gain = 1.5 / math.sqrt(shape[-1]) if len(shape) > 1 else 0.5
            data = torch.randn(shape, generator=generator, dtype=torch.float64) * gain
            self.register_parameter(name, nn.Parameter(data.to(dtype)))
        self.width, self.fill = draw.randint(2, 9), draw.choice(FILLS)
        self.form, self.slots = draw.choice(("sdpa", "matmul", "einsum")), draw.randint(3, 24)
        self.spread = draw.choice((1.0, 1.0, 2.0, 6.0))
        self.way = draw.randrange(4)
        self.plain = False  # set to see what becomes of attention without its mask


Piece = Callable[[Parts, Tensor, Context], Tensor]


@dataclass(frozen=True)
class Entry:
    """A piece by name: what computes it, its parameters, and the inputs that it needs."""

    run: Callable[..., Any]
    shapes: dict[str, Shape]
    needs: tuple[str, ...]
    group: str


FILLS: Final = (float("-inf"), "lowest", -1e4, -1e9)
PIECES: Final[dict[str, Entry]] = {}
HEADS: Final[dict[str, Entry]] = {}


def piece(group: str, *needs: str, **shapes: str) -> Callable[[Piece], Piece]:
    """Register a piece; shapes as `w="D D"`."""
    def keep(run: Piece) -> Piece:
        parts = {name: tuple(text.split()) for name, text in shapes.items()}
        PIECES[run.__name__] = Entry(run, parts, needs, group)
        return run
    return keep


def head(*needs: str, **shapes: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a head."""
    def keep(run: Callable[..., Any]) -> Callable[..., Any]:
        parts = {name: tuple(text.split()) for name, text in shapes.items()}
        HEADS[run.__name__] = Entry(run, parts, needs, "head")
        return run
    return keep
