"""How long tokens take: the quantities of vLLM's benchmarks, of requests to a session."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import torch

from ringcompile.generation import stream
from ringcompile.session import Session


@dataclass(frozen=True)
class Latency:
    """When the tokens of a request came.

    Attributes:
        times: seconds from the request to each new token; those of a batch come together.
        batch: sequences of the request.
    """

    times: tuple[float, ...]
    batch: int = 1

    @property
    def ttft(self) -> float:
        """Time to first token, in seconds."""
        return self.times[0]

    @property
    def itl(self) -> list[float]:
        """Inter-token latencies: the seconds between each token and the one before."""
        return [later - before for before, later in pairwise(self.times)]

    @property
    def tpot(self) -> float:
        """Time per output token, the first one excluded: (latency - TTFT) / (N - 1), in seconds."""
        return (self.times[-1] - self.ttft) / (len(self.times) - 1)

    @property
    def tokens_per_second(self) -> float:
        """Output tokens of all sequences over the time of the request."""
        return self.batch * len(self.times) / self.times[-1]


def percentile(values: Sequence[float], percent: int) -> float:
    """Nearest rank: a value that was measured."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


def request(session: Session, ids: torch.Tensor, new_tokens: int) -> Latency:
    """Generate from an empty cache, greedily and without an end token.

    Args:
        session: with a cache.
        ids: int64 [batch, tokens], the prompts.
        new_tokens: how many tokens follow.

    Raises:
        RingCompileError: as `generation.generate`.
    """
    session.reset()
    times, started = [], time.perf_counter()
    for _ in stream(session, ids, new_tokens):
        times.append(time.perf_counter() - started)
    return Latency(tuple(times), len(ids))


def summary(requests: Sequence[Latency]) -> dict[str, float]:
    """Medians over requests of TTFT, TPOT and tokens a second; ITL over all of their tokens.

    Args:
        requests: of two new tokens or more.
    """
    gaps = [seconds for one in requests for seconds in one.itl]
    return {
        "ttft_ms": median(one.ttft for one in requests) * 1e3,
        "tpot_ms": median(one.tpot for one in requests) * 1e3,
        "itl_p50_ms": percentile(gaps, 50) * 1e3,
        "itl_p99_ms": percentile(gaps, 99) * 1e3,
        "tps": median(one.tokens_per_second for one in requests),
    }
