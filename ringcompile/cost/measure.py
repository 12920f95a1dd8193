"""Measures the figures of a device: kernels at a grid of sizes, on the CPU or a CUDA device.

Times are of the device alone: on CUDA by events, short kernels many at a time in a CUDA graph, so
that the host's share, a figure of its own, stays out of them. Weights are taken in turns from more
memory than caches hold, as in a model, where each is used once a step. On a CPU each call comes
behind a product of some milliseconds, as it would in a program: caches that others use as well have
lost its operands by then, and alone in a loop a short kernel is up to four times as fast. Copies,
of which models have several in a row, come behind one like them. The same product tells how fast
the CPU is; its figures are for the best pace at which it was seen (`pace`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from ringcompile.cost.figures import UNITS
from ringcompile.cost.pace import Pace, product_seconds
from ringcompile.errors import RingCompileError
from ringcompile.ops import kernels

aten = torch.ops.aten
Report = Callable[[str], None]


@dataclass(frozen=True)
class MeasuredSizes:
    """What is measured.

    Attributes:
        rows, widths: matrix products of rows x width x width.
        lengths, head_dims: attention of `heads` heads over equal numbers of queries and keys.
        masked: lengths with a mask, which is a tensor.
        tensors: bytes that pointwise ops read and write.
        cache: bytes that no cache holds.
        sample: the least seconds of one timed sample, on CUDA, and how many are taken.
    """

    rows: tuple[int, ...]
    widths: tuple[int, ...]
    lengths: tuple[int, ...]
    masked: tuple[int, ...]
    head_dims: tuple[int, ...]
    heads: int
    tensors: tuple[int, ...]
    cache: int
    sample: float
    num_samples: int


_KIB, _MIB = 1 << 10, 1 << 20
# What takes longer than this is timed call by call.
_LONG = 5e-3
# On a CPU, what takes longer than this is timed once more.
_VERY_LONG = 60e-3
SIZES = {
    "cuda": MeasuredSizes(
        rows=(16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
        widths=(512, 1024, 2048, 4096, 8192, 16384),
        lengths=(256, 1024, 4096, 16384), masked=(256, 1024, 4096),
        head_dims=(64, 128, 256, 512), heads=16,
        tensors=tuple(_MIB << i for i in range(0, 11, 2)),
        cache=256 * _MIB, sample=1e-3, num_samples=7,
    ),
    "cpu": MeasuredSizes(
        rows=(1, 4, 16, 64, 128, 256, 512, 1024, 2048), widths=(64, 128, 256, 512, 1024, 2048),
        lengths=(16, 64, 256, 512, 1024, 2048), masked=(64, 256, 512, 1024),
        head_dims=(16, 32, 64, 128, 512), heads=8,
        tensors=tuple(4 * _KIB << i for i in range(0, 15, 2)),
        cache=64 * _MIB, sample=2e-3, num_samples=9,
    ),
    "quick": MeasuredSizes(
        rows=(1, 16, 64), widths=(32, 128), lengths=(16, 64), masked=(16,), head_dims=(16, 32),
        heads=2, tensors=(4 * _KIB, 64 * _KIB), cache=_MIB, sample=1e-5, num_samples=2,
    ),
}


@dataclass
class Clock:
    """Times functions on a device.

    Attributes:
        device: where the functions' tensors are.
        sample: the least seconds of one timed sample, on CUDA.
        num_samples: samples; the median counts.
        pace: of a CPU.
    """

    device: torch.device
    sample: float
    num_samples: int
    pace: Pace = field(default_factory=Pace)
    _turn: int = field(default=0, init=False)

    def seconds(self, call: Callable[[int], object], *, in_a_row: bool = False) -> float:
        """The seconds of one call on the device, at a steady pace.

        Args:
            call: gets the number of the call.
            in_a_row: whether, on a CPU, it is timed behind another such call.
        """
        once = min(self._timed(call, 1) for _ in range(3))
        if self.device.type != "cuda":
            return self._steady(call, 1 if once > _VERY_LONG else self.num_samples, in_a_row)
        repeats = max(1, math.ceil(self.sample / max(once, 1e-7)))
        if once < _LONG:  # it may be the host that took so long
            repeats = min(max(repeats, 10), 50)
            graph = self._captured(call, repeats)
            if graph is not None:
                times = [self._timed(lambda _: graph.replay(), 1) for _ in range(self.num_samples)]
                return median(times) / repeats
        if once > 30 * self.sample:
            return min(once, self._timed(call, 1))
        return median(self._timed(call, repeats) for _ in range(self.num_samples))

    def _steady(self, call: Callable[[int], object], count: int, in_a_row: bool) -> float:
        seconds, products = [], [product_seconds(1)]
        for _ in range(count):
            if in_a_row:
                call(self._next())
            seconds.append(self._timed(call, 1))
            products.append(product_seconds(1))
        return self.pace.steady(median(seconds), median(products))

    def _timed(self, call: Callable[[int], object], repeats: int) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            for _ in range(repeats):
                call(self._next())
            return (time.perf_counter() - start) / repeats
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(repeats):
            call(self._next())
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / repeats * 1e-3

    def _captured(
        self, call: Callable[[int], object], repeats: int
    ) -> torch.cuda.CUDAGraph | None:
        """A graph of so many calls, replayed once; None for what cannot be captured."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                for _ in range(repeats):
                    call(self._next())
            graph.replay()
        except RuntimeError:
            torch.cuda.synchronize(self.device)
            return None
        return graph

    def _next(self) -> int:
        self._turn += 1
        return self._turn


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
    clock = Clock(device, sizes.sample, sizes.num_samples)
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
    return {key: _slower(figure, clock.pace.best) for key, figure in made.items()}


def _slower(figure: dict[str, Any], times: float) -> dict[str, Any]:
    """A figure where all takes so many times as long."""
    if times == 1.0:
        return figure
    factor = times if UNITS[figure["unit"]][0] == "second" else 1 / times

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
            weights = torch.randn(num_sets, width, width, dtype=dtype, device=clock.device)
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


def _product(x: torch.Tensor, weights: torch.Tensor) -> Callable[[int], object]:
    return lambda i: F.linear(x, weights[i % len(weights)])


def _attention(
    clock: Clock, dtype: torch.dtype, sizes: MeasuredSizes, kind: str, lengths: tuple[int, ...]
) -> dict[str, Any]:
    """The kernel that `ops.kernels.attend` picks, the FLOPs of what queries see counted."""
    grid = [[_attend(clock, dtype, sizes.heads, head_dim, length, kind) for length in lengths]
            for head_dim in sizes.head_dims]
    axes = {"head_dim": list(sizes.head_dims), "length": list(lengths)}
    return {"value": grid, "unit": "GFLOP/s", "axes": axes}


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


def _two_axes(x: torch.Tensor) -> torch.Tensor:
    """[S, H, 64], as heads are before they are permuted."""
    return x.view(-1, 8, 64)


# Kind -> the call to time on a tensor [rows, 512] and its twin, and how often all bytes of one
# are read and written.
POINTWISE: dict[str, tuple[Callable[[torch.Tensor, torch.Tensor], object], int]] = {
    "stream": (aten.add.Tensor, 3),
    "strided": (lambda x, _: _two_axes(x).permute(1, 0, 2).contiguous(), 2),
    "special": (lambda x, _: aten.gelu.default(x), 2),
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
    seconds = clock.seconds(lambda _: aten.add.Tensor(tiny, tiny), in_a_row=True)
    return {"value": _rounded(seconds * 1e6), "unit": "us"}


def _scan(clock: Clock, sizes: MeasuredSizes) -> dict[str, Any]:
    """A step of a running sum over the rows of [rows, 8], as slots of experts are counted."""
    rows = max(sizes.rows)
    counts = torch.ones(rows, 8, dtype=torch.int64, device=clock.device)
    seconds = clock.seconds(lambda _: aten.cumsum.default(counts, 0))
    return {"value": _rounded(seconds / rows * 1e9), "unit": "ns"}


def _rounded(value: float) -> float:
    """Four digits: more than any measurement here is good for."""
    return float(f"{value:.4g}")
