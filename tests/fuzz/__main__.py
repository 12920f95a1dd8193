"""`python -m tests.fuzz SEED N [--workers W]`: N cases from a seed on.

The exit code is 1 if one of them did what must not be. Cases are independent of each other, so
that any number can be done in pieces: 100,000 are
`for seed in $(seq 0 5000 95000); do python -m tests.fuzz $seed 5000; done`. A count of 1 replays a
single case.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch

from tests.fuzz.case import Verdict, judge
from tests.fuzz.pristine import RECIPES, pristine

_CHUNK = 25  # cases that a worker takes at a time


def judged(seeds: range, workers: int) -> Iterator[Verdict]:
    """The verdicts, in order; workers are forked once everything is imported and compiled."""
    for name in RECIPES:
        pristine(name)
    if workers == 1 or len(seeds) <= _CHUNK:
        yield from map(judge, seeds)
        return
    chunks = [seeds[i : i + _CHUNK] for i in range(0, len(seeds), _CHUNK)]
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, mp_context=fork) as pool:
        for chunk, verdicts in [(chunk, pool.submit(_all, chunk)) for chunk in chunks]:
            try:
                yield from verdicts.result()
            except BrokenProcessPool:
                raise SystemExit(
                    f"a worker died at or soon behind seed {chunk[0]}: replay these one by one"
                ) from None


def _all(seeds: Iterable[int]) -> list[Verdict]:
    return [judge(seed) for seed in seeds]


def main() -> int:
    """Judge the cases that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("seed", type=int)
    parser.add_argument("count", type=int)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    torch.set_num_threads(1)
    outcomes: Counter[str] = Counter()
    failed, slowest, computed, started = 0, 0.0, 0.0, time.time()
    for verdict in judged(range(options.seed, options.seed + options.count), options.workers):
        outcomes["failed" if verdict.failed else verdict.outcome] += 1
        slowest, computed = max(slowest, verdict.seconds), computed + verdict.seconds
        failed += verdict.failed
        if verdict.failed or options.count == 1:
            print(verdict, flush=True)
    print(
        f"{options.count} cases from {options.seed} on: {dict(outcomes)}, slowest {slowest:.2f} s; "
        f"{options.count / computed:.1f} a CPU second, {time.time() - started:.0f} s"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
