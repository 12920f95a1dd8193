"""Cases of the rows that read or write at indices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ringcompile.ir.calls import Call
from tests.ir.case import Arguments, Case, Free, all_but, called, leading, shape_of
from tests.ir.draws import Draws, Shape


def _embedding(draws: Draws) -> Arguments:
    table = (draws.size(), draws.size())
    return called(draws.real(table), draws.integers(draws.shape(), 0, table[0] - 1))


def _embedding_free(call: Call) -> Free:
    return {(0, 1), *((1, d) for d in range(len(shape_of(call, 1))))}


def _index_select(draws: Draws) -> Arguments:
    shape = draws.shape(1)
    dim = draws.dim(len(shape))
    picked = draws.shape(0, 1)
    return called(draws.real(shape), dim, draws.integers(picked, 0, shape[dim] - 1))


def _and_the_index(free: Callable[[Call], Free]) -> Callable[[Call], Free]:
    return lambda call: free(call) | {(1, d) for d in range(len(shape_of(call, 1)))}


def _written_along(*parts: Any, source: bool = True) -> Case:
    """self, dim, index and a source; or, without one, `parts`."""

    def make(draws: Draws) -> Arguments:
        shape = draws.shape(1)
        dim = draws.dim(len(shape))
        count = draws.number(1, shape[dim])
        chosen = draws.order(shape[dim])[:count]
        index = chosen[0] if count == 1 and draws.flag() else chosen
        sizes = list(shape)
        sizes[dim] = count
        written = [draws.real(tuple(sizes))] if source else parts
        return called(draws.real(shape), dim, index, *written)

    return Case(make, all_but("dim", *((0, 2) if source else (0,))))


def _picked(draws: Draws, shape: Shape) -> tuple[list[Tensor | None], Shape]:
    """Index tensors for some of the dims, and the shape that they broadcast to."""
    where = sorted(draws.permutation(len(shape))[: draws.number(1, min(3, len(shape)))])
    common = draws.shape(0, 2)
    entries: list[Tensor | None] = [None] * (where[-1] + 1)
    for nth, dim in enumerate(where):
        size = common if nth == 0 else draws.narrower(common)
        entries[dim] = draws.integers(size, 0, shape[dim] - 1)
    return entries, common


def _index(draws: Draws) -> Arguments:
    shape = draws.shape(1)
    return called(draws.real(shape), _picked(draws, shape)[0])


def _not_indexed(call: Call) -> Free:
    entries = list(call["indices"])
    return {
        (0, d) for d in range(len(shape_of(call, 0))) if d >= len(entries) or entries[d] is None
    }


def _index_free(call: Call) -> Free:
    """Dims that no index picks from, and the indices' own."""
    widest = {(1, d) for d in range(len(shape_of(call, 1)))}
    return _not_indexed(call) | widest


def _index_put(draws: Draws) -> Arguments:
    shape = draws.shape(1)
    entries, _ = _picked(draws, shape)
    x = draws.real(shape)
    there = tuple(torch.ops.aten.index.Tensor(x, entries).shape)
    # What is written twice is added up: which one of two stays is not told.
    return called(x, entries, draws.real(draws.narrower(there)), True)


def _gather(draws: Draws) -> Arguments:
    shape = draws.shape()
    dim = draws.dim(len(shape))
    size = shape[dim] if shape else 1
    picked = draws.smaller(shape, dim)
    return called(draws.real(shape), dim, draws.integers(picked, 0, size - 1))


def _gather_free(call: Call) -> Free:
    """Dims of which all rows are picked from; of the index, the picked dim too."""
    source, picked = (shape_of(call, i) for i in range(2))
    rank = len(source)
    if not rank:
        return set()
    dim = call["dim"] % rank
    same = {(i, d) for i in range(2) for d in range(rank) if d != dim and source[d] == picked[d]}
    return same | {(1, dim)}


def _scatter(*behind: Any, source: bool = True, **kwargs: Any) -> Case:
    """self, dim, index, and a source as large or larger; each place is written once."""

    def make(draws: Draws) -> Arguments:
        shape = draws.shape()
        dim = draws.dim(len(shape))
        index = draws.real(shape).argsort(dim) if shape else torch.tensor(0)
        written = draws.smaller(shape)
        for d, size in enumerate(written):
            index = index.narrow(d, 0, size)
        larger = tuple(size + (draws.number(0, 4) == 0) for size in written)
        parts = [draws.real(larger)] if source else []
        return called(draws.real(shape), dim, index.contiguous(), *parts, *behind, **kwargs)

    return Case(make, _scatter_free)


def _scatter_free(call: Call) -> Free:
    shapes = [shape_of(call, i) for i in range(len(call.operands))]
    rank = len(shapes[0])
    if not rank:
        return set()
    alike = [d for d in range(rank)
             if d != call["dim"] % rank and len({shape[d] for shape in shapes}) == 1]
    return {(i, d) for i in range(len(shapes)) for d in alike}


def _slice_scatter(draws: Draws) -> Arguments:
    shape = draws.shape(1)
    dim = draws.dim(len(shape))
    start = draws.number(0, shape[dim])
    end = draws.number(start, shape[dim])
    step = draws.number(1, 2)
    sizes = list(shape)
    sizes[dim] = len(range(start, end, step))
    return called(draws.real(shape), draws.real(tuple(sizes)), dim, start, end, step)


def _select_scatter(draws: Draws) -> Arguments:
    shape = draws.shape(1)
    dim = draws.dim(len(shape))
    sizes = list(shape)
    del sizes[dim]
    index = draws.number(-shape[dim], shape[dim] - 1)
    return called(draws.real(shape), draws.real(tuple(sizes)), dim, index)


def _select_scatter_free(call: Call) -> Free:
    rank = len(shape_of(call, 0))
    return all_but("dim", 0)(call) | {(1, d) for d in range(rank - 1)}


def _one_hot(draws: Draws) -> Arguments:
    """The number of classes may be left to the data: all of it, then."""
    return called(draws.small(draws.shape()), draws.pick([6, 8, -1]))


def _one_hot_free(call: Call) -> Free:
    return {(0, d) for d in range(len(shape_of(call, 0))) if call["num_classes"] != -1}


def _bucketize(draws: Draws) -> Arguments:
    boundaries = draws.real((draws.size(),)).sort().values
    return called(draws.real(draws.shape()), boundaries, right=draws.flag())


def _searchsorted(draws: Draws) -> Arguments:
    shape = draws.shape(1, 3)
    return called(
        draws.real(shape).sort(-1).values, draws.real((*shape[:-1], draws.size())),
        right=draws.flag(),
    )


def _searched_free(call: Call) -> Free:
    rank = len(shape_of(call, 1))
    one_row = len(shape_of(call, 0)) == 1
    return {(1, d) for d in range(rank)} | {(0, d) for d in range(0 if one_row else rank - 1)}


def _roll(draws: Draws) -> Arguments:
    shape = draws.shape()
    dims = draws.dims(len(shape))
    shifts = [draws.number(-3, 3) for _ in dims or [0]]
    return called(draws.real(shape), shifts, dims)


_TABLE: dict[str, Case] = {
    "embedding.default": Case(_embedding, _embedding_free, exact=True),
    "index_select.default": Case(
        _index_select, _and_the_index(all_but("dim", 0)), exact=True
    ),
    "index.Tensor": Case(_index, _index_free, exact=True),
    "index_put.default": Case(_index_put, _not_indexed),
    "index_add.default": _written_along(),
    "index_copy.default": _written_along(),
    "index_fill.int_Scalar": _written_along(2.5, source=False),
    "gather.default": Case(_gather, _gather_free, exact=True),
    "scatter.src": _scatter(),
    "scatter.value": _scatter(1.5, source=False),
    "scatter.reduce": _scatter(reduce="multiply"),
    "scatter.value_reduce": _scatter(1.5, source=False, reduce="add"),
    "scatter_add.default": _scatter(),
    "scatter_reduce.two": _scatter("amax", include_self=False),
    "slice_scatter.default": Case(_slice_scatter, all_but("dim"), exact=True),
    "select_scatter.default": Case(_select_scatter, _select_scatter_free, exact=True),
    "one_hot.default": Case(_one_hot, _one_hot_free),
    "bucketize.Tensor": Case(_bucketize, leading(0, 0)),
    "searchsorted.Tensor": Case(_searchsorted, _searched_free),
    "roll.default": Case(_roll, all_but("dims"), exact=True),
}

CASES: dict[str, Case] = {f"aten.{name}": case for name, case in _TABLE.items()}
