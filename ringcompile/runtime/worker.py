"""The life of one local rank's process: join, answer calls, leave, and never outlive the parent."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from ringcompile.errors import RingCompileError, SourceLocation
from ringcompile.runtime.exchange import PeerLostError
from ringcompile.runtime.join import Rank, join_local, leave
from ringcompile.runtime.transport import pack, unpack


@dataclass(frozen=True)
class RankPlace:
    """What a rank's process is told when it starts; `ends` is for `Links`."""

    index: int
    world_size: int
    folder: Path
    backend: str
    threads: int
    timeout: float
    join_timeout: float
    environment: dict[str, str]
    ends: dict[int, Connection] = field(default_factory=dict)


@dataclass(frozen=True)
class RankCall:
    """A function that every rank is to call, as `function(rank, *args)`."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    folder: Path


@dataclass(frozen=True)
class Reply:
    """What a rank returned."""

    value: Any


@dataclass(frozen=True)
class Failure:
    """What a rank raised.

    Attributes:
        error: one of ours, whatever was raised.
        trace: the traceback's text.
        consequence: whether another rank's end may be the cause.
    """

    error: RingCompileError
    trace: str
    consequence: bool


def serve(connection: Connection, lifeline: Connection, place: RankPlace) -> None:
    """Join, then answer calls until the parent hangs up.

    Args:
        connection: where calls come from and answers go; the first two answers say that the
            process has started and that it has joined.
        lifeline: closed by the parent's end, however that comes.
        place: which rank this is.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets Ctrl-C too, and ends the ranks
    threading.Thread(target=_end_with_parent, args=(lifeline, place.folder), daemon=True).start()
    os.dup2(2, 1)  # standard output is the parent's: whatever a rank prints is a message
    os.environ.clear()
    os.environ.update(place.environment)
    torch.set_num_threads(place.threads)
    _send(connection, pack(Reply(None), place.folder, ""))
    try:
        rank = _join(place)
        _send(connection, pack(Reply(None), place.folder, ""))
        while (call := _next_call(connection)) is not None:
            answer = Reply(call.function(rank, *call.args))
            _send(connection, pack(answer, call.folder, f"rank{place.index}"))
            del call, answer
    except BaseException as error:
        _send(connection, pack(_failure(error, place.index), place.folder, ""))
        threading.Event().wait()  # an end now would reach the others before the parent knows why
    leave()


def _send(connection: Connection, message: bytes) -> None:
    """Answer the parent; if it has ended, so does this process, without a word."""
    try:
        connection.send_bytes(message)
    except OSError:
        os._exit(1)


def _join(place: RankPlace) -> Rank:
    return join_local(
        place.index,
        place.world_size,
        place.folder / "store",
        backend=place.backend,
        timeout=place.timeout,
        join_timeout=place.join_timeout,
        ends=place.ends,
    )


def _next_call(connection: Connection) -> RankCall | None:
    try:
        message = connection.recv_bytes()
    except EOFError:
        return None
    return unpack(message)


def _end_with_parent(lifeline: Connection, folder: Path) -> None:
    lifeline.poll(None)
    shutil.rmtree(folder, ignore_errors=True)  # a parent that was killed could not
    os._exit(1)


def _failure(error: BaseException, index: int) -> Failure:
    trace = "".join(traceback.format_exception(error))
    if isinstance(error, RingCompileError):
        return Failure(error, trace, isinstance(error, PeerLostError))
    last = traceback.extract_tb(error.__traceback__)[-1]
    wrapped = RingCompileError(
        f"rank {index} failed: {type(error).__name__}: {error}",
        location=SourceLocation(last.filename, last.lineno or 0),
    )
    # torch.distributed has no class of its own for a connection that broke.
    return Failure(wrapped, trace, consequence=isinstance(error, RuntimeError))
