"""What Ctrl-C does to a command: it ends at once, with one line and nothing left behind.

Python's own way, an exception wherever the program happens to be, is a traceback where modules are
still being imported, and the end of the process by `abort` where torch calls Python.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from ringcompile.held import remove_unfinished

EXIT_CODE = 1
_CLEAR = b"\x1b[?25h\r\x1b[2K"  # the cursor again, and nothing in the line that shows progress


@dataclass
class _State:
    """Whether an interrupt has to wait, and whether one does."""

    deferred: int = 0
    pending: bool = False


_state = _State()


def end_on_interrupt() -> None:
    """Let Ctrl-C (SIGINT) end this process: its processes, its unfinished files, then itself."""
    own = os.getpid()

    def end(_signal: int, _frame: FrameType | None) -> None:
        if os.getpid() != own:  # forked from this one, which ends it
            os._exit(EXIT_CODE)
        if _state.deferred:
            _state.pending = True
        else:
            _end()

    # Where the caller ignores it, as a shell does for what runs in the background, it stays so.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, end)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """While inside, Ctrl-C waits: a process that is being started cannot be ended yet."""
    _state.deferred += 1
    try:
        yield
    finally:
        _state.deferred -= 1
        if _state.pending and not _state.deferred:
            _end()


def _end() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _end_children()
    remove_unfinished()
    _say()
    os._exit(EXIT_CODE)


def _end_children() -> None:
    """End the ranks, and the processes that compile plans: some of them ignore Ctrl-C."""
    multiprocessing = sys.modules.get("multiprocessing")
    if multiprocessing is None or "multiprocessing.process" not in sys.modules:
        return
    for child in multiprocessing.active_children():
        with contextlib.suppress(OSError, ValueError, AttributeError):
            child.kill()


def _say() -> None:
    """One line on standard error; of a job's ranks only the first says it."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            os.write(2, (_CLEAR if os.isatty(2) else b"") + b"aborted\n")
