"""Cases of the rows that need some dims whole: along a dim, and reductions."""

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


def _recurrence(draws: Draws) -> Arguments:
    shape = draws.shape(1)
    return called(draws.real(shape), draws.real(shape), dim=draws.dim(len(shape)))


def _linear_attention(draws: Draws) -> Arguments:
    shape, size, features = draws.shape(1), draws.number(1, 3), draws.number(1, 3)
    queries, keys = (draws.real((*shape, size)) for _ in range(2))
    decay = draws.real((*shape, size) if draws.flag() else shape)
    beta = draws.real(shape) if draws.flag() else None
    return called(queries, keys, draws.real((*shape, features)), decay, beta)


def _tokens_split(call: Call, layout: Layout) -> bool:
    return bool(layout.dims[-2])


def _heads_and_features(call: Call) -> Free:
    """Heads and tokens of all operands, and features of values."""
    rank, count = len(shape_of(call, 0)), len(call.operands)
    return {(i, d) for i in range(count) for d in range(rank - 1)} | {(2, rank - 1)}


def _fourier(part: Part, *lengths: int | None) -> Case:
    def make(draws: Draws) -> Arguments:
        shape = draws.shape(1)
        length = draws.pick(lengths or [None, 4])
        norm = draws.pick([None, "ortho"])
        return called(part(draws, shape), length, draws.dim(len(shape)), norm)

    return Case(make, all_but("dim"))


def _split_along(argument: str) -> Callable[[Call, Layout], bool]:
    """Whether the result is split along the dim that an argument names."""

    def rewritten(call: Call, layout: Layout) -> bool:
        return bool(layout.dims) and bool(layout.dims[call[argument] % len(layout.dims)])

    return rewritten


_ALONG_DIM: dict[str, Case] = {
    "softmax.int": along(),
    "log_softmax.int": along(REAL, torch.float32),
    "_softmax.default": along(REAL, False),
    "_log_softmax.default": along(REAL, False),
    "cumsum.default": Case(along().make, leading(0), rewritten=_split_along("dim")),
    "cumprod.default": Case(along(UNIT).make, leading(0), rewritten=_split_along("dim")),
    "logcumsumexp.default": Case(along().make, leading(0), rewritten=_split_along("dim")),
    "slice.Tensor": Case(_slice, all_but("dim"), exact=True),
    "cat.default": Case(_cat, all_but("dim"), exact=True),
    "stack.default": Case(_stack, leading(0), exact=True),
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
    "fft_irfft.default": _fourier(COMPLEX, 4, 5),
}


# -- reductions ------------------------------------------------------------------------------------

def _norm(draws: Draws) -> Arguments:
    """Of vectors, or of matrices."""
    shape = draws.shape(1)
    return called(draws.real(shape), None, draws.dims(len(shape), 1)[:2], draws.flag())


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


def everything(part: Part = REAL) -> Case:
    """All dims, none of them named."""
    return Case(lambda draws: called(part(draws, draws.shape())), whole)


def _nonzero_count(draws: Draws) -> Arguments:
    shape = draws.shape()
    return called(draws.small(shape), draws.dims(len(shape)))


def _kthvalue(draws: Draws) -> Arguments:
    shape = draws.shape(1, 4)
    dim = draws.dim(len(shape))
    return called(_distinct(draws, shape), draws.number(1, shape[dim]), dim, draws.flag())


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
    "prod.default": everything(UNIT),
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
    "linalg_norm.default": Case(_norm, all_but("dim")),
    "max.dim": _of_one(_distinct),
    "min.dim": _of_one(_distinct),
    "median.dim": _of_one(_distinct),
    "mode.default": _of_one(SMALL),
    "kthvalue.default": Case(_kthvalue, all_but("dim")),
    "count_nonzero.dim_IntList": Case(_nonzero_count, all_but("dim")),
    "mean.default": everything(),
    "sum.default": everything(INTEGERS),
    "max.default": everything(),
    "min.default": everything(),
    "any.default": everything(FLAGS),
    "all.default": everything(FLAGS),
}


CASES: dict[str, Case] = {
    f"aten.{name}": case for table in (_ALONG_DIM, _REDUCTIONS) for name, case in table.items()
} | {
    "ringcompile.recurrence.default": Case(
        _recurrence, leading(0), rewritten=_split_along("dim")
    ),
    "ringcompile.linear_attention.default": Case(
        _linear_attention, _heads_and_features, rewritten=_tokens_split
    ),
}
