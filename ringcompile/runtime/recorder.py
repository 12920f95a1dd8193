"""What a rank exchanged last, kept as by a flight recorder for the case that a run ends badly."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

KEPT = 100
_VARIABLE = "RINGCOMPILE_RECORDS"


@dataclass
class Exchanged:
    """One exchange of a rank.

    Attributes:
        kind: shift, wait, or the name of a collective.
        node: the node that asked for it.
        peers: the other ranks that take part.
        num_bytes: what this rank sends.
        started: the time, in seconds since the epoch.
        seconds: how long the rank was held up; None while it still is.
        state: "started", "done" or "failed".
    """

    kind: str
    node: str
    peers: list[int]
    num_bytes: int
    started: float = field(default_factory=time.time)
    seconds: float | None = None
    state: str = "started"

    def end(self, state: str) -> None:
        """Say how it ended."""
        self.state, self.seconds = state, time.time() - self.started


class Recorder:
    """The last exchanges of one rank."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.last: deque[Exchanged] = deque(maxlen=KEPT)

    def begin(self, kind: str, node: str, peers: Sequence[int], num_bytes: int) -> Exchanged:
        """Note that an exchange begins."""
        others = sorted({peer for peer in peers if peer != self.rank})
        exchanged = Exchanged(kind, node, others, num_bytes)
        self.last.append(exchanged)
        return exchanged

    def write(self) -> Path | None:
        """Write them to a file that the next bad end overwrites; its path, None if that failed.

        The folder is what RINGCOMPILE_RECORDS names, or else one in the folder for temporary files
        that only this user can read.
        """
        rows = ",\n".join(json.dumps(asdict(exchanged)) for exchanged in self.last)
        with contextlib.suppress(OSError):
            path = _folder() / f"rank{self.rank}.json"
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
            with open(os.open(path, flags, 0o600), "w") as file:
                file.write(f"[\n{rows}\n]\n")
            return path
        return None


def _folder() -> Path:
    chosen = os.environ.get(_VARIABLE)
    if chosen:
        Path(chosen).mkdir(parents=True, exist_ok=True)
        return Path(chosen)
    folder = Path(tempfile.gettempdir()) / f"ringcompile-records-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not folder.is_dir() or folder.is_symlink() or found.st_uid != os.getuid():
        raise PermissionError(folder)
    return folder
