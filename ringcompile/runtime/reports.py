"""Who is to blame: ranks that lost others report it, and a rank that others waited for is named.

When one rank stops, those that wait for it fail, and those that wait for them. All that still run
report by way of the job's store; the one that does not is the one that was lost.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from typing import Any

from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed.distributed_c10d import _get_default_store

from ringcompile.runtime.join import Rank, has_store_of_launcher, under_torchrun
from ringcompile.runtime.tasks import Stats

_WAIT = 1.2  # seconds in which the others fail as well, and say so
_SETTLE = 0.3  # seconds for the last one, where all others have said so
_LINGER = 1.0  # seconds for which rank 0, which holds the store, waits for the others to read
_ANSWER = 0.7  # seconds more, after which the store does not answer at all
_SAY = 5.0  # seconds for which a rank that has lost another puts SIGTERM off
_POLL = 0.05
_KEY = "ringcompile/lost"
# A rank is slow that computes for so many times as long as any other, and so many seconds longer.
_TIMES, _SECONDS = 2.0, 0.5


def silent_ranks(rank: Rank) -> set[int]:
    """Report a loss, and give the ranks that do not report one; empty where that cannot be told.

    Where the job's store does not answer, that is the rank that holds it.
    """
    _put_off_termination()
    try:
        store: Any = _get_default_store()
    except (RuntimeError, ValueError):
        return set()
    found: list[set[int]] = []
    # A store whose process is stopped answers never, and torch sets no limit to that.
    asking = threading.Thread(target=lambda: found.append(_silent(store, rank)), daemon=True)
    asking.start()
    asking.join(_WAIT + _ANSWER)
    silent = found[0] if found else _holder(store) - {rank.index}
    if rank.index == 0:
        asking.join(_LINGER)
    return silent


def _silent(store: Any, rank: Rank) -> set[int]:
    try:
        store.set(f"{_KEY}/{rank.index}", "1")
        silent = set(range(rank.world_size)) - {rank.index}
        deadline = time.monotonic() + _WAIT
        while silent and time.monotonic() < deadline:
            silent = {other for other in silent if not store.check([f"{_KEY}/{other}"])}
            if len(silent) == 1:
                deadline = min(deadline, time.monotonic() + _SETTLE)
            time.sleep(_POLL)
        store.add(f"{_KEY}/read", 1)
        if rank.index == 0 and _holder(store):
            _linger(store, rank.world_size - len(silent))
    except (RuntimeError, ValueError):
        return _holder(store) - {rank.index}
    return silent


def _linger(store: Any, readers: int) -> None:
    """The store ends with this process: wait until the others that report have read."""
    deadline = time.monotonic() + _LINGER
    while store.add(f"{_KEY}/read", 0) < readers and time.monotonic() < deadline:
        time.sleep(_POLL)


def _holder(store: Any) -> set[int]:
    """The rank whose process holds the store, if any does."""
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return {0} if isinstance(store, TCPStore) and not has_store_of_launcher() else set()


def _put_off_termination() -> None:
    """Have SIGTERM end this process a little later.

    A launcher sends it to all ranks as soon as it has lost one. It does not know what the others
    waited for; this process does, and ends by itself when it has said so.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or not under_torchrun() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        return

    def later(*_: object) -> None:
        timer = threading.Timer(_SAY, os._exit, (128 + signal.SIGTERM,))
        timer.daemon = True
        timer.start()

    signal.signal(signal.SIGTERM, later)


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
