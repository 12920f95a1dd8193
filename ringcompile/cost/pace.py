"""How fast a CPU is at this moment: others may be using it as well.

A shared core is for some seconds as fast as it can be and for some a third slower. A matrix product
timed before and behind a measurement tells which, so that seconds measured at different moments
can be compared: each is what it would have been while such a product took as long as at best.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

_SIDE, _REPEATS = 512, 3


def product_seconds() -> float:
    """Of one product of two square matrices, now."""
    x = torch.ones(_SIDE, _SIDE)
    torch.mm(x, x)
    start = time.perf_counter()
    for _ in range(_REPEATS):
        torch.mm(x, x)
    return (time.perf_counter() - start) / _REPEATS


@dataclass
class Pace:
    """Brings seconds to one pace, that of the first product; `best` then brings them to the best.

    Attributes:
        product: the seconds of a product, now.
    """

    product: Callable[[], float] = product_seconds
    _first: float | None = field(default=None, init=False)
    _least: float = field(default=float("inf"), init=False)

    def steady(self, measured: Callable[[], float]) -> float:
        """The seconds that are measured, at the pace of the first product."""
        before = self.product()
        seconds = measured()
        now = (before + self.product()) / 2
        self._least = min(self._least, now)
        self._first = self._first or now
        return seconds * self._first / now

    @property
    def best(self) -> float:
        """How long all takes at the best pace seen, over the pace of the first product."""
        return self._least / self._first if self._first else 1.0
