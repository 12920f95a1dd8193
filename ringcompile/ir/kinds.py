"""What kind of work each op is: a column of the rule table, and a row for each operator of ours.

Most ops move bytes, at one of four rates (see `hardware.DEVICE_FIELDS`): plain streams, arithmetic
that is costly for each element, reductions and everything else that goes over a tensor in passes.
Many of these are *thin*: what they compute of an entry or of a row depends on little else, so that
one kernel can do several of them (`ir/fused.py`).
"""

from __future__ import annotations

from typing import Any

from ringcompile.errors import RingCompileError
from ringcompile.ir.calls import target_name
from ringcompile.ir.pure_ops import is_pure
from ringcompile.ir.rules import find_rule

# Of the operators that only appear while a program is partitioned, and so have no rule.
_OURS = {
    f"ringcompile.{name}.default": kind
    for name, kind in {
        "positions": "stream", "window_positions": "stream", "redistribute": "same", "wait": "same",
        "ring_attention": "attention", "block_attention": "block_attention",
        "cached_attention": "cached_attention", "attend_merge": "attend_merge", "merge": "merge",
        "finish": "finish", "pack": "view", "route": "sort", "store": "stream",
        "sort_rows": "sort_rows", "in_order": "join",
        "merge_states": "stream", "pack_state": "join", "running_sum": "scan",
        "running_recurrence": "recurrence", "linear_state": "linear_state",
        "chained_states": "chained_states",
        "running_linear_attention": "running_linear_attention",
        "recent": "join",
    }.items()
}


def kind_of(target: Any) -> str:
    """The kind of work that an op is; `ops.ROWS` has a row for each.

    Raises:
        RingCompileError: the op has no rule, so that nothing is known of it.
    """
    name, rule = target_name(target), find_rule(target)
    kind = _OURS.get(name) if rule is None else rule.cost
    if kind is None and is_pure(target):
        return "stream"  # read and written once, which is the least that it can cost
    if kind is None:
        raise RingCompileError(f"the cost model has no entry for {name}")
    return kind


def looks_at(target: Any) -> str:
    """Whether an op's result is another "view" of its operand, the "same", or new memory ("")."""
    name, rule = target_name(target), find_rule(target)
    kind = _OURS.get(name) if rule is None else rule.cost
    return kind if kind in ("view", "same") else ""


def is_elementwise(target: Any) -> bool:
    """Whether the op's result has the strides of its operand."""
    rule = find_rule(target)
    return rule is not None and rule.elementwise
