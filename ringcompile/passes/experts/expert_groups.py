"""Experts found in a graph: the nodes that run on rows of experts, or on buffers of their slots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from ringcompile.ir.calls import Call, target_name
from ringcompile.ir.expr import OWN, Size, equal, is_symbolic, symbol
from ringcompile.ir.nodes import location_of, reached, results_of, type_of
from ringcompile.ir.program import Program
from ringcompile.ir.rules import FactorRule, find_rule
from ringcompile.ir.types import TensorType
from ringcompile.ops.schemas import op
from ringcompile.passes.unpacked import Unpacked

_EXPERT_LINEAR = op("expert_linear")
_BATCHED = ("aten.bmm.default", "aten.matmul.default", "aten.baddbmm.default",
            "aten.einsum.default")  # fmt: skip


@dataclass(frozen=True)
class Group:
    """Nodes that run on rows of experts, from the first product with their weights to the last.

    Attributes:
        nodes: all of them, in order.
        weights: what they read that has an entry an expert.
        entering: what they read that has rows, or slots.
        leaving: what of them is read elsewhere.
        expert: the index of each row's expert; None for buffers.
        num_experts: how many there are.
    """

    nodes: tuple[fx.Node, ...]
    weights: tuple[fx.Node, ...]
    entering: tuple[fx.Node, ...]
    leaving: tuple[fx.Node, ...]
    expert: fx.Node | None
    num_experts: int


def groups_of_rows(program: Program) -> list[Group]:
    """What runs between the first and the last `expert_linear` of the same rows."""
    by_expert: dict[fx.Node, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.target is _EXPERT_LINEAR:
            by_expert.setdefault(Call(node)["expert"], []).append(node)
    order = {node: i for i, node in enumerate(program.graph.nodes)} if by_expert else {}
    return [_row_group(program, expert, nodes, order) for expert, nodes in by_expert.items()]


def _row_group(
    program: Program, expert: fx.Node, products: Sequence[fx.Node], order: Mapping[fx.Node, int]
) -> Group:
    nodes = _between(products, order)
    weights = dict.fromkeys(
        x for node in products for name in ("weight", "bias") if (x := Call(node)[name]) is not None
    )
    rows = len(type_of(expert).shape)
    entering = dict.fromkeys(
        x
        for node in nodes
        for x in Call(node).operands
        if x not in nodes and x not in weights and x is not expert
        and len(type_of(x).shape) >= rows and x.name not in program.weights
    )
    return Group(
        nodes, tuple(weights), tuple(entering), _leaving(nodes), expert,
        int(type_of(Call(products[0])["weight"]).shape[0]),
    )


def _between(ends: Sequence[fx.Node], order: Mapping[fx.Node, int]) -> tuple[fx.Node, ...]:
    """Every node on a way from one of these to another, and these."""
    first, last = min(map(order.__getitem__, ends)), max(map(order.__getitem__, ends))
    below = reached(ends, lambda node: [n for n in node.users if order[n] <= last])
    above = reached(ends, lambda node: [n for n in node.all_input_nodes if order[n] >= first])
    return tuple(sorted(below & above, key=order.__getitem__))


def _leaving(nodes: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
    return tuple(n for n in nodes if any(user not in nodes for user in n.users))


def groups_of_buffers(program: Program, of_own_tokens: bool = True) -> list[Group]:
    """Chains of batched products whose batch is the experts: [E, C, D] x weight [E, D, F].

    Args:
        program: layouts along the sequence are chosen.
        of_own_tokens: only buffers whose slots are counted by each rank's own tokens.
    """
    unpacked = Unpacked(lambda node: node.name in program.weights)
    products = [
        n for n in program.graph.nodes
        if _is_expert_product(n, unpacked) and (not of_own_tokens or _counts_own_tokens(n))
    ]
    order = {node: i for i, node in enumerate(program.graph.nodes)} if products else {}
    groups: list[Group] = []
    seen: set[fx.Node] = set()
    for node in products:
        if node in seen:
            continue
        layer = location_of(node).layer
        alike = [n for n in products if location_of(n).layer == layer and n not in seen]
        seen.update(alike)
        group = _group_of(_between(alike, order), unpacked)
        if group is not None:
            groups.append(group)
    return groups


def _is_expert_product(node: fx.Node, unpacked: Unpacked) -> bool:
    """A product in which the first dim of a weight of three is a batch dim of slots."""
    if target_name(node.target) not in _BATCHED or not isinstance(node.meta["type"], TensorType):
        return False
    rule, call = find_rule(node.target), Call(node)
    assert isinstance(rule, FactorRule)
    operands, bias = call.operands, rule.given_bias(call)
    weights = [x for x in operands if unpacked.weights(x) and not (bias and x is call[bias])]
    if len(weights) != 1 or len(type_of(weights[0]).shape) != 3:
        return False
    names = rule.factors(call)
    factor = names.operands[operands.index(weights[0])][0]
    return factor is not None and names.output[:1] == (factor,) and len(names.output) == 3


def _counts_own_tokens(node: fx.Node) -> bool:
    slots = type_of(node).shape[1]
    return is_symbolic(slots) and symbol(OWN) in slots.free_symbols


def with_what_follows(program: Program, group: Group) -> Group:
    """A group of buffers with the ops behind its last matmul that keep slots, such as a bias."""
    unpacked = Unpacked(lambda node: node.name in program.weights)
    num_experts, slots = type_of(group.nodes[0]).shape[:2]
    nodes = dict.fromkeys(group.nodes)
    work = [user for node in group.leaving for user in node.users]
    while work:
        node = work.pop(0)
        if node not in nodes and _keeps_slots(node, num_experts, slots) and all(
            x in nodes or _of_experts(x, num_experts, unpacked) for x in node.all_input_nodes
        ):
            nodes[node] = None
            work += node.users
    return _group_of(tuple(nodes), unpacked) or group


def _of_experts(x: fx.Node, num_experts: Size, unpacked: Unpacked) -> bool:
    """Whether a value [E, .., ..] is made of weights alone."""
    shape = type_of(x).shape if isinstance(x.meta["type"], TensorType) else ()
    return bool(unpacked.weights(x)) and len(shape) == 3 and shape[0] == num_experts


def _group_of(nodes: tuple[fx.Node, ...], unpacked: Unpacked) -> Group | None:
    num_experts, slots = type_of(nodes[0]).shape[:2]
    if not all(_keeps_slots(node, num_experts, slots) for node in nodes):
        return None
    operands = dict.fromkeys(x for n in nodes for x in Call(n).operands if x not in nodes)
    weights = tuple(x for x in operands if _of_experts(x, num_experts, unpacked))
    entering = tuple(
        x for x in operands if x not in weights and _keeps_slots(x, num_experts, slots)
    )
    if len(weights) + len(entering) < len(operands):
        return None
    return Group(nodes, weights, entering, _leaving(nodes), None, int(num_experts))


def _keeps_slots(node: fx.Node, num_experts: Size, slots: Size) -> bool:
    """Whether a value is [E, C, ...], one entry an expert and a slot."""
    if node.op != "call_function":
        return False
    shapes = [type_.shape[:2] for type_ in results_of(node)]
    return all(
        len(shape) == 2 and shape[0] == num_experts and equal(shape[1], slots) for shape in shapes
    )
