"""What a session asks of all ranks at a time, and what it gets back.

A task is answered in the same steps whoever runs the ranks: `Runner` prepares it and computes it,
and a driver (lock-step, local processes, a torchrun job) answers what the rank asks of its peers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeAlias

import torch

from ringcompile.errors import RingCompileError
from ringcompile.ir.program import Program, WeightSource
from ringcompile.mesh import Mesh
from ringcompile.runtime.batches import Deal, whole_outputs
from ringcompile.runtime.data import name_inputs
from ringcompile.runtime.outputs import EVERYTHING, Kept, Summary
from ringcompile.runtime.pieces import Share
from ringcompile.traces.measured import RankTrace

Inputs: TypeAlias = dict[str, torch.Tensor]


class HasPrograms(Protocol):
    """Programs for all ranks, as compiled or as loaded from an artifact."""

    @property
    def mesh(self) -> Mesh:
        """The mesh they are for."""

    def rank(self, rank: int, /) -> Program:
        """The program of one rank."""

    @property
    def source(self) -> WeightSource | None:
        """Where the data of weights comes from."""

    @property
    def identity(self) -> str:
        """A digest of all that the ranks must have in common."""

    @property
    def carried(self) -> HasPrograms | None:
        """The programs for the next tokens of a sequence, if there is a cache."""

    @property
    def prefill(self) -> HasPrograms | None:
        """The programs that divide a prompt among ranks, if there are any."""


@dataclass(frozen=True)
class Opened:
    """The programs of some ranks, whose weights have been read: `HasPrograms` without data."""

    mesh: Mesh
    ranks: Mapping[int, Program]
    identity: str
    source: None = None
    carried: None = None
    prefill: None = None

    def rank(self, rank: int, /) -> Program:
        """The program of one of these ranks."""
        return self.ranks[rank]


# The kinds of programs that an artifact may hold.
WHOLE, CARRIED, PREFILL = "whole", "carried", "prefill"
_OF_KIND: dict[str, Callable[[HasPrograms], HasPrograms | None]] = {
    WHOLE: lambda parallel: parallel,
    CARRIED: lambda parallel: parallel.carried,
    PREFILL: lambda parallel: parallel.prefill,
}


def of_kind(parallel: HasPrograms, kind: str) -> HasPrograms:
    """The programs of a kind.

    Raises:
        RingCompileError: there are none.
    """
    found = _OF_KIND[kind](parallel)
    if found is None:
        raise RingCompileError(
            "the program was compiled without a cache",
            hint="pass cache=N to transform, or --cache N on the command line",
        )
    return found


@dataclass(frozen=True)
class Run:
    """Run the program of the whole sequence once.

    Attributes:
        inputs: whole inputs by name.
        keep: what is kept of the outputs.
        whole: whether outputs that are kept are put together.
    """

    kind: ClassVar[str] = WHOLE
    inputs: Inputs
    keep: Kept = EVERYTHING
    whole: bool = True


@dataclass(frozen=True)
class Extend:
    """Take in the next tokens of the sequences, and give what the model returns for them.

    Attributes:
        inputs: whole inputs by name, for the new tokens only.
        new: how many tokens are new.
        last: whether outputs of the last new token alone are wanted.
    """

    kind: ClassVar[str] = CARRIED
    keep: ClassVar[Kept] = EVERYTHING
    whole: ClassVar[bool] = True
    inputs: Inputs
    new: int
    last: bool = False


@dataclass(frozen=True)
class Prompt:
    """Take in the first tokens of the sequences, each rank its share of them; without outputs.

    Attributes:
        inputs: whole inputs by name.
        new: how many tokens they have.
    """

    kind: ClassVar[str] = PREFILL
    keep: ClassVar[Kept] = Kept(outputs=False)
    whole: ClassVar[bool] = False
    inputs: Inputs
    new: int


Task: TypeAlias = Run | Extend | Prompt


@dataclass(frozen=True)
class Stats:
    """What one task cost a rank.

    Attributes:
        rank: the rank.
        bytes_sent: bytes handed to other ranks by the program's transfers.
        seconds: from the rank's share of the inputs to its outputs; in lock-step, of all ranks
            together.
        wait_seconds: the part of it spent waiting for others (on the host: near zero with NCCL).
        peak_bytes: the process' largest resident memory so far; with CUDA, of device memory.
    """

    rank: int
    bytes_sent: int
    seconds: float
    wait_seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class RankRun:
    """What one rank has of the answer to a task.

    Attributes:
        microbatches: of each microbatch, its share of every output; () on the ranks of pipeline
            stages that return nothing.
        dealt: how the batch was dealt out, and the lengths of the outputs.
        stats: what it cost.
        summaries: of each microbatch, of its share of every output, if they are kept.
        trace: what it did when, if that was written down.
        handed: in place of `microbatches`, the same in pieces, for another process that puts whole
            outputs together. They are gone once it has.
        notes: what the user should know.
    """

    microbatches: tuple[tuple[torch.Tensor, ...], ...]
    dealt: Deal
    stats: Stats
    summaries: tuple[tuple[Summary, ...], ...] = ()
    trace: RankTrace | None = None
    handed: tuple[tuple[Share, ...], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def outputs(self) -> tuple[torch.Tensor, ...]:
        """Its share of every output of the first microbatch."""
        return self.microbatches[0]


@dataclass(frozen=True)
class Result:
    """The answer to a task.

    Attributes:
        outputs: whole outputs, nested as the model returns them; None where they are not kept, and
            on the later ranks of a torchrun job.
        runs: what each rank has; in a torchrun job, what this process has.
        stats: what it cost each rank; likewise, unless summaries are kept.
        summaries: for each rank, of each of its microbatches, of every output, if they are kept.
        traces: what each rank did when, if that was written down.
    """

    outputs: Any
    runs: list[RankRun]
    stats: list[Stats]
    summaries: Sequence[Sequence[tuple[Summary, ...]]]
    traces: Sequence[RankTrace] = ()

    @property
    def dealt(self) -> Deal:
        """How the batch was dealt out."""
        return self.runs[0].dealt

    @property
    def bytes_sent(self) -> list[int]:
        """The bytes that each rank sent."""
        return [stats.bytes_sent for stats in self.stats]

    @property
    def microbatches(self) -> list[tuple[tuple[torch.Tensor, ...], ...]]:
        """For each rank, of each of its microbatches, its share of every output."""
        return [run.microbatches for run in self.runs]

    @property
    def shares(self) -> list[tuple[torch.Tensor, ...]]:
        """Each rank's share of every output, of its first microbatch."""
        return [run.outputs for run in self.runs]


def together(last: Program, task: Task, runs: list[RankRun]) -> Result:
    """The answer, from what all ranks have.

    Args:
        last: the program of the last rank, which is one of the last stage.
        task: what was asked.
        runs: of all ranks.
    """
    outputs = None
    if task.keep.outputs and task.whole:
        everyones = [run.handed or run.microbatches for run in runs]
        outputs = whole_outputs(last, everyones, runs[0].dealt, task.keep.last)
    traces = [run.trace for run in runs if run.trace is not None]
    return Result(
        outputs, runs, [run.stats for run in runs], [run.summaries for run in runs], traces
    )


class Driver(Protocol):
    """Runs all ranks of a program."""

    def answer(self, task: Task) -> Result:
        """Let all ranks do a task.

        Raises:
            RingCompileError: a rank failed, or was lost.
        """

    def rewind(self, length: int) -> None:
        """Forget the tokens from position `length` on."""

    def agreed(self, choose: Callable[[], torch.Tensor], batch: int) -> torch.Tensor:
        """The tokens [batch] that are chosen once, for all ranks."""

    @property
    def reports(self) -> bool:
        """Whether this process has the outputs: all but the later ranks of a torchrun job."""

    def close(self) -> None:
        """Let the ranks end, or let go of what they keep."""

    def kill(self) -> None:
        """The same at once, whatever the ranks are doing."""


def run_task(program: Program, inputs: Any, keep: Kept = EVERYTHING, whole: bool = True) -> Run:
    """The task of running once on inputs: a mapping by name, a sequence in order, or one tensor.

    Raises:
        RingCompileError: inputs that do not fit the program.
    """
    return Run(name_inputs(program, inputs), keep, whole)
