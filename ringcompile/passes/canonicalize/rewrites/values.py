"""Values: what changes nothing goes, casts, constants, positions and masks as indices."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ringcompile.errors import RingCompileError
from ringcompile.ir.calls import Call, target_name
from ringcompile.ir.expr import depends_on_data, spelled, unbacked
from ringcompile.ir.nodes import type_of
from ringcompile.ir.types import TensorType
from ringcompile.passes.base import Builder
from ringcompile.passes.canonicalize.rewrites.common import Rewrite, operand, short_name
from ringcompile.passes.canonicalize.rewrites.moved import picked_by_positions

aten = torch.ops.aten
# Sizes that torch has no symbol for are named from here on.
_FIRST_OWN = 100_000


def _identity(builder: Builder, node: fx.Node) -> Any:
    return builder.env[node.args[0]]  # type: ignore[index]


def _removed(builder: Builder, node: fx.Node) -> None:
    return None


def _elementwise(target: Any) -> Callable[[Builder, fx.Node], fx.Node]:
    """Min and max of two tensors, which share their names with reductions."""

    def rewrite(builder: Builder, node: fx.Node) -> fx.Node:
        new = builder.copy(node)
        if target_name(node.target).endswith(".other"):
            new.target = target
        return new

    return rewrite


def _cast(builder: Builder, node: fx.Node) -> fx.Node:
    x, dtype = operand(builder, node), type_of(node).dtype
    if type_of(x).dtype == dtype:
        return x
    return builder.call(aten.to.dtype, (x, dtype), type_of(node), name=node.name)


def _neutral(neutral: float) -> Callable[[Builder, fx.Node], fx.Node]:
    """`x + 0` and `x * 1` where they change neither shape nor dtype."""

    def rewrite(builder: Builder, node: fx.Node) -> fx.Node:
        call, x = Call(node), builder.env[node.args[0]]  # type: ignore[index]
        other = call["other"]
        if isinstance(other, int | float) and other == neutral and type_of(x) == type_of(node):
            return x
        return builder.copy(node)

    return rewrite


def _full(value: Any) -> Callable[[Builder, fx.Node], fx.Node]:
    def rewrite(builder: Builder, node: fx.Node) -> fx.Node:
        type_ = type_of(node)
        fill = Call(node)["fill_value"] if value is None else value
        if isinstance(fill, fx.Node):
            return builder.copy(node)
        if any(map(depends_on_data, type_.shape)) and short_name(node).endswith("_like"):
            return builder.call(
                aten.full_like.default, (operand(builder, node), fill), type_, dtype=type_.dtype
            )
        return builder.call(
            aten.full.default, (list(type_.shape), fill), type_, name=node.name, dtype=type_.dtype
        )

    return rewrite


def _arange(builder: Builder, node: fx.Node) -> fx.Node:
    call, type_ = Call(node), type_of(node)
    start, step = call.get("start", 0) or 0, call.get("step", 1)
    return builder.call(
        aten.arange.start_step, (start, call["end"], step), type_, name=node.name, dtype=type_.dtype
    )


def _scalar_tensor(builder: Builder, node: fx.Node) -> fx.Node:
    type_ = type_of(node)
    return builder.call(
        aten.full.default, ([], Call(node)["s"]), type_, name=node.name, dtype=type_.dtype
    )


def _dropout(builder: Builder, node: fx.Node) -> fx.Node:
    call = Call(node)
    if call.get("train", call.get("training")) and call["p"] > 0:
        raise RingCompileError(
            f"dropout with p={call['p']} is left on", hint="call model.eval() before capture"
        )
    return operand(builder, node)


def _picked(builder: Builder, node: fx.Node) -> fx.Node:
    """Picking by moved positions is moving; by other indices it is what it is."""
    call, entries = Call(node), Call(node)["indices"]
    given = [dim for dim, entry in enumerate(entries) if entry is not None]
    found = None
    if len(given) == 1:
        index = builder.env[entries[given[0]]]
        found = picked_by_positions(builder, builder.env[call["self"]], given[0], index)
    return found or _index(builder, node)


def _index_select(builder: Builder, node: fx.Node) -> fx.Node:
    call, x = Call(node), operand(builder, node)
    dim, index = call["dim"] % max(len(type_of(x).shape), 1), builder.env[call["index"]]
    alone = not type_of(x).shape or not type_of(index).shape
    return (None if alone else picked_by_positions(builder, x, dim, index)) or builder.copy(node)


def _index(builder: Builder, node: fx.Node) -> fx.Node:
    """A mask among the indices becomes the positions where it holds."""
    call = Call(node)
    entries: list[Any] = []
    for entry in call["indices"]:
        index = builder.env[entry] if entry is not None else None
        if index is None or type_of(index).dtype not in (torch.bool, torch.uint8):
            entries.append(index)
        else:
            entries += _where_true(builder, index, node)
    args = (operand(builder, node), entries, *builder.mapped(node.args[2:]))
    return builder.call(node.target, args, type_of(node), name=node.name)


def _index_put(builder: Builder, node: fx.Node) -> fx.Node:
    """`x[mask] = value`, with one value for all, chooses between two: no entry is looked up."""
    call = Call(node)
    mask, values = call["indices"][0], type_of(call["values"])
    rank, masked = len(type_of(node).shape), 0 if mask is None else len(type_of(mask).shape)
    alone = mask is not None and type_of(mask).dtype == torch.bool and not any(call["indices"][1:])
    if not alone or call["accumulate"] or len(values.shape) > rank - masked:
        return _index(builder, node)
    shape = (*type_of(mask).shape, *(1,) * (rank - masked))
    wide = TensorType.whole(torch.bool, shape)
    opened = builder.call(aten.reshape.default, (builder.env[mask], spelled(shape)), wide)
    args = (opened, builder.env[call["values"]], operand(builder, node))
    return builder.call(aten.where.self, args, type_of(node), name=node.name)


def _where_true(builder: Builder, mask: fx.Node, node: fx.Node) -> list[fx.Node]:
    """One index tensor for each dim of the mask; how many entries, only the data tells."""
    values = Call(node).get("values")
    sizes = type_of(values).shape if values is not None else type_of(node).shape
    fresh = unbacked(f"u{_FIRST_OWN + len(builder.graph.nodes)}")
    size = next(filter(depends_on_data, sizes), fresh)
    found = TensorType.whole(torch.int64, (size,))
    rank = len(type_of(mask).shape)
    made = builder.call(aten.where.default, (mask,), (found,) * rank)
    return [builder.call(operator.getitem, (made, i), found) for i in range(rank)]


def _baddbmm(builder: Builder, node: fx.Node) -> fx.Node:
    call, type_ = Call(node), type_of(node)
    bias, left, right = (builder.env[call[name]] for name in ("self", "batch1", "batch2"))
    product = builder.call(aten.matmul.default, (left, right), type_)
    if call["alpha"] != 1:
        product = builder.call(aten.mul.Tensor, (product, call["alpha"]), type_)
    if call["beta"] == 0:  # what is there is not read, not even a NaN
        return product
    if call["beta"] != 1:
        bias = builder.call(aten.mul.Tensor, (bias, call["beta"]), type_of(bias))
    return builder.call(aten.add.Tensor, (product, bias), type_, name=node.name)


VALUES: dict[str, Rewrite] = {
    **dict.fromkeys(
        ["contiguous", "clone", "detach", "detach_", "alias", "lift_fresh_copy", "lift_fresh"],
        _identity,
    ),
    **dict.fromkeys(
        ["_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range",
         "sym_constrain_range_for_size"],
        _removed,
    ),
    **dict.fromkeys(["to", "_to_copy", "type_as", "_to_cpu", "bool", "float"], _cast),
    **dict.fromkeys(["ones", "ones_like", "new_ones"], _full(1)),
    # What is in an empty tensor is not told, so zeros are as good as anything.
    **dict.fromkeys(
        ["zeros", "zeros_like", "new_zeros", "empty", "empty_like", "new_empty"], _full(0)
    ),
    **dict.fromkeys(["full", "full_like", "new_full"], _full(None)),
    "scalar_tensor": _scalar_tensor,
    "arange": _arange,
    "add": _neutral(0),
    "mul": _neutral(1),
    "min": _elementwise(aten.minimum.default),
    "max": _elementwise(aten.maximum.default),
    "baddbmm": _baddbmm,
    "index": _picked,
    "index_select": _index_select,
    "index_put": _index_put,
    "dropout": _dropout,
    "feature_dropout": _dropout,
}
