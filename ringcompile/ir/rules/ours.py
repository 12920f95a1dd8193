"""The factors of our own ops: attention, linear attention, and matmuls of experts."""

from __future__ import annotations

from ringcompile.ir.calls import Call
from ringcompile.ir.expr import Size, product
from ringcompile.ir.nodes import type_of
from ringcompile.ir.rules.base import Factors, Names, rank_of, shapes


def attention(call: Call) -> Factors:
    """B h q d, b g k d, b g k e -> b h q e.

    Keys and values may be split along their sequence on the axis that splits the queries: that
    is ring attention; `sequence.place` keeps such a split. The key mask must know all keys.
    A sink has one number a query head. Heads pass where each has keys of its own (g is h) or all
    have the same; in groups, a rank's heads would have to be those of its groups.
    """
    heads, groups = (shapes(call)[i][1] for i in range(2))
    g = "h" if groups == heads else None
    h = "h" if g or groups == 1 else None
    names: list[Names] = [("b", h, "q", "d"), ("b", g, "k", "d"), ("b", g, "k", "e")]
    if call["key_mask"] is not None:
        shape = type_of(call["key_mask"]).shape
        names.append((None if shape[0] == 1 else "b", None, None, None))
    if call["mask"] is not None:
        shape = type_of(call["mask"]).shape
        rows = zip(("b", h, "q"), shape, strict=False)
        names.append((*(None if size == 1 else f for f, size in rows), None))
    if call["sink"] is not None:
        names.append((h,))
    return Factors(tuple(names), ("b", h, "q", "e"))


def linear_attention(call: Call) -> Factors:
    """... s n, ... s n, ... s p, ... s [n], ... s, ... n p -> ... s p; along s, see `scan`."""
    batch = tuple(range(rank_of(call) - 2))
    key, value = (*batch, "s", None), (*batch, "s", "p")
    names: dict[str, Names] = {
        "q": key, "k": key, "v": value, "decay": key[: len(type_of(call["decay"]).shape)],
        "beta": key[:-1], "state": (*batch, None, "p"),
    }
    return Factors(tuple(of for name, of in names.items() if call[name] is not None), value)


def expert_linear(call: Call) -> Factors:
    """... i, ..., e o i (or e i o), e o -> ... o; rows are of the experts that are here."""
    batch = tuple(range(rank_of(call) - 1))
    return Factors(((*batch, "i"), batch, *_matrices(call)), (*batch, "o"))


def grouped_linear(call: Call) -> Factors:
    """... i, e, e o i (or e i o), e o -> ... o; rows are sorted, so that none can be left out."""
    batch: Names = (None, *range(1, rank_of(call) - 1))
    return Factors(((*batch, "i"), (None,), *_matrices(call)), (*batch, "o"))


def _matrices(call: Call) -> tuple[Names, ...]:
    """A matrix an expert, and its bias if there is one."""
    weight: Names = ("e", "i", "o") if call["transposed"] else ("e", "o", "i")
    return (weight, ("e", "o")) if call["bias"] is not None else (weight,)


def keys_twice(call: Call) -> Size:
    """Of attention: each key is multiplied with the query, and its weight with the value."""
    return product([2, shapes(call)[1][2]])


def state_twice(call: Call) -> Size:
    """Of linear attention: each feature takes part in states as they are written and read."""
    return product([2, shapes(call)[0][-1]])


def features(call: Call) -> Size:
    """Of a product with matrices that are chosen by row: the row's features."""
    return product(shapes(call)[0][-1:])
