"""Ranks report that they lost others, so that each can tell who is to blame.

When one rank stops, those that wait for it fail, and those that wait for them. All that still run
report by way of the job's store; the one that does not is the one that was lost.
"""

from __future__ import annotations

import time
from typing import Any

from torch.distributed.distributed_c10d import _get_default_store

from ringcompile.runtime.join import Rank

_WAIT = 0.8  # seconds in which the others fail as well, and say so
_POLL = 0.05


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
