"""Calls of one function in as many processes as there are processors.

They are forked off this process, so that what it knows need not be sent to them: only what they are
called with and what they return. Where processes cannot be forked safely, the calls are made here.
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

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

# What processes call; they have it from this process, since graphs are slow to send.
_function: Callable[[Any], Any] | None = None


def mapped(function: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    """What a function returns for each of some items, in their order.

    Args:
        function: may hold anything; what it changes stays in the process that calls it.
        items: can be pickled, as can what is returned for them.

    Raises:
        RingCompileError: a process was ended from outside.
        Exception: what the function raises.
    """
    global _function
    count = min(_processors(), len(items))
    if count < 2:
        return [function(item) for item in items]
    outer, _function = _function, function
    try:
        context = multiprocessing.get_context("fork")
        with warnings.catch_warnings():
            # Of threads that a fork does not take along (Python 3.12); see `_start`.
            warnings.filterwarnings("ignore", r"This process .* is multi-threaded")
            with ProcessPoolExecutor(count, context, _start) as pool:
                return list(pool.map(_call, items))
    except BrokenProcessPool as error:
        raise RingCompileError(
            f"one of {count} processes that compile was ended from outside",
            hint="they may have had too little memory; fewer processors (taskset) need less",
        ) from error
    finally:
        _function = outer


def _processors() -> int:
    """That this process may use; one where others may hold locks that a fork would inherit."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1


def _start() -> None:
    """An interrupt is for the parent to see; threads of torch do not outlive a fork."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def _call(item: Any) -> Any:
    assert _function is not None
    return _function(item)
