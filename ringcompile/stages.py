"""The program behind every pass, from the model for one device to one rank."""

from __future__ import annotations

from dataclasses import replace

from ringcompile.errors import RingCompileError
from ringcompile.ir.program import Program
from ringcompile.options import Options
from ringcompile.parallel_program import ParallelProgram
from ringcompile.pass_list import front_passes
from ringcompile.passes.base import Pass, Pipeline


def front_stages(parallel: ParallelProgram) -> list[tuple[str, Program]]:
    """The model for one device, and what each pass makes of it, up to the program of all ranks.

    Empty where the model is not known: of an artifact that does not hold it.

    Raises:
        RingCompileError: the passes refuse the model: another version of ringcompile compiled it.
    """
    model = parallel.reference
    if model is None:
        return []
    plan = parallel.plan()
    options = replace(Options.recorded(parallel.options), stages=tuple(plan.stages))
    passes = front_passes(parallel.mesh, options, plan.told("tp"))
    return [("one device", model), *_observed(passes, model)]


def rank_stages(parallel: ParallelProgram, rank: int) -> list[tuple[str, Program]]:
    """The program of all ranks, and what each pass makes of it, up to that of one rank."""
    observed = _observed(parallel.passes_of(rank), parallel.program)
    return [("every rank", parallel.program), *observed]


def around(parallel: ParallelProgram, name: str, rank: int) -> tuple[Program, Program]:
    """The program before a pass and behind it; of a pass that runs often, the last time.

    Raises:
        RingCompileError: no such pass.
    """
    late = rank_stages(parallel, rank)
    stages = [*front_stages(parallel), *late[1:]] or late
    names = [stage for stage, _ in stages]
    if name not in names[1:]:
        raise RingCompileError(
            f"unknown pass '{name}'", hint=f"passes: {', '.join(dict.fromkeys(names[1:]))}"
        )
    at = len(names) - 1 - names[::-1].index(name)
    return stages[at - 1][1], stages[at][1]


def _observed(passes: list[Pass], program: Program) -> list[tuple[str, Program]]:
    found: list[tuple[str, Program]] = []

    def observe(step: Pass, made: Program, seconds: float) -> None:
        found.append((step.name, made))

    Pipeline(passes, observe).run(program)
    return found
