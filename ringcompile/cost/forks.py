"""Map a function over items in as many processes as there are usable CPUs.

The processes are forked from this one and share its memory, so only the items and the results are
sent. Where forking is unsafe, the calls are made in this process, one after another.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch

from ringcompile.errors import RingCompileError
from ringcompile.interrupt import deferred
from ringcompile.progress import counted

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

# What processes call; they have it from this process, since graphs are slow to send.
_function: Callable[[Any], Any] | None = None


def mapped(function: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    """Call a function for each item and return the results in the order of the items.

    Args:
        function: any callable; its side effects stay in the process that calls it.
        items: the arguments; they and the results must be picklable.

    Raises:
        RingCompileError: a process was killed.
        Exception: what the function raises.
    """
    global _function
    count = min(_processors(), len(items))
    if count < 2:
        return [function(item) for item in counted("programs", items)]
    outer, _function = _function, function
    try:
        context = multiprocessing.get_context("fork")
        with warnings.catch_warnings():
            # Of threads that a fork does not take along (Python 3.12); see `_start`.
            warnings.filterwarnings("ignore", r"This process .* is multi-threaded")
            with ProcessPoolExecutor(count, context, _start) as pool:
                with deferred():  # until all processes are there
                    results = pool.map(_call, items)
                return [next(results) for _ in counted("programs", items)]
    except BrokenProcessPool as error:
        raise RingCompileError(
            f"one of {count} compiling processes was killed from outside",
            hint="the machine may be out of memory; fewer processors (taskset) need less",
        ) from error
    finally:
        _function = outer


def _processors() -> int:
    """The number of usable CPUs; 1 where forking is unsafe because a thread may hold a lock."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1


def _start() -> None:
    """Ignore interrupts, which the parent handles; torch's threads do not survive a fork."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def _call(item: Any) -> Any:
    assert _function is not None
    return _function(item)
