"""Runs a parallel program on processes of this machine, one a rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ringcompile.errors import RingCompileError
from ringcompile.ir.program import Program
from ringcompile.runtime.batches import deal
from ringcompile.runtime.distributed import answer_task, open_peer, rewind
from ringcompile.runtime.join import EXCHANGE_TIMEOUT, check_world_size
from ringcompile.runtime.outputs import EVERYTHING, Kept
from ringcompile.runtime.processes import Processes
from ringcompile.runtime.runner import Settings
from ringcompile.runtime.tasks import (
    WHOLE,
    HasPrograms,
    RankRun,
    Result,
    Task,
    of_kind,
    run_task,
    together,
)


def launch(
    target: Callable[..., Any],
    nproc: int,
    args: tuple[Any, ...] = (),
    *,
    timeout: float = EXCHANGE_TIMEOUT,
    **options: Any,
) -> list[Any]:
    """Call `target(rank, *args)` once on each of `nproc` joined ranks; their results, in order.

    Args:
        target: a function from a module that can be imported.
        nproc: how many ranks.
        args: what to pass; tensors are handed over at any depth.
        timeout: seconds that the call may take.
        options: as for `Processes`.

    Raises:
        RingCompileError: as a rank raised it; or a rank failed in another way.
    """
    with Processes(nproc, timeout=timeout, **options) as processes:
        return processes.call(target, *args)


class LocalRanks(Processes):
    """The ranks of parallel programs, loaded and ready for many tasks.

    Args:
        load: a function from a module that can be imported, such as `artifact.load`; this process
            and every rank call it.
        args: its arguments.
        kinds: as for `Peer`.
        nproc: the number of ranks asked for, if any was: it has to be the mesh's.
        settings: how the ranks compute.
        identity: that of the program which the caller has read already, if it has.
        options: as for `Processes`.

    Raises:
        RingCompileError: what `load` raises; another number of ranks; another program than
            the caller's; a rank that did not join.
    """

    reports = True

    def __init__(
        self,
        load: Callable[..., HasPrograms],
        args: tuple[Any, ...] = (),
        kinds: Sequence[str] = (WHOLE,),
        *,
        nproc: int | None = None,
        settings: Settings | None = None,
        identity: str | None = None,
        **options: Any,
    ) -> None:
        self.parallel = load(*args)
        if identity not in (None, self.parallel.identity):
            raise _replaced()
        if nproc is not None:
            check_world_size(self.parallel.mesh, nproc)
        self.bytes_sent: list[int] = []
        self._read: dict[tuple[str, int], Program] = {}
        super().__init__(self.parallel.mesh.world_size, **options)
        theirs = self.call(open_peer, load, args, kinds, settings or Settings())
        if theirs[0] != self.parallel.identity:
            self.kill()
            raise _replaced()

    def answer(self, task: Task) -> Result:
        """See `Driver`; after an error the ranks are gone, unless the inputs do not fit."""
        deal(self._program(task.kind, 0), task.inputs)
        runs: list[RankRun] = self.call(answer_task, task)
        found = together(self._program(task.kind, self.num_ranks - 1), task, runs)
        self.bytes_sent = found.bytes_sent
        return found

    def run(self, inputs: Any, *, keep: Kept = EVERYTHING, whole: bool = True) -> Result:
        """Run the program of the whole sequence once: see `run_task`."""
        return self.answer(run_task(self._program(WHOLE, 0), inputs, keep, whole))

    def _program(self, kind: str, rank: int) -> Program:
        """A rank's program, read once: to read it takes longer than to compute a token."""
        key = (kind, rank)
        if key not in self._read:
            self._read[key] = of_kind(self.parallel, kind).rank(rank)
        return self._read[key]

    def rewind(self, length: int) -> None:
        """See `Driver`."""
        self.call(rewind, length)

    def agreed(self, choose: Callable[[], torch.Tensor], batch: int) -> torch.Tensor:
        """See `Driver`: the next task hands them to all ranks."""
        return choose()


def _replaced() -> RingCompileError:
    return RingCompileError(
        "the artifact was replaced while the ranks were started", hint="run it again"
    )
