"""Cases of the rows for convolutions, pooling, resizing, padding and windows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ringcompile.ir.calls import Call
from tests.ir.case import Arguments, Case, Free, all_but, called, pairs, shape_of
from tests.ir.draws import Draws, Shape


def _space(draws: Draws, dims: int) -> Shape:
    """Sizes of at least 4, one of them perhaps the split length."""
    return tuple(max(4, draws.size()) if dims < 3 else 4 for _ in range(dims))


def _sampled(draws: Draws, channels: int, dims: int) -> Shape:
    samples = (draws.size(),) if draws.flag() else ()
    return (*samples, channels, *_space(draws, dims))


def _convolution(dims: int, padding: Callable[[Draws], Any]) -> Case:
    def make(draws: Draws) -> Arguments:
        groups = draws.pick([1, 1, 2])
        inner, outer = draws.size() * groups, draws.size() * groups
        weight = draws.real((outer, inner // groups, *[3] * dims))
        bias = draws.real((outer,)) if draws.flag() else None
        x = draws.real(_sampled(draws, inner, dims))
        return called(x, weight, bias, [1], padding(draws), [1], groups)

    return Case(make, _convolution_free)


def _convolution_free(call: Call) -> Free:
    batched = len(shape_of(call, 0)) == len(shape_of(call, 1))
    outer = {(i, 0) for i in range(1, len(call.operands)) if call["groups"] == 1}
    return outer | ({(0, 0)} if batched else set())


def _transposed(dims: int) -> Case:
    def make(draws: Draws) -> Arguments:
        groups = draws.pick([1, 2])
        inner, outer = draws.size() * groups, draws.size()
        weight = draws.real((inner, outer, *[3] * dims))
        bias = draws.real((outer * groups,)) if draws.flag() else None
        return called(
            draws.real(_sampled(draws, inner, dims)), weight, bias, [2], [1], [1], groups
        )

    return Case(make, _samples)


def _samples(call: Call) -> Free:
    return {(0, 0)} if len(shape_of(call, 0)) == len(shape_of(call, 1)) else set()


def _pooled(dims: int, *more: Any) -> Case:
    """Of samples of channels, or of channels alone."""

    def make(draws: Draws) -> Arguments:
        return called(draws.real(_sampled(draws, draws.size(), dims)), *more)

    def free(call: Call) -> Free:
        return {(0, d) for d in range(len(shape_of(call, 0)) - dims)}

    return Case(make, free)


def _resized(dims: int, *more: Any) -> Case:
    def make(draws: Draws) -> Arguments:
        shape = (draws.size(), draws.size(), *_space(draws, dims))
        return called(draws.real(shape), None, *more, [2.0] * dims)

    return Case(make, pairs((0, 0), (0, 1)))


def _pads(draws: Draws, count: int) -> list[int]:
    return [draws.pick([0, 0, 1, 2, -1]) for _ in range(2 * count)]


def _pad_constant(draws: Draws) -> Arguments:
    shape = tuple(max(size, 2) for size in draws.shape(1))
    return called(draws.real(shape), _pads(draws, draws.number(0, len(shape))))


def _pad(draws: Draws) -> Arguments:
    if draws.flag():
        return _pad_constant(draws)
    shape = (draws.size(), draws.size(), *_space(draws, 2))
    pads = [draws.number(0, 2) for _ in range(4)]
    return called(draws.real(shape), pads, draws.pick(["reflect", "replicate", "circular"]))


def _pad_free(call: Call) -> Free:
    rank, pads = len(shape_of(call, 0)), list(call["pad"])
    padded = {rank - 1 - i // 2 for i, amount in enumerate(pads) if amount}
    return {(0, d) for d in range(rank) if d not in padded}


def _unfold(draws: Draws) -> Arguments:
    shape = draws.shape(1)
    dim = draws.dim(len(shape))
    return called(draws.real(shape), dim, draws.number(1, shape[dim]), draws.number(1, 2))


def _same(draws: Draws) -> str:
    return draws.pick(["same", "valid"])


def _some(draws: Draws) -> list[int]:
    return [draws.number(0, 1)]


_TABLE: dict[str, Case] = {
    **{f"conv{dims}d.default": _convolution(dims, _some) for dims in (1, 2, 3)},
    **{f"conv{dims}d.padding": _convolution(dims, _same) for dims in (1, 2)},
    "conv_transpose1d.default": _transposed(1),
    "conv_transpose2d.input": _transposed(2),
    "avg_pool1d.default": _pooled(1, [2]),
    "avg_pool2d.default": _pooled(2, [2, 2]),
    "avg_pool3d.default": _pooled(3, [2, 2, 2]),
    "max_pool1d.default": _pooled(1, [2]),
    "max_pool2d.default": _pooled(2, [2, 2]),
    "max_pool2d_with_indices.default": _pooled(2, [2, 2]),
    "max_pool3d_with_indices.default": _pooled(3, [2, 2, 2]),
    "adaptive_max_pool2d.default": _pooled(2, [3, 2]),
    "adaptive_avg_pool1d.default": _pooled(1, [3]),
    "adaptive_avg_pool2d.default": _pooled(2, [3, 2]),
    "upsample_nearest1d.vec": _resized(1),
    "upsample_linear1d.vec": _resized(1, False),
    "upsample_nearest2d.vec": _resized(2),
    "upsample_bilinear2d.vec": _resized(2, False),
    "upsample_bicubic2d.vec": _resized(2, True),
    "pad.default": Case(_pad, _pad_free),
    "constant_pad_nd.default": Case(_pad_constant, _pad_free),
    "unfold.default": Case(_unfold, all_but("dimension"), exact=True),
}
CASES: dict[str, Case] = {f"aten.{name}": case for name, case in _TABLE.items()}
