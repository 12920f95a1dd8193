"""Runs a parallel program on processes of this machine, one a rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ringcompile.errors import RingCompileError
from ringcompile.runtime.batches import deal, whole_outputs
from ringcompile.runtime.data import name_inputs
from ringcompile.runtime.distributed import Parallel, RankRun, Session, Stats
from ringcompile.runtime.join import EXCHANGE_TIMEOUT, Rank, check_world_size
from ringcompile.runtime.outputs import EVERYTHING, Keep
from ringcompile.runtime.processes import Processes


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


@dataclass(frozen=True)
class LocalRun:
    """What a run gave, and what it cost each rank.

    Attributes:
        outputs: whole outputs, nested as the model returns them; None where none were kept.
        stats: one a rank.
        runs: what each rank kept.
    """

    outputs: Any
    stats: list[Stats]
    runs: list[RankRun] = field(default_factory=list)


class LocalRanks(Processes):
    """The ranks of one parallel program, loaded and ready for many runs.

    `run` runs the program. `call` calls a function with each `Rank`, whose `state` is its
    `Session`.

    Args:
        load: a function from a module that can be imported, such as `artifact.load`; this process
            and every rank call it.
        args: its arguments.
        nproc: the number of ranks asked for, if any was: it has to be the mesh's.
        compiler: as for `Session`.
        check_finite: likewise.
        identity: that of the program which the caller has read already, if it has.
        options: as for `Processes`.

    Raises:
        RingCompileError: what `load` raises; another number of ranks; another program than
            the caller's; a rank that did not join.
    """

    def __init__(
        self,
        load: Callable[..., Parallel],
        args: tuple[Any, ...] = (),
        *,
        nproc: int | None = None,
        compiler: str | None = None,
        check_finite: bool = False,
        identity: str | None = None,
        **options: Any,
    ) -> None:
        parallel = load(*args)
        if identity not in (None, parallel.identity):
            raise _replaced()
        if nproc is not None:
            check_world_size(parallel.mesh, nproc)
        self.program = parallel.rank(0)
        self.last = parallel.rank(parallel.mesh.world_size - 1)
        super().__init__(parallel.mesh.world_size, **options)
        theirs = self.call(_open, load, args, compiler, check_finite)
        if theirs[0] != parallel.identity:
            self.kill()
            raise _replaced()

    def run(
        self, inputs: Any, *, timeout: float | None = None, keep: Keep = EVERYTHING,
        whole: bool = True,
    ) -> LocalRun:
        """Run once on whole inputs: a mapping by name, a sequence in order, or one tensor.

        Args:
            inputs: the inputs.
            timeout: as for `call`.
            keep: what is kept of the outputs.
            whole: whether outputs that are kept are put together.

        Raises:
            RingCompileError: inputs that do not fit (the ranks stay), or as `call`.
        """
        named = name_inputs(self.program, inputs)
        dealt = deal(self.program, named)
        runs: list[RankRun] = self.call(_run, named, keep, timeout=timeout)
        outputs = None
        if keep.outputs and whole:
            everyones = [run.microbatches for run in runs]
            outputs = whole_outputs(self.last, everyones, dealt, keep.last)
        return LocalRun(outputs, [run.stats for run in runs], runs)


def _replaced() -> RingCompileError:
    return RingCompileError(
        "the artifact was replaced while the ranks were started", hint="run it again"
    )


def _open(
    rank: Rank,
    load: Callable[..., Parallel],
    args: tuple[Any, ...],
    compiler: str | None,
    check_finite: bool,
) -> str:
    """Make the rank's session; which artifact it is for."""
    parallel = load(*args)
    rank.state = Session(parallel, rank, compiler=compiler, check_finite=check_finite)
    return parallel.identity


def _run(rank: Rank, inputs: Any, keep: Keep) -> RankRun:
    return rank.state.run(inputs, keep)
