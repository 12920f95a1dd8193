"""Rows for ops that read or write at indices: picking, scattering, counting, sorting.

An index says where in a dim, so that dim is whole on every rank; the other dims pass.
"""

from __future__ import annotations

from ringcompile.ir.calls import Call
from ringcompile.ir.nodes import type_of
from ringcompile.ir.rules.base import Factors, Names, rank_of, shapes


def _dim(call: Call) -> int:
    """The dim that is read or written along, counted from the front."""
    return call["dim"] % max(rank_of(call), 1)


def index_select(call: Call) -> Factors:
    """One dim is picked from, and must be whole; the picked entries may be split."""
    rank, dim = rank_of(call), _dim(call)
    names: Names = tuple(None if i == dim else i for i in range(rank))
    index = ("picked",) * len(shapes(call)[1])
    return Factors((names, index), tuple("picked" if i == dim else i for i in range(rank)))


def index(call: Call) -> Factors:
    """x[i, j, ...] with index tensors side by side: indexed dims whole, indices broadcast."""
    source, where, picked = _indexed(call)
    out = type_of(call.node).shape
    start, width = _place_of_indices(where, picked)
    operand = _kept(source, where, len(out), start, width)
    output: Names = tuple(
        ("picked", i - start) if start <= i < start + width else ("kept", i)
        for i in range(len(out))
    )
    names = tuple(
        tuple(None if size == 1 and out[start + width - len(shape) + i] != 1
              else ("picked", width - len(shape) + i) for i, size in enumerate(shape))
        for shape in picked
    )
    return Factors((operand, *names), output)


def index_put(call: Call) -> Factors:
    """x[i, j, ...] = values: indexed dims and what indexes them whole, the others pass."""
    source, where, picked = _indexed(call)
    start, width = _place_of_indices(where, picked)
    rank = len(source) - len(where) + width
    operand = _kept(source, where, rank, start, width)
    values = type_of(call["values"]).shape
    sizes = {("kept", i): source[dim] for dim, name in enumerate(operand)
             if name is not None for i in [name[1]]}  # type: ignore[index]
    aligned = [("kept", rank - len(values) + i) for i in range(len(values))]
    named: Names = tuple(
        name if sizes.get(name) == size else None
        for name, size in zip(aligned, values, strict=True)
    )
    return Factors((operand, *((None,) * len(shape) for shape in picked), named), operand)


def _indexed(
    call: Call,
) -> tuple[tuple[object, ...], list[int], list[tuple[object, ...]]]:
    """The shape indexed into, which dims are indexed, and the shapes of their indices."""
    entries = list(call["indices"])
    where = [i for i, entry in enumerate(entries) if entry is not None]
    return shapes(call)[0], where, [type_of(entries[i]).shape for i in where]


def _place_of_indices(where: list[int], picked: list[tuple[object, ...]]) -> tuple[int, int]:
    """Where the broadcast index dims stand in the result, and how many they are."""
    adjacent = where == list(range(where[0], where[-1] + 1))
    return (where[0] if adjacent else 0), max(map(len, picked))


def _kept(
    source: tuple[object, ...], where: list[int], rank: int, start: int, width: int
) -> Names:
    """Names of the dims that are not indexed, by their place in the result."""
    free = iter(i for i in range(rank) if not start <= i < start + width)
    return tuple(None if i in where else ("kept", next(free)) for i in range(len(source)))


def gather(call: Call) -> Factors:
    """torch.gather: only where index and source agree on the other dims; kept to whole there."""
    rank, dim = rank_of(call), _dim(call)
    source, picked = shapes(call)
    same = tuple(i if i != dim and source[i] == picked[i] else None for i in range(rank))
    index_names: Names = tuple("picked" if i == dim else same[i] for i in range(rank))
    return Factors((same, index_names), index_names)


def scatter(call: Call) -> Factors:
    """Scatter and its kind: the dim written along whole, others where all tensors agree."""
    operands = shapes(call)
    dim = _dim(call)
    written = [shape for shape in operands if len(shape) == rank_of(call)]
    names: Names = tuple(
        i if i != dim and all(shape[i] == operands[0][i] for shape in written) else None
        for i in range(rank_of(call))
    )
    return Factors(
        tuple(names if len(shape) == rank_of(call) else (None,) * len(shape) for shape in operands),
        names,
    )


def index_add(call: Call) -> Factors:
    """x[index] += source along a dim, which is whole; the other dims pass."""
    rank, dim = rank_of(call), _dim(call)
    names: Names = tuple(None if i == dim else i for i in range(rank))
    operands = shapes(call)
    index = (None,) * len(operands[1])
    source = (names,) if len(operands) == 3 else ()
    return Factors((names, index, *source), names)


def slice_scatter(call: Call) -> Factors:
    """A piece along one dim written into a tensor; the dim is whole."""
    rank, dim = rank_of(call), _dim(call)
    names: Names = tuple(None if i == dim else i for i in range(rank))
    return Factors((names, names), names)


def select_scatter(call: Call) -> Factors:
    """One index of a dim written into a tensor; the dim is whole."""
    rank, dim = rank_of(call), _dim(call)
    names: Names = tuple(None if i == dim else i for i in range(rank))
    return Factors((names, tuple(i for i in range(rank) if i != dim)), names)


def one_hot(call: Call) -> Factors:
    """A new last dim with an entry a class, which is whole; how many, only all entries may tell."""
    known = call["num_classes"] != -1
    names: Names = tuple(i if known else None for i in range(rank_of(call) - 1))
    return Factors((names,), (*names, None))


def bucketize(call: Call) -> Factors:
    """Each value's place among boundaries, which are whole."""
    names: Names = tuple(range(rank_of(call)))
    return Factors((names, (None,)), names)


def searchsorted(call: Call) -> Factors:
    """Each value's place in a sorted row, which is whole; rows of their own go with the values."""
    rank = rank_of(call)
    values: Names = tuple(range(rank))
    rows = shapes(call)[0]
    names: Names = (None,) if len(rows) == 1 else (*range(rank - 1), None)
    sorter = (names,) * (len(call.operands) - 2)
    return Factors((names, values, *sorter), values)


def roll(call: Call) -> Factors:
    """Entries moved around along dims, which are whole; without dims all are."""
    rank = rank_of(call)
    turned = {dim % rank for dim in call["dims"]} or set(range(rank))
    names: Names = tuple(None if i in turned else i for i in range(rank))
    return Factors((names,), names)
