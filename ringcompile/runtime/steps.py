"""A node of a program, prepared for running: its arguments but for values that a run computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from ringcompile.ir.calls import map_values


@dataclass(frozen=True)
class Slot:
    """Stands for a value that a run holds, in prepared arguments."""

    index: int


@dataclass
class Step:
    """One call.

    Attributes:
        node: whose value it computes.
        function: what to call.
        args: positional arguments.
        kwargs: the others.
        fill: where slots are among the positional ones, and which.
        nested: whether slots are anywhere else.
        out: the slot of the result.
        frees: slots that nothing reads any more.
        communicates: the op's name where other ranks take part.
    """

    node: fx.Node
    function: Callable[..., Any]
    args: list[Any]
    kwargs: dict[str, Any]
    fill: list[tuple[int, int]]
    nested: bool
    out: int
    frees: list[int]
    communicates: str | None

    def filled(self, held: list[Any]) -> tuple[list[Any], dict[str, Any]]:
        """The arguments, slots replaced by what is held."""
        if self.nested:
            values = map_values(
                (self.args, self.kwargs), lambda v: held[v.index] if isinstance(v, Slot) else v
            )
            return values
        args = self.args.copy()
        for position, slot in self.fill:
            args[position] = held[slot]
        return args, self.kwargs


def holds_slot(value: Any) -> bool:
    """Whether a slot is anywhere in nested arguments."""
    if isinstance(value, list | tuple):
        return any(map(holds_slot, value))
    if isinstance(value, dict):
        return any(map(holds_slot, value.values()))
    return isinstance(value, Slot)
