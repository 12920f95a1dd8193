"""Measures the figures of a device: kernels at a grid of sizes, on the CPU or a CUDA device.

Times are of the device alone: on CUDA by events, short kernels many at a time in a CUDA graph, so
that the host's share, a figure of its own, stays out of them. Weights are taken in turns from more
memory than caches hold, as in a model, where each is used once a step, and they lie in memory as
programs have them. What a call comes behind on a CPU is told in `clock`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from ringcompile.cost.clock import Clock
from ringcompile.cost.figures import UNITS
from ringcompile.errors import RingCompileError
from ringcompile.ops import kernels
from ringcompile.ops.memory_order import column_by_column

Report = Callable[[str], None]


@dataclass(frozen=True)
class MeasuredSizes:
    """What is measured.

    Attributes:
        rows, widths: matrix products of rows x width x width.
        lengths, head_dims: attention of `heads` heads over equal numbers of queries and keys.
        masked: lengths with a mask, which is a tensor.
        cached: lengths of caches that one query reads.
        tensors: bytes that pointwise ops read and write.
        cache: bytes that no cache holds.
        sample: the least seconds of one timed sample, on CUDA.
        num_samples: how many are taken; on a CPU, at most.
    """

    rows: tuple[int, ...]
    widths: tuple[int, ...]
    lengths: tuple[int, ...]
    masked: tuple[int, ...]
    cached: tuple[int, ...]
    head_dims: tuple[int, ...]
    heads: int
    tensors: tuple[int, ...]
    cache: int
    sample: float
    num_samples: int


_KIB, _MIB = 1 << 10, 1 << 20
SIZES = {
    "cuda": MeasuredSizes(
        rows=(16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
        widths=(512, 1024, 2048, 4096, 8192, 16384),
        lengths=(256, 1024, 4096, 16384), masked=(256, 1024, 4096),
        cached=(256, 1024, 4096, 16384, 65536),
        head_dims=(64, 128, 256, 512), heads=16,
        tensors=tuple(_MIB << i for i in range(0, 11, 2)),
        cache=256 * _MIB, sample=1e-3, num_samples=7,
    ),
    "cpu": MeasuredSizes(
        rows=(1, 4, 16, 64, 128, 256, 512, 1024, 2048), widths=(64, 128, 256, 512, 1024, 2048),
        lengths=(16, 64, 256, 1024, 2048), masked=(64, 256, 1024), cached=(16, 64, 256, 1024, 4096),
        head_dims=(16, 32, 64, 128, 512), heads=8,
        tensors=tuple(4 * _KIB << i for i in range(0, 15, 2)),
        cache=64 * _MIB, sample=2e-3, num_samples=9,
    ),
    "quick": MeasuredSizes(
        rows=(1, 16, 64), widths=(32, 128), lengths=(16, 64), masked=(16,), cached=(16, 64),
        head_dims=(16, 32), heads=4, tensors=(4 * _KIB, 64 * _KIB), cache=_MIB, sample=1e-5,
        num_samples=2,
    ),
}


def measure_device(
    device: torch.device, dtype: torch.dtype, sizes: MeasuredSizes, report: Report = lambda _: None
) -> dict[str, dict[str, Any]]:
    """Measure all figures of a device that one process can measure.

    Args:
        device: the CPU or a CUDA device.
        dtype: of matrices, queries, keys, values and tensors.
        sizes: what to measure.
        report: called with the name of each field when it has been measured.

    Returns:
        by field: value, unit and axes; who measured it and when is for the caller to say.
    """
    clock = Clock(device, sizes.sample, sizes.num_samples, sizes.cache)
    name = str(dtype).removeprefix("torch.")
    made: dict[str, dict[str, Any]] = {}
    with torch.no_grad():
        for key, measure in _fields(clock, dtype, sizes):
            try:
                made[key.format(name)] = measure()
                report(key.format(name))
            except (RuntimeError, RingCompileError) as error:  # of one kernel: the others count
                report(f"{key.format(name)} could not be measured: {str(error).splitlines()[0]}")
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return {key: slower(figure, clock.pace.best) for key, figure in made.items()}


def slower(figure: dict[str, Any], times: float) -> dict[str, Any]:
    """A figure where all takes so many times as long; one that is no time or rate stays."""
    factor = {"second": times, "byte/s": 1 / times, "FLOP/s": 1 / times}.get(
        UNITS[figure["unit"]][0], 1.0
    )
    if factor == 1.0:
        return figure

    def of(value: Any) -> Any:
        return [of(one) for one in value] if isinstance(value, list) else _rounded(value * factor)

    return {**figure, "value": of(figure["value"])}


def _fields(
    clock: Clock, dtype: torch.dtype, sizes: MeasuredSizes
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    yield "matmul.{}", partial(_matmul, clock, dtype, sizes)
    for kind, lengths in (("", sizes.lengths), ("_causal", sizes.lengths),
                          ("_masked", sizes.masked)):
        yield f"attention{kind}.{{}}", partial(_attention, clock, dtype, sizes, kind, lengths)
    yield "attention_cached", partial(_cached, clock, dtype, sizes)
    for kind in POINTWISE:
        yield kind, partial(_pointwise, clock, dtype, sizes, kind)
    yield "bandwidth", partial(_bandwidth, clock, sizes)
    yield "launch", partial(_launch, clock, dtype)
    yield "scan", partial(_scan, clock, sizes)


def _matmul(clock: Clock, dtype: torch.dtype, sizes: MeasuredSizes) -> dict[str, Any]:
    """A linear layer without bias, [rows, width] by [width, width]."""
    grid = []
    for rows in sizes.rows:
        line = []
        for width in sizes.widths:
            num_sets = max(2, min(64, sizes.cache // (width * width * dtype.itemsize)))
            x = torch.randn(rows, width, dtype=dtype, device=clock.device)
            weights = [
                column_by_column(torch.randn(width, width, device=clock.device).to(dtype))
                for _ in range(num_sets)
            ]
            seconds = clock.seconds(_product(x, weights))
            line.append(_rounded(2 * rows * width * width / seconds / 1e9))
        grid.append(line)
    axes = {"rows": list(sizes.rows), "width": list(sizes.widths)}
    return {"value": padded(sizes.rows, grid), "unit": "GFLOP/s", "axes": axes}


def padded(rows: Sequence[int], grid: Sequence[Sequence[float]]) -> list[list[float]]:
    """Rates of products such that fewer rows never take longer than more: they could be padded.

    A library may pick a poor kernel for one size, and a sample may catch something else.

    Args:
        rows: increasing.
        grid: for each number of rows the rates at each width.
    """
    made = [list(grid[-1])]
    for fewer, more, line in zip(rows[-2::-1], rows[:0:-1], grid[-2::-1], strict=True):
        least = (rate * fewer / more for rate in made[0])
        made.insert(0, [max(own, _rounded(other)) for own, other in zip(line, least, strict=True)])
    return made


def _product(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> Callable[[int], object]:
    return lambda i: F.linear(x, weights[i % len(weights)])


def _attention(
    clock: Clock, dtype: torch.dtype, sizes: MeasuredSizes, kind: str, lengths: tuple[int, ...]
) -> dict[str, Any]:
    """The kernel that `ops.kernels.attend` picks, the FLOPs of what queries see counted."""
    grid = [[_attend(clock, dtype, _heads(clock, sizes, length), head_dim, length, kind)
             for length in lengths] for head_dim in sizes.head_dims]
    axes = {"head_dim": list(sizes.head_dims), "length": list(lengths)}
    return {"value": grid, "unit": "GFLOP/s", "axes": axes}


def _heads(clock: Clock, sizes: MeasuredSizes, length: int) -> int:
    """On a CPU a core does one head after another: of many keys, few heads tell as much."""
    if clock.device.type == "cuda":
        return sizes.heads
    return max(2, sizes.heads * 256 // max(length, 256))


def _attend(
    clock: Clock, dtype: torch.dtype, heads: int, head_dim: int, length: int, kind: str
) -> float:
    shape = (1, heads, length, head_dim)
    q, k, v = (torch.randn(shape, dtype=dtype, device=clock.device) for _ in range(3))
    causal, mask = kind == "_causal", None
    if kind == "_masked":
        mask = torch.ones(length, length, dtype=torch.bool, device=clock.device).tril_()

    def call(_: int) -> object:
        return kernels.attend(q, k, v, scale=head_dim**-0.5, causal=causal, mask=mask)

    pairs = length * (length + 1) / 2 if causal else length * length
    return _rounded(4 * heads * head_dim * pairs / clock.seconds(call) / 1e9)


def _cached(clock: Clock, dtype: torch.dtype, sizes: MeasuredSizes) -> dict[str, Any]:
    """Bytes of keys and values that one query of four heads for each KV head reads a second."""
    groups, head_dim = max(sizes.heads // 4, 1), 64
    q = torch.randn(1, sizes.heads, 1, head_dim, dtype=dtype, device=clock.device)
    rates, points = [], []
    for length in sizes.cached:
        shape = (1, groups, length, head_dim)
        points.append(2 * groups * length * head_dim * dtype.itemsize)
        pairs = [torch.randn(2, *shape, dtype=dtype, device=clock.device)
                 for _ in range(max(2, min(64, sizes.cache // points[-1])))]
        rates.append(_rounded(points[-1] / clock.seconds(_query(q, pairs)) / 1e9))
    return {"value": rates, "unit": "GB/s", "axes": {"bytes": points}}


def _query(q: torch.Tensor, pairs: Sequence[torch.Tensor]) -> Callable[[int], object]:
    def call(i: int) -> object:
        k, v = pairs[i % len(pairs)]
        return kernels.attend(q, k, v, scale=q.shape[3] ** -0.5)

    return call


def _two_axes(x: torch.Tensor) -> torch.Tensor:
    """[S, H, 64], as heads are before they are permuted."""
    return x.view(-1, 8, 64)


# Kind -> the call to time on a tensor [rows, 512] and its twin, and how often all bytes of one
# are read and written.
POINTWISE: dict[str, tuple[Callable[[torch.Tensor, torch.Tensor], object], int]] = {
    "stream": (torch.add, 3),
    "strided": (lambda x, _: _two_axes(x).permute(1, 0, 2).contiguous(), 2),
    "special": (lambda x, _: F.gelu(x), 2),
    "reduction": (lambda x, y: F.rms_norm(x, (512,), y[0]), 2),
}
_IN_A_ROW = ("strided",)


def _pointwise(clock: Clock, dtype: torch.dtype, sizes: MeasuredSizes, kind: str) -> dict[str, Any]:
    """Bytes read and written a second, by how many they are."""
    function, passes = POINTWISE[kind]
    rates = []
    for num_bytes in sizes.tensors:
        rows = max(1, num_bytes // passes // dtype.itemsize // 512)
        x, y = (torch.randn(rows, 512, dtype=dtype, device=clock.device) for _ in range(2))
        seconds = clock.seconds(_binary(function, x, y), in_a_row=kind in _IN_A_ROW)
        rates.append(_rounded(passes * x.nbytes / seconds / 1e9))
    return {"value": rates, "unit": "GB/s", "axes": {"bytes": list(sizes.tensors)}}


def _binary(
    function: Callable[[torch.Tensor, torch.Tensor], object], x: torch.Tensor, y: torch.Tensor
) -> Callable[[int], object]:
    return lambda _: function(x, y)


def _bandwidth(clock: Clock, sizes: MeasuredSizes) -> dict[str, Any]:
    """A copy of more than caches hold."""
    num_bytes = 4 * sizes.cache
    source = torch.empty(num_bytes, dtype=torch.uint8, device=clock.device).random_()
    target = torch.empty_like(source)
    seconds = clock.seconds(lambda _: target.copy_(source))
    return {"value": _rounded(2 * num_bytes / seconds / 1e9), "unit": "GB/s"}


def _launch(clock: Clock, dtype: torch.dtype) -> dict[str, Any]:
    """An addition of next to nothing."""
    tiny = torch.ones(8, dtype=dtype, device=clock.device)
    seconds = clock.seconds(lambda _: torch.add(tiny, tiny))
    return {"value": _rounded(seconds * 1e6), "unit": "us"}


def _scan(clock: Clock, sizes: MeasuredSizes) -> dict[str, Any]:
    """A step of a running sum over the rows of [rows, 8], as slots of experts are counted."""
    rows = max(sizes.rows)
    counts = torch.ones(rows, 8, dtype=torch.int64, device=clock.device)
    seconds = clock.seconds(lambda _: counts.cumsum(0))
    return {"value": _rounded(seconds / rows * 1e9), "unit": "ns"}


def _rounded(value: float) -> float:
    """Four digits: more than any measurement here is good for."""
    return float(f"{value:.4g}")
