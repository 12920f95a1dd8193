"""How fast a CPU is at this moment: others may be using it as well.

A shared core is for some seconds as fast as it can be and for some a third slower. A matrix product
timed beside a measurement tells which, so that seconds measured at different moments can be
compared: each is what it would have been while such a product took as long as at best.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from math import inf

import torch

_SIDE, _REPEATS = 512, 3


def product_seconds(repeats: int = _REPEATS) -> float:
    """Of one product of two square matrices, now: the mean of some behind one more."""
    x = torch.ones(_SIDE, _SIDE)
    torch.mm(x, x)
    start = time.perf_counter()
    for _ in range(repeats):
        torch.mm(x, x)
    return (time.perf_counter() - start) / repeats


@dataclass
class Pace:
    """Brings seconds to one pace, that of the first product; `best` says what to the best."""

    _first: float | None = field(default=None, init=False)
    _least: float = field(default=inf, init=False)

    def steady(self, seconds: float, product: float) -> float:
        """The seconds at the pace of the first product.

        Args:
            seconds: what was measured.
            product: the seconds of a product at that time.
        """
        self._least = min(self._least, product)
        self._first = self._first or product
        return seconds * self._first / product

    @property
    def best(self) -> float:
        """How long all takes at the best pace seen, over the pace of the first product."""
        return self._least / self._first if self._first else 1.0
