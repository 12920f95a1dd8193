"""Runs whole programs in this process: all ranks in lock-step, or one program for one device."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ringcompile.errors import RingCompileError, one_error
from ringcompile.ir.program import Program, WeightSource
from ringcompile.mesh import Mesh
from ringcompile.runtime.data import name_inputs
from ringcompile.runtime.engine import Engine
from ringcompile.runtime.executor import Executor, run_alone
from ringcompile.runtime.lockstep import LockStep
from ringcompile.runtime.memory import peak_bytes
from ringcompile.runtime.outputs import EVERYTHING, Kept
from ringcompile.runtime.runner import OpenWeights, Runner, Settings, computed, read_weights
from ringcompile.runtime.tasks import (
    HasPrograms,
    RankRun,
    Result,
    Stats,
    Task,
    of_kind,
    run_task,
    together,
)


class LockStepRanks:
    """All ranks in this process.

    Args:
        programs: gives a rank's program of a kind.
        mesh: the mesh that the programs were made for.
        source: the weights' data, the same for all ranks.
        settings: how the ranks compute.
        device: where all ranks compute.
        engine: drives the ranks' generators: `LockStep`, or `Queued` as a rehearsal of NCCL.
    """

    reports = True

    def __init__(
        self,
        programs: Callable[[str, int], Program],
        mesh: Mesh,
        source: WeightSource | None,
        settings: Settings | None = None,
        device: torch.device | str = "cpu",
        engine: Callable[[Mesh], Engine[Any]] = LockStep,
    ) -> None:
        self.engine = engine
        self.mesh, self.bytes_sent = mesh, list[int]()
        self.device, self._programs = torch.device(device), programs
        weights, how = OpenWeights(source, self.device), settings or Settings()
        if self.device.type == "cuda":  # ranks take turns: none of them is recorded alone
            how = replace(how, cuda_graphs="off")

        def runner(rank: int) -> Runner:
            return Runner(lambda kind: programs(kind, rank), weights, how)

        self.runners = [runner(rank) for rank in range(mesh.world_size)]

    @classmethod
    def of(cls, parallel: HasPrograms, kinds: Sequence[str], settings: Settings) -> LockStepRanks:
        """The ranks of compiled programs; `kinds` and `settings` as for `JobRanks`."""
        made = cls(lambda kind, rank: of_kind(parallel, kind).rank(rank), parallel.mesh,
                   parallel.source, settings)
        for runner in made.runners:
            for kind in kinds:
                runner.open(kind)
        return made

    @torch.no_grad()
    def answer(self, task: Task) -> Result:
        """See `Driver`; after an error the tokens before the task are still there."""
        before = [runner.length() for runner in self.runners]
        last = self._programs(task.kind, self.mesh.world_size - 1)
        try:
            with one_error("running the program", last.from_file):
                return together(last, task, self._computed(task))
        except BaseException:
            for runner, length in zip(self.runners, before, strict=True):
                runner.rewind(length)
            raise

    def _computed(self, task: Task) -> list[RankRun]:
        prepared = [runner.prepare(task) for runner in self.runners]
        started = time.perf_counter()
        made, self.bytes_sent = self.engine(self.mesh).run(list(map(computed, prepared)))
        seconds, peak = time.perf_counter() - started, peak_bytes(self.device)
        return [
            RankRun(mine.microbatches, mine.dealt, Stats(rank, sent, seconds, 0.0, peak),
                    mine.summaries, notes=self.runners[rank].notes())
            for rank, (mine, sent) in enumerate(zip(made, self.bytes_sent, strict=True))
        ]

    def rewind(self, length: int) -> None:
        """See `Driver`."""
        for runner in self.runners:
            runner.rewind(length)

    def agreed(self, choose: Callable[[], torch.Tensor], batch: int) -> torch.Tensor:
        """See `Driver`: the next task hands them to all ranks."""
        return choose()

    def close(self) -> None:
        """See `Driver`."""
        self.runners = []

    kill = close


def run_lockstep(
    programs: Sequence[Program],
    mesh: Mesh,
    source: WeightSource | None,
    inputs: Any,
    *,
    device: torch.device | str = "cpu",
    check_types: bool = False,
    compiler: str | None = None,
    keep: Kept = EVERYTHING,
    whole: bool = True,
    check_finite: bool = False,
    engine: Callable[[Mesh], Engine[Any]] = LockStep,
) -> Result:
    """Run all ranks once in this process.

    Args:
        programs: of all ranks, in order.
        mesh: the mesh that the programs were made for.
        source: the weights' data, the same for all ranks.
        inputs: whole inputs, by name or in order.
        device: where all ranks compute.
        check_types: see `Settings`.
        compiler: likewise.
        keep: what is kept of the outputs.
        whole: whether outputs that are kept are put together.
        check_finite: see `Settings`.
        engine: see `LockStepRanks`.

    Raises:
        RingCompileError: there is not one program for each rank, or a run fails.
    """
    if len(programs) != mesh.world_size:
        raise RingCompileError(
            f"{len(programs)} programs for a mesh of {mesh.world_size} ranks ({mesh})"
        )
    task = run_task(programs[0], inputs, keep, whole)
    settings = Settings(check_types, compiler, check_finite)
    ranks = LockStepRanks(lambda _, rank: programs[rank], mesh, source, settings, device, engine)
    return ranks.answer(task)


@torch.no_grad()
def run_single(program: Program, source: WeightSource | None, inputs: Any) -> Any:
    """Run a program that was not partitioned, on whole inputs."""
    whole = name_inputs(program, inputs)
    lengths = program.bindings(whole)
    values = read_weights(program, source)
    values.update({p: whole[name] for p, name in program.placeholders.items()})
    return program.output_structure.build(run_alone(Executor(program, lengths), values))
