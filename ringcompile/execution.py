"""Running and checking what was compiled: in this process, on local processes, under torchrun."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ringcompile import artifact
from ringcompile.compiler import recorded_model
from ringcompile.errors import RingCompileError
from ringcompile.held import scratch
from ringcompile.ir.communication import SHIFT
from ringcompile.ir.expr import BATCH, SEQUENCE, bind
from ringcompile.ir.nodes import type_of
from ringcompile.ir.program import Program
from ringcompile.numerics.check import Comparison, Numerics, Request
from ringcompile.numerics.files import read_input_file
from ringcompile.options import BACKENDS, TRIES
from ringcompile.parallel_program import ParallelProgram
from ringcompile.runtime.batches import joined
from ringcompile.runtime.data import name_inputs
from ringcompile.runtime.distributed import Session
from ringcompile.runtime.inprocess import run_lockstep
from ringcompile.runtime.join import in_job, join_torchrun
from ringcompile.runtime.launcher import LocalRanks, LocalRun
from ringcompile.runtime.outputs import Keep, positions_of

# What becomes of a run's outputs.
OUTPUTS = ("whole", "local")


@dataclass(frozen=True)
class Verification:
    """What was checked; ranks that do not fit together are an error instead."""

    ranks: int
    transfers: int
    numerics: tuple[Numerics, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.ranks} ranks fit together, {self.transfers} transfers"]
        lines += [
            f"length {row.length}: largest difference {row.difference:.2e} (allowed "
            f"{row.allowed:.0e})" for row in self.numerics
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    @property
    def passed(self) -> bool:
        """Whether every difference is within what is allowed; true if no numbers were compared."""
        return not self.wrong

    @property
    def wrong(self) -> str:
        """What differs, where, and how to see it again; empty where nothing does."""
        return next((row.wrong for row in self.numerics if row.wrong), "")


@dataclass(frozen=True)
class Share:
    """What one rank has of the outputs of a run.

    Attributes:
        rank: the rank.
        outputs: its share of every output, nested as the model returns them; () on the ranks of
            pipeline stages that return nothing.
        positions: for every output, nested likewise, where in the sequence its rows stand (int64);
            rows whose position is not below the length of the sequence are padding. None for an
            output without a dim of the sequence.
    """

    rank: int
    outputs: Any
    positions: Any


def run(
    parallel: ParallelProgram,
    inputs: Any,
    *,
    backend: str = "lockstep",
    last: int | None = None,
    outputs: str = "whole",
) -> Any:
    """Run once on whole inputs.

    Args:
        parallel: what `transform` or `load` returned.
        inputs: by name, or in order.
        backend: "lockstep" (all ranks in this process), "gloo" or "nccl" (a process for each). In a
            job of torchrun's, or where a process group is initialised, this process is one of its
            ranks, and all ranks call `run` with the same inputs.
        last: compute outputs for so many last positions of the sequence only; hidden states of
            other positions do not go through the head.
        outputs: "whole" puts outputs together; "local" leaves each rank its share.

    Returns:
        whole outputs, nested as the model returns them; with "local" a list with a `Share` for each
        rank. In a job rank 0 has whole outputs and other ranks None; with "local" each rank has a
        list with its own `Share`.

    Raises:
        RingCompileError: inputs that do not fit, or ranks that fail or do not join.
    """
    check_choice("backend", backend, BACKENDS)
    check_choice("form of outputs", outputs, OUTPUTS)
    if last is not None and last < 1:
        raise RingCompileError(f"last={last}: it must be at least 1")
    parallel.ensure_verified()
    keep, whole = Keep(last), outputs == "whole"
    if backend != "lockstep" and in_job():
        return _in_job(parallel, inputs, backend, keep, whole)
    if backend == "lockstep":
        done = run_lockstep(
            parallel.ranks(), parallel.mesh, parallel.source, inputs, keep=keep, whole=whole
        )
        found, runs, dealt = done.outputs, done.microbatches, done.dealt
    else:
        local = _on_processes(parallel, inputs, backend, keep, whole)
        found, runs = local.outputs, [run.microbatches for run in local.runs]
        dealt = local.runs[0].dealt
    if whole:
        return found
    return [
        share_of_rank(program, rank, runs[rank], dealt.lengths, last)
        for rank, program in enumerate(parallel.ranks())
    ]


def check_choice(what: str, value: str, known: Sequence[str]) -> None:
    """Raise RingCompileError for a value that is none of those there are."""
    if value not in known:
        raise RingCompileError(f"unknown {what} '{value}'", hint=f"one of: {', '.join(known)}")


def share_of_rank(
    program: Program, rank: int, runs: Any, lengths: dict[str, int], last: int | None = None
) -> Share:
    """What a rank has of the outputs of a run.

    Args:
        program: that rank's.
        rank: which.
        runs: its share of every output, of each of its microbatches.
        lengths: of the run.
        last: the number of last positions that were kept; None for all.
    """
    rows = [positions_of(program, type_of(node), lengths, last) for node in program.outputs]
    if not program.outputs:
        return Share(rank, (), ())
    build = program.output_structure.build
    return Share(rank, build(joined(program, runs, lengths)), build(rows))


def _in_job(
    parallel: ParallelProgram, inputs: Any, backend: str, keep: Keep, whole: bool
) -> Any:
    """This rank's part of a run in the job that it is in."""
    rank = join_torchrun(parallel.mesh, backend=backend)
    session = Session(parallel, rank, check_inputs=True)
    done = session.run(inputs, keep)
    if whole:
        return session.assemble(done, keep)
    runs, lengths = done.microbatches, done.dealt.lengths
    return [share_of_rank(session.program, rank.index, runs, lengths, keep.last)]


def _on_processes(
    parallel: ParallelProgram, inputs: Any, backend: str, keep: Keep, whole: bool
) -> LocalRun:
    with contextlib.ExitStack() as stack:
        if parallel.saved is None:
            folder = stack.enter_context(scratch()) / "program"
            parallel.save(folder)
        else:
            folder = parallel.saved.folder.path
        identity = parallel.identity if parallel.saved is not None else None
        ranks = stack.enter_context(
            LocalRanks(artifact.load, (folder,), backend=backend, identity=identity)
        )
        return ranks.run(inputs, keep=keep, whole=whole)


def verify(
    parallel: ParallelProgram,
    module: nn.Module | None = None,
    *,
    numerics: bool = False,
    model: str | None = None,
    seq: int | None = None,
    inputs: Any = None,
    tries: int = TRIES,
    seed: int = 0,
) -> Verification:
    """Check all ranks against each other and, on request, their numbers against the model's.

    Of an artifact all files are read and compared with their digests first, weights too. Numbers
    are compared on random inputs: ids from the whole vocabulary, masks with padding and holes,
    lengths that divide over the ranks and that do not, and that reach the thresholds in the model's
    code. The model is `module`, or the one that is named, or the program for one device that was
    kept; the last is run under its own weights and under larger ones, which show more.

    Args:
        parallel: what `transform` or `load` returned.
        module: the model; with `numerics` and without it, the one that `model` or the program's
            own options name is loaded, if loading it runs no code that an artifact chose.
        numerics: compare numbers; any of the other arguments asks for it too.
        model: a spec, as for `load_model`.
        seq: compare at this sequence length only, in tokens.
        inputs: compare on these whole inputs only: by name, in order, or a file (see
            `read_input_file`).
        tries: random inputs for each length.
        seed: of the first random inputs.

    Raises:
        RingCompileError: files that were changed after they were saved, ranks that do not fit
            together, no model to compare with, or inputs that it does not take.
    """
    if parallel.saved is not None:
        parallel.saved.check()
    parallel.verify()
    programs = parallel.ranks()
    transfers = sum(str(n.target) == SHIFT for p in programs for n in p.graph.nodes)
    if not (numerics or module is not None or seq or inputs is not None):
        return Verification(len(programs), transfers)
    if module is None and (model or _names_a_model(parallel)):
        module = recorded_model(parallel.options, model).module
    comparison = Comparison(parallel, module)
    rows = tuple(comparison.run(_request(parallel, seq, inputs, tries, seed)))
    return Verification(len(programs), transfers, rows, tuple(comparison.notes))


def _names_a_model(parallel: ParallelProgram) -> bool:
    """Whether an artifact says what it was made from, and that is not code."""
    spec = parallel.options.get("model")
    return parallel.reference is None or bool(spec and ":" not in spec)


def _request(
    parallel: ParallelProgram, seq: int | None, inputs: Any, tries: int, seed: int
) -> Request:
    if inputs is None:
        return Request(length=seq, seed=seed, tries=tries)
    if isinstance(inputs, str | Path):
        named = name_inputs(parallel.program, read_input_file(Path(inputs)))
        return Request(inputs=named, named=f"the inputs of '{inputs}'")
    return Request(inputs=name_inputs(parallel.program, inputs))


def random_inputs(
    program: Program, length: int, batch: int | None = None
) -> dict[str, torch.Tensor]:
    """Whole inputs by name: small token ids, masks of ones, normal floats; seeded.

    Args:
        program: any rank's.
        length: of the sequences, in tokens.
        batch: how many sequences; by default one for each replica.
    """
    generator = torch.Generator().manual_seed(0)
    replicas = 1 if program.mesh is None else program.mesh.size("dp")
    known = {SEQUENCE: length, BATCH: batch or max(replicas, program.batch_range[0])}
    made = {}
    for spec in program.inputs:
        shape = [int(bind(size, known)) for size in spec.type.shape]
        if spec.type.dtype.is_floating_point:
            made[spec.name] = torch.randn(shape, generator=generator).to(spec.type.dtype)
        elif "mask" in spec.name:
            made[spec.name] = torch.ones(shape, dtype=spec.type.dtype)
        else:
            made[spec.name] = torch.randint(0, 2, shape, generator=generator).to(spec.type.dtype)
    return made
