"""What torch.export does with sizes of inputs without a word: numbers in their place, none of 1.

torch.export takes a size that varies to be at least 2. Whatever code asks of it that is answered
otherwise for 1 is noted here, with the line: such a program is for sizes of 2 and more.
"""

from __future__ import annotations

import contextlib
import inspect
import traceback
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv, uninteresting_files

from ringcompile.capture.source_lines import line_of_stack
from ringcompile.errors import SourceLocation

_TORCH = str(Path(torch.__file__).parent)


@dataclass(frozen=True)
class Question:
    """A condition on sizes that the model's code asked for.

    Attributes:
        condition: in torch's symbols.
        answer: what torch.export took it to be.
        sizes: for each symbol the inputs' dims that it stands for, as guards write them.
        line: where.
    """

    condition: Any
    answer: bool
    sizes: Mapping[Any, tuple[str, ...]]
    line: SourceLocation

    def is_other_for_one(self, names: Mapping[str, str], role: str) -> bool:
        """Whether the answer would be another one for a batch, or a length, of 1."""
        for dims in self.sizes.values():
            if role not in {names.get(dim) for dim in dims}:
                return False
        at_one = self.condition.xreplace(dict.fromkeys(self.sizes, 1))
        return not at_one.free_symbols and bool(at_one) != self.answer


@dataclass
class Lines:
    """What was noted while a model was exported.

    Attributes:
        found: where sizes were turned into numbers, by the input's dim as guards write it.
        asked: what the model's code asked of sizes.
    """

    found: dict[str, SourceLocation] = field(default_factory=dict)
    asked: list[Question] = field(default_factory=list)

    def clear(self) -> None:
        """Forget what an export that failed brought."""
        self.found.clear()
        self.asked.clear()

    def first(self, dims: Iterable[str]) -> SourceLocation | None:
        """The line for the first of these dims that has one."""
        return next((self.found[dim] for dim in dims if dim in self.found), None)

    def about_one(self, names: Mapping[str, str], role: str) -> SourceLocation | None:
        """The first line that does something else for a size of 1."""
        lines = (q.line for q in self.asked if q.is_other_for_one(names, role))
        return next(lines, None)


@contextlib.contextmanager
def specialised() -> Iterator[Lines]:
    """Note what becomes of sizes of inputs while a model is exported."""
    replace: Any = ShapeEnv._set_replacement
    evaluate: Any = ShapeEnv.evaluate_expr
    lines = Lines()

    def replaced(env: Any, symbol: Any, by: Any, why: str) -> None:
        if by.is_number and (here := line_of_stack(traceback.extract_stack())) is not None:
            for name in _names(env, symbol):
                lines.found.setdefault(name, here)
        replace(env, symbol, by, why)

    def evaluated(env: Any, condition: Any, *args: Any, **kwargs: Any) -> Any:
        answer = evaluate(env, condition, *args, **kwargs)
        if getattr(condition, "is_Relational", False) and (line := _asking()) is not None:
            sizes = {free: _names(env, free) for free in condition.free_symbols}
            lines.asked.append(Question(condition, bool(answer), sizes, line))
        return answer

    ShapeEnv._set_replacement = replaced  # type: ignore[assignment, method-assign]
    ShapeEnv.evaluate_expr = evaluated  # type: ignore[assignment, method-assign]
    try:
        yield lines
    finally:
        ShapeEnv._set_replacement = replace  # type: ignore[method-assign]
        ShapeEnv.evaluate_expr = evaluate  # type: ignore[method-assign]


def _names(env: Any, symbol: Any) -> tuple[str, ...]:
    sources = getattr(env, "var_to_sources", {}).get(symbol, ())
    return tuple(s.name() if callable(s.name) else s.name for s in sources)


def _asking() -> SourceLocation | None:
    """The line whose own code asks for a condition; None where torch does, for its own ends.

    torch asks of every size that may be broadcast whether it is 1, and computes the same either
    way.
    """
    frame = inspect.currentframe()
    hidden = {*uninteresting_files(), __file__}
    while frame is not None and frame.f_code.co_filename in hidden:
        frame = frame.f_back
    if frame is None or frame.f_code.co_filename.startswith(_TORCH):
        return None
    return SourceLocation(frame.f_code.co_filename, frame.f_lineno)
