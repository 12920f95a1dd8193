"""The table of dump formats."""

from __future__ import annotations

from collections.abc import Callable

from ringcompile.dump.graphs import dot, graphml
from ringcompile.dump.json_ import json_
from ringcompile.dump.python_view import python_view
from ringcompile.errors import RingCompileError, one_error
from ringcompile.ir.printer import print_program
from ringcompile.ir.program import Program
from ringcompile.options import FORMATS

_FORMATS: dict[str, Callable[[Program], str]] = dict(
    zip(FORMATS, (print_program, json_, python_view, dot, graphml), strict=True)
)


def formats() -> tuple[str, ...]:
    """The names that `render` knows."""
    return tuple(_FORMATS)


def render(program: Program, format: str) -> str:  # noqa: A002 - the option's name
    """A program in one of the formats, without a newline at its end.

    Raises:
        RingCompileError: there is no such format.
    """
    if format not in _FORMATS:
        raise RingCompileError(
            f"unknown format '{format}'", hint=f"formats are: {', '.join(_FORMATS)}"
        )
    with one_error("printing the program", program.from_file):
        return _FORMATS[format](program).rstrip("\n")
