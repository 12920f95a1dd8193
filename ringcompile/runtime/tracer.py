"""What a rank does when, written down while it runs: every op, transfer, wait, and its memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ringcompile.runtime.clocks import clock_of, offset_to_first
from ringcompile.runtime.collectives import Collective
from ringcompile.runtime.executor import Request, Shift, Wait, Watch
from ringcompile.runtime.join import Rank
from ringcompile.traces.measured import OP, RankTrace
from ringcompile.traces.slices import COMMUNICATION, COMPUTE, WAIT

_PAGE = os.sysconf("SC_PAGE_SIZE")
_STATM = Path("/proc/self/statm")


class Tracer:
    """Writes down one run of a rank.

    Args:
        rank: which.
    """

    def __init__(self, rank: Rank) -> None:
        self.rank = rank
        self._microbatch, self._lengths = 0, dict[str, int]()
        self._clock = clock_of(rank.device)
        self._offset = (0.0, 0.0)
        self._slices: list[tuple[str, str, str, Any, Any, int]] = []
        self._memory: list[tuple[Any, int]] = []
        self._started: dict[str, tuple[Any, Any]] = {}

    def start(self) -> None:
        """Forget what was written down so far, and compare clocks; all ranks call it."""
        self._clock = clock_of(self.rank.device)
        self._offset = offset_to_first(self.rank)
        self._slices, self._memory, self._started = [], [], {}

    def begin(self, microbatch: int, lengths: dict[str, int]) -> None:
        """Say which microbatch comes next, and the values of the program's size symbols."""
        self._microbatch, self._lengths = microbatch, lengths

    def watching(self, inner: Watch | None) -> Watch:
        """What an `Executor` calls in place of every op that does not communicate."""

        def watch(
            node: fx.Node, args: list[Any], kwargs: dict[str, Any], function: Callable[..., Any]
        ) -> Any:
            begin = self._clock.mark()
            if inner is None:
                result = function(*args, **kwargs)
            else:
                result = inner(node, args, kwargs, function)
            # For the last positions alone the last layer is computed by copies of its nodes.
            name = node.meta.get("copy_of", node.name)
            self._add(COMPUTE, name, OP, begin, self._clock.mark())
            self._memory.append((begin, held_bytes(self.rank.device)))
            return result

        return watch

    def answering(self, answer: Callable[[Request], Any]) -> Callable[[Request], Any]:
        """What answers a program's requests, and is timed."""

        def timed(request: Request) -> Any:
            begin = self._clock.mark()
            reply = answer(request)
            end = self._clock.mark()
            match request:
                case Shift():
                    done = self._clock.mark_done(reply.works)
                    self._started[request.node] = (begin, done)
                case Wait():
                    shift = request.handle.shift
                    started, done = self._started.pop(shift.node)
                    self._add(COMPUTE, request.node, WAIT, begin, end)
                    self._add(shift.axis, shift.node, COMMUNICATION, started, done or end)
                case Collective():
                    self._add(COMPUTE, request.node, WAIT, begin, end)
                    self._add(request.axis, request.node, COMMUNICATION, begin, end)
            return reply

        return timed

    def _add(self, track: str, node: str, kind: str, begin: Any, end: Any) -> None:
        self._slices.append((track, node, kind, begin, end, self._microbatch))

    def recorded(self) -> RankTrace:
        """What was written down since `start`."""
        shift, error = self._offset
        seconds = self._clock.seconds
        return RankTrace(
            self.rank.index,
            [(track, node, kind, seconds(begin) + shift, seconds(end) + shift, microbatch)
             for track, node, kind, begin, end, microbatch in self._slices],
            [(seconds(moment) + shift, num_bytes) for moment, num_bytes in self._memory],
            dict(self._lengths), error,
        )


def held_bytes(device: torch.device) -> int:
    """The memory of tensors on a GPU; on a CPU, of the process, as far as the system tells."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        return int(_STATM.read_bytes().split()[1]) * _PAGE
    except OSError:
        return 0
