"""In which operands an op is linear: a partial sum may pass through it, term by term."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ringcompile.ir.calls import Call


@dataclass(frozen=True)
class Linear:
    """What an op does to a sum it does to the terms of the sum.

    Attributes:
        operand: the operand in which it is linear, whatever the others are; None where it is
            linear in each of them while the others are no sums, or in all of them together.
        together: whether it is linear in all operands together, and all have to be sums.
        when: for which calls this holds.
    """

    operand: int | None = None
    together: bool = False
    when: Callable[[Call], bool] = lambda call: True

    def axes(self, call: Call, partials: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
        """The axes over which the result is a partial sum, if the operands may stay ones.

        Args:
            call: the op.
            partials: for each operand, the axes over which it is a partial sum.

        Returns:
            nothing where no operand is one, or where the sum has to be made first.
        """
        sums = [i for i, partial in enumerate(partials) if partial]
        if self.together:  # terms of one sum: of the same axes
            passes = len(set(partials)) == 1
        else:
            passes = len(sums) == 1 and self.operand in (None, sums[0])
        return next(filter(None, partials), ()) if passes and self.when(call) else ()


FIRST = Linear(0)
EACH = Linear()
TOGETHER = Linear(together=True)
