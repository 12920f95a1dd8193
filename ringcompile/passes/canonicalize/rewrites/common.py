"""What all rewrites use: names of ops, operands in the new graph, shapes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import fx

from ringcompile.ir.calls import aten_name, target_name
from ringcompile.ir.expr import spelled
from ringcompile.ir.nodes import type_of
from ringcompile.ir.types import TensorType
from ringcompile.passes.base import Builder
from ringcompile.passes.views import same_shape

aten = torch.ops.aten

# From a call of the old graph to what stands for it in the new one: a node, a list, or None.
Rewrite: TypeAlias = Callable[[Builder, fx.Node], Any]

# Second names that torch has for one op, with the same overloads and arguments.
ALIASES = {
    "multiply": "mul", "divide": "div", "true_divide": "div", "subtract": "sub", "absolute": "abs",
    "negative": "neg", "greater": "gt", "greater_equal": "ge", "less": "lt", "less_equal": "le",
    "not_equal": "ne", "clip": "clamp", "fix": "trunc", "arccos": "acos", "arcsin": "asin",
    "arctan": "atan", "concat": "cat", "concatenate": "cat", "special_expit": "sigmoid",
    "special_erf": "erf", "special_log1p": "log1p", "special_logsumexp": "logsumexp",
}


def short_name(node: fx.Node) -> str:
    """The op's name without namespace and overload; getitem by its own name."""
    if node.target is operator.getitem:
        return "getitem"
    return aten_name(node.target)


def operand(builder: Builder, node: fx.Node) -> fx.Node:
    """The first operand of a call, in the new graph."""
    new = builder.env[node.args[0]]  # type: ignore[index]
    assert isinstance(new, fx.Node)
    return new


def as_shape(builder: Builder, x: fx.Node, type_: TensorType, name: str) -> fx.Node:
    """`x` reshaped to a type's shape, or as it is."""
    if same_shape(type_of(x).shape, type_.shape):
        return x
    return builder.call(aten.reshape.default, (x, spelled(type_.shape)), type_, name=name)


def renamed(builder: Builder, node: fx.Node) -> fx.Node:
    """The same call by the op's first name."""
    new = builder.copy(node)
    _, short, overload = target_name(node.target).split(".")
    new.target = getattr(getattr(aten, ALIASES[short]), overload)
    return new
