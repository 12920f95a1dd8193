"""How fast a rank is at this moment, on a machine that others use as well."""

from __future__ import annotations

from ringcompile.cost import pace
from ringcompile.runtime.join import Rank


def product_seconds(rank: Rank) -> float:
    """Of one product of two square matrices, on this rank and now."""
    return pace.product_seconds()
