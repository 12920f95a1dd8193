"""Few ops for many: what torch writes in several ways is written in one.

Views become `reshape`, dim orders `permute`, pieces `slice`, constants `full`, positions `arange`;
casts that change nothing, device moves, copies and checks of metadata disappear. Rules and later
passes then have one case each.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ringcompile.errors import RingCompileError
from ringcompile.ir.calls import Call
from ringcompile.ir.expr import Size, depends_on_data, equal, simplify, spelled, unbacked
from ringcompile.ir.nodes import error_at, type_of
from ringcompile.ir.program import Program
from ringcompile.ir.types import TensorType
from ringcompile.ops.schemas import op
from ringcompile.passes.base import Builder, Pass, refuse
from ringcompile.passes.views import unexpanded

aten = torch.ops.aten
_END = 2**63 - 1
# Sizes that torch has no symbol for are named from here on.
_FIRST_OWN = 100_000


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Rewrite aten calls into the canonical few.

        y = view(x, [1, s, -1, 16]); z = transpose(y, 1, 2); a, b = split(z, 8, -1)
    ->  y = reshape(x, [1, s, 4, 16]); z = permute(y, [0, 2, 1, 3]); a = slice(z, 3, 0, 8); b = ...
    """

    name: ClassVar[str] = "canonicalize"

    def run(self, program: Program) -> Program:
        """Look each call up in `_REWRITES`; what is not there stays as it was."""
        builder = Builder()
        for node in program.graph.nodes:
            builder.at(node)
            rewrite = _REWRITES.get(_short(node)) if node.op == "call_function" else None
            if _short(node) in _ALIASES:
                rewrite = _renamed
            try:
                new = rewrite(builder, node) if rewrite else builder.copy(node)
            except RingCompileError as error:
                raise refuse(node, error) from None
            builder.env[node] = new
            _check_arguments(new)
        return program.with_graph(builder.graph)


def _check_arguments(node: Any) -> None:
    """A size that only the data tells may be that of a tensor, but no number in the graph."""
    if isinstance(node, fx.Node) and node.op == "call_function":
        leaves = pytree.tree_leaves((node.args, node.kwargs))
        unknown = next((leaf for leaf in leaves if depends_on_data(leaf)), None)
        if unknown is not None:
            raise error_at(
                node,
                f"a size depends on the data (torch calls it {unknown})",
                hint="sizes may depend on the lengths of inputs, not on their values",
            )


def _short(node: fx.Node) -> str:
    """The op's name without namespace and overload; getitem by its own name."""
    if node.target is operator.getitem:
        return "getitem"
    return str(node.target).removeprefix("aten.").split(".")[0]


# Second names that torch has for one op, with the same overloads and arguments.
_ALIASES = {
    "multiply": "mul", "divide": "div", "true_divide": "div", "subtract": "sub", "absolute": "abs",
    "negative": "neg", "greater": "gt", "greater_equal": "ge", "less": "lt", "less_equal": "le",
    "not_equal": "ne", "clip": "clamp", "fix": "trunc", "arccos": "acos", "arcsin": "asin",
    "arctan": "atan", "concat": "cat", "concatenate": "cat", "special_expit": "sigmoid",
    "special_erf": "erf", "special_log1p": "log1p", "special_logsumexp": "logsumexp",
}


def _renamed(builder: Builder, node: fx.Node) -> fx.Node:
    new = builder.copy(node)
    _, short, overload = str(node.target).split(".")
    new.target = getattr(getattr(aten, _ALIASES[short]), overload)
    return new


def _elementwise(target: Any) -> Callable[[Builder, fx.Node], fx.Node]:
    """Min and max of two tensors, which share their names with reductions."""

    def rewrite(builder: Builder, node: fx.Node) -> fx.Node:
        new = builder.copy(node)
        if str(node.target).endswith(".other"):
            new.target = target
        return new

    return rewrite


def _operand(builder: Builder, node: fx.Node) -> fx.Node:
    new = builder.env[node.args[0]]  # type: ignore[index]
    assert isinstance(new, fx.Node)
    return new


def _identity(builder: Builder, node: fx.Node) -> Any:
    return builder.env[node.args[0]]  # type: ignore[index]


def _removed(builder: Builder, node: fx.Node) -> None:
    return None


def _reshape(builder: Builder, node: fx.Node) -> fx.Node:
    return _as_shape(builder, _operand(builder, node), type_of(node), node.name)


def _as_shape(builder: Builder, x: fx.Node, type_: TensorType, name: str) -> fx.Node:
    if _same_shape(type_of(x).shape, type_.shape):
        return x
    return builder.call(aten.reshape.default, (x, spelled(type_.shape)), type_, name=name)


def _same_shape(a: tuple[Size, ...], b: tuple[Size, ...]) -> bool:
    return len(a) == len(b) and all(map(equal, a, b))


def _permute(builder: Builder, node: fx.Node) -> fx.Node:
    call, rank = Call(node), len(type_of(node).shape)
    dims = list(range(rank))
    if "dims" in call.arguments:
        dims = [dim % rank for dim in call["dims"]]
    elif _short(node) == "mT":
        dims[-2:] = dims[:-3:-1]
    else:  # transpose of two dims; t and numpy_T have none and turn all around
        a, b = call.get("dim0", call.get("axis0")), call.get("dim1", call.get("axis1"))
        if a is None:
            dims.reverse()
        else:
            dims[a % rank], dims[b % rank] = dims[b % rank], dims[a % rank]
    if dims == sorted(dims):
        return _operand(builder, node)
    return builder.call(
        aten.permute.default, (_operand(builder, node), dims), type_of(node), name=node.name
    )


def _movedim(builder: Builder, node: fx.Node) -> fx.Node:
    call, rank = Call(node), len(type_of(node).shape)
    source = [d % rank for d in _listed(call["source"])]
    target = [d % rank for d in _listed(call["destination"])]
    placed = dict(zip(target, source, strict=True))
    rest = iter(d for d in range(rank) if d not in source)
    dims = [placed[i] if i in placed else next(rest) for i in range(rank)]
    return builder.call(
        aten.permute.default, (_operand(builder, node), dims), type_of(node), name=node.name
    )


def _listed(dims: int | Sequence[int]) -> list[int]:
    return [dims] if isinstance(dims, int) else list(dims)


def _expand(builder: Builder, node: fx.Node) -> fx.Node:
    x, type_ = _operand(builder, node), type_of(node)
    if _same_shape(type_of(x).shape, type_.shape):
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
    x, type_ = _operand(builder, node), type_of(node)
    call = Call(node)
    times = list(call.get("repeats", call.get("dims")))
    sizes = (*(1,) * (len(type_.shape) - len(type_of(x).shape)), *type_of(x).shape)
    times = [1] * (len(sizes) - len(times)) + times
    apart = tuple(size for pair in zip([1] * len(sizes), sizes, strict=True) for size in pair)
    grown = tuple(size for pair in zip(times, sizes, strict=True) for size in pair)
    for target, shape in ((aten.reshape.default, apart), (aten.expand.default, grown)):
        x = builder.call(target, (x, list(shape)), TensorType.whole(type_.dtype, shape))
    return _as_shape(builder, x, type_, node.name)


def _broadcast(builder: Builder, node: fx.Node) -> list[fx.Node]:
    """Meshgrid and broadcast_tensors: each result is an operand expanded."""
    made = []
    for i, (old, type_) in enumerate(zip(node.args[0], node.meta["type"], strict=True)):  # type: ignore[arg-type]
        x, rank = builder.env[old], len(type_.shape)
        if _short(node) == "meshgrid":
            swapped = {0: 1, 1: 0} if Call(node).get("indexing") == "xy" else {}
            dim = swapped.get(i, i)
            shape = tuple(type_.shape[dim] if j == dim else 1 for j in range(rank))
            x = _as_shape(builder, x, TensorType.whole(type_.dtype, shape), f"{node.name}_{i}")
        made.append(builder.call(aten.expand.default, (x, list(type_.shape)), type_))
    return made


def _slice(builder: Builder, node: fx.Node) -> fx.Node:
    call, x = Call(node), _operand(builder, node)
    dim = call["dim"] % len(type_of(x).shape)
    size = type_of(x).shape[dim]
    start, step = _from_end(call["start"] or 0, size), call["step"]
    if _same_shape(type_of(x).shape, type_of(node).shape) and step == 1:
        return x
    end = size if call["end"] in (None, _END) else _from_end(call["end"], size)
    return builder.call(
        aten.slice.Tensor, (x, dim, start, end, step), type_of(node), name=node.name
    )


def _from_end(index: Size, size: Size) -> Size:
    return simplify(size + index) if isinstance(index, int) and index < 0 else index


def _narrow(builder: Builder, node: fx.Node) -> fx.Node:
    call, x = Call(node), _operand(builder, node)
    start = _from_end(call["start"], type_of(x).shape[call["dim"]])
    return _piece(builder, x, call["dim"], start, type_of(node), node.name)


def _piece(
    builder: Builder, x: fx.Node, dim: int, start: Size, type_: TensorType, name: str
) -> fx.Node:
    dim %= len(type_.shape)
    if _same_shape(type_of(x).shape, type_.shape):
        return x
    end = simplify(start + type_.shape[dim])
    return builder.call(aten.slice.Tensor, (x, dim, start, end), type_, name=name)


def _pieces(builder: Builder, node: fx.Node) -> list[fx.Node]:
    """split, chunk, split_with_sizes, unbind: each piece is a slice (or a select) of its own."""
    call, x = Call(node), _operand(builder, node)
    dim, start, made = call.get("dim", 0), 0, []
    for i, type_ in enumerate(node.meta["type"]):
        name = f"{node.name}_{i}"
        if _short(node) == "unbind":
            made.append(builder.call(aten.select.int, (x, dim, i), type_, name=name))
            continue
        made.append(_piece(builder, x, dim, start, type_, name))
        start = simplify(start + type_.shape[dim])
    return made


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
    args = (_operand(builder, node), entries, *builder.mapped(node.args[2:]))
    return builder.call(node.target, args, type_of(node), name=node.name)


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


def _getitem(builder: Builder, node: fx.Node) -> Any:
    source = builder.env[node.args[0]]  # type: ignore[index]
    if isinstance(source, list):
        return source[node.args[1]]  # type: ignore[index]
    return builder.copy(node)


def _cast(builder: Builder, node: fx.Node) -> fx.Node:
    x, dtype = _operand(builder, node), type_of(node).dtype
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
        if any(map(depends_on_data, type_.shape)) and _short(node).endswith("_like"):
            return builder.call(
                aten.full_like.default, (_operand(builder, node), fill), type_, dtype=type_.dtype
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
    return _operand(builder, node)


def _attention(builder: Builder, node: fx.Node) -> fx.Node:
    """One attention op with un-expanded heads; its mask is read by the `masks` pass."""
    call = Call(node)
    if call["dropout_p"]:
        raise RingCompileError(
            f"attention dropout with p={call['dropout_p']} is left on",
            hint="call model.eval() before capture",
        )
    q, k, v = (builder.env[call[name]] for name in ("query", "key", "value"))
    result, one_head = type_of(node), len(type_of(q).shape) == 3
    if one_head:
        q, k, v = (_with_head_dim(builder, x) for x in (q, k, v))
        result = TensorType.whole(result.dtype, _with_head(result.shape))
    if len(type_of(q).shape) != 4:
        raise RingCompileError(
            f"attention over tensors of {len(type_of(q).shape)} dims; [batch, heads, tokens, dim] "
            "has a rule",
            hint="view the heads as a dim of their own",
        )
    if not equal(type_of(q).shape[0], type_of(k).shape[0]):
        raise RingCompileError(
            f"attention of {type_of(q).shape[0]} queries' batch over {type_of(k).shape[0]} keys'",
            hint="expand the batch of keys and values first",
        )
    causal = bool(call["is_causal"])
    if causal and not equal(type_of(q).shape[2], type_of(k).shape[2]):
        raise error_at(node, "causal attention of unequal query and key lengths")
    scale = call["scale"]
    if scale is None:
        scale = float(type_of(q).shape[3]) ** -0.5
    mask = builder.env[call["attn_mask"]] if call["attn_mask"] is not None else None
    if mask is not None and one_head and len(type_of(mask).shape) == 3:
        mask = _with_head_dim(builder, mask)
    if mask is not None and len(type_of(mask).shape) < 4:
        shape = (*(1,) * (4 - len(type_of(mask).shape)), *type_of(mask).shape)
        mask = _as_shape(builder, mask, TensorType.whole(type_of(mask).dtype, shape), "mask")
    made = builder.call(
        op("attention"),
        (q, *_key_heads(builder, k, v), None, mask),
        result,
        name=node.name,
        scale=float(scale),
        lower=0 if causal else None,
        upper=None,
    )
    return _as_shape(builder, made, type_of(node), "heads")


def _with_head(shape: tuple[Size, ...]) -> tuple[Size, ...]:
    return (shape[0], 1, *shape[1:])


def _with_head_dim(builder: Builder, x: fx.Node) -> fx.Node:
    """[N, S, D] as [N, 1, S, D]."""
    type_ = type_of(x)
    return _as_shape(builder, x, TensorType.whole(type_.dtype, _with_head(type_.shape)), "head")


def _key_heads(builder: Builder, k: fx.Node, v: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Keys and values without the repetition of heads, where both have it."""
    own = unexpanded(builder, k), unexpanded(builder, v)
    return own if equal(type_of(own[0]).shape[1], type_of(own[1]).shape[1]) else (k, v)


def _repeat_interleave(builder: Builder, node: fx.Node) -> fx.Node:
    """Each index of a dim so many times over: a dim of copies grown behind it, and merged."""
    call, x, type_ = Call(node), _operand(builder, node), type_of(node)
    shape, dim = type_of(x).shape, call["dim"]
    if dim is None or isinstance(call["repeats"], fx.Node):
        return builder.copy(node)
    behind = dim % len(shape) + 1
    for target, copies in ((aten.reshape.default, 1), (aten.expand.default, call["repeats"])):
        grown = (*shape[:behind], copies, *shape[behind:])
        x = builder.call(target, (x, list(grown)), TensorType.whole(type_.dtype, grown))
    return _as_shape(builder, x, type_, node.name)


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


_REWRITES: dict[str, Callable[[Builder, fx.Node], Any]] = {
    **dict.fromkeys(
        ["view", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze",
         "view_as", "reshape_as"],
        _reshape,
    ),
    **dict.fromkeys(
        ["transpose", "t", "numpy_T", "mT", "permute", "swapaxes", "swapdims"], _permute
    ),
    **dict.fromkeys(["movedim", "moveaxis"], _movedim),
    **dict.fromkeys(["expand", "expand_as", "broadcast_to"], _expand),
    **dict.fromkeys(
        ["contiguous", "clone", "detach", "detach_", "alias", "lift_fresh_copy", "lift_fresh"],
        _identity,
    ),
    **dict.fromkeys(["to", "_to_copy", "type_as", "_to_cpu", "bool", "float"], _cast),
    **dict.fromkeys(
        ["_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range",
         "sym_constrain_range_for_size"],
        _removed,
    ),
    **dict.fromkeys(["ones", "ones_like", "new_ones"], _full(1)),
    # What is in an empty tensor is not told, so zeros are as good as anything.
    **dict.fromkeys(
        ["zeros", "zeros_like", "new_zeros", "empty", "empty_like", "new_empty"], _full(0)
    ),
    **dict.fromkeys(["full", "full_like", "new_full"], _full(None)),
    **dict.fromkeys(["split", "split_with_sizes", "chunk", "unbind", "tensor_split"], _pieces),
    "add": _neutral(0),
    "mul": _neutral(1),
    **dict.fromkeys(["repeat", "tile"], _repeat),
    "repeat_interleave": _repeat_interleave,
    "baddbmm": _baddbmm,
    **dict.fromkeys(["meshgrid", "broadcast_tensors"], _broadcast),
    "slice": _slice,
    "min": _elementwise(aten.minimum.default),
    "max": _elementwise(aten.maximum.default),
    "narrow": _narrow,
    "cat": _cat,
    "index": _index,
    "index_put": _index,
    "getitem": _getitem,
    "arange": _arange,
    "scalar_tensor": _scalar_tensor,
    "dropout": _dropout,
    "feature_dropout": _dropout,
    "scaled_dot_product_attention": _attention,
}
