"""Where does the first NaN or infinity come from? Every op's operands and results are looked at.

Infinities have their uses: masks, the running maximum of rows that have seen no key. One counts as
a fault only where a torch op makes it of finite numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from ringcompile.errors import RingCompileError
from ringcompile.ir.nodes import error_at
from ringcompile.ir.program import Program

# These make infinities on purpose.
_MAY_BE_INFINITE = frozenset({"aten.log.default", "aten.log2.default", "aten.log10.default"})
_HINT = "run the model itself in float32, or look at the layers before it"


def finite_watch(program: Program) -> Callable[..., Any]:
    """What an `Executor` calls in place of every op: it computes, and looks at the numbers.

    The error names the rank, the op and the user's line, on the rank where the first such number
    appears; ranks that only receive one go on.

    Args:
        program: of one rank.
    """
    where = _rank_of(program)

    def watch(
        node: fx.Node, args: list[Any], kwargs: dict[str, Any], function: Callable[..., Any]
    ) -> Any:
        given = list(_numbers((args, kwargs)))  # before: some ops overwrite what they read
        had_nan = any(bool(tensor.isnan().any()) for tensor in given)
        had_inf = any(bool(tensor.isinf().any()) for tensor in given) or _infinite_scalar(
            (args, kwargs)
        )
        if had_nan:
            _check_placeholders(node, args, where)
        result = function(*args, **kwargs)
        made = list(_numbers(result))
        if not had_nan and any(bool(tensor.isnan().any()) for tensor in made):
            raise _first(node, "NaN", where)
        quiet = had_nan or had_inf or str(node.target) in _MAY_BE_INFINITE
        if not quiet and str(node.target).startswith("aten.") and any(
            bool(tensor.isinf().any()) for tensor in made
        ):
            raise _first(node, "infinity", where)
        return result

    return watch


def _first(node: fx.Node, what: str, where: str) -> RingCompileError:
    return error_at(
        node, f"{where}: the first {what} appears in the result of {node.target}, which reads none",
        hint=_HINT,
    )


def _check_placeholders(node: fx.Node, args: list[Any], where: str) -> None:
    """Raise RingCompileError where a NaN comes in with a weight or an input."""
    for operand, value in zip(node.args, args, strict=False):
        if not isinstance(operand, fx.Node) or operand.op != "placeholder":
            continue
        if any(bool(tensor.isnan().any()) for tensor in _numbers(value)):
            raise error_at(
                node, f"{where}: '{operand.name}', a weight or an input, holds NaN",
                hint="look at the checkpoint, or at what was passed",
            )


def _numbers(values: Any) -> Iterator[torch.Tensor]:
    for leaf in tree_leaves(values):
        if torch.is_tensor(leaf) and leaf.is_floating_point():
            yield leaf


def _infinite_scalar(values: Any) -> bool:
    return any(isinstance(leaf, float) and not math.isfinite(leaf) for leaf in tree_leaves(values))


def _rank_of(program: Program) -> str:
    if program.mesh is None or program.coordinates is None:
        return "the model"
    return f"rank {program.mesh.rank(program.coordinates)}"
