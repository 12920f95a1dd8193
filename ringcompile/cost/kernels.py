"""A kernel: what it computes and moves, and the seconds that takes on a device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import sqrt

import torch

from ringcompile.cost.hardware import Device

# Our own kernels, for these head dims and half precision, work on the accumulator itself; see
# `ops/kernels/custom.py`.
_FOLDING = range(257, 513)
_HALVES = (torch.float16, torch.bfloat16)
# Attention is measured with so many heads. A GPU has work for all of its parts from so many rows
# of queries on, over all heads: a tile of 64 for each of about 128 multiprocessors.
_HEADS, _FULL = 16, 64 * 128


@dataclass(frozen=True)
class Kernel:
    """One launch.

    Attributes:
        kind: a field of a device: "matmul", "attention", "attention_causal", "attention_masked",
            "stream", "strided", "special" or "reduction"; "scan", a running sum of `rows` steps;
            or "merge", bringing a block into the accumulator, which is nothing where the attention
            kernel does it.
        dtype: of its operands.
        num_bytes: read and written, each operand and result once.
        flops: multiplications and additions in matrix products, of visible pairs in attention;
            what pointwise ops compute is not counted.
        rows, inner, columns: of a matrix product; queries, head_dim, keys of attention; of a
            merge, `inner` is the head_dim.
        batch: matrix products side by side; heads, over the batch, of attention.
    """

    kind: str
    dtype: torch.dtype
    num_bytes: int
    flops: int = 0
    rows: int = 0
    inner: int = 0
    columns: int = 0
    batch: int = 1


@dataclass(frozen=True)
class Time:
    """Seconds of a kernel, and what they are spent on.

    Attributes:
        seconds: on the device.
        bound: "matmul" or "attention" (arithmetic), "weights" (operands of a product), "memory"
            (other bytes), "steps" (one after the other, of a running sum) or "launch" (neither: it
            is too small).
    """

    seconds: float
    bound: str


def time_of(kernel: Kernel, device: Device) -> Time:
    """The seconds of a kernel: of arithmetic, of memory, or of a launch, whichever is longest.

    Raises:
        RingCompileError: the device's table does not have what is needed.
    """
    launch = device.value("launch")
    if kernel.kind == "merge":
        if device.asynchronous and kernel.inner in _FOLDING and kernel.dtype in _HALVES:
            return Time(0.0, "memory")
        kernel = replace(kernel, kind="stream")
    if kernel.kind == "matmul":
        times = {"matmul": _matmul(kernel, device),
                 "weights": kernel.num_bytes / device.value("bandwidth")}
    elif kernel.kind.startswith("attention"):
        times = {"attention": _attention(kernel, device),
                 "memory": kernel.num_bytes / device.value("bandwidth")}
    else:
        times = {"memory": _memory(kernel, device)}
        if kernel.kind == "scan":
            times["steps"] = kernel.rows * device.optional("scan")
    bound = max(times, key=lambda name: times[name])
    if times[bound] < launch:
        return Time(launch, "launch")
    return Time(times[bound], bound)


def _matmul(kernel: Kernel, device: Device) -> float:
    if not kernel.flops:
        return 0.0
    width = sqrt(kernel.inner * kernel.columns)
    return kernel.flops / device.get("matmul", kernel.dtype)(rows=kernel.rows, width=width)


def _attention(kernel: Kernel, device: Device) -> float:
    """With a mask, all pairs are gone through, whether they are visible or not.

    The rate is that of as many pairs in a square, but on a GPU fewer rows are fewer tiles of work.
    """
    masked = kernel.kind == "attention_masked"
    pairs = kernel.batch * kernel.rows * kernel.columns
    flops = 4 * kernel.inner * pairs if masked else kernel.flops
    if not flops:
        return 0.0
    figure = device.get(kernel.kind, kernel.dtype)
    length = sqrt(kernel.rows * kernel.columns)
    rate = figure(head_dim=kernel.inner, length=length)
    points = figure.points("length")
    if device.asynchronous and points:
        measured = max(length, points[0])
        rate *= min(kernel.rows * kernel.batch / _FULL, 1) / min(_HEADS * measured / _FULL, 1)
    return flops / rate


def _memory(kernel: Kernel, device: Device) -> float:
    if not kernel.num_bytes:
        return 0.0
    kind = "reduction" if kernel.kind == "scan" else kernel.kind
    return kernel.num_bytes / device.get(kind, kernel.dtype)(bytes=kernel.num_bytes)
