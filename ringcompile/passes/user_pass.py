"""A pass that a user wrote: what it does wrong is an error with its name, and not a traceback."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ringcompile.errors import RingCompileError
from ringcompile.ir.operands import attention_operands, lost_operand
from ringcompile.ir.program import Program
from ringcompile.ir.verifier import verify_program
from ringcompile.passes.base import Pass

_HINT = (
    "see 'A rewrite of your own' in docs/extending.md; `Builder` copies nodes with their types "
    "and lines"
)


@dataclass(frozen=True)
class UserPass(Pass):
    """Runs a user's pass, and holds what comes back to what must hold behind every pass.

    Attributes:
        step: the user's.
    """

    name: ClassVar[str] = "user-pass"
    step: Pass

    def __post_init__(self) -> None:
        """Take the user's name for it, which goes into the list of passes that ran.

        Raises:
            RingCompileError: it is no pass.
        """
        if not isinstance(self.step, Pass):
            raise RingCompileError(
                f"passes= takes instances of Pass, not {self.step!r}", hint=_HINT
            )
        object.__setattr__(self, "name", self.step.name)

    def run(self, program: Program) -> Program:
        """The rewritten program.

        Raises:
            RingCompileError: the pass failed, changed the program that it was given, or returned
                one that is invalid.
        """
        before, given = str(program.graph), attention_operands(program)
        try:
            made = self.step.run(program)
        except RingCompileError:
            raise
        except Exception as error:
            raise self._error(f"failed: {type(error).__name__}: {error}") from error
        if not isinstance(made, Program):
            raise self._error(f"returned {type(made).__name__}, not a Program")
        if str(program.graph) != before:
            raise self._error("changed the program that it was given; it has to return a new one")
        try:
            verify_program(made)
            lost = lost_operand(given, attention_operands(made))
        except (AssertionError, RuntimeError) as error:  # fx's own check raises RuntimeError
            raise self._error(f"left an invalid program: {error}") from error
        if lost is not None:
            raise self._error(f"left an invalid program: {lost}")
        return made

    def _error(self, what: str) -> RingCompileError:
        return RingCompileError(f"the pass '{self.step.name}' {what}", hint=_HINT)
