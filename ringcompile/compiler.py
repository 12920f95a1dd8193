"""The API behind the package's public names: capture, transform, run, save, load, check, verify."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ringcompile.errors import RingCompileError
from ringcompile.ir.program import Program
from ringcompile.mesh import Mesh
from ringcompile.passes.base import Pass, Pipeline
from ringcompile.passes.canonicalize import Canonicalize
from ringcompile.passes.cleanup import CleanUp
from ringcompile.passes.lower_ring import LowerRing
from ringcompile.passes.partition import Partition
from ringcompile.passes.place import Place
from ringcompile.passes.recognize_masks import RecognizeMasks
from ringcompile.passes.specialize import Specialize
from ringcompile.runtime.data import assemble_outputs, name_inputs, share_inputs
from ringcompile.runtime.executor import Executor
from ringcompile.runtime.lockstep import LockStep

Observer = Callable[[Pass, Program, float], None]


def front_passes(mesh: Mesh, order: str, gather_unknown: bool) -> list[Pass]:
    """From a captured program to one program for all ranks."""
    return [
        Canonicalize(),
        RecognizeMasks(),
        CleanUp(),
        Place(mesh, order, gather_unknown),
        CleanUp(),
        Partition(),
        CleanUp(),
    ]


def rank_passes(rank: int) -> list[Pass]:
    """From the program for all ranks to that of one."""
    return [Specialize(rank), LowerRing(), CleanUp()]


@dataclass
class ParallelProgram:
    """One program for all ranks, and each rank's own, made when asked for."""

    program: Program
    mesh: Mesh
    observe: Observer | None = None
    _ranks: dict[int, Program] = field(default_factory=dict)

    @property
    def world_size(self) -> int:
        return self.mesh.world_size

    def rank(self, rank: int) -> Program:
        """The program of one rank."""
        if not 0 <= rank < self.world_size:
            raise RingCompileError(
                f"rank {rank} does not exist", hint=f"ranks are 0 to {self.world_size - 1}"
            )
        if rank not in self._ranks:
            self._ranks[rank] = Pipeline(rank_passes(rank), self.observe).run(self.program)
        return self._ranks[rank]


def transform(
    program: Program,
    parallel: str | Mesh,
    *,
    order: str = "auto",
    gather_unknown: bool = False,
    observe: Observer | None = None,
) -> ParallelProgram:
    mesh = Mesh.parse(parallel) if isinstance(parallel, str) else parallel
    placed = Pipeline(front_passes(mesh, order, gather_unknown), observe).run(program)
    return ParallelProgram(placed, mesh, observe)


def run(parallel: ParallelProgram, inputs: Any, backend: str = "lockstep") -> Any:
    first = parallel.rank(0)
    whole = name_inputs(first, inputs)
    lengths = first.bindings(whole)
    weights = {p: first.source(w.name) for p, w in first.weights.items()}
    gens = []
    for r in range(parallel.world_size):
        p = parallel.rank(r)
        gens.append(Executor(p, lengths).run({**{k: weights[k] for k in p.weights}, **share_inputs(p, whole, lengths)}))
    with torch.no_grad():
        shares, sent = LockStep(parallel.mesh).run(gens)
    return assemble_outputs(first, shares, lengths)
