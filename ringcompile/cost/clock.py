"""Times functions on a device; on a CPU, at one pace and behind what programs have before a call.

What a call comes behind makes it up to four times as slow as it is alone in a loop: caches have
lost its operands and the code of its kernel. In a program for many tokens a long call comes behind
a product of some milliseconds. In one for a single token all calls are short, and come behind
matmuls of one row, each of which reads more than a core's cache holds. So a short call is timed
behind such a matmul, and a long one behind a product. Copies, of which models have several in a
row, come behind one like them. Products also tell how fast the CPU is (`pace`).

On a CPU no more samples are taken than it needs for them to agree.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
import torch.nn.functional as F

from ringcompile.cost.pace import Pace, product_seconds

# On a GPU, what takes longer than this is timed call by call.
_LONG = 5e-3
# On a CPU, what takes less is short; the first call of a short one takes less than this; and long
# calls are timed again until they took this long in all.
_SHORT, _FIRST, _ENOUGH = 2e-3, 20e-3, 60e-3
# Samples agree where the middle half of at least four lies this close together.
_FEWEST, _CLOSE = 4, 1.05
_SIDES = 512, 640  # of the weight of a matmul of one row: 1.3 MB


@dataclass
class Clock:
    """Times functions on a device.

    Attributes:
        device: where the functions' tensors are.
        sample: the least seconds of one timed sample, on CUDA.
        num_samples: samples, the most on a CPU; the median counts.
        cache: bytes that no cache of a CPU holds.
        pace: of a CPU.
    """

    device: torch.device
    sample: float
    num_samples: int
    cache: int = 0
    pace: Pace = field(default_factory=Pace)
    _turn: int = field(default=0, init=False)
    _weights: list[torch.Tensor] = field(default_factory=list, init=False)

    def seconds(self, call: Callable[[int], object], *, in_a_row: bool = False) -> float:
        """The seconds of one call on the device, at a steady pace.

        Args:
            call: gets the number of the call.
            in_a_row: whether, on a CPU, it is timed behind another such call.
        """
        if self.device.type == "cuda":
            return self._on_cuda(call)
        once, before = self._timed(call, 1), call if in_a_row else None
        if once < _FIRST:  # which takes longer: memory has to be got
            once = self._timed(call, 1)
        return self._short(call, before) if once < _SHORT else self._long(call, before)

    def _short(
        self, call: Callable[[int], object], before: Callable[[int], object] | None
    ) -> float:
        products, samples = [product_seconds(1), product_seconds(1)], list[float]()
        while len(samples) < self.num_samples and not settled(samples):
            self._one_row()
            if before is not None:
                before(self._next())
            samples.append(self._timed(call, 1))
        products += [product_seconds(1), product_seconds(1)]
        # A product takes so long that it may have been interrupted; most short calls were not.
        return self.pace.steady(median(samples), min(products))

    def _long(
        self, call: Callable[[int], object], before: Callable[[int], object] | None
    ) -> float:
        products, samples = [product_seconds(1)], list[float]()
        while len(samples) < self.num_samples and sum(samples) < _ENOUGH and not settled(samples):
            if before is not None:
                before(self._next())
            samples.append(self._timed(call, 1))
            products.append(product_seconds(1))
        return self.pace.steady(median(samples), median(products))

    def _one_row(self) -> None:
        """A matmul of one row with a weight that no cache holds any more."""
        if not self._weights:
            count = max(2, self.cache // (4 * math.prod(_SIDES)))
            self._weights = [torch.randn(_SIDES) for _ in range(count)]
        F.linear(torch.ones(1, _SIDES[1]), self._weights[self._next() % len(self._weights)])

    def _on_cuda(self, call: Callable[[int], object]) -> float:
        once = min(self._timed(call, 1) for _ in range(3))
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


def settled(samples: Sequence[float]) -> bool:
    """Whether the middle half of samples lies so close together that more would tell no more."""
    count = len(samples)
    ordered = sorted(samples)
    return count >= _FEWEST and ordered[-1 - count // 4] <= _CLOSE * ordered[count // 4]
