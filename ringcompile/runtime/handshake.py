"""What the ranks of a job must have in common, compared before the first message.

Ranks on several hosts read several copies of an artifact. Programs of two versions would often
still exchange tensors of the right shapes, and give wrong numbers without a word.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Mapping
from datetime import timedelta
from functools import cache
from importlib import metadata
from typing import Any

import torch
from torch.distributed.distributed_c10d import _get_default_store

from ringcompile.artifact.ops import allowed_ops
from ringcompile.errors import RingCompileError
from ringcompile.runtime.join import Rank, first_line, name_ranks

_POLL = 1.0  # seconds between two looks for what the others say
_LINGER = 2.0  # seconds that rank 0, which may hold the store, waits for the others to read on
_ALL_SAY = "the same artifact"
_COUNT = itertools.count()


def facts_of(identity: str, world_size: int) -> dict[str, str]:
    """What has to be the same on all ranks, by what it is called in a message.

    Args:
        identity: the digest of all that the artifact holds.
        world_size: the number of ranks that the program is for.
    """
    return {
        "artifact": identity,
        "number of ranks": str(world_size),
        "ringcompile": _version(),
        "torch": str(torch.__version__),
        "set of ops": _op_set(),
    }


@cache
def _version() -> str:
    try:
        return metadata.version("ringcompile")
    except metadata.PackageNotFoundError:
        return "unknown"


@cache
def _op_set() -> str:
    return hashlib.sha256(" ".join(sorted(allowed_ops())).encode()).hexdigest()


def agree(rank: Rank, facts: Mapping[str, str]) -> None:
    """Go on where all ranks state the same facts; all ranks have to call it.

    Args:
        rank: this process' place in a job that it has joined.
        facts: from `facts_of`.

    Raises:
        RingCompileError: on every rank: which ranks differ from rank 0, and in what; or a rank did
            not say.
    """
    if rank.world_size == 1:
        return
    talk = _Talk(rank, f"ringcompile/facts/{next(_COUNT)}", rank.timeout)
    try:
        talk.say(facts)
        refusal = talk.compare() if rank.index == 0 else talk.verdict()
    except RuntimeError as error:
        raise RingCompileError(
            f"rank {rank.index} lost the job's store before the first message: {first_line(error)}",
            hint="see what rank 0 reports",
        ) from error
    if refusal:
        talk.linger()
        raise RingCompileError(
            refusal, hint="give all hosts the same copy of the artifact, and the same versions"
        )


class _Talk:
    """One comparison, by way of the job's store."""

    def __init__(self, rank: Rank, key: str, timeout: float) -> None:
        self.rank, self.key, self.timeout = rank, key, timeout
        self.store: Any = _get_default_store()

    def say(self, facts: Mapping[str, str]) -> None:
        self.store.set(f"{self.key}/{self.rank.index}", json.dumps(dict(facts)))

    def compare(self) -> str:
        """Rank 0 compares all others with itself and tells them; empty where all agree."""
        keys = [f"{self.key}/{index}" for index in range(self.rank.world_size)]
        if not self._wait(keys):
            silent = [index for index, key in enumerate(keys) if not self.store.check([key])]
            refusal = (
                f"{name_ranks(silent)} did not say within {self.timeout:g} s which artifact they "
                "run"
            )
        else:
            refusal = _difference([json.loads(self.store.get(key)) for key in keys])
        self.store.set(f"{self.key}/verdict", refusal or _ALL_SAY)
        return refusal

    def verdict(self) -> str:
        """What rank 0 found; empty where all agree."""
        if not self._wait([f"{self.key}/verdict"]):
            return f"rank 0 did not say within {self.timeout:g} s which artifact it runs"
        found = self.store.get(f"{self.key}/verdict").decode()
        self.store.add(f"{self.key}/read", 1)
        return "" if found == _ALL_SAY else str(found)

    def linger(self) -> None:
        """Rank 0 waits until the others know: where it holds the store, that ends with it."""
        deadline = time.monotonic() + _LINGER
        others = self.rank.world_size - 1
        while self.rank.index == 0 and time.monotonic() < deadline:
            if self.store.add(f"{self.key}/read", 0) >= others:
                return
            time.sleep(0.02)

    def _wait(self, keys: list[str]) -> bool:
        deadline = time.monotonic() + self.timeout
        while (left := deadline - time.monotonic()) > 0:
            try:
                self.store.wait(keys, timedelta(seconds=max(0.01, min(_POLL, left))))
            except RuntimeError:
                self.store.check(keys[:1])  # raises where the store itself is gone
                continue
            return True
        return False


def _difference(everyones: list[Mapping[str, str]]) -> str:
    """The first fact that ranks do not share with rank 0; empty where there is none."""
    mine = everyones[0]
    for what, value in mine.items():
        others = [index for index, facts in enumerate(everyones) if facts.get(what) != value]
        if others:
            theirs = str(everyones[others[0]].get(what))
            runs = "runs" if len(others) == 1 else "run"
            return (
                f"{name_ranks(others)} {runs} another {what} than rank 0: {theirs[:16]}, "
                f"rank 0 has {value[:16]}"
            )
    return ""
