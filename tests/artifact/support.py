"""What the artifact's tests share: a compiled model, saved."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from ringcompile.artifact import save
from ringcompile.compiler import transform
from ringcompile.ir.program import Program
from ringcompile.parallel_program import ParallelProgram
from tests.support import zoo_program


@cache
def compile_model(name: str, spec: str = "ring=2") -> ParallelProgram:
    return transform(zoo_program(name), spec)


def view(program: Program) -> str:
    return f'"""{program.name}"""\n'


def save_model(parallel: ParallelProgram, folder: Path, **changes: Any) -> Path:
    values: dict[str, Any] = {
        "spmd": parallel.program,
        "ranks": parallel.ranks(),
        "mesh": parallel.mesh,
        "source": parallel.source,
        "options": {"order": "auto"},
        "view": view,
    }
    return save(folder, **(values | changes))
