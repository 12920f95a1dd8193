"""An artifact run as a job: in this process, on processes of this machine, or under torchrun."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from ringcompile.ir.expr import SEQUENCE
from ringcompile.ir.nodes import type_of
from ringcompile.ir.program import Program
from ringcompile.numerics.compare import outputs_by_name
from ringcompile.parallel_program import ParallelProgram
from ringcompile.runtime.batches import deal
from ringcompile.runtime.join import JOIN_TIMEOUT, in_job, pick_backend
from ringcompile.runtime.outputs import Kept, Summary, combined, shape_of
from ringcompile.runtime.reports import slow_rank
from ringcompile.session import Session
from ringcompile.traces.measured import RankTrace, measured
from ringcompile.traces.nodes import Nodes
from ringcompile.traces.slices import Trace


@dataclass(frozen=True)
class Job:
    """How an artifact is run.

    Attributes:
        keep: what is kept of the outputs.
        nproc: the number of processes asked for, if any was: it has to be the mesh's.
        backend: "lockstep", "gloo", "nccl" or "auto".
        timeout: seconds that the run may take.
        join_timeout: seconds that the ranks have to find one another.
        compiler: as for `Executor`.
        check_finite: look for the first NaN or infinity, and compare what ranks exchange; nothing
            is compiled then.
        trace: write down what each rank does when; runs once more before, and nothing is compiled.
    """

    keep: Kept
    nproc: int | None = None
    backend: str = "auto"
    timeout: float = 300.0
    join_timeout: float = JOIN_TIMEOUT
    compiler: str | None = None
    check_finite: bool = False
    trace: bool = False


@dataclass(frozen=True)
class RunReport:
    """What `ringcompile run` prints.

    Attributes:
        ranks: how many.
        backend: what they communicated over.
        seconds: of the slowest rank.
        bytes_sent: by each rank.
        outputs: of every output by name, its dtype, shape, mean and largest magnitude.
        tensors: whole outputs by name, where they are kept.
        traces: what each rank did when, where that was asked for.
        slow: which rank the others waited for; empty where none was much slower.
    """

    ranks: int
    backend: str
    seconds: float
    bytes_sent: list[int]
    outputs: dict[str, str]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    traces: Sequence[RankTrace] = ()
    slow: str = ""


def run_job(
    parallel: ParallelProgram, inputs: Mapping[str, torch.Tensor], job: Job
) -> RunReport | None:
    """Run once on whole inputs; None on ranks of a torchrun job that have nothing to report.

    Args:
        parallel: a loaded artifact.
        inputs: whole inputs by name.
        job: how to run it.

    Raises:
        RingCompileError: a wrong number of ranks, inputs that do not fit, ranks that fail.
    """
    with Session(
        parallel, job.backend, compiler=job.compiler, check_finite=job.check_finite,
        trace=job.trace, nproc=job.nproc, timeout=job.timeout, join_timeout=job.join_timeout,
    ) as session:
        found = session.result(inputs, job.keep)
        if not session.reports:
            return None
    return RunReport(
        parallel.world_size,
        _backend(parallel, job),
        max(stats.seconds for stats in found.stats),
        found.bytes_sent,
        described(parallel, inputs, job.keep, found.summaries),
        outputs_by_name(found.outputs),
        found.traces,
        slow_rank(found.stats),
    )


def _backend(parallel: ParallelProgram, job: Job) -> str:
    """What the ranks communicated over."""
    if in_job() and job.backend != "lockstep":
        return str(dist.get_backend())
    if job.backend == "lockstep":
        return job.backend
    return pick_backend(job.backend, parallel.world_size)


def described(
    parallel: ParallelProgram,
    inputs: Mapping[str, torch.Tensor],
    keep: Kept,
    everyones: Sequence[Sequence[tuple[Summary, ...]]],
) -> dict[str, str]:
    """A line for each output, from what the ranks counted and added up."""
    program = parallel.rank(parallel.world_size - 1)
    lengths = deal(program, inputs).lengths
    found = combined(program, everyones)
    return {
        name: _line(
            str(type_of(node).dtype), shape_of(program, i, lengths, keep.last), summary
        )
        for i, (name, node, summary) in enumerate(
            zip(output_names(program), program.outputs, found, strict=True)
        )
    }


def _line(dtype: str, shape: list[int], summary: Summary) -> str:
    return (
        f"{dtype.removeprefix('torch.')} {shape}, mean {summary.mean:+.6f}, "
        f"largest {summary.largest:.6f}"
    )


def output_dtypes(parallel: ParallelProgram) -> dict[str, torch.dtype]:
    """The dtype of each output by name, in order."""
    program = parallel.rank(parallel.world_size - 1)
    types = [type_of(node).dtype for node in program.outputs]
    return dict(zip(output_names(program), types, strict=True))


def output_names(program: Program) -> list[str]:
    """A name for each output, in order: its path in what the model returns."""
    marks = program.output_structure.build(torch.empty(0) for _ in program.outputs)
    return list(outputs_by_name(marks))


def timeline_of(parallel: ParallelProgram, found: RunReport, name: str) -> tuple[Trace, Nodes]:
    """What the ranks of a traced run did when, and the nodes that it names.

    Args:
        parallel: the artifact that was run.
        found: what its run gave.
        name: the artifact's, for the title.
    """
    nodes = Nodes(parallel.ranks(), [one.lengths for one in found.traces])
    tokens = found.traces[0].lengths.get(SEQUENCE)
    length = f", {tokens} tokens" if tokens else ""
    title = f"{name}: {parallel.mesh}{length}, measured over {found.backend}"
    facts: dict[str, str | float] = {"artifact": parallel.identity}
    return measured(found.traces, nodes, title, facts), nodes
