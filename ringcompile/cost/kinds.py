"""What kind of work each op is, read off the rule table: an op with a rule has a cost.

Most ops move bytes, at one of four rates (see `hardware.DEVICE_FIELDS`): plain streams, arithmetic
that is costly for each element, reductions and everything else that goes over a tensor in passes.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

from ringcompile.errors import RingCompileError
from ringcompile.ir.rules import FactorRule, find_rule, spatial, table
from ringcompile.ir.rules import indexing as rows_by_index

# Another way to look at the same memory, unless torch has to copy.
VIEWS = frozenset({
    "aten.reshape.default", "aten.permute.default", "aten.slice.Tensor", "aten.expand.default",
    "aten.select.int", "aten.unfold.default", "aten.view_as_real.default",
    "aten.view_as_complex.default", "aten.real.default",
})
# The operand itself.
SAME = frozenset({
    "ringcompile.redistribute.default", "ringcompile.tokenwise.default",
    "ringcompile.wait.default", "aten._conj.default", "aten.conj.default",
    "aten.resolve_conj.default", "aten.positive.default",
})
_SPECIAL = frozenset(
    f"aten.{name}.default" for name in (
        "exp", "exp2", "expm1", "log", "log2", "log1p", "log10", "sqrt", "rsqrt", "reciprocal",
        "sin", "cos", "tan", "tanh", "sigmoid", "erf", "erfc", "erfinv", "silu", "gelu", "elu",
        "celu", "selu", "mish", "softplus", "log_sigmoid", "sinh", "cosh", "asin", "acos", "atan",
        "asinh", "acosh", "atanh", "logit", "atan2", "polar", "logaddexp", "hypot", "angle", "glu",
    )
) | {"aten.pow.Tensor_Scalar", "aten.pow.Tensor_Tensor", "aten.pow.Scalar", "aten.xlogy.Tensor"}
_STREAMS = frozenset({
    "ringcompile.positions.default", "ringcompile.finish.default", "ringcompile.store.default",
    "ringcompile.merge_states.default",
})
# How the dims of an op are tied says how it goes over memory.
_BY_FACTORS = {
    table.pointwise: "stream",
    table.creation: "stream",
    table.stack: "stream",
    table.real_pairs: "stream",
    table.embedding: "stream",
    table.last_two_whole: "stream",
    table._flip: "stream",
    table._glu: "special",
    table.along_dim: "reduction",
    table.scan: "reduction",
    table.reduction: "reduction",
    table.reduce_listed: "reduction",
    table.reduce_all: "reduction",
    table.trailing_whole: "reduction",
    table.all_whole: "reduction",
    rows_by_index.index_select: "stream",
    rows_by_index.index: "stream",
    rows_by_index.gather: "stream",
    rows_by_index.index_put: "stream",
    rows_by_index.index_add: "stream",
    rows_by_index.scatter: "stream",
    rows_by_index.slice_scatter: "stream",
    rows_by_index.select_scatter: "stream",
    rows_by_index.one_hot: "stream",
    rows_by_index.bucketize: "stream",
    rows_by_index.roll: "stream",
    spatial.pad: "stream",
    spatial.pooling: "reduction",
    spatial.channel_norm: "reduction",
    spatial.group_norm: "reduction",
}


@lru_cache
def memory_kind(target: Any) -> str:
    """Which of a device's rates an op that moves bytes works at.

    Raises:
        RingCompileError: the op has no rule, so that nothing is known of it.
    """
    name = str(target)
    if name in _STREAMS:
        return "stream"
    if name in _SPECIAL:
        return "special"
    kind = _BY_FACTORS.get(_factors(target))
    if kind is None:
        raise RingCompileError(f"nothing is known of what {name} costs")
    return kind


@lru_cache
def is_elementwise(target: Any) -> bool:
    """Whether the op's result has the strides of its operand."""
    return _factors(target) is table.pointwise


def _factors(target: Any) -> Any:
    rule = find_rule(target)
    found = rule.factors if isinstance(rule, FactorRule) else None
    return found.func if isinstance(found, partial) else found
