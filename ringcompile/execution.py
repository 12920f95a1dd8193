"""Running and checking what was compiled: in this process, on local processes, under torchrun."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ringcompile import artifact
from ringcompile.compiler import ParallelProgram, load, recorded_model
from ringcompile.errors import RingCompileError
from ringcompile.ir.communication import SHIFT
from ringcompile.ir.expr import SEQUENCE, bind
from ringcompile.ir.program import Program
from ringcompile.numerics.check import Comparison, Numerics, Request
from ringcompile.numerics.compare import outputs_by_name
from ringcompile.numerics.files import read_input_file
from ringcompile.options import BACKENDS, TRIES
from ringcompile.runtime.data import name_inputs
from ringcompile.runtime.distributed import Session
from ringcompile.runtime.inprocess import run_lockstep
from ringcompile.runtime.join import (
    JOIN_TIMEOUT,
    join_torchrun,
    pick_backend,
    under_torchrun,
)
from ringcompile.runtime.launcher import LocalRanks


@dataclass(frozen=True)
class Verification:
    """What was checked; ranks that do not fit together are an error instead."""

    ranks: int
    transfers: int
    numerics: tuple[Numerics, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every difference is within what is allowed; true if no numbers were compared."""
        return not self.wrong

    @property
    def wrong(self) -> str:
        """What differs, where, and how to see it again; empty where nothing does."""
        return next((row.wrong for row in self.numerics if row.wrong), "")


@dataclass(frozen=True)
class RunReport:
    """What `ringcompile run` prints."""

    ranks: int
    backend: str
    seconds: float
    bytes_sent: list[int]
    outputs: dict[str, str] = field(default_factory=dict)


def run(parallel: ParallelProgram, inputs: Any, backend: str = "lockstep") -> Any:
    """Run on whole inputs and return whole outputs, nested as the model returns them.

    Args:
        parallel: what `transform` or `load` returned.
        inputs: by name, or in order.
        backend: "lockstep" (all ranks in this process), "gloo" or "nccl" (a process for each).

    Raises:
        RingCompileError: inputs that do not fit, or ranks that fail or do not join.
    """
    if backend not in BACKENDS:
        raise RingCompileError(
            f"unknown backend '{backend}'", hint=f"backends: {', '.join(BACKENDS)}"
        )
    parallel.ensure_verified()
    if backend == "lockstep":
        return run_lockstep(parallel.ranks(), parallel.mesh, parallel.source, inputs).outputs
    if parallel.saved is not None:
        return _run_folder(parallel.saved.folder.path, inputs, backend, parallel.identity)
    with tempfile.TemporaryDirectory(prefix="ringcompile-") as folder:
        parallel.save(Path(folder) / "program")
        return _run_folder(Path(folder) / "program", inputs, backend)


def _run_folder(folder: Path, inputs: Any, backend: str, identity: str | None = None) -> Any:
    with LocalRanks(artifact.load, (folder,), backend=backend, identity=identity) as ranks:
        return ranks.run(inputs).outputs


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


def random_inputs(program: Program, length: int) -> dict[str, torch.Tensor]:
    """Whole inputs by name: small token ids, masks of ones, normal floats; seeded.

    With `dp`, a batch of the captured size for each replica.
    """
    generator = torch.Generator().manual_seed(0)
    made = {}
    for spec in program.inputs:
        shape = [int(bind(size, {SEQUENCE: length})) for size in spec.type.shape]
        if len(shape) > 1 and program.mesh is not None:
            shape[0] *= program.mesh.size("dp")
        if spec.type.dtype.is_floating_point:
            made[spec.name] = torch.randn(shape, generator=generator).to(spec.type.dtype)
        elif "mask" in spec.name:
            made[spec.name] = torch.ones(shape, dtype=spec.type.dtype)
        else:
            made[spec.name] = torch.randint(0, 2, shape, generator=generator).to(spec.type.dtype)
    return made


def run_artifact(
    folder: Path,
    *,
    nproc: int | None,
    backend: str,
    inputs: Path | None,
    outputs: Path | None,
    length: int,
    timeout: float,
    join_timeout: float = JOIN_TIMEOUT,
    compiler: str | None = None,
) -> RunReport | None:
    """Run an artifact as `ringcompile run` does; None on ranks that have nothing to report.

    Raises:
        RingCompileError: files that cannot be read, a wrong number of ranks, ranks that fail.
    """
    parallel = load(folder)
    parallel.ensure_verified()
    whole = _read_inputs(inputs) if inputs else random_inputs(parallel.program, length)
    if under_torchrun():
        return _under_torchrun(
            parallel, backend, whole, outputs, timeout, join_timeout, compiler
        )
    start = time.perf_counter()
    if backend == "lockstep":
        done = run_lockstep(
            parallel.ranks(), parallel.mesh, parallel.source, whole, compiler=compiler
        )
        seconds = time.perf_counter() - start
        return _report(parallel, backend, seconds, done.bytes_sent, done.outputs, outputs)
    options: dict[str, Any] = {
        "nproc": nproc, "backend": backend, "timeout": timeout, "join_timeout": join_timeout,
        "compiler": compiler, "identity": parallel.identity,
    }
    with LocalRanks(artifact.load, (folder,), **options) as ranks:
        found = ranks.run(whole)
    return _report(
        parallel,
        pick_backend(backend, parallel.world_size),
        max(stats.seconds for stats in found.stats),
        [stats.bytes_sent for stats in found.stats],
        found.outputs,
        outputs,
    )


def _under_torchrun(
    parallel: ParallelProgram,
    backend: str,
    whole: dict[str, torch.Tensor],
    outputs: Path | None,
    timeout: float,
    join_timeout: float,
    compiler: str | None,
) -> RunReport | None:
    rank = join_torchrun(
        parallel.mesh, backend=backend, timeout=timeout, join_timeout=join_timeout
    )
    session = Session(parallel, rank, check_inputs=True, compiler=compiler)
    done = session.run(whole)
    everyone = session.everyones_stats(done)
    found = session.assemble(done)
    if rank.index != 0:
        return None
    return _report(
        parallel,
        dist.get_backend(),
        max(stats.seconds for stats in everyone),
        [stats.bytes_sent for stats in everyone],
        found,
        outputs,
    )


def _read_inputs(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise RingCompileError(
            f"cannot read inputs from '{file}': {error}",
            hint="write them with safetensors.torch.save_file({name: tensor}, file)",
        ) from None


def _report(
    parallel: ParallelProgram,
    backend: str,
    seconds: float,
    bytes_sent: list[int],
    outputs: Any,
    file: Path | None,
) -> RunReport:
    named = outputs_by_name(outputs)
    if file is not None:
        try:
            save_file({name: tensor.contiguous() for name, tensor in named.items()}, file)
        except (OSError, SafetensorError) as error:
            raise RingCompileError(f"cannot write outputs to '{file}': {error}") from None
    described = {
        name: f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}, "
        f"mean {float(t.double().mean()):+.6f}, largest {float(t.double().abs().max()):.6f}"
        for name, t in named.items()
    }
    return RunReport(parallel.world_size, backend, seconds, bytes_sent, described)
