"""Many trials, in processes of their own: one that dies takes no other with it."""

from __future__ import annotations

import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any, TypeVar

import torch
import transformers

from tests.families.catalogue import FAMILIES
from tests.families.trial import CRASHED, SPEC, Outcome, Trial, try_family

DIED = Outcome(CRASHED, reason="the process died")
T = TypeVar("T")


def sweep(
    names: Sequence[str], jobs: int = 2, seconds: int = 300, spec: str = SPEC
) -> Iterator[Trial]:
    """The trials of these families, in their order."""
    attempt = partial(_trial, spec=spec)
    return each(names, jobs, seconds, attempt, lambda name: Trial(name, DIED))


def each(
    names: Sequence[str], jobs: int, seconds: int, attempt: Callable[[str, int], T],
    died: Callable[[str], T],
) -> Iterator[T]:
    """What becomes of each of these, in their order.

    Args:
        names: of families.
        jobs: how many processes to use.
        seconds: how long an attempt may take.
        attempt: a function of a module, of a name and the seconds.
        died: what is said of an attempt whose process died.
    """
    left = list(names)
    while left:
        with _pool(jobs) as pool:
            futures = [pool.submit(attempt, name, seconds) for name in left]
            for future in futures:
                try:
                    yield future.result()
                except BrokenProcessPool:
                    break
                left = left[1:]
        if left:  # a process died: the next one alone, so that it is known which
            yield _alone(left[0], seconds, attempt, died)
            left = left[1:]


def _alone(name: str, seconds: int, attempt: Any, died: Callable[[str], T]) -> T:
    with _pool(1) as pool:
        try:
            found: T = pool.submit(attempt, name, seconds).result()
        except BrokenProcessPool:
            return died(name)
        return found


def _pool(jobs: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(jobs, context, initializer=quiet)


def quiet() -> None:
    """Nothing but outcomes is printed; one thread."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    # torch prints the whole graph where an export fails; the reason comes as an exception.
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)


def _trial(name: str, seconds: int, spec: str) -> Trial:
    return try_family(FAMILIES[name], seconds, spec)
