"""Views: shapes, dim orders, pieces and copies become reshape, permute, expand, slice and cat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ringcompile.ir.calls import Call
from ringcompile.ir.expr import Size, product, simplify, spelled
from ringcompile.ir.nodes import type_of
from ringcompile.ir.types import TensorType
from ringcompile.passes.base import Builder
from ringcompile.passes.canonicalize.rewrites.common import Rewrite, as_shape, operand, short_name
from ringcompile.passes.views import same_shape

aten = torch.ops.aten
_END = 2**63 - 1


def _reshape(builder: Builder, node: fx.Node) -> fx.Node:
    return as_shape(builder, operand(builder, node), type_of(node), node.name)


def _view(builder: Builder, node: fx.Node) -> fx.Node:
    """Another shape; or the same bytes as another dtype, which is no matter of shapes."""
    dtype = Call(node).get("dtype")
    if dtype is None:
        return _reshape(builder, node)
    x = operand(builder, node)
    return x if dtype == type_of(x).dtype else builder.copy(node)


def _permute(builder: Builder, node: fx.Node) -> fx.Node:
    call, rank = Call(node), len(type_of(node).shape)
    dims = list(range(rank))
    if "dims" in call.arguments:
        dims = [dim % rank for dim in call["dims"]]
    elif short_name(node) == "mT":
        dims[-2:] = dims[:-3:-1]
    else:  # transpose of two dims; t and numpy_T have none and turn all around
        a, b = call.get("dim0", call.get("axis0")), call.get("dim1", call.get("axis1"))
        if a is None:
            dims.reverse()
        else:
            dims[a % rank], dims[b % rank] = dims[b % rank], dims[a % rank]
    if dims == sorted(dims):
        return operand(builder, node)
    return builder.call(
        aten.permute.default, (operand(builder, node), dims), type_of(node), name=node.name
    )


def _movedim(builder: Builder, node: fx.Node) -> fx.Node:
    call, rank = Call(node), len(type_of(node).shape)
    source = [d % rank for d in _listed(call["source"])]
    target = [d % rank for d in _listed(call["destination"])]
    placed = dict(zip(target, source, strict=True))
    rest = iter(d for d in range(rank) if d not in source)
    dims = [placed[i] if i in placed else next(rest) for i in range(rank)]
    return builder.call(
        aten.permute.default, (operand(builder, node), dims), type_of(node), name=node.name
    )


def _listed(dims: int | Sequence[int]) -> list[int]:
    return [dims] if isinstance(dims, int) else list(dims)


def _expand(builder: Builder, node: fx.Node) -> fx.Node:
    x, type_ = operand(builder, node), type_of(node)
    if same_shape(type_of(x).shape, type_.shape):
        return x
    return builder.call(aten.expand.default, (x, spelled(type_.shape)), type_, name=node.name)


def _cat(builder: Builder, node: fx.Node) -> fx.Node:
    """Empty tensors without dims, to which caches are joined at first, are left out."""
    parts = [builder.env[n] for n in Call(node).operands]
    parts = [part for part in parts if type_of(part).shape != (0,)] or parts[:1]
    if len(parts) == 1:
        return parts[0]
    return builder.call(
        aten.cat.default, (parts, Call(node)["dim"]), type_of(node), name=node.name
    )


def _repeat(builder: Builder, node: fx.Node) -> fx.Node:
    """Copies side by side: a dim of copies grown in front of each dim, and merged with it."""
    x, type_ = operand(builder, node), type_of(node)
    call = Call(node)
    times = list(call.get("repeats", call.get("dims")))
    sizes = (*(1,) * (len(type_.shape) - len(type_of(x).shape)), *type_of(x).shape)
    times = [1] * (len(sizes) - len(times)) + times
    apart = tuple(size for pair in zip([1] * len(sizes), sizes, strict=True) for size in pair)
    grown = tuple(size for pair in zip(times, sizes, strict=True) for size in pair)
    for target, shape in ((aten.reshape.default, apart), (aten.expand.default, grown)):
        x = builder.call(target, (x, list(shape)), TensorType.whole(type_.dtype, shape))
    return as_shape(builder, x, type_, node.name)


def _broadcast(builder: Builder, node: fx.Node) -> list[fx.Node]:
    """Meshgrid and broadcast_tensors: each result is an operand expanded."""
    made = []
    for i, (old, type_) in enumerate(zip(node.args[0], node.meta["type"], strict=True)):  # type: ignore[arg-type]
        x, rank = builder.env[old], len(type_.shape)
        if short_name(node) == "meshgrid":
            swapped = {0: 1, 1: 0} if Call(node).get("indexing") == "xy" else {}
            dim = swapped.get(i, i)
            shape = tuple(type_.shape[dim] if j == dim else 1 for j in range(rank))
            x = as_shape(builder, x, TensorType.whole(type_.dtype, shape), f"{node.name}_{i}")
        made.append(builder.call(aten.expand.default, (x, list(type_.shape)), type_))
    return made


def _slice(builder: Builder, node: fx.Node) -> fx.Node:
    call, x = Call(node), operand(builder, node)
    dim = call["dim"] % len(type_of(x).shape)
    size = type_of(x).shape[dim]
    start, step = _from_end(call["start"] or 0, size), call["step"]
    if same_shape(type_of(x).shape, type_of(node).shape) and step == 1:
        return x
    end = size if call["end"] in (None, _END) else _from_end(call["end"], size)
    return builder.call(
        aten.slice.Tensor, (x, dim, start, end, step), type_of(node), name=node.name
    )


def _from_end(index: Size, size: Size) -> Size:
    return simplify(size + index) if isinstance(index, int) and index < 0 else index


def _slice_scatter(builder: Builder, node: fx.Node) -> fx.Node:
    """A run of a dim replaced, as `x[:, 6:] = y` does: what is around it, and the run, joined."""
    call, type_ = Call(node), type_of(node)
    x, src = builder.env[call["self"]], builder.env[call["src"]]
    dim = call["dim"] % len(type_.shape)
    size, width = type_.shape[dim], type_of(src).shape[dim]
    if call["step"] != 1:
        return builder.copy(node)
    if same_shape((width,), (size,)):
        return src
    start = _from_end(call["start"] or 0, size)
    end = simplify(start + width)
    parts = [src]
    for first, last, at in ((0, start, 0), (end, size, len(parts) + 1)):
        if not same_shape((first,), (last,)):
            shape = (*type_.shape[:dim], simplify(last - first), *type_.shape[dim + 1 :])
            parts.insert(at, builder.call(
                aten.slice.Tensor, (x, dim, first, last), TensorType.whole(type_.dtype, shape)
            ))
    return builder.call(aten.cat.default, (parts, dim), type_, name=node.name)


def _narrow(builder: Builder, node: fx.Node) -> fx.Node:
    call, x = Call(node), operand(builder, node)
    start = _from_end(call["start"], type_of(x).shape[call["dim"]])
    return _piece(builder, x, call["dim"], start, type_of(node), node.name)


def _piece(
    builder: Builder, x: fx.Node, dim: int, start: Size, type_: TensorType, name: str
) -> fx.Node:
    dim %= len(type_.shape)
    if same_shape(type_of(x).shape, type_.shape):
        return x
    end = simplify(start + type_.shape[dim])
    return builder.call(aten.slice.Tensor, (x, dim, start, end), type_, name=name)


def _pieces(builder: Builder, node: fx.Node) -> list[fx.Node]:
    """split, chunk, split_with_sizes, unbind: each piece is a slice (or a select) of its own."""
    call, x = Call(node), operand(builder, node)
    dim, start, made = call.get("dim", 0), 0, []
    for i, type_ in enumerate(node.meta["type"]):
        name = f"{node.name}_{i}"
        if short_name(node) == "unbind":
            made.append(builder.call(aten.select.int, (x, dim, i), type_, name=name))
            continue
        made.append(_piece(builder, x, dim, start, type_, name))
        start = simplify(start + type_.shape[dim])
    return made


def _repeat_interleave(builder: Builder, node: fx.Node) -> fx.Node:
    """Each index of a dim so many times over: a dim of copies grown behind it, and merged."""
    call, x, type_ = Call(node), operand(builder, node), type_of(node)
    if isinstance(call["repeats"], fx.Node):
        return builder.copy(node)
    dim = call["dim"]
    if dim is None:  # over all entries, in order
        flat = (product(type_of(x).shape),)
        x, dim = as_shape(builder, x, TensorType.whole(type_.dtype, flat), "flat"), 0
    shape = type_of(x).shape
    behind = dim % len(shape) + 1
    for target, copies in ((aten.reshape.default, 1), (aten.expand.default, call["repeats"])):
        grown = (*shape[:behind], copies, *shape[behind:])
        x = builder.call(target, (x, list(grown)), TensorType.whole(type_.dtype, grown))
    return as_shape(builder, x, type_, node.name)


def _getitem(builder: Builder, node: fx.Node) -> Any:
    source = builder.env[node.args[0]]  # type: ignore[index]
    if isinstance(source, list):
        return source[node.args[1]]  # type: ignore[index]
    return builder.copy(node)


VIEWS: dict[str, Rewrite] = {
    "view": _view,
    **dict.fromkeys(
        ["_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze",
         "view_as", "reshape_as"],
        _reshape,
    ),
    **dict.fromkeys(
        ["transpose", "t", "numpy_T", "mT", "permute", "swapaxes", "swapdims"], _permute
    ),
    **dict.fromkeys(["movedim", "moveaxis"], _movedim),
    **dict.fromkeys(["expand", "expand_as", "broadcast_to"], _expand),
    **dict.fromkeys(["meshgrid", "broadcast_tensors"], _broadcast),
    **dict.fromkeys(["repeat", "tile"], _repeat),
    "repeat_interleave": _repeat_interleave,
    "slice": _slice,
    "narrow": _narrow,
    "slice_scatter": _slice_scatter,
    **dict.fromkeys(["split", "split_with_sizes", "chunk", "unbind", "tensor_split"], _pieces),
    "cat": _cat,
    "getitem": _getitem,
}
