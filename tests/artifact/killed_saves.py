"""Saves that end at any step that touches files: killed there, or refused by the system.

A step is what Python tells its audit hooks of files: opening, making, renaming, removing. Counting
steps, and not seconds, meets every moment on a machine of any speed, also the one between the two
renames that put a new version in the place of the old one.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ringcompile.errors import RingCompileError
from ringcompile.parallel_program import ParallelProgram
from tests.artifact.support import save_model

_OF_FILES = ("open", "os.")
_MAKE = {"os.mkdir", "os.rename"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Steps:
    """Counts steps while a block runs, and ends one of them."""

    def __init__(self) -> None:
        self.count, self.names = -1, list[str]()
        self.at, self.kills = -1, False
        sys.addaudithook(self._step)

    def _step(self, event: str, args: tuple[Any, ...]) -> None:
        if self.count < 0 or not event.startswith(_OF_FILES):
            return
        makes = event in _MAKE or (event == "open" and bool(args[2] & _WRITING))
        self.names.append(f"{event}, makes" if makes else event)
        self.count += 1
        if self.count - 1 != self.at:
            return
        if self.kills:
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @contextmanager
    def ending(self, at: int, *, kills: bool = False) -> Iterator[None]:
        """The step of this number fails, or kills the process; -1 for none."""
        self.count, self.at, self.kills = 0, at, kills
        self.names.clear()
        try:
            yield
        finally:
            self.count = -1


STEPS = Steps()


def save(parallel: ParallelProgram, folder: Path, count: int) -> None:
    save_model(parallel, folder, overwrite=True, options={"count": count})


def steps_of_a_save(parallel: ParallelProgram, folder: Path) -> list[str]:
    """The steps of a save that is let through; those that need room on the disk end in `makes`."""
    with STEPS.ending(-1):
        save(parallel, folder, 0)
    return list(STEPS.names)


def killed_save(parallel: ParallelProgram, folder: Path, count: int, at: int) -> bool:
    """Save in a process that is killed at a step; whether it was, and not done before."""
    child = os.fork()
    if not child:
        with STEPS.ending(at, kills=True):
            save(parallel, folder, count)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def refused_save(parallel: ParallelProgram, folder: Path, count: int, at: int) -> str:
    """Save where the system refuses a step; what is said, nothing where it does not matter."""
    try:
        with STEPS.ending(at):
            save(parallel, folder, count)
    except RingCompileError as error:
        return error.message
    return ""


def saves_killed_after(parallel: ParallelProgram, folder: Path, seconds: float) -> None:
    """Save again and again in a process that is killed after some seconds, at no step."""
    child = os.fork()
    if not child:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)  # it ends the process as SIGKILL does
        for count in range(10**6):
            save(parallel, folder, count)
    os.waitpid(child, 0)
