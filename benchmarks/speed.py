"""How fast a rank is at this moment, on a machine that others use as well."""

from __future__ import annotations

import time

import torch

from ringcompile.runtime.join import Rank

SIDE, REPEATS = 512, 4


def product_seconds(rank: Rank) -> float:
    """Of one product of two square matrices of `SIDE`, on this rank and now."""
    x = torch.ones(SIDE, SIDE)
    torch.mm(x, x)
    start = time.perf_counter()
    for _ in range(REPEATS):
        torch.mm(x, x)
    return (time.perf_counter() - start) / REPEATS
