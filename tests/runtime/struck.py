"""One rank of a job, or a job's parent, in which something happens to a rank at a chosen moment.

`python -m tests.runtime.struck PLAN`: a plan is JSON, see `Plan`. The rank that is struck does it
to itself, so that the moment is exact: before it joins, when it has checked in and the others wait
for it, in the middle of a run's exchanges, or in the middle of a decoding step's.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ringcompile import compiler
from ringcompile.errors import RingCompileError
from ringcompile.runtime import join
from ringcompile.runtime.join import Rank
from ringcompile.session import Session
from tests.runtime import struck

STARTS = ("local", "torchrun", "plain")
FAULTS = ("SIGKILL", "SIGTERM", "SIGSTOP", "socket", "packets")
MOMENTS = ("start", "join", "run", "decode")
_CALLS, _AFTER = 3, 5  # the call that is struck, and the exchanges of it that still succeed


@dataclass(frozen=True)
class Plan:
    """What happens.

    Attributes:
        artifact: its folder.
        start: one of STARTS.
        fault: one of FAULTS.
        moment: one of MOMENTS.
        victim: the rank that is struck.
        notes: a folder: `rankN` holds process ids, `struck` the time, and
            `saidN` when a process says what went wrong.
        timeout: seconds, of exchanges.
        join_timeout: seconds.
        cut: a command that drops all packets between the hosts.
    """

    artifact: str
    start: str
    fault: str
    moment: str
    victim: int
    notes: str
    timeout: float = 300.0
    join_timeout: float = 300.0
    cut: tuple[str, ...] = ()

    def to_json(self) -> str:
        """For the command line."""
        return json.dumps(asdict(self))

    def note_rank(self, index: int) -> None:
        """Write down that this process is a rank."""
        (Path(self.notes) / f"rank{index}").write_text(str(os.getpid()))

    def strike(self, pid: int | None = None) -> None:
        """Do to a process, this one by default, what is planned."""
        (Path(self.notes) / "struck").write_text(str(time.time()))
        if self.fault == "socket":
            _close_sockets()
        elif self.fault == "packets":
            subprocess.run(self.cut, shell=False, check=True)
        else:
            os.kill(pid or os.getpid(), signal.Signals[self.fault])


def _close_sockets() -> None:
    """Break this process' connections to other ranks."""
    for name in os.listdir("/proc/self/fd"):
        try:
            with socket.socket(fileno=os.dup(int(name))) as found:
                if found.family in (socket.AF_INET, socket.AF_INET6) and found.getpeername():
                    found.shutdown(socket.SHUT_RDWR)
        except OSError:
            continue  # no socket, one that listens, or one that is closed by now


def _arm(exchange: Any, plan: Plan) -> None:
    """Strike after so many exchanges from now on."""
    answer, left = exchange.answer, [_AFTER]

    def counted(request: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            plan.strike()
        return answer(request)

    exchange.answer = counted


def arm(rank: Rank, plan: Plan) -> None:
    """Called on every local rank: note who it is, and strike in the next call if it is the one."""
    plan.note_rank(rank.index)
    if rank.index == plan.victim:
        _arm(rank.state.exchange, plan)


def _work(plan: Plan, session: Session) -> None:
    """Calls without end, of which one is struck."""
    ids = torch.arange(16)[None] % 7
    for call in range(200):
        if call == _CALLS and plan.moment in ("run", "decode"):
            driver: Any = session.driver
            if plan.start == "local":
                driver.call(arm, plan)
            elif driver.peer.rank.index == plan.victim:
                _arm(driver.peer.exchange, plan)
        if plan.moment == "decode":
            session.extend(ids if call == 0 else ids[:, :1])
        else:
            session.run(ids)


def _early(plan: Plan) -> None:
    """Have the rank struck before it has joined, if that is planned."""
    if plan.moment == "start":
        plan.strike()
    elif plan.moment == "join":
        former: Callable[..., Any] = dist.init_process_group

        def struck(*args: Any, **options: Any) -> Any:
            plan.strike()
            return former(*args, **options)

        join.dist.init_process_group = struck  # type: ignore[assignment]


def _early_local(plan: Plan) -> None:
    """Likewise, for a rank that this process starts: at once, or while the others wait for it."""
    former = ForkServerProcess.start

    def start(process: ForkServerProcess) -> None:
        former(process)
        index = int(process.name.removeprefix("ringcompile-rank"))
        (Path(plan.notes) / f"rank{index}").write_text(str(process.pid))
        if index != plan.victim:
            return
        if plan.moment == "join":
            os.kill(process.pid or 0, signal.SIGSTOP)
            if os.fork() == 0:
                time.sleep(1.5)
                plan.strike(process.pid)
                if plan.fault == "SIGTERM":  # which a stopped process takes when it goes on
                    os.kill(process.pid or 0, signal.SIGCONT)
                os._exit(0)
        elif plan.moment == "start":
            plan.strike(process.pid)

    ForkServerProcess.start = start  # type: ignore[method-assign]


def main() -> None:
    """Be a rank, or start some; what fails is said as on the command line."""
    data = json.loads(sys.argv[1])
    plan = Plan(**{**data, "cut": tuple(data["cut"])})
    torch.set_num_threads(1)
    try:
        if plan.start == "local":
            _early_local(plan)
        else:
            index = int(os.environ["RANK"])
            plan.note_rank(index)
            if index == plan.victim:
                _early(plan)
        made = compiler.load(plan.artifact)
        with Session(
            made, "gloo", threads=1, timeout=plan.timeout, join_timeout=plan.join_timeout
        ) as session:
            _work(plan, session)
    except RingCompileError as error:
        (Path(plan.notes) / f"said{os.environ.get('RANK', '')}").write_text(str(time.time()))
        print(str(error), file=sys.stderr, flush=True)
        sys.exit(1)


if __name__ == "__main__":
    struck.main()  # by the module's own name, under which local ranks find `arm`
