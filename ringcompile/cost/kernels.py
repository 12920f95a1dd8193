"""Kernels: their FLOPs and bytes, and the time they take on a device."""

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
    """One kernel launch.

    Attributes:
        kind: a field of a device: "matmul", "attention", "attention_causal", "attention_masked",
            "stream", "strided", "special" or "reduction"; "attention_cached", one query over cached
            keys, bound by memory; "scan", a prefix sum of `rows` steps; or "merge", which folds a
            block into the accumulator, and is free where the attention kernel does it.
        dtype: the dtype of its operands.
        num_bytes: the bytes read and written, each operand and result once.
        flops: the FLOPs of a matmul, or of the visible pairs in attention; pointwise
            arithmetic is not counted.
        rows, inner, columns: the sizes of a matmul; of attention the numbers of queries,
            head_dim and keys; of a merge, `inner` is the head_dim.
        batch: the number of matmuls; of attention, heads times batch.
        parts: of a fused group, the kernels that it stands for; CPUs run these.
        less: of a part of a fused group, what the rest of the group takes by itself, where
            `num_bytes` and `parts` are those of the whole group.
    """

    kind: str
    dtype: torch.dtype
    num_bytes: int
    flops: int = 0
    rows: int = 0
    inner: int = 0
    columns: int = 0
    batch: int = 1
    parts: tuple[Kernel, ...] = ()
    less: Kernel | None = None


@dataclass(frozen=True)
class Time:
    """The time of a kernel and what limits it.

    Attributes:
        seconds: the time on the device.
        bound: "matmul" or "attention" (arithmetic), "weights" (operands of a matmul), "memory"
            (other bytes), "steps" (of a prefix sum, one after another) or "launch" (the kernel is
            too small to be limited by either).
    """

    seconds: float
    bound: str


def time_of(kernel: Kernel, device: Device) -> Time:
    """The time of a kernel: the longest of its arithmetic, its memory traffic and a launch.

    Raises:
        RingCompileError: the device's table does not have what is needed.
    """
    if kernel.less is not None:
        whole = time_of(replace(kernel, less=None), device)
        return Time(max(whole.seconds - time_of(kernel.less, device).seconds, 0.0), whole.bound)
    if kernel.parts and not device.asynchronous:
        return Time(sum(time_of(part, device).seconds for part in kernel.parts), "memory")
    launch = device.value("launch")
    if kernel.kind == "merge":
        if device.asynchronous and kernel.inner in _FOLDING and kernel.dtype in _HALVES:
            return Time(0.0, "memory")
        kernel = replace(kernel, kind="stream")
    if kernel.kind == "matmul":
        times = {"matmul": _matmul(kernel, device),
                 "weights": kernel.num_bytes / device.value("bandwidth")}
    elif kernel.kind == "attention_cached":
        # Keys are divided among all parts of a device, however few queries there are: nothing but
        # memory limits a kernel that reads every key once for a query or a few.
        name = kernel.kind if kernel.kind in device.figures else "bandwidth"
        times = {"memory": kernel.num_bytes / device.get(name)(bytes=kernel.num_bytes)}
    elif kernel.kind.startswith("attention"):
        times = {"attention": _attention(kernel, device),
                 "memory": kernel.num_bytes / device.value("bandwidth")}
    else:
        times = {"memory": _memory(kernel, device)}
        if kernel.kind == "scan":
            times["steps"] = kernel.rows * device.optional("scan")
    bound = max(times, key=lambda name: times[name])
    seconds = times[bound]
    if kernel.kind == "matmul" and _reads_as_measured(kernel, device):
        seconds = times["matmul"]
    return Time(seconds, bound) if seconds >= launch else Time(launch, "launch")


def _reads_as_measured(kernel: Kernel, device: Device) -> bool:
    """Whether the rate of a matmul was measured at so few rows that reading weights is all it does.

    On a CPU, weights are read faster than memory is copied, which is what `bandwidth` tells.
    """
    points = device.get("matmul", kernel.dtype).points("rows")
    return not device.asynchronous and bool(points) and points[0] <= kernel.rows


def _matmul(kernel: Kernel, device: Device) -> float:
    if not kernel.flops:
        return 0.0
    width = sqrt(kernel.inner * kernel.columns)
    return kernel.flops / device.get("matmul", kernel.dtype)(rows=kernel.rows, width=width)


def _attention(kernel: Kernel, device: Device) -> float:
    """The time of attention; with a mask tensor, pairs that are hidden take time as well.

    The rate is that of a square block with as many pairs. On a GPU, fewer rows give fewer tiles.
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
