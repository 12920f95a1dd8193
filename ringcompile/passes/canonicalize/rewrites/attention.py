"""Attention of torch as our one op, with key heads that are not repeated."""

from __future__ import annotations

from torch import fx

from ringcompile.errors import RingCompileError
from ringcompile.ir.calls import Call
from ringcompile.ir.expr import Size, equal
from ringcompile.ir.nodes import error_at, type_of
from ringcompile.ir.types import TensorType
from ringcompile.ops.schemas import op
from ringcompile.passes.base import Builder
from ringcompile.passes.canonicalize.rewrites.common import Rewrite, as_shape
from ringcompile.passes.views import unexpanded


def _attention(builder: Builder, node: fx.Node) -> fx.Node:
    """One attention op with un-expanded heads; its mask is read by the `masks` pass."""
    call = Call(node)
    _check_dropout(call)
    q, k, v = (builder.env[call[name]] for name in ("query", "key", "value"))
    result, one_head = type_of(node), len(type_of(q).shape) == 3
    if one_head:
        q, k, v = (_with_head_dim(builder, x) for x in (q, k, v))
        result = TensorType.whole(result.dtype, _with_head(result.shape))
    _check_shapes(q, k)
    causal = bool(call["is_causal"])
    if causal and not equal(type_of(q).shape[2], type_of(k).shape[2]):
        raise error_at(node, "is_causal=True needs as many keys as queries; here their numbers "
                             "differ")
    scale = call["scale"]
    if scale is None:
        scale = float(type_of(q).shape[3]) ** -0.5
    mask = builder.env[call["attn_mask"]] if call["attn_mask"] is not None else None
    if mask is not None and one_head and len(type_of(mask).shape) == 3:
        mask = _with_head_dim(builder, mask)
    if mask is not None and len(type_of(mask).shape) < 4:
        shape = (*(1,) * (4 - len(type_of(mask).shape)), *type_of(mask).shape)
        mask = as_shape(builder, mask, TensorType.whole(type_of(mask).dtype, shape), "mask")
    made = builder.call(
        op("attention"),
        (q, *_key_heads(builder, k, v), None, mask),
        result,
        name=node.name,
        scale=float(scale),
        lower=0 if causal else None,
        upper=None,
    )
    return as_shape(builder, made, type_of(node), "heads")


def _check_dropout(call: Call) -> None:
    if call["dropout_p"]:
        raise RingCompileError(
            f"attention dropout with p={call['dropout_p']} is left on",
            hint="call model.eval() before capture",
        )


def _check_shapes(q: fx.Node, k: fx.Node) -> None:
    if len(type_of(q).shape) != 4:
        raise RingCompileError(
            f"attention over tensors of {len(type_of(q).shape)} dims is not supported; they must "
            "be [batch, heads, tokens, head_dim]",
            hint="reshape queries, keys and values so that heads are a dim",
        )
    if not equal(type_of(q).shape[0], type_of(k).shape[0]):
        raise RingCompileError(
            f"attention of {type_of(q).shape[0]} queries' batch over {type_of(k).shape[0]} keys'",
            hint="expand the keys and values to the batch of the queries",
        )


def _with_head(shape: tuple[Size, ...]) -> tuple[Size, ...]:
    return (shape[0], 1, *shape[1:])


def _with_head_dim(builder: Builder, x: fx.Node) -> fx.Node:
    """[N, S, D] as [N, 1, S, D]."""
    type_ = type_of(x)
    return as_shape(builder, x, TensorType.whole(type_.dtype, _with_head(type_.shape)), "head")


def _key_heads(builder: Builder, k: fx.Node, v: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Keys and values without the repetition of heads, where both have it."""
    own = unexpanded(builder, k), unexpanded(builder, v)
    return own if equal(type_of(own[0]).shape[1], type_of(own[1]).shape[1]) else (k, v)


ATTENTION: dict[str, Rewrite] = {"scaled_dot_product_attention": _attention}
