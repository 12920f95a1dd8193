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
from torch.utils import _pytree as pytree

from ringcompile import artifact
from ringcompile.compiler import ParallelProgram, load, recorded_model
from ringcompile.errors import RingCompileError
from ringcompile.ir.communication import SHIFT
from ringcompile.ir.expr import SEQUENCE, bind
from ringcompile.ir.program import Program
from ringcompile.options import BACKENDS
from ringcompile.runtime.distributed import Session
from ringcompile.runtime.inprocess import run_lockstep
from ringcompile.runtime.join import (
    JOIN_TIMEOUT,
    join_torchrun,
    pick_backend,
    under_torchrun,
)
from ringcompile.runtime.launcher import LocalRanks

# The largest difference to the single device that numerics may show, of the largest output.
ALLOWED = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Numerics:
    """Numbers of all ranks against the single-device model, at one sequence length."""

    length: int
    difference: float
    allowed: float


@dataclass(frozen=True)
class Verification:
    """What was checked; ranks that do not fit together are an error instead."""

    ranks: int
    transfers: int
    numerics: tuple[Numerics, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every difference is within what is allowed; true if no numbers were compared."""
        return all(row.difference <= row.allowed for row in self.numerics)


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
) -> Verification:
    """Check all ranks against each other and, on request, against the single-device model.

    Of an artifact all files are read and compared with their digests first, weights too.

    Args:
        parallel: what `transform` or `load` returned.
        module: the model; with `numerics` and without it, the one that `model` or the program's
            own options name is loaded.
        numerics: compare numbers, at a length that divides over the ranks and one that does not.
        model: a spec, as for `load_model`.

    Raises:
        RingCompileError: files that were changed after they were saved, ranks that do not fit
            together, or no model to compare with.
    """
    if parallel.saved is not None:
        parallel.saved.check()
    parallel.verify()
    programs = parallel.ranks()
    transfers = sum(str(n.target) == SHIFT for p in programs for n in p.graph.nodes)
    rows: tuple[Numerics, ...] = ()
    if numerics or module is not None:
        module = module if module is not None else recorded_model(parallel.options, model).module
        rows = tuple(_compare(parallel, module, length) for length in _lengths(parallel))
    return Verification(len(programs), transfers, rows)


def _lengths(parallel: ParallelProgram) -> list[int]:
    fixed = parallel.program.lengths.get(SEQUENCE)
    if fixed is not None:
        return [fixed]
    assert parallel.program.sequence is not None
    low, high = parallel.program.length_range
    whole = max(parallel.program.sequence.num_chunks, 2) * 4
    wanted = [whole, whole + 3]
    return [max(low, min(length, high or length)) for length in wanted]


@torch.no_grad()
def _compare(parallel: ParallelProgram, module: nn.Module, length: int) -> Numerics:
    inputs = random_inputs(parallel.program, length)
    expected = module(**inputs)
    found = run_lockstep(
        parallel.ranks(), parallel.mesh, parallel.source, inputs, check_types=True
    ).outputs
    pairs = list(zip(_leaves(found), _leaves(expected), strict=True))
    largest = max(float(e.abs().max()) for _, e in pairs)
    worst = max(float((f.double() - e.double()).abs().max()) for f, e in pairs)
    allowed = max(ALLOWED.get(e.dtype, 0.0) for _, e in pairs)
    return Numerics(length, worst / max(largest, 1e-30), allowed)


def _leaves(value: Any) -> list[torch.Tensor]:
    plain = dict(value) if hasattr(value, "keys") else value
    return [leaf for leaf in pytree.tree_leaves(plain) if torch.is_tensor(leaf)]


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
    named = _named(outputs)
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


def _named(outputs: Any) -> dict[str, torch.Tensor]:
    """The tensors of nested outputs, by their path."""
    if torch.is_tensor(outputs):
        return {"output": outputs}
    paths = pytree.tree_flatten_with_path(outputs)[0]
    return {
        ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path): leaf
        for path, leaf in paths
        if torch.is_tensor(leaf)
    }
