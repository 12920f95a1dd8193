"""The mask operand of attention: several masks as one tensor of 4 dims."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import torch
from torch import fx

from ringcompile.ir.expr import Size
from ringcompile.ir.nodes import type_of
from ringcompile.ir.types import TensorType
from ringcompile.passes.base import Builder
from ringcompile.passes.views import in_heads, reshaped

aten = torch.ops.aten


def joined(nodes: list[fx.Node], builder: Builder) -> fx.Node | None:
    """One 4-dim mask operand from several nodes: bools are and-ed, additive ones added."""
    flags = [_four_dims(n, builder) for n in nodes if _is_bool(n)]
    biases = [_four_dims(n, builder) for n in nodes if not _is_bool(n)]
    visible = _fold(aten.logical_and.default, flags, builder)
    bias = _fold(aten.add.Tensor, biases, builder)
    if visible is None or bias is None:
        return visible if bias is None else bias
    return builder.call(
        aten.where.ScalarOther,
        (visible, bias, -inf),
        broadcast([visible, bias], type_of(bias).dtype),
    )


def as_mask(
    builder: Builder, x: fx.Node, lead: Sequence[Size], heads: tuple[Size, Size]
) -> fx.Node:
    """A tensor that is broadcast to [*lead, Sq, Sk], in the 4 dims [*heads, Sq, Sk]."""
    shape = type_of(x).shape
    padded = (*(1,) * (len(lead) + 2 - len(shape)), *shape)
    return in_heads(builder, reshaped(builder, x, padded), lead, heads)


def _fold(target: object, nodes: list[fx.Node], builder: Builder) -> fx.Node | None:
    if not nodes:
        return None
    total = nodes[0]
    for node in nodes[1:]:
        dtype = torch.promote_types(type_of(total).dtype, type_of(node).dtype)
        total = builder.call(target, (total, node), broadcast([total, node], dtype))
    return total


def broadcast(nodes: list[fx.Node], dtype: torch.dtype) -> TensorType:
    """The type of tensors of 4 dims broadcast together."""
    shapes = [type_of(node).shape for node in nodes]
    sizes = (next((s for s in sizes if s != 1), 1) for sizes in zip(*shapes, strict=True))
    return TensorType.whole(dtype, tuple(sizes))


def _four_dims(node: fx.Node, builder: Builder) -> fx.Node:
    type_ = type_of(node)
    if len(type_.shape) == 4:
        return node
    shape = (*(1,) * (4 - len(type_.shape)), *type_.shape)
    return builder.call(
        aten.reshape.default, (node, list(shape)), TensorType.whole(type_.dtype, shape)
    )


def _is_bool(node: fx.Node) -> bool:
    return type_of(node).dtype == torch.bool
