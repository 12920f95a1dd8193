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

from ringcompile.errors import RingCompileError
from ringcompile.ir.calls import Call
from ringcompile.ir.expr import Size, equal, simplify
from ringcompile.ir.nodes import error_at, type_of
from ringcompile.ir.program import Program
from ringcompile.ir.types import TensorType
from ringcompile.ops.schemas import op
from ringcompile.passes.base import Builder, Pass, refuse

aten = torch.ops.aten
_END = 2**63 - 1


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
            try:
                new = rewrite(builder, node) if rewrite else builder.copy(node)
            except RingCompileError as error:
                raise refuse(node, error) from None
            builder.env[node] = new
        return program.with_graph(builder.graph)


def _short(node: fx.Node) -> str:
    """The op's name without namespace and overload; getitem by its own name."""
    if node.target is operator.getitem:
        return "getitem"
    return str(node.target).removeprefix("aten.").split(".")[0]


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
    return builder.call(aten.reshape.default, (x, list(type_.shape)), type_, name=name)


def _same_shape(a: tuple[Size, ...], b: tuple[Size, ...]) -> bool:
    return len(a) == len(b) and all(map(equal, a, b))


def _permute(builder: Builder, node: fx.Node) -> fx.Node:
    call, rank = Call(node), len(type_of(node).shape)
    dims = list(range(rank))
    if "dims" in call.arguments:
        dims = [dim % rank for dim in call["dims"]]
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
    return builder.call(aten.expand.default, (x, list(type_.shape)), type_, name=node.name)


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
    if mask is not None and len(type_of(mask).shape) < 4:
        shape = (*(1,) * (4 - len(type_of(mask).shape)), *type_of(mask).shape)
        mask = _as_shape(builder, mask, TensorType.whole(type_of(mask).dtype, shape), "mask")
    return builder.call(
        op("attention"),
        (q, _unexpanded(k), _unexpanded(v), None, mask),
        type_of(node),
        name=node.name,
        scale=float(scale),
        lower=0 if causal else None,
        upper=None,
    )


def _unexpanded(x: fx.Node) -> fx.Node:
    """[B,G,S,D] behind reshape(expand(reshape(x, [B,G,1,S,D]), [B,G,r,S,D]), [B,G*r,S,D])."""
    steps = [x]
    for target in (aten.reshape.default, aten.expand.default, aten.reshape.default):
        if steps[-1].target is not target:
            return x
        steps.append(steps[-1].args[0])  # type: ignore[arg-type]
    grown, single, source = (type_of(node).shape for node in steps[1:])
    repeats_heads = (
        len(grown) == 5
        and single == (*grown[:2], 1, *grown[3:])
        and source == (*grown[:2], *grown[3:])
    )
    return steps[-1] if repeats_heads else x


_REWRITES: dict[str, Callable[[Builder, fx.Node], Any]] = {
    **dict.fromkeys(
        ["view", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze",
         "view_as"],
        _reshape,
    ),
    **dict.fromkeys(["transpose", "t", "numpy_T", "permute", "swapaxes", "swapdims"], _permute),
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
    **dict.fromkeys(["zeros", "zeros_like", "new_zeros"], _full(0)),
    **dict.fromkeys(["full", "full_like", "new_full"], _full(None)),
    **dict.fromkeys(["split", "split_with_sizes", "chunk", "unbind", "tensor_split"], _pieces),
    "add": _neutral(0),
    "mul": _neutral(1),
    "slice": _slice,
    "narrow": _narrow,
    "getitem": _getitem,
    "arange": _arange,
    "scalar_tensor": _scalar_tensor,
    "dropout": _dropout,
    "feature_dropout": _dropout,
    "scaled_dot_product_attention": _attention,
}
