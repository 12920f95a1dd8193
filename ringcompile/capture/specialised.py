"""Where torch.export turns the size of an input into a number, and that sizes of one are not."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch.fx.experimental import _config as shape_config
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from ringcompile.capture.source_lines import line_of_stack
from ringcompile.errors import SourceLocation


@contextlib.contextmanager
def sizes_of_one_are_not_special() -> Iterator[None]:
    """A size that varies may be 1 as well: where code asks whether it is, torch keeps a guard.

    By default torch.export takes such a size to be at least 2, and what code does with one
    sequence would be lost without a word.
    """
    with shape_config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        yield


@dataclass
class Lines:
    """Where sizes of inputs were turned into numbers, by the input's dim as guards write it."""

    found: dict[str, SourceLocation] = field(default_factory=dict)

    def first(self, dims: Iterable[str]) -> SourceLocation | None:
        """The line for the first of these dims that has one."""
        return next((self.found[dim] for dim in dims if dim in self.found), None)


@contextlib.contextmanager
def specialised() -> Iterator[Lines]:
    """The user's lines at which torch.export turns a size of an input into a number."""
    original: Any = ShapeEnv._set_replacement
    lines = Lines()

    def replaced(env: Any, symbol: Any, by: Any, why: str) -> None:
        if by.is_number:
            here = line_of_stack(traceback.extract_stack())
            for source in getattr(env, "var_to_sources", {}).get(symbol, ()):
                name = source.name() if callable(source.name) else source.name
                if here is not None:
                    lines.found.setdefault(name, here)
        original(env, symbol, by, why)

    ShapeEnv._set_replacement = replaced  # type: ignore[assignment, method-assign]
    try:
        yield lines
    finally:
        ShapeEnv._set_replacement = original  # type: ignore[method-assign]
