"""Placeholder until the dump layer lands; overwrite this file."""
from ringcompile.ir.program import Program


def python_view(program: Program) -> str:
    raise NotImplementedError
