"""Ops that a partial sum may pass through: what they do to a sum they do to its terms."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ringcompile.ir.calls import Call

# Linear in the first operand, whatever the others are.
_IN_FIRST = frozenset(
    f"aten.{name}"
    for name in (
        "reshape.default", "permute.default", "expand.default", "slice.Tensor", "select.int",
        "index_select.default", "index.Tensor", "gather.default", "neg.default",
        "sum.dim_IntList", "mean.dim", "mul.Scalar", "div.Scalar", "div.Tensor",
    )
)  # fmt: skip
# Linear in each of the operands while the others are no sums.
_IN_ONE = frozenset({"aten.mul.Tensor"})
# Linear in all operands together.
_IN_ALL = frozenset({"aten.stack.default", "aten.cat.default"})

# Linear only for some arguments.
_IF: dict[str, Callable[[Call], bool]] = {
    "aten.constant_pad_nd.default": lambda call: call["value"] == 0,
    "aten.masked_fill.Scalar": lambda call: call["value"] == 0,
    "aten.where.ScalarOther": lambda call: call["other"] == 0,
    "aten.add.Tensor": lambda call: len(call.operands) == 2,
    "aten.sub.Tensor": lambda call: len(call.operands) == 2,
}
_ALL_IF = frozenset({"aten.add.Tensor", "aten.sub.Tensor"})
# Which operand is the sum, where it is not the first.
_SUM_AT = {"aten.where.ScalarOther": 1}


def passes_partial(call: Call, partials: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The axes over which an op's result is a partial sum, if its operands may stay ones.

    Args:
        call: the op.
        partials: for each operand, the axes over which it is a partial sum.

    Returns:
        nothing where no operand is one, or where the sum has to be made first.
    """
    target = str(call.target)
    axes = next(filter(None, partials), ())
    where = [i for i, partial in enumerate(partials) if partial]
    if not axes or (target in _IF and not _IF[target](call)):
        return ()
    if target in _IN_ALL or target in _ALL_IF:
        return axes if where == list(range(len(partials))) else ()
    if target in _IN_ONE:
        return axes if len(where) == 1 else ()
    if target in _IN_FIRST or target in _IF:
        return axes if where == [_SUM_AT.get(target, 0)] else ()
    return ()
