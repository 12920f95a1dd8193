"""One rank's program of a small model, its weights and its share of the inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ringcompile.compiler import transform
from ringcompile.ir.program import Program
from ringcompile.models import zoo
from ringcompile.parallel_program import ParallelProgram
from ringcompile.runtime.alone import Alone
from ringcompile.runtime.data import name_inputs, share_inputs
from ringcompile.runtime.drive import drive
from ringcompile.runtime.executor import Executor
from ringcompile.runtime.runner import read_weights
from tests.support import zoo_program


@dataclass(frozen=True)
class OneRank:
    parallel: ParallelProgram
    program: Program
    lengths: dict[str, int]
    weights: dict[str, torch.Tensor]
    share: dict[str, torch.Tensor]

    @property
    def values(self) -> dict[str, torch.Tensor]:
        return {**self.weights, **self.share}


def captured(name: str, dtype: str | None) -> Program:
    return zoo_program(name, sequence=24, dtype=dtype)


def one_rank(
    name: str,
    parallel: str = "ring=4",
    *,
    rank: int = 1,
    length: int = 64,
    device: str = "cpu",
    dtype: str | None = None,
    **options: str,
) -> OneRank:
    made = transform(captured(name, dtype), parallel, **options)  # type: ignore[arg-type]
    program = made.rank(rank)
    _, inputs = zoo.build(name, sequence=length, seed=3, dtype=dtype)
    whole = name_inputs(program, inputs)
    lengths = program.bindings(whole)
    share = {
        key: x.to(device) for key, x in share_inputs(program, whole, lengths).items()
    }
    return OneRank(made, program, lengths, read_weights(program, made.source, device), share)


def run_alone(made: OneRank, executor: Executor) -> tuple[torch.Tensor, ...]:
    return drive(executor.run(made.values), Alone(made.parallel.mesh, executor.device).answer)
