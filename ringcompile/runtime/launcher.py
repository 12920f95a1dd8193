"""Runs a parallel program on processes of this machine, one a rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ringcompile.runtime.batches import deal, whole_outputs
from ringcompile.runtime.data import name_inputs
from ringcompile.runtime.distributed import Parallel, RankRun, Session, Stats
from ringcompile.runtime.join import EXCHANGE_TIMEOUT, Rank, check_world_size
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
    """Whole outputs, nested as the model returned them, and each rank's cost."""

    outputs: Any
    stats: list[Stats]


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
        options: as for `Processes`.

    Raises:
        RingCompileError: what `load` raises; another number of ranks; a rank that did not join.
    """

    def __init__(
        self,
        load: Callable[..., Parallel],
        args: tuple[Any, ...] = (),
        *,
        nproc: int | None = None,
        compiler: str | None = None,
        **options: Any,
    ) -> None:
        parallel = load(*args)
        if nproc is not None:
            check_world_size(parallel.mesh, nproc)
        self.program = parallel.rank(0)
        self.last = parallel.rank(parallel.mesh.world_size - 1)
        super().__init__(parallel.mesh.world_size, **options)
        self.call(_open, load, args, compiler)

    def run(self, inputs: Any, *, timeout: float | None = None) -> LocalRun:
        """Run once on whole inputs: a mapping by name, a sequence in order, or one tensor.

        Raises:
            RingCompileError: inputs that do not fit (the ranks stay), or as `call`.
        """
        whole = name_inputs(self.program, inputs)
        lengths = self.program.bindings(deal(self.program, whole).hands[0][0])
        runs: list[RankRun] = self.call(_run, whole, timeout=timeout)
        outputs = whole_outputs(self.last, [run.microbatches for run in runs], lengths)
        return LocalRun(outputs, [run.stats for run in runs])


def _open(
    rank: Rank, load: Callable[..., Parallel], args: tuple[Any, ...], compiler: str | None
) -> None:
    rank.state = Session(load(*args), rank, compiler=compiler)


def _run(rank: Rank, inputs: Any) -> RankRun:
    return rank.state.run(inputs)
