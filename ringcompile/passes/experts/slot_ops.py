"""What experts do to their slots: matmuls with a matrix an expert, and ops on each slot alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ringcompile.ir.calls import Call, aten_name
from ringcompile.ir.expr import equal
from ringcompile.ir.nodes import results_of, type_of
from ringcompile.ir.rules import FactorRule, find_rule
from ringcompile.ir.rules.base import Names
from ringcompile.passes.experts.expert_groups import Group

# Ops of one operand that make 0 of 0.
_ZERO_OF_ZERO = frozenset({
    "relu", "gelu", "silu", "tanh", "abs", "leaky_relu", "elu", "celu", "selu", "mish", "hardswish",
    "neg", "square", "relu6", "erf", "sin", "tan", "atan", "sinh", "asinh", "sign", "slice", "to",
    "glu",
})
_SUMS = frozenset({"add", "sub", "cat", "maximum", "minimum"})


@dataclass(frozen=True)
class Product:
    """A matmul of slots [E, C, I] with a matrix for each expert.

    Attributes:
        slots: [E, C, I].
        weight: [E, O, I], or [E, I, O] if transposed.
        transposed: whether the matrices are stored as input by output.
        bias: [E, 1, O], which is added.
    """

    slots: fx.Node
    weight: fx.Node
    transposed: bool
    bias: fx.Node | None


def product_of(node: fx.Node, group: Group) -> Product | None:
    """The matmul that a node is; None if it is something else."""
    rule, call = find_rule(node.target), Call(node)
    if not isinstance(rule, FactorRule) or not rule.sums:
        return None
    bias = call[rule.given_bias(call)] if rule.given_bias(call) else None  # type: ignore[index]
    if bias is not None and (call.get("beta", 1), call.get("alpha", 1)) != (1, 1):
        return None
    names = rule.factors(call)
    factors = dict(zip(call.operands, names.operands, strict=True))
    pair = [x for x in call.operands if x is not bias]
    if len(pair) != 2 or len(set(pair)) != 2 or len(names.output) != 3:
        return None
    weight = next((x for x in pair if x in group.weights), None)
    if weight is None or (bias is not None and not _of_expert(bias, group)):
        return None
    slots = next(x for x in pair if x is not weight)
    expert, slot, column = names.output
    if len(factors[slots]) != 3 or factors[slots][:2] != (expert, slot):
        return None
    inner = factors[slots][2]
    orders: dict[Names, bool] = {(expert, column, inner): False, (expert, inner, column): True}
    if len({expert, slot, column, inner}) != 4 or factors[weight] not in orders:
        return None
    return Product(slots, weight, orders[factors[weight]], bias)


def _of_expert(x: fx.Node, group: Group) -> bool:
    """Whether a value [E, 1, F] is one for all slots of an expert."""
    return x in group.weights and equal(type_of(x).shape[1], 1)


def runs_by_slot(group: Group) -> bool:
    """Whether every node makes each slot of the same slot of what it reads, and of its expert."""
    return all(product_of(node, group) or _pointwise(node, group) for node in group.nodes)


def _pointwise(node: fx.Node, group: Group) -> bool:
    rule = find_rule(node.target)
    if not isinstance(rule, FactorRule) or rule.sums or rule.shape_argument is not None:
        return False
    if len(results_of(node)) > 1:
        return False
    names = rule.factors(Call(node))
    return None not in names.output[:2] and all(
        _fits(x, dims, names.output, group)
        for x, dims in zip(Call(node).operands, names.operands, strict=True)
    )


def _fits(x: fx.Node, dims: Names, output: Names, group: Group) -> bool:
    if x in group.weights:
        return _of_expert(x, group) and dims[0] == output[0]
    return dims[:2] == output[:2]


def gives_zeros(group: Group) -> bool:
    """Whether all that leaves the experts is 0 for a slot of zeros."""
    zero = set(group.entering)
    for node in group.nodes:
        if _is_zero(node, group, zero):
            zero.add(node)
    return zero >= set(group.leaving)


def _is_zero(node: fx.Node, group: Group, zero: set[fx.Node]) -> bool:
    found = product_of(node, group)
    if found is not None:
        return found.slots in zero and found.bias is None
    call, name = Call(node), aten_name(node.target)
    if name == "mul":
        return any(x in zero for x in call.operands)
    all_zero = bool(call.operands) and all(x in zero for x in call.operands)
    if name in _SUMS:
        return all_zero and not isinstance(call.get("other"), int | float)
    return all_zero and name in _ZERO_OF_ZERO
