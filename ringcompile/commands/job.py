"""An artifact run as a job: in this process, on processes of this machine, or under torchrun."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from ringcompile import artifact
from ringcompile.ir.nodes import type_of
from ringcompile.ir.program import Program
from ringcompile.numerics.compare import outputs_by_name
from ringcompile.parallel_program import ParallelProgram
from ringcompile.runtime.batches import deal
from ringcompile.runtime.distributed import Session
from ringcompile.runtime.inprocess import run_lockstep
from ringcompile.runtime.join import JOIN_TIMEOUT, in_job, join_torchrun, pick_backend
from ringcompile.runtime.launcher import LocalRanks
from ringcompile.runtime.outputs import Keep, Summary, combined, shape_of


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
    """

    keep: Keep
    nproc: int | None = None
    backend: str = "auto"
    timeout: float = 300.0
    join_timeout: float = JOIN_TIMEOUT
    compiler: str | None = None
    check_finite: bool = False


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
    """

    ranks: int
    backend: str
    seconds: float
    bytes_sent: list[int]
    outputs: dict[str, str]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


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
    parallel.ensure_verified()
    if in_job():
        return _under_torchrun(parallel, inputs, job)
    if job.backend == "lockstep":
        return _in_lockstep(parallel, inputs, job)
    options: dict[str, Any] = {
        "nproc": job.nproc, "backend": job.backend, "timeout": job.timeout,
        "join_timeout": job.join_timeout, "compiler": job.compiler, "identity": parallel.identity,
        "check_finite": job.check_finite,
    }
    assert parallel.saved is not None
    with LocalRanks(artifact.load, (parallel.saved.folder.path,), **options) as ranks:
        found = ranks.run(inputs, keep=job.keep)
    return RunReport(
        parallel.world_size,
        pick_backend(job.backend, parallel.world_size),
        max(stats.seconds for stats in found.stats),
        [stats.bytes_sent for stats in found.stats],
        described(parallel, inputs, job.keep, [run.summaries for run in found.runs]),
        outputs_by_name(found.outputs),
    )


def _in_lockstep(
    parallel: ParallelProgram, inputs: Mapping[str, torch.Tensor], job: Job
) -> RunReport:
    start = time.perf_counter()
    done = run_lockstep(
        parallel.ranks(), parallel.mesh, parallel.source, inputs, compiler=job.compiler,
        keep=job.keep, check_finite=job.check_finite,
    )
    return RunReport(
        parallel.world_size, job.backend, time.perf_counter() - start, done.bytes_sent,
        described(parallel, inputs, job.keep, done.summaries), outputs_by_name(done.outputs),
    )


def _under_torchrun(
    parallel: ParallelProgram, inputs: Mapping[str, torch.Tensor], job: Job
) -> RunReport | None:
    rank = join_torchrun(
        parallel.mesh, backend=job.backend, timeout=job.timeout, join_timeout=job.join_timeout
    )
    session = Session(
        parallel, rank, check_inputs=True, compiler=job.compiler, check_finite=job.check_finite
    )
    done = session.run(inputs, job.keep)
    everyone = session.everyones_stats(done)
    summaries = session.everyones_summaries(done)
    found = session.assemble(done, job.keep) if job.keep.outputs else None
    if rank.index != 0:
        return None
    return RunReport(
        parallel.world_size,
        dist.get_backend(),
        max(stats.seconds for stats in everyone),
        [stats.bytes_sent for stats in everyone],
        described(parallel, inputs, job.keep, summaries),
        outputs_by_name(found),
    )


def described(
    parallel: ParallelProgram,
    inputs: Mapping[str, torch.Tensor],
    keep: Keep,
    everyones: list[Any],
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

