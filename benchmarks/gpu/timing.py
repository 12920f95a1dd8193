"""Medians of what a GPU takes, launches left out; on a CPU of what the call takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

_NUM_REPLAYS = 7


def on_gpu() -> bool:
    """Whether there is a GPU to measure."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """The GPU, or the CPU without one."""
    return torch.device("cuda", 0) if on_gpu() else torch.device("cpu")


def kernel_seconds(
    call: Callable[..., Any], inputs: Sequence[tuple[Any, ...]], *, per_replay: int = 8
) -> float:
    """Median seconds of one call, launched from a recorded CUDA graph.

    Args:
        call: what to measure; on a GPU, something that can be recorded.
        inputs: sets of arguments, taken in turn, so that caches hold no inputs of the next call
            where together they are larger than the caches.
        per_replay: calls between two time stamps.
    """
    for arguments in inputs[:2]:
        call(*arguments)
    if not on_gpu():
        started = time.perf_counter()
        call(*inputs[0])
        return time.perf_counter() - started
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call(*inputs[i % len(inputs)]) for i in range(per_replay)]
    del kept
    return event_seconds(graph.replay) / per_replay


def event_seconds(call: Callable[[], Any], repeats: int = _NUM_REPLAYS) -> float:
    """Median seconds between CUDA events around a call, after one for warming up."""
    call()
    if not on_gpu():
        started = time.perf_counter()
        call()
        return time.perf_counter() - started
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def errors(found: torch.Tensor, want: torch.Tensor) -> tuple[float, float]:
    """Largest difference over the largest number, and RMS of the difference over the RMS."""
    difference = found.double() - want
    largest = float(difference.abs().max() / want.abs().max())
    return largest, float(difference.square().mean().sqrt() / want.square().mean().sqrt())
