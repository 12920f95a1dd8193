"""The one error a user can cause, and the place in their code that it points at."""

from __future__ import annotations

import linecache
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class SourceLocation:
    """Where a node comes from: the user's file and line, and the module path of its layer."""

    file: str = ""
    line: int = 0
    layer: str = ""

    @property
    def text(self) -> str:
        """The source line itself, stripped; empty when the file is not at hand.

        Only Python's files are looked into, for a saved program may name any.
        """
        source = self.file.endswith(".py") or self.file.startswith("<")
        return linecache.getline(self.file, self.line).strip() if source else ""

    @property
    def short(self) -> str:
        """`file.py:12`, for dumps."""
        if not self.file:
            return ""
        return f"{self.file.rpartition('/')[2]}:{self.line}"

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.file else ""


@contextmanager
def one_error(what: str, strange: bool = True) -> Iterator[None]:
    """Whatever goes wrong with something that came from a file is one error of ours.

    Args:
        what: what is being done, as the subject of the message.
        strange: whether it did come from a file; where not, an error is a bug, and stays as it is.

    Raises:
        RingCompileError: in place of any other exception.
    """
    try:
        yield
    except RingCompileError:
        raise
    except Exception as error:
        if not strange:
            raise
        said = (str(error).strip().splitlines() or [""])[0][:200]
        raise RingCompileError(
            f"{what} failed: {type(error).__name__}: {said}",
            hint="do not use this artifact; if it is as ringcompile saved it, this is a bug",
        ) from error


class RingCompileWarning(UserWarning):
    """What a user should know though nothing is wrong."""


class RingCompileError(Exception):
    """An error that the user can fix: a message, the source line that it is about, and a hint.

    Args:
        message: what is wrong, with the values involved.
        hint: what to do next.
        location: the line in the user's code.
        node: the name of the graph node.
    """

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        location: SourceLocation | None = None,
        node: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.location = location
        self.node = node

    def __str__(self) -> str:
        at = str(self.location) if self.location else ""
        lines = [f"{at}: error: {self.message}" if at else f"error: {self.message}"]
        if self.location and self.location.text:
            lines.append(f"    {self.location.text}")
        if self.node:
            lines.append(f"  node: %{self.node}")
        if self.location and self.location.layer:
            lines.append(f"  layer: {self.location.layer}")
        if self.hint:
            lines.append(f"  hint: {self.hint}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process borders: the default would lose the keyword arguments.
        return (_rebuild, (self.message, self.hint, self.location, self.node))


def _rebuild(
    message: str, hint: str | None, location: SourceLocation | None, node: str | None
) -> RingCompileError:
    return RingCompileError(message, hint=hint, location=location, node=node)
