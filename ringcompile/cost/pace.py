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
    """The time of one matmul of two square matrices now: the mean of a few, after a warm-up."""
    x = torch.ones(_SIDE, _SIDE)
    torch.mm(x, x)
    start = time.perf_counter()
    for _ in range(repeats):
        torch.mm(x, x)
    return (time.perf_counter() - start) / repeats


@dataclass
class Pace:
    """Scales times to one pace of the CPU, that of the first matmul that was timed."""

    _first: float | None = field(default=None, init=False)
    _least: float = field(default=inf, init=False)

    def steady(self, seconds: float, product: float) -> float:
        """The time scaled to the pace of the first matmul.

        Args:
            seconds: the measured time.
            product: the time of a matmul at that moment, in seconds.
        """
        self._least = min(self._least, product)
        self._first = self._first or product
        return seconds * self._first / product

    @property
    def best(self) -> float:
        """The factor from the pace of the first matmul to the best pace seen."""
        return self._least / self._first if self._first else 1.0
