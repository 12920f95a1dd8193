"""Cases of the rows that need some dims whole: along a dim, reductions, views and creation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ringcompile.ir.calls import Call
from ringcompile.ir.layout import Layout
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
from tests.ir.cases_pointwise import COMPLEX, FLAGS, INTEGERS, REAL, SMALL, UNIT, Part
from tests.ir.draws import Draws, Shape


def along(
    part: Part = REAL, *more: Any, least: int = 0, exact: bool = False, **kwargs: Any
) -> Case:
    """An operand of `least` or more dims, a dim, and further arguments."""

    def make(draws: Draws) -> Arguments:
        shape = draws.shape(least)
        return called(part(draws, shape), draws.dim(len(shape)), *more, **kwargs)

    return Case(make, all_but("dim"), exact)


def _distinct(draws: Draws, shape: Shape) -> torch.Tensor:
    return draws.order(torch.Size(shape).numel()).view(shape).double()


def _slice(draws: Draws) -> Arguments:
    shape = draws.shape(1)
    dim = draws.dim(len(shape))
    start = draws.number(0, shape[dim])
    end = draws.number(start, shape[dim])
    return called(draws.real(shape), dim, start, end, draws.number(1, 3))


def _cat(draws: Draws) -> Arguments:
    shape = draws.shape(1)
    dim = draws.dim(len(shape))
    parts = []
    for _ in range(draws.number(1, 3)):
        sizes = list(shape)
        sizes[dim] = draws.size()
        parts.append(draws.real(tuple(sizes)))
    return called(parts, dim)


def _stack(draws: Draws) -> Arguments:
    shape = draws.shape()
    parts = [draws.real(shape) for _ in range(draws.number(1, 3))]
    return called(parts, draws.dim(len(shape) + 1))


def _beside_new(call: Call) -> Free:
    return {(i, d) for i in range(len(call.operands)) for d in range(len(shape_of(call, i)))}


def _diff(draws: Draws) -> Arguments:
    shape = draws.shape(1)
    dim = draws.dim(len(shape))
    ends = []
    for _ in range(2):
        sizes = list(shape)
        sizes[dim] = draws.number(1, 2)
        ends.append(draws.real(tuple(sizes)) if draws.flag() else None)
    return called(draws.real(shape), draws.number(1, 2), dim, *ends)


def _topk(draws: Draws) -> Arguments:
    shape = draws.shape(1)
    dim = draws.dim(len(shape))
    return called(_distinct(draws, shape), draws.number(0, shape[dim]), dim, draws.flag())


def _argsort_stable(draws: Draws) -> Arguments:
    shape = draws.shape()
    return called(draws.small(shape), stable=True, dim=draws.dim(len(shape)), descending=True)


def _fourier(part: Part) -> Case:
    def make(draws: Draws) -> Arguments:
        shape = draws.shape(1)
        length = draws.pick([None, 4])
        norm = draws.pick([None, "ortho"])
        return called(part(draws, shape), length, draws.dim(len(shape)), norm)

    return Case(make, all_but("dim"))


_ALONG_DIM: dict[str, Case] = {
    "softmax.int": along(),
    "log_softmax.int": along(REAL, torch.float32),
    "_softmax.default": along(REAL, False),
    "_log_softmax.default": along(REAL, False),
    "cumprod.default": along(UNIT),
    "logcumsumexp.default": along(),
    "slice.Tensor": Case(_slice, all_but("dim"), exact=True),
    "cat.default": Case(_cat, all_but("dim"), exact=True),
    "stack.default": Case(_stack, _beside_new, exact=True),
    "diff.default": Case(_diff, all_but("dim")),
    "topk.default": Case(_topk, all_but("dim"), exact=True),
    "sort.default": along(_distinct, exact=True),
    "sort.stable": Case(_argsort_stable, all_but("dim"), exact=True),
    "argsort.default": along(_distinct, True, exact=True),
    "argsort.stable": Case(_argsort_stable, all_but("dim"), exact=True),
    "cummax.default": along(INTEGERS, exact=True),
    "cummin.default": along(REAL, exact=True),
    "fft_fft.default": _fourier(COMPLEX),
    "fft_ifft.default": _fourier(COMPLEX),
    "fft_rfft.default": _fourier(REAL),
}


# -- reductions ------------------------------------------------------------------------------------

def reduced(part: Part = REAL, *before: Any, least: int = 0, empty: bool = True) -> Case:
    """Several dims, or none for all, with or without keepdim.

    Args:
        part: makes the operand.
        before: arguments between the operand and the dims.
        least: how many dims are named at least.
        empty: whether `dim` may be None or an empty list.
    """

    def make(draws: Draws) -> Arguments:
        shape = draws.shape(0 if empty else 1)
        dims: Any = draws.dims(len(shape), 0 if empty else 1)
        return called(part(draws, shape), *before, dims, draws.flag())

    return Case(make, all_but("dim"))


def _corrected(draws: Draws) -> Arguments:
    shape = draws.shape()
    dims = draws.pick([None, draws.dims(len(shape))])
    return called(
        draws.real(shape), dims, correction=draws.number(0, 1), keepdim=draws.flag()
    )


def _of_one(part: Part = REAL, keepdim: bool = True) -> Case:
    """One dim, always named."""

    def make(draws: Draws) -> Arguments:
        shape = draws.shape()
        return called(part(draws, shape), draws.dim(len(shape)), *[draws.flag()] * keepdim)

    return Case(make, all_but("dim"))


def _place(draws: Draws) -> Arguments:
    shape = draws.shape()
    dim = draws.pick([None, draws.dim(len(shape))])
    return called(draws.real(shape), dim, draws.flag())


def _flags_of(draws: Draws) -> Arguments:
    """`dim` None is all dims; an empty list is none of them, see `_flags_free`."""
    shape = draws.shape()
    return called(draws.flags(shape), draws.pick([None, draws.dims(len(shape))]), draws.flag())


def _flags_free(call: Call) -> Free:
    return aligned(call) if call["dim"] == [] else all_but("dim")(call)


def _everything(part: Part = REAL) -> Case:
    return Case(lambda draws: called(part(draws, draws.shape())), whole)


def _nonzero_count(draws: Draws) -> Arguments:
    shape = draws.shape()
    return called(draws.small(shape), draws.dims(len(shape)))


_REDUCTIONS: dict[str, Case] = {
    "mean.dim": reduced(),
    "sum.dim_IntList": reduced(INTEGERS),
    "nansum.default": reduced(),
    "amax.default": reduced(),
    "amin.default": reduced(INTEGERS),
    "logsumexp.default": reduced(empty=False),
    "any.dim": _of_one(FLAGS),
    "all.dim": _of_one(SMALL),
    "any.dims": Case(_flags_of, _flags_free),
    "all.dims": Case(_flags_of, _flags_free),
    "argmax.default": Case(_place, all_but("dim")),
    "argmin.default": Case(_place, all_but("dim")),
    "prod.dim_int": _of_one(UNIT),
    "prod.default": _everything(UNIT),
    "var.correction": Case(_corrected, all_but("dim")),
    "std.correction": Case(_corrected, all_but("dim")),
    "var_mean.correction": Case(_corrected, all_but("dim")),
    "var.dim": Case(
        lambda draws: called(
            draws.real(shape := draws.shape()), draws.dims(len(shape)), draws.flag(), draws.flag()
        ),
        all_but("dim"),
    ),
    "linalg_vector_norm.default": reduced(REAL, 2),
    "max.dim": _of_one(_distinct),
    "min.dim": _of_one(_distinct),
    "median.dim": _of_one(_distinct),
    "mode.default": _of_one(SMALL),
    "count_nonzero.dim_IntList": Case(_nonzero_count, all_but("dim")),
    "mean.default": _everything(),
    "sum.default": _everything(INTEGERS),
    "max.default": _everything(),
    "min.default": _everything(),
    "any.default": _everything(FLAGS),
    "all.default": _everything(FLAGS),
}


# -- views, creation, norms ------------------------------------------------------------------------

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


def _split_along(argument: str) -> Callable[[Call, Layout], bool]:
    """Whether the result is split along the dim that an argument names."""

    def rewritten(call: Call, layout: Layout) -> bool:
        return bool(layout.dims) and bool(layout.dims[call[argument] % len(layout.dims)])

    return rewritten


_VIEWS: dict[str, Case] = {
    "reshape.default": Case(_reshape, _kept_by_view, exact=True),
    "expand.default": Case(_expand, aligned, exact=True),
    "permute.default": Case(_permute, _beside_new, exact=True),
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
    "cumsum.default": Case(
        along().make, _beside_new, rewritten=_split_along("dim")
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

# -- all whole -------------------------------------------------------------------------------------

def _whole(make: Callable[[Draws], Arguments]) -> Case:
    return Case(make, whole)


def _masked_scatter(draws: Draws) -> Arguments:
    shape = draws.shape()
    return called(
        draws.real(shape), draws.flags(draws.narrower(shape)), draws.real((*shape, 2))
    )


def _searchsorted(draws: Draws) -> Arguments:
    shape = draws.shape(1, 3)
    return called(
        draws.real(shape).sort(-1).values, draws.real((*shape[:-1], draws.size())),
        right=draws.flag(),
    )


def _weight_norm(draws: Draws) -> Arguments:
    shape = draws.shape(2, 3)
    return called(draws.real(shape), draws.real((shape[0], *[1] * (len(shape) - 1))), 0)


def _images(*more: Any, channels: int = 1, times: int = 1) -> Case:
    def make(draws: Draws) -> Arguments:
        height, width = (draws.size() * times for _ in range(2))
        return called(draws.real((draws.size(), draws.size() * channels, height, width)), *more)

    return Case(make, whole)


_ALL_WHOLE: dict[str, Case] = {
    "nonzero.default": _everything(SMALL),
    "nonzero_numpy.default": _everything(SMALL),
    "where.default": _everything(FLAGS),
    "masked_select.default": _whole(lambda draws: called(
        draws.real(shape := draws.shape()), draws.flags(draws.narrower(shape)))),
    "masked_scatter.default": _whole(_masked_scatter),
    "bincount.default": _whole(lambda draws: called(
        draws.small(shape := draws.shape(1, 1)), draws.real(shape), draws.number(0, 8))),
    "histc.default": _whole(lambda draws: called(draws.real(draws.shape()), 5, -1, 1)),
    "searchsorted.Tensor": _whole(_searchsorted),
    "eye.default": _whole(lambda draws: called(draws.size())),
    "eye.m": _whole(lambda draws: called(draws.size(), draws.size())),
    "linspace.default": _whole(lambda draws: called(-1, 2, draws.size())),
    "isin.Tensor_Tensor": _whole(lambda draws: called(
        draws.integers(draws.shape()), draws.small(draws.shape(1, 2)))),
    "fft_fftn.default": _whole(lambda draws: called(draws.complex(draws.shape(1)))),
    "fft_fft2.default": _whole(lambda draws: called(draws.complex(draws.shape(2)))),
    "tril_indices.default": _whole(lambda draws: called(draws.size(), draws.size(), 1)),
    "triu_indices.default": _whole(lambda draws: called(draws.size(), draws.size(), -1)),
    "_weight_norm.default": _whole(_weight_norm),
    "im2col.default": _images([1, 1], [1, 1], [0, 0], [1, 1]),
    "pixel_shuffle.default": _images(2, channels=4),
    "pixel_unshuffle.default": _images(2, times=2),
    "repeat_interleave.Tensor": _whole(lambda draws: called(draws.small(draws.shape(1, 1)))),
    "unique_consecutive.default": _whole(lambda draws: called(
        draws.small(draws.shape()), True, True)),
    "_unique2.default": _whole(lambda draws: called(
        draws.small(draws.shape()), True, draws.flag(), draws.flag())),
}

CASES: dict[str, Case] = {
    f"aten.{name}": case
    for table in (_ALONG_DIM, _REDUCTIONS, _VIEWS, _NORMS, _ALL_WHOLE)
    for name, case in table.items()
}
