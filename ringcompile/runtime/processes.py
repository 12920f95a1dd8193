"""Ranks as processes of this machine: started together, called together, ended together.

Whatever happens to a rank reaches the caller as an error, and no process is left behind. The ranks
are forked from a server that has imported torch: 16 of them take about a second and share their
memory. The server itself stays until this process ends, so that the next ranks start faster.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self

import torch

from ringcompile.errors import RingCompileError
from ringcompile.held import scratch
from ringcompile.interrupt import deferred
from ringcompile.runtime.join import (
    EXCHANGE_TIMEOUT,
    JOIN_TIMEOUT,
    missing_ranks,
    name_ranks,
    pick_backend,
)
from ringcompile.runtime.links import connected_pairs
from ringcompile.runtime.transport import pack, unpack
from ringcompile.runtime.worker import Failure, RankCall, RankPlace, Reply, serve

# What every rank needs. torch imports torch._dynamo, more than a second of work, when an op first
# runs on the meta device, as each op of a saved program does.
_PRELOAD = [
    "torch", "torch.distributed", "torch._dynamo", "ringcompile.runtime.launcher",
    "ringcompile.artifact",
]
_GRACE = 1.5  # seconds for the cause to arrive when a consequence was reported first
_WORD = 2.5  # seconds for the others to say what they waited for when a rank has ended
_LEAVE = 5.0  # seconds to leave when asked to


_KILLED_BY = {
    signal.SIGKILL: "SIGKILL is often the system out of memory: use fewer ranks, a shorter "
    "sequence or a smaller dtype",
    signal.SIGTERM: "a person, a scheduler or a time limit sends SIGTERM; ringcompile does not",
}


class Processes:
    """The ranks of one job, kept alive from call to call. Leaving the `with` ends them.

    Args:
        num_ranks: how many.
        backend: `gloo`, `nccl`, or `auto`.
        threads: torch's threads in each rank; by default this process' own are shared out.
        timeout: seconds that one call may take.
        join_timeout: seconds that the ranks have to start and find one another.

    Raises:
        RingCompileError: a rank did not join, or ended.
    """

    def __init__(
        self,
        num_ranks: int,
        *,
        backend: str = "auto",
        threads: int | None = None,
        timeout: float = EXCHANGE_TIMEOUT,
        join_timeout: float = JOIN_TIMEOUT,
    ) -> None:
        self.num_ranks, self.timeout = num_ranks, timeout
        self._scratch = ExitStack()
        self._folder = self._scratch.enter_context(scratch())
        self._processes: list[ForkServerProcess] = []
        self._connections: list[connection.Connection] = []
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(_PRELOAD)
        # The ranks hold the reading end: they see it close, whatever becomes of this process.
        self._lifelines = self._context.Pipe(duplex=False)
        self._num_calls = 0
        try:
            place = RankPlace(
                index=0,
                world_size=num_ranks,
                folder=self._folder,
                backend=pick_backend(backend, num_ranks),
                threads=threads or max(1, torch.get_num_threads() // num_ranks),
                timeout=timeout,
                join_timeout=join_timeout,
                environment=dict(os.environ),
            )
            self._start(place)
            self._collect(join_timeout, missing_ranks)
            self._collect(join_timeout, missing_ranks, _GRACE)
        except BaseException:
            self.kill()
            raise

    def call(
        self, function: Callable[..., Any], *args: Any, timeout: float | None = None
    ) -> list[Any]:
        """Call `function(rank, *args)` in every rank; the ranks' results, in order.

        Arguments and results may hold tensors at any depth. After an error the ranks are gone.

        Args:
            function: from a module that the ranks can import (not from `__main__`).
            args: what to pass.
            timeout: seconds, instead of the job's.

        Raises:
            RingCompileError: as a rank raised it; or a rank failed in another way, was killed, or
                has not answered in time.
        """
        if not self._processes:
            raise RingCompileError("the ranks have ended", hint="start new ones")
        folder = self._folder / f"call{self._num_calls}"
        self._num_calls += 1
        try:
            folder.mkdir()
            self._send(pack(RankCall(function, args, folder), folder, "args"))
            return self._collect(timeout or self.timeout, _unanswered, _GRACE)
        except BaseException:
            self.kill()
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Let the ranks leave; the ones that do not are killed."""
        try:
            for end in self._connections:
                end.close()
            deadline = time.monotonic() + _LEAVE
            for process in self._processes:
                process.join(max(0.0, deadline - time.monotonic()))
        finally:
            self.kill()

    def kill(self) -> None:
        """End the ranks at once and remove what they left."""
        for end in self._lifelines:
            end.close()
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
            process.close()
        for end in self._connections:
            end.close()
        self._processes, self._connections = [], []
        self._scratch.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.kill()

    def _start(self, place: RankPlace) -> None:
        _start_server()
        ends = connected_pairs(self._context, self.num_ranks)
        for index in range(self.num_ranks):
            ours, theirs = self._context.Pipe()
            self._connections.append(ours)
            process = self._context.Process(
                target=serve,
                args=(theirs, self._lifelines[0], replace(place, index=index, ends=ends[index])),
                name=f"ringcompile-rank{index}",
                daemon=True,
            )
            try:
                with _main_hidden(), deferred():
                    process.start()
            except (OSError, EOFError) as error:
                raise RingCompileError(
                    f"cannot start rank {index}: {error}",
                    hint=f"temporary files go to {tempfile.gettempdir()}; its path has to be short "
                    "enough for a socket, and there has to be memory for the processes",
                ) from error
            finally:
                for end in (theirs, *ends[index].values()):
                    end.close()
            self._processes.append(process)

    def _send(self, message: bytes) -> None:
        for index, end in enumerate(self._connections):
            try:
                end.send_bytes(message)
            except OSError as error:
                raise self._ended(index) from error

    def _collect(
        self,
        timeout: float,
        late: Callable[[Sequence[int], float], RingCompileError],
        grace: float = 0.0,
    ) -> list[Any]:
        """Each rank's next answer; raises what the first rank to fail reports.

        A rank that misses another knows more than is known here, so it gets a grace to say so.
        """
        answers: dict[int, Any] = {}
        ended: RingCompileError | None = None
        waiting = dict(zip(self._connections, range(self.num_ranks), strict=True))
        deadline, suspect = time.monotonic() + timeout + grace, None
        while waiting and not (ended and (suspect or not self._num_calls)):
            ready = connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                raise ended or self._late(sorted(waiting.values()), timeout, late, suspect)
            for end in ready:
                index = waiting.pop(end)  # type: ignore[call-overload]
                match self._receive(index):
                    case Reply(value):
                        answers[index] = value
                    case Failure(error, consequence=True):
                        suspect = suspect or error
                        deadline = min(deadline, time.monotonic() + _GRACE)
                    case Failure(error):
                        raise error
                    case None:
                        ended = ended or self._ended(index)
                        deadline = min(deadline, time.monotonic() + _WORD)
        if ended:
            raise _where(ended, suspect)
        if suspect:
            raise suspect
        return [answers[index] for index in range(self.num_ranks)]

    def _late(
        self,
        ranks: list[int],
        timeout: float,
        late: Callable[[Sequence[int], float], RingCompileError],
        suspect: RingCompileError | None,
    ) -> RingCompileError:
        """The error for ranks that do not answer: about those that are stopped, if any are."""
        stopped = [rank for rank in ranks if _is_stopped(self._processes[rank].pid)]
        if not stopped:
            return suspect or late(ranks, timeout)
        return _where(
            RingCompileError(
                late(stopped, timeout).message,
                hint=f"{name_ranks(stopped)} is stopped (SIGSTOP, or a debugger); SIGCONT lets it "
                     "go on",
            ), suspect,
        )

    def _receive(self, index: int) -> Reply | Failure | None:
        """What a rank answers; None where it has ended."""
        try:
            message = unpack(self._connections[index].recv_bytes())
        except (EOFError, OSError):
            return None
        if isinstance(message, Failure):
            message.error.add_note(message.trace)
        return message

    def _ended(self, index: int) -> RingCompileError:
        process = self._processes[index]
        process.join(_LEAVE)
        code = process.exitcode
        if code is not None and code < 0:
            number = signal.Signals(-code)
            return RingCompileError(
                f"rank {index} was killed by {number.name}", hint=_KILLED_BY.get(number)
            )
        return RingCompileError(f"rank {index} ended with exit code {code}")


def _start_server() -> None:
    """Start the server that forks ranks, if it is not there, with Ctrl-C blocked in it and in them.

    The terminal sends it to them, too; a rank that has just been forked would print a traceback.
    """
    resource_tracker.ensure_running()  # first: where it is started, it unblocks Ctrl-C behind it
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _where(error: RingCompileError, suspect: RingCompileError | None) -> RingCompileError:
    """The error about a rank, with the op and the line in which another one waited for it."""
    if suspect is None or suspect.node is None:
        return error
    return RingCompileError(
        f"{error.message} while others waited for it", hint=error.hint,
        location=suspect.location, node=suspect.node,
    )


def _is_stopped(pid: int | None) -> bool:
    """Whether a process exists but does not run, as far as the system tells."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state in ("T", "t")


def _unanswered(ranks: Sequence[int], timeout: float) -> RingCompileError:
    return RingCompileError(
        f"{name_ranks(ranks)} did not answer within {timeout:g} s",
        hint="raise the timeout for long runs; `ringcompile verify` finds ranks that wait "
        "for each other",
    )


@contextmanager
def _main_hidden() -> Iterator[None]:
    """Keep multiprocessing from running the user's script again in every rank.

    It would import `__main__` there, which a script without `if __name__ == "__main__"` does not
    survive; the ranks need nothing from it.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
