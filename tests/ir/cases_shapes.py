"""Cases of the rows for views, creation, and norms over some of the dims."""

from __future__ import annotations

import torch

from ringcompile.ir.calls import Call
from ringcompile.ir.nodes import type_of
from tests.ir.case import (
    Arguments,
    Case,
    Free,
    aligned,
    all_but,
    called,
    leading,
    pairs,
    shape_of,
    whole,
)
from tests.ir.draws import Draws


def _factors(number: int, draws: Draws) -> list[int]:
    """A shape of that many elements."""
    found = []
    while number > 1 and draws.flag():
        found.append(draws.pick([d for d in range(1, number + 1) if number % d == 0]))
        number //= found[-1]
    return [*found, number]


def _reshape(draws: Draws) -> Arguments:
    """Some dims stay, a run of them is joined and taken apart in another way."""
    shape = draws.shape(0, 5)
    first = draws.number(0, len(shape))
    last = draws.number(first, len(shape))
    middle = _factors(torch.Size(shape[first:last]).numel(), draws)
    return called(draws.real(shape), [*shape[:first], *middle, *shape[last:]])


def _kept_by_view(call: Call) -> Free:
    """Dims before the first that changes."""
    source, target = shape_of(call, 0), call.node.meta["type"].shape
    kept = set()
    for d, (old, new) in enumerate(zip(source, target, strict=False)):
        if old != new:
            break
        kept.add((0, d))
    return kept


def _expand(draws: Draws) -> Arguments:
    shape = draws.shape()
    spelled = [-1 if size != 1 and draws.flag() else size for size in shape]
    x = draws.real(draws.narrower(shape))
    for i, size in enumerate(reversed(shape), 1):
        if i > x.dim() or x.shape[-i] != size:
            spelled[-i] = size
    return called(x, spelled)


def _permute(draws: Draws) -> Arguments:
    shape = draws.shape(0, 5)
    order = draws.permutation(len(shape))
    return called(draws.real(shape), [d - len(shape) if draws.flag() else d for d in order])


def _select(draws: Draws) -> Arguments:
    shape = draws.shape(1)
    dim = draws.dim(len(shape))
    return called(draws.real(shape), dim, draws.number(-shape[dim], shape[dim] - 1))


def _flip(draws: Draws) -> Arguments:
    shape = draws.shape()
    return called(draws.real(shape), draws.dims(len(shape)))


def _flip_free(call: Call) -> Free:
    return aligned(call) if not call["dims"] else all_but("dims")(call)


def _glu(draws: Draws) -> Arguments:
    shape = list(draws.shape(1))
    dim = draws.dim(len(shape))
    shape[dim] *= 2
    return called(draws.real(tuple(shape)), dim)


def _normed(weights: int) -> Case:
    def make(draws: Draws) -> Arguments:
        shape = draws.shape(1)
        inner = shape[draws.number(0, len(shape) - 1) :]
        others = [draws.real(inner) if draws.flag() else None for _ in range(weights)]
        return called(draws.real(shape), list(inner), *others)

    def free(call: Call) -> Free:
        return leading(len(call["normalized_shape"]), 0)(call)

    return Case(make, free)


def _pieces(call: Call) -> Free:
    """The pair of numbers is the last dim where they are real."""
    rank = len(shape_of(call, 0))
    behind = 1 if str(call.target) == "aten.view_as_complex.default" else 0
    return {(0, d) for d in range(rank - behind)}


def _arange(draws: Draws) -> Arguments:
    step, start = draws.pick([1, 2, -1]), draws.number(-2, 3)
    return called(start, start + step * draws.size(), step, dtype=torch.int64)


def _diagonal(draws: Draws) -> Arguments:
    shape = draws.shape(2, 4)
    one = draws.number(0, len(shape) - 2)
    other = draws.number(one + 1, len(shape) - 1)
    return called(draws.real(shape), draws.number(-1, 1), one, other)


def _diagonal_free(call: Call) -> Free:
    return all_but("dim1")(call) & all_but("dim2")(call)


def _bits(draws: Draws) -> Arguments:
    """Whole numbers as others: as long, shorter, or longer (several of them in the last dim)."""
    have, made = draws.pick([(torch.int64, torch.float64), (torch.int64, torch.int32),
                             (torch.int32, torch.uint8), (torch.uint8, torch.int32),
                             (torch.int16, torch.int32)])
    joined = max(made.itemsize // have.itemsize, 1)
    x = draws.integers((*draws.shape(0, 3), draws.size() * joined), 0, 99).to(have)
    return called(x, made)


def _bits_free(call: Call) -> Free:
    alike = type_of(call.operands[0]).dtype.itemsize == type_of(call.node).dtype.itemsize
    return aligned(call) if alike else aligned(call) - {(0, len(shape_of(call, 0)) - 1)}


_VIEWS: dict[str, Case] = {
    "view.dtype": Case(_bits, _bits_free, exact=True),
    "diagonal.default": Case(_diagonal, _diagonal_free, exact=True),
    "reshape.default": Case(_reshape, _kept_by_view, exact=True),
    "expand.default": Case(_expand, aligned, exact=True),
    "permute.default": Case(_permute, leading(0), exact=True),
    "select.int": Case(_select, all_but("dim"), exact=True),
    "flip.default": Case(_flip, _flip_free, exact=True),
    "glu.default": Case(_glu, all_but("dim")),
    "view_as_complex.default": Case(
        lambda draws: called(draws.real((*draws.shape(), 2))), _pieces, exact=True
    ),
    "view_as_real.default": Case(
        lambda draws: called(draws.complex(draws.shape())), _pieces, exact=True
    ),
    "full.default": Case(
        lambda draws: called(list(draws.shape()), 1.5, dtype=torch.float64), whole, exact=True
    ),
    "arange.start_step": Case(
        _arange, whole, exact=True, rewritten=lambda call, layout: not layout.is_whole
    ),
    "tril.default": Case(
        lambda draws: called(draws.real(draws.shape(2)), draws.number(-2, 2)), leading(2), True
    ),
    "triu.default": Case(
        lambda draws: called(draws.real(draws.shape(2)), draws.number(-2, 2)), leading(2), True
    ),
    "layer_norm.default": _normed(2),
    "rms_norm.default": _normed(1),
}


def _group_norm(draws: Draws) -> Arguments:
    groups = draws.number(1, 3)
    channels = groups * draws.size()
    weights = [draws.real((channels,)) if draws.flag() else None for _ in range(2)]
    return called(draws.real((draws.size(), channels, *draws.shape(1, 2))), groups, *weights)


def _batch_norm(draws: Draws) -> Arguments:
    """With running statistics, or with those of the batch where there are none."""
    shape = (draws.size() + 1, draws.size(), *draws.shape(0, 2))
    one = shape[1:2]
    affine = [draws.real(one) if draws.flag() else None for _ in range(2)]
    running = [draws.real(one), draws.positive(one)]
    of_batch = draws.flag()
    return called(
        draws.real(shape), *affine, *([None, None] if of_batch else running), of_batch,
        0.1, 1e-5, True,
    )


def _batch_norm_free(call: Call) -> Free:
    rank = len(shape_of(call, 0))
    others = {(i, 0) for i in range(1, len(call.operands))}
    return others | ({(0, 1)} if call["training"] else {(0, d) for d in range(rank)})


_NORMS: dict[str, Case] = {
    "group_norm.default": Case(_group_norm, pairs((0, 0))),
    "batch_norm.default": Case(_batch_norm, _batch_norm_free),
}

CASES: dict[str, Case] = {
    f"aten.{name}": case for table in (_VIEWS, _NORMS) for name, case in table.items()
}
