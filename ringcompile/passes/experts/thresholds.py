"""Whether a run of a region on a sample has reached every bound that counts of tokens can meet.

What is computed of several tokens (a count, a rank, a fraction, a position) may be compared with a
constant, clamped, or used as an address in a buffer of constant size. Fourteen tokens never fill
32 slots, so that a sample says nothing of a model that drops the 33rd token. A sample proves that
tokens do not change each other only if such values lay on both sides of each bound. Bounds that
grow with the sequence are no constants: the sample has them at its own length.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ringcompile.ir.calls import Call, aten_name
from ringcompile.ir.expr import is_symbolic
from ringcompile.ir.nodes import results_of
from ringcompile.ir.rules import FactorRule, find_rule

# What these make along the tokens is of several of them; of the last two, the indices are.
_MIXING = frozenset({
    "cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "sum", "nansum", "mean", "prod", "var",
    "std", "var_mean", "logsumexp", "linalg_vector_norm", "max", "min", "amax", "amin", "argmax",
    "argmin", "any", "all", "median", "mode", "kthvalue", "count_nonzero", "softmax", "log_softmax",
    "argsort", "sort", "topk", "recurrence", "linear_attention",
})
_ORDERING = frozenset({"sort", "topk"})
_COUNTING = frozenset({"bincount", "histc", "nonzero", "nonzero_numpy", "searchsorted",
                       "unique_consecutive", "_unique2", "repeat_interleave"})
# They add up entries: of whole numbers that is counting, of features it is bringing them along.
_ADDING = frozenset({"index_add", "scatter_add", "scatter_reduce", "scatter", "index_put"})
_COMPARING = frozenset({"lt", "le", "gt", "ge", "eq", "ne", "isclose", "clamp", "clamp_min",
                        "clamp_max", "minimum", "maximum", "bucketize"})
_DIVIDING = frozenset({"floor_divide", "remainder", "fmod"})
# The bounds at which an op of one operand bends; at a distance a smooth one shows nothing.
_BENDING: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("relu", "sign", "abs", "heaviside", "leaky_relu", "logical_not"), (0, 0)),
    "relu6": (0, 6),
    **dict.fromkeys(
        ("hardtanh", "hardsigmoid", "hardswish", "threshold", "sigmoid", "tanh", "erf", "exp",
         "softplus", "silu", "gelu", "softmax", "log_softmax", "elu", "mish", "log_sigmoid"),
        (-math.inf, math.inf),
    ),
}
_READING = frozenset({"gather", "index_select", "index", "embedding"})
# Those whose address is an argument `index`, in the dim `dim`.
_ADDRESSING = frozenset({"gather", "index_select", "index_add", "index_copy", "scatter",
                         "scatter_add", "scatter_reduce"})


@dataclass
class _Bound:
    """How far values came, and the smallest and largest number that they met.

    Attributes:
        beyond: whether a value has to lie above the largest one; else it may be equal to it.
    """

    beyond: bool
    low: float = math.inf
    high: float = -math.inf
    smallest: float = math.inf
    largest: float = -math.inf

    @property
    def reached(self) -> bool:
        above = self.high > self.largest if self.beyond else self.high >= self.largest
        return self.low <= self.smallest and above


@dataclass
class Thresholds:
    """Follows what is computed of several tokens through runs of a region.

    Attributes:
        grows: whether a size grows with the sequence.
        exempt: nodes whose outcome is computed over all tokens, outside of the region.
    """

    grows: Callable[[Any], bool]
    exempt: frozenset[fx.Node]
    mixed: set[fx.Node] = field(default_factory=set)
    scaling: set[fx.Node] = field(default_factory=set)
    bounds: dict[tuple[fx.Node, int], _Bound] = field(default_factory=dict)

    @property
    def reached(self) -> bool:
        """Whether every bound was reached, in the runs that were noted."""
        return all(bound.reached for bound in self.bounds.values())

    def note(self, node: fx.Node, operands: Mapping[fx.Node, Any], result: Any) -> None:
        """Take the values of one call into account.

        Args:
            node: the call.
            operands: the value of each node that it reads.
            result: what it gave.
        """
        if self._is_mixed(node, operands, result):
            self.mixed.add(node)
        elif self._holds_growing(node) or self.scaling & operands.keys():
            self.scaling.add(node)
        picks = node.target is operator.getitem
        if not picks and node not in self.exempt and self.mixed & operands.keys():
            self._meet(node, operands)

    # -- what is computed of several tokens ---------------------------------------------------

    def _is_mixed(self, node: fx.Node, operands: Mapping[fx.Node, Any], result: Any) -> bool:
        name, given = _short(node), [n for n in node.all_input_nodes if n in self.mixed]
        if node.target is operator.getitem:
            ordered = _short(node.args[0]) in _ORDERING  # type: ignore[arg-type]
            return bool(given) and not (ordered and node.args[1] == 0)
        if name == "arange":
            return self._holds_growing(node)
        if name == "full_like":
            return False
        if name in _MIXING and self._along_tokens(node):
            return True
        if name in _COUNTING:
            return bool(given) or any(map(self._is_of_tokens, node.all_input_nodes))
        if name in _ADDING:
            return self._adds_up(node, given, operands)
        if not given:
            return self._counts_by_matmul(node, operands)
        return self._passes(node, given, operands, result)

    def _adds_up(
        self, node: fx.Node, given: list[fx.Node], operands: Mapping[fx.Node, Any]
    ) -> bool:
        """Whether a result counts entries of several tokens, or brings counts along."""
        call = Call(node)
        where = call["indices"] if _short(node) == "index_put" else [call["index"]]
        indices = [index for index in where if index is not None]
        if not set(given) <= set(indices):
            return True
        dim = 0 if _short(node) in ("index_put", "index_add") else call["dim"]
        shapes = [results_of(index)[0].shape for index in indices]
        several = any(shape and self.grows(shape[dim]) for shape in shapes)
        return (several or bool(given)) and all(map(_is_whole_numbers, operands.values()))

    def _passes(
        self, node: fx.Node, given: list[fx.Node], operands: Mapping[fx.Node, Any], result: Any
    ) -> bool:
        """Whether a result is made of counts, and not only of what they choose."""
        if _short(node) in _READING:  # an entry of each token stays one, whatever its place
            first = node.all_input_nodes[0]
            return first in given or not self._is_of_tokens(first)
        rest = [n for n in operands if n not in given and self._is_of_tokens(n)]
        return not rest or _is_whole_numbers(result)

    def _counts_by_matmul(self, node: fx.Node, operands: Mapping[fx.Node, Any]) -> bool:
        rule = find_rule(node.target)
        if not isinstance(rule, FactorRule) or not rule.sums:
            return False
        names, call = rule.factors(Call(node)), Call(node)
        summed = set(rule.contracted(names))
        over_tokens = any(
            factor in summed and self.grows(size)
            for dims, x in zip(names.operands, call.operands, strict=True)
            for factor, size in zip(dims, results_of(x)[0].shape, strict=True)
        )
        return over_tokens and all(map(_is_whole_numbers, operands.values()))

    def _along_tokens(self, node: fx.Node) -> bool:
        call = Call(node)
        shape, dims = results_of(call.operands[0])[0].shape, call.get("dim")
        listed = [dims] if isinstance(dims, int) else list(dims or range(len(shape)))
        return any(self.grows(shape[dim]) for dim in listed) if shape else False

    def _is_of_tokens(self, node: fx.Node) -> bool:
        return any(self.grows(size) for type_ in results_of(node) for size in type_.shape)

    def _holds_growing(self, node: fx.Node) -> bool:
        leaves = pytree.tree_leaves((node.args, dict(node.kwargs)))
        return any(map(self.grows, filter(is_symbolic, leaves)))

    # -- the bounds that it meets -------------------------------------------------------------

    def _meet(self, node: fx.Node, operands: Mapping[fx.Node, Any]) -> None:
        name, call = _short(node), Call(node)
        if name in _COMPARING:
            self._compared(node, call, operands)
        elif name in _DIVIDING or call.get("rounding_mode") is not None:
            self._divided(node, call, operands)
        elif name in _BENDING or _is_flag(node):
            self._bent(node, operands)
        elif name == "one_hot":
            self._addressed(node, 0, call["self"], call["num_classes"], operands)
        elif name == "embedding":
            self._looked_up(node, call["indices"], call["weight"], 0, operands)
        elif name in ("index", "index_put"):
            for dim, where in enumerate(call["indices"]):
                if where is not None:
                    self._looked_up(node, where, call["self"], dim, operands)
        elif name in _ADDRESSING:
            self._looked_up(node, call["index"], call["self"], call["dim"], operands)

    def _compared(self, node: fx.Node, call: Call, operands: Mapping[fx.Node, Any]) -> None:
        values = list(call.arguments.values())
        counts = [x for x in values if isinstance(x, fx.Node) and x in self.mixed]
        others = [x for x in values if not (isinstance(x, fx.Node) and x in self.mixed)]
        for i, other in enumerate(others):
            if other is None or isinstance(other, bool) or self._is_growing(other):
                continue
            met = operands[other] if isinstance(other, fx.Node) else other
            if isinstance(met, Tensor | int | float):
                self._grow(node, i, [operands[x] for x in counts], met)

    def _is_growing(self, value: Any) -> bool:
        if isinstance(value, fx.Node):
            return value in self.scaling
        return is_symbolic(value) and self.grows(value)

    def _divided(self, node: fx.Node, call: Call, operands: Mapping[fx.Node, Any]) -> None:
        divisor = list(call.arguments.values())[1]
        if self._is_growing(divisor) or divisor in self.mixed:
            return
        met = operands[divisor] if isinstance(divisor, fx.Node) else divisor
        counts = [operands[x] for x in call.operands if x in self.mixed]
        self._grow(node, 0, counts, 2 * met)

    def _bent(self, node: fx.Node, operands: Mapping[fx.Node, Any]) -> None:
        low, high = _BENDING.get(_short(node), (0, 0))
        counts = [operands[x] for x in operands if x in self.mixed]
        if not all(x.dtype == torch.bool for x in counts if isinstance(x, Tensor)):
            self._grow(node, 0, counts, torch.tensor([low, high]))

    def _looked_up(
        self, node: fx.Node, index: fx.Node, table: fx.Node, dim: int,
        operands: Mapping[fx.Node, Any],
    ) -> None:
        size = results_of(table)[0].shape[dim]
        # The sample's own weights differ from row to row, so that another row would show.
        drawn = table.op == "placeholder" and results_of(table)[0].dtype.is_floating_point
        if index in self.mixed and not drawn and results_of(index)[0].dtype != torch.bool:
            self._addressed(node, dim, index, size, operands)

    def _addressed(
        self, node: fx.Node, which: int, index: fx.Node, size: Any,
        operands: Mapping[fx.Node, Any],
    ) -> None:
        """An address in a dim of constant size: the sample has to fill it."""
        if isinstance(size, int) and size > 0:
            bounds = torch.tensor([0, size - 1])
            self._grow(node, which, [operands[index]], bounds, beyond=False)

    def _grow(
        self, node: fx.Node, which: int, counts: list[Any], met: Any, beyond: bool = True
    ) -> None:
        bound = self.bounds.setdefault((node, which), _Bound(beyond))
        for x in (x for x in counts if isinstance(x, Tensor) and x.numel()):
            bound.low, bound.high = min(bound.low, float(x.min())), max(bound.high, float(x.max()))
        limit = met if isinstance(met, Tensor) else torch.tensor(float(met))
        if limit.numel():
            bound.smallest = min(bound.smallest, float(limit.min()))
            bound.largest = max(bound.largest, float(limit.max()))


def _is_flag(node: fx.Node) -> bool:
    """A cast to true or false."""
    return _short(node) == "to" and results_of(node)[0].dtype == torch.bool


def _is_whole_numbers(value: Any) -> bool:
    """Whether all of a value are whole numbers: counts, ranks, flags, whatever their dtype."""
    if not isinstance(value, Tensor):
        return isinstance(value, int | float) and float(value).is_integer()
    return not value.dtype.is_floating_point or bool((value == value.round()).all())


def _short(node: fx.Node) -> str:
    return aten_name(node.target)
