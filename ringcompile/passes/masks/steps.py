"""What the steps of the mask analysis share: how a step looks, and values of plain numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import fx

from ringcompile.ir.calls import Call
from ringcompile.ir.expr import equal, is_symbolic
from ringcompile.passes.masks.values import Affine, Condition, Value

# Integers in which no position or difference of positions wraps around.
WIDE = (torch.int64, torch.int32)


class Known(Protocol):
    """What a step may ask about the operands of its op."""

    def of(self, node: Any) -> Value:
        """The value of a node, or of a number standing in its place."""

    def condition(self, node: fx.Node) -> Condition:
        """A bool node as a condition; one opaque test where it is not understood."""

    def number(self, value: Any) -> float | None:
        """The number that a scalar, or a tensor that is the same everywhere, holds."""


# The value of an op's result; None where it is not understood.
Step = Callable[[Known, Call], Value]


def is_difference(value: Affine) -> bool:
    """Whether only the difference of two positions decides what it is."""
    return len(value.coefficients) == 2 and equal(sum(c for _, c in value.coefficients), 0)


def number_value(value: Any) -> Value:
    """A bool or an integer, the same at every position; other numbers are opaque."""
    if isinstance(value, bool):
        return Condition(never=not value)
    if isinstance(value, int) or (is_symbolic(value) and value.is_integer):
        return Affine((), value)
    return None
