"""Who is to blame: ranks that lost others report it, and a rank that others waited for is named.

When one rank stops, those that wait for it fail, and those that wait for them. All that still run
report by way of the job's store; the one that does not is the one that was lost.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from torch.distributed.distributed_c10d import _get_default_store

from ringcompile.runtime.join import Rank
from ringcompile.runtime.tasks import Stats

_WAIT = 0.8  # seconds in which the others fail as well, and say so
_POLL = 0.05
# A rank is slow that computes for so many times as long as any other, and so many seconds longer.
_TIMES, _SECONDS = 2.0, 0.5


def silent_ranks(rank: Rank) -> set[int]:
    """Report a loss, and give the ranks that do not report one; empty where that cannot be told."""
    key = "ringcompile/lost"
    try:
        store: Any = _get_default_store()
        store.set(f"{key}/{rank.index}", "1")
        silent = set(range(rank.world_size)) - {rank.index}
        deadline = time.monotonic() + _WAIT
        while silent and time.monotonic() < deadline:
            silent = {other for other in silent if not store.check([f"{key}/{other}"])}
            time.sleep(_POLL)
    except (RuntimeError, ValueError):
        return set()  # the store is gone with the rank that held it
    return silent


def slow_rank(stats: Sequence[Stats]) -> str:
    """The rank that all others waited for, with its time; empty where none is so much slower.

    Args:
        stats: what a task cost each rank.
    """
    busy = sorted((one.seconds - one.wait_seconds, one.rank) for one in stats)
    if len(busy) == 1:
        return ""
    (others, _), (most, rank) = busy[-2:]
    if most < max(_TIMES * others, others + _SECONDS):
        return ""
    return (
        f"rank {rank} computed for {most:.2f} s and every other rank for at most {others:.2f} s, "
        "so they waited for it"
    )
