"""One row's case: how its calls are drawn, and which dims it must let pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ringcompile.ir.calls import Call
from ringcompile.ir.layout import Layout
from ringcompile.ir.nodes import results_of, type_of
from tests.ir.draws import Draws

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
# (operand, dim) pairs: split there and nowhere else, the call must stay split.
Free = set[tuple[int, int]]


def called(*args: Any, **kwargs: Any) -> Arguments:
    """The arguments of a call, tensors for operands."""
    return args, kwargs


@dataclass(frozen=True)
class Case:
    """How calls of an op are drawn, and what its row owes.

    Attributes:
        make: draws the arguments of one call.
        free: the dims whose split must pass.
        exact: the op moves or compares: shares are equal to the last bit.
        rewritten: whether `partition` writes a call with that output layout in another way, so
            that it is not run on shares as it stands.
    """

    make: Callable[[Draws], Arguments]
    free: Callable[[Call], Free]
    exact: bool = False
    rewritten: Callable[[Call, Layout], bool] = lambda call, layout: False


def shape_of(call: Call, operand: int) -> tuple[Any, ...]:
    return type_of(call.operands[operand]).shape


def whole(call: Call) -> Free:
    """No dim: the op needs all of what it reads."""
    return set()


def aligned(call: Call) -> Free:
    """Dims that are as large as the result's, counted from the right."""
    out = results_of(call.node)[0].shape
    found = set()
    for i in range(len(call.operands)):
        shape = shape_of(call, i)
        behind = len(out) - len(shape)
        found |= {(i, d) for d, size in enumerate(shape) if size == out[behind + d]}
    return found


def all_but(argument: str, *operands: int) -> Callable[[Call], Free]:
    """All dims of the operands but those that an argument names: one, several, or None for all."""

    def free(call: Call) -> Free:
        found = set()
        for i in operands or range(len(call.operands)):
            rank = len(shape_of(call, i))
            named = call[argument]
            listed = [named] if isinstance(named, int) else list(named or range(rank))
            taken = {dim % rank for dim in listed} if rank else set()
            found |= {(i, d) for d in range(rank) if d not in taken}
        return found

    return free


def leading(behind: int, *operands: int) -> Callable[[Call], Free]:
    """All dims of the operands but the last `behind`."""

    def free(call: Call) -> Free:
        return {
            (i, d) for i in operands or range(len(call.operands))
            for d in range(len(shape_of(call, i)) - behind)
        }

    return free


def pairs(*found: tuple[int, int]) -> Callable[[Call], Free]:
    """Always these."""
    return lambda call: {(i, d) for i, d in found if i < len(call.operands)}
