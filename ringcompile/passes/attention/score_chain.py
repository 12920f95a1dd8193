"""Attention written out by hand, read from its softmax: down to q k^T, and up to the values.

What stands between the two products is read as a list of steps, in the order in which the model
takes them. An op that is no such step is named, and the attention is left as it is.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ringcompile.ir.calls import Call
from ringcompile.ir.expr import Size, equal, is_symbolic
from ringcompile.ir.nodes import type_of
from ringcompile.ir.program import Program
from ringcompile.ir.types import TensorType
from ringcompile.passes.attention.score_steps import (
    Bend,
    Bias,
    Fill,
    HandWritten,
    NotUnderstoodError,
    Scale,
    Sink,
    Step,
    short,
)
from ringcompile.passes.contraction import Contraction, Operand, read


@dataclass
class Reader:
    """Reads attention around softmaxes of a program."""

    program: Program
    live: set[fx.Node] = field(default_factory=set)

    def __post_init__(self) -> None:
        for node in reversed(self.program.graph.nodes):
            if node.op == "output" or node in self.live:
                self.live.update([node, *node.all_input_nodes])

    def read(self, softmax: fx.Node) -> HandWritten:
        """The attention that a softmax belongs to.

        Raises:
            NotUnderstoodError: with the reason.
        """
        call = Call(softmax)
        rank = len(type_of(softmax).shape)
        if rank < 2 or call["dim"] % rank != rank - 1:
            raise NotUnderstoodError("its softmax is not taken over the last dim")
        down = _Down(self)
        scores = down.to_scores(call.operands[0])
        values, zeroed = _Up(self, down.steps).to_values(softmax)
        if not all(equal(softmax_size, size) for softmax_size, size in zip(
                type_of(values.operands[0].node).shape[-2:], down.shapes[0][-2:], strict=True)):
            raise NotUnderstoodError("its attention weights and its scores differ in shape")
        return HandWritten(scores, values, down.steps, down.shapes, zeroed)

    def users(self, node: fx.Node) -> list[fx.Node]:
        """The users whose results are needed."""
        return [user for user in node.users if user in self.live]

    def constant(self, value: object) -> float | None:
        """The number that an argument is, also where it stands in a tensor; None if unknown."""
        if isinstance(value, int | float):
            return float(value)
        if not isinstance(value, fx.Node):
            return None
        if value.op == "placeholder":
            return self._held(value)
        name = short(value)
        if name == "full":
            return self.constant(Call(value)["fill_value"])
        if name in ("to", "reshape", "expand", "permute"):
            return self.constant(value.args[0])
        if name in _ARITHMETIC and len(value.args) == _ARITHMETIC[name][0]:
            numbers = [self.constant(arg) for arg in value.args]
            return None if None in numbers else _ARITHMETIC[name][1](*numbers)
        return None

    def _held(self, node: fx.Node) -> float | None:
        """The only element of a constant of the model."""
        weight = self.program.weights.get(node.name)
        if weight is None or self.program.source is None or math.prod(weight.shape) != 1:
            return None
        tensor = self.program.source(weight.name)
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.is_meta:
            return None
        return float(tensor.reshape(-1)[0])


_ARITHMETIC: dict[str, tuple[int, Callable[..., float]]] = {
    "sqrt": (1, math.sqrt),
    "rsqrt": (1, lambda x: x**-0.5),
    "reciprocal": (1, lambda x: 1 / x),
    "neg": (1, operator.neg),
    "mul": (2, operator.mul),
    "div": (2, operator.truediv),
    "pow": (2, operator.pow),
}


@dataclass
class _Down:
    """From the softmax to the product that its scores are."""

    reader: Reader
    steps: list[Step] = field(default_factory=list)
    shapes: list[tuple[Size, ...]] = field(default_factory=list)

    def to_scores(self, node: fx.Node, above: int = 1) -> Contraction:
        """Follow the scores; `above` is the number of users a value may have."""
        num_users = len(self.reader.users(node))
        if num_users > above:
            raise NotUnderstoodError("its scores are also used elsewhere")
        type_ = node.meta.get("type")
        if not isinstance(type_, TensorType) or not type_.dtype.is_floating_point:
            raise NotUnderstoodError("its scores are not a floating-point tensor")
        found = read(node)
        if found is not None:
            self.shapes.append(type_.shape)
            return _scores(found)
        step = _DOWN.get(short(node)) if node.op == "call_function" else None
        if step is None:
            raise NotUnderstoodError(f"{node.target} is applied to its scores before the softmax, "
                                     "which is not supported")
        made = step(self, node)
        self.shapes.append(type_.shape)
        return made

    def scale(self, node: fx.Node) -> Contraction:
        """Mul and div."""
        divide = short(node) == "div"
        if divide and Call(node).get("rounding_mode") is not None:
            raise NotUnderstoodError("its scores are rounded")
        scores, factor = node.args[:2]
        if not self._is_score(scores, node) and not divide:
            scores, factor = factor, scores
        return self._then(scores, Scale(self._factor(factor), divide), node)

    def _factor(self, factor: Any) -> Any:
        known = self.reader.constant(factor)
        if known is not None:
            return known
        if not isinstance(factor, fx.Node):
            return factor  # a length
        shape = type_of(factor).shape
        if shape and not equal(shape[-1], 1):
            raise NotUnderstoodError("its scores are multiplied by a factor that differs from key "
                                     "to key")
        return factor

    def bias(self, node: fx.Node) -> Contraction:
        """Add and sub of a tensor: whichever operand leads to a product is the scores."""
        if Call(node).get("alpha", 1) != 1:
            raise NotUnderstoodError("something is added to its scores with alpha other than 1")
        sign = -1 if short(node) == "sub" else 1
        if sign < 0 and self._is_largest(node.args[1], node.args[0]):
            return self.to_scores(node.args[0], above=2)  # type: ignore[arg-type]
        ways = [(node.args[0], node.args[1])]
        if sign > 0:
            ways.append((node.args[1], node.args[0]))
        reasons = []
        for scores, other in ways:
            if not self._is_score(scores, node) or not isinstance(other, fx.Node):
                continue
            kept = len(self.steps), len(self.shapes)
            try:
                return self._then(scores, Bias(other, _lead(node), sign), node)
            except NotUnderstoodError as reason:
                reasons.append(reason)
                del self.steps[kept[0] :], self.shapes[kept[1] :]
        raise reasons[0] if reasons else NotUnderstoodError("a number is added to its scores")

    def _is_largest(self, value: object, scores: object) -> bool:
        """The largest score of each row, which no softmax notices the lack of."""
        if isinstance(value, fx.Node) and value.target is operator.getitem and value.args[1] == 0:
            value = value.args[0]
        if not isinstance(value, fx.Node) or short(value) not in ("amax", "max"):
            return False
        call = Call(value)
        dim = call.get("dim")
        dims = [dim] if isinstance(dim, int) else list(dim or [])
        last = len(type_of(scores).shape) - 1  # type: ignore[arg-type]
        return (call.operands[0] is scores and bool(call.get("keepdim"))
                and [d % (last + 1) for d in dims] == [last])

    def fill(self, node: fx.Node) -> Contraction:
        """Where and masked_fill."""
        call = Call(node)
        if short(node) == "masked_fill":
            mask, scores, value, where = call["mask"], call["self"], call["value"], True
        elif self._is_score(call["self"], node) and self._number(call["other"]) is not None:
            mask, scores, value, where = call["condition"], call["self"], call["other"], False
        else:
            mask, scores, value, where = call["condition"], call["other"], call["self"], True
        number = self._number(value)
        if number is None:
            raise NotUnderstoodError("its masked scores are not replaced by one constant")
        return self._then(scores, Fill(mask, _lead(node), number, where), node)

    def _number(self, value: object) -> float | None:
        return self.reader.constant(value)

    def bend(self, node: fx.Node) -> Contraction:
        """Tanh."""
        return self._then(node.args[0], Bend(), node)

    def sink(self, node: fx.Node) -> Contraction:
        """Cat of one column."""
        tensors, rank = Call(node)["tensors"], len(type_of(node).shape)
        if Call(node)["dim"] % rank != rank - 1 or len(tensors) != 2:
            raise NotUnderstoodError("its scores are concatenated with more than one column")
        single = [equal(type_of(x).shape[-1], 1) for x in tensors]
        if single.count(True) != 1:
            raise NotUnderstoodError("its scores are concatenated with more than one column")
        column, scores = tensors if single[0] else tensors[::-1]
        found = self.to_scores(scores)
        self.steps.append(Sink(column, single[0]))
        return found

    def clip(self, node: fx.Node) -> Contraction:
        """Maximum with the lowest number there is: for what a mask pushed below it."""
        ways = [(node.args[0], node.args[1]), (node.args[1], node.args[0])]
        for scores, other in ways:
            limit = self.reader.constant(other)
            if limit is not None and limit <= torch.finfo(type_of(node).dtype).min:
                return self.to_scores(scores)  # type: ignore[arg-type]
        raise NotUnderstoodError("its scores are clamped from below")

    def view(self, node: fx.Node) -> Contraction:
        """A reshape of the leading dims."""
        source, target = type_of(node.args[0]).shape, type_of(node).shape  # type: ignore[arg-type]
        if len(source) < 2 or not all(map(equal, source[-2:], target[-2:])):
            raise NotUnderstoodError("its scores are reshaped so that queries or keys are merged "
                                     "with other dims")
        return self.to_scores(node.args[0])  # type: ignore[arg-type]

    def cast(self, node: fx.Node) -> Contraction:
        """Another floating-point dtype; kernels score in float32, and in float64 for float64."""
        found = self.to_scores(node.args[0])  # type: ignore[arg-type]
        wide = type_of(node).dtype == torch.float64
        if wide and type_of(found.node).dtype != torch.float64:
            raise NotUnderstoodError("its softmax is in float64, but its queries are not")
        return found

    def _is_score(self, value: object, node: fx.Node) -> bool:
        return (isinstance(value, fx.Node)
                and len(type_of(value).shape) == len(type_of(node).shape)
                and all(map(equal, type_of(value).shape, type_of(node).shape)))

    def _then(self, scores: object, step: Step, node: fx.Node) -> Contraction:
        if not isinstance(scores, fx.Node) or not self._is_score(scores, node):
            raise NotUnderstoodError("its scores are broadcast to more")
        found = self.to_scores(scores)
        self.steps.append(step)
        return found


_DOWN: dict[str, Callable[[_Down, fx.Node], Contraction]] = {
    **dict.fromkeys(("mul", "div"), _Down.scale),
    **dict.fromkeys(("add", "sub"), _Down.bias),
    **dict.fromkeys(("where", "masked_fill"), _Down.fill),
    "tanh": _Down.bend,
    "maximum": _Down.clip,
    "cat": _Down.sink,
    "reshape": _Down.view,
    "to": _Down.cast,
}


def _lead(node: fx.Node) -> tuple[Size, ...]:
    return type_of(node).shape[:-2]


def _scores(found: Contraction) -> Contraction:
    """The product with the queries' operand first, if it is one of queries and keys."""
    if len(found.output) < 2 or not found.is_product or len(found.summed) != 1:
        raise NotUnderstoodError("its scores are not a matmul of queries and keys")
    (summed,) = found.summed
    if is_symbolic(found.size(summed)):
        raise NotUnderstoodError("the matmul of its scores sums over tokens")
    queries, keys = found.output[-2:]
    for which in (0, 1):
        if queries in found.alone(which) and keys in found.alone(1 - which):
            operands = (found.operands[which], found.operands[1 - which])
            return Contraction(found.node, operands, found.output)
    raise NotUnderstoodError("its scores are not a matmul of queries and keys")


@dataclass
class _Up:
    """From the softmax to the product of its weights and the values."""

    reader: Reader
    steps: list[Step]
    zeroed: list[fx.Node] = field(default_factory=list)

    def to_values(self, softmax: fx.Node) -> tuple[Contraction, list[fx.Node]]:
        sinks = [step for step in self.steps if isinstance(step, Sink)]
        node = softmax
        while True:
            users = self.reader.users(node)
            if len(users) != 1 or users[0].op != "call_function":
                raise NotUnderstoodError("its attention weights are also used elsewhere")
            user = users[0]
            found = read(user)
            if found is not None:
                if sinks:
                    raise NotUnderstoodError("the column of its attention sink is not removed "
                                             "before the matmul with the values")
                return _values(found, node), self.zeroed
            if short(user) == "slice" and sinks:
                self._drop(user, sinks.pop())
            elif not self._keeps(user, node):
                raise NotUnderstoodError(f"{user.target} changes its attention weights")
            node = user

    def _drop(self, node: fx.Node, sink: Sink) -> None:
        """The slice that leaves the sink's column out."""
        call, (*_, size) = Call(node), type_of(node.args[0]).shape  # type: ignore[arg-type]
        first = 1 if sink.first else 0
        rank = len(type_of(node).shape)
        kept = equal(type_of(node).shape[-1], size - 1)
        if call["dim"] % rank != rank - 1 or not equal(call["start"] or 0, first) or not kept:
            raise NotUnderstoodError("the column of its attention sink is not removed before the "
                                     "matmul with the values")

    def _keeps(self, user: fx.Node, node: fx.Node) -> bool:
        """Casts and views; and zeros where the mask has hidden keys anyway."""
        if short(user) == "to":
            return type_of(user).dtype.is_floating_point
        if short(user) == "reshape":
            source, target = type_of(node).shape, type_of(user).shape
            return len(target) > 1 and all(map(equal, source[-2:], target[-2:]))
        if short(user) != "masked_fill" or self.reader.constant(Call(user)["value"]) != 0:
            return False
        mask = Call(user)["mask"]
        hidden = [s.node for s in self.steps if isinstance(s, Fill) and s.where]
        if Call(user)["self"] is not node or mask not in hidden:
            return False
        self.zeroed.append(mask)
        return True


def _values(found: Contraction, weights: fx.Node) -> Contraction:
    """The product with the weights' operand first, if it sums over the keys."""
    nodes = [operand.node for operand in found.operands]
    if nodes.count(weights) != 1:
        raise NotUnderstoodError("its attention weights are multiplied by themselves")
    which = nodes.index(weights)
    own, other = found.operands[which], found.operands[1 - which]
    if not found.is_product or found.summed != {own.names[-1]}:
        raise NotUnderstoodError("its attention weights are not multiplied by the values in a "
                                 "plain matmul")
    if len(_features(own, other)) != 1 or own.names[-2] in other.names:
        raise NotUnderstoodError("its attention weights are not multiplied by the values in a "
                                 "plain matmul")
    lead = own.names[:-2]
    if not all(equal(found.size(n), s) for n, s in
               zip(lead, type_of(weights).shape, strict=False)):
        raise NotUnderstoodError("its attention weights are broadcast to more heads")
    return Contraction(found.node, (own, other), found.output)


def _features(weights: Operand, values: Operand) -> set[Hashable]:
    return set(values.names) - set(weights.names)
