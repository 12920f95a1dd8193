"""Cases of the rows that need all of what they read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.ir.case import Arguments, Case, called, whole
from tests.ir.cases_dims import everything
from tests.ir.cases_pointwise import FLAGS, SMALL
from tests.ir.draws import Draws


def _whole(make: Callable[[Draws], Arguments]) -> Case:
    return Case(make, whole)


def _masked_scatter(draws: Draws) -> Arguments:
    shape = draws.shape()
    return called(
        draws.real(shape), draws.flags(draws.narrower(shape)), draws.real((*shape, 2))
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
    "nonzero.default": everything(SMALL),
    "nonzero_numpy.default": everything(SMALL),
    "where.default": everything(FLAGS),
    "masked_select.default": _whole(lambda draws: called(
        draws.real(shape := draws.shape()), draws.flags(draws.narrower(shape)))),
    "masked_scatter.default": _whole(_masked_scatter),
    "bincount.default": _whole(lambda draws: called(
        draws.small(shape := draws.shape(1, 1)), draws.real(shape), draws.number(0, 8))),
    "histc.default": _whole(lambda draws: called(draws.real(draws.shape()), 5, -1, 1)),
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
    f"aten.{name}": case for table in (_ALL_WHOLE,) for name, case in table.items()
}
