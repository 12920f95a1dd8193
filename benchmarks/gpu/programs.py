"""The zoo's models, captured without their weights and compiled for a mesh."""

from __future__ import annotations

from functools import lru_cache

from ringcompile.capture.export import capture
from ringcompile.capture.loaders import load_model
from ringcompile.compiler import transform
from ringcompile.ir.program import Program
from ringcompile.parallel_program import ParallelProgram


@lru_cache
def captured(model: str) -> Program:
    """One device's program."""
    loaded = load_model(model, weights=False)
    return capture(loaded.module, loaded.args, loaded.kwargs, name=model)


@lru_cache
def compiled(model: str, parallel: str) -> ParallelProgram:
    """The program for all ranks."""
    return transform(captured(model), parallel)
