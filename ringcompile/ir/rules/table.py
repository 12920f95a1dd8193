"""The rule table: one row an op, by the op's full name.

An op that is not here is an error that names the op, the layer and the user's line; it is never
treated as pointwise. Where nothing that it reads is split it needs no row: see `ir/pure_ops.py`,
which with this table is the allowlist of ops that a saved graph may contain.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ringcompile.ir.calls import Call, target_name
from ringcompile.ir.expr import Size, product
from ringcompile.ir.nodes import type_of
from ringcompile.ir.rules import contraction, indexing, ours, spatial
from ringcompile.ir.rules.base import FactorRule, Factors, Names, Rule, ViewRule, rank_of, shapes
from ringcompile.ir.rules.bits import BitsRule
from ringcompile.ir.rules.linear import EACH, FIRST, TOGETHER, Linear
from ringcompile.ir.rules.windows import WindowRule


def pointwise(call: Call) -> Factors:
    """Operands broadcast to the output, aligned at the right; a size-1 dim ties to nothing."""
    out = type_of(call.node).shape
    operands = []
    for shape in shapes(call):
        offset = len(out) - len(shape)
        operands.append(
            tuple(None if size == 1 and out[offset + i] != 1 else offset + i
                  for i, size in enumerate(shape))
        )
    return Factors(tuple(operands), tuple(range(len(out))))


def creation(call: Call) -> Factors:
    """No operands: any dim may be made in pieces."""
    return Factors((), tuple(range(rank_of(call))))


def permute(call: Call) -> Factors:
    """Output dim i is operand dim `dims[i]`."""
    rank = rank_of(call)
    return Factors((tuple(range(rank)),), tuple(dim % rank for dim in call["dims"]))


def along_dim(call: Call) -> Factors:
    """An op that needs one dim whole and works row by row on the others."""
    rank = rank_of(call)
    dim = call["dim"] % rank if rank else 0
    names: Names = tuple(None if i == dim else i for i in range(rank))
    return Factors((names,) * len(call.operands), names)


def scan(call: Call) -> Factors:
    """A scan goes on from rank to rank: `partition` writes that out."""
    names: Names = tuple(range(rank_of(call)))
    return Factors((names,) * len(call.operands), names)


def reduction(call: Call) -> Factors:
    """`dim` (one, several or all) reduced, with or without keepdim."""
    rank = len(shapes(call)[0])
    dims = call["dim"]
    listed = [dims] if isinstance(dims, int) else list(dims or range(rank))
    reduced = {dim % rank for dim in listed} if rank else set()
    keep = call.get("keepdim", False)
    operand: Names = tuple(None if i in reduced else i for i in range(rank))
    return Factors((operand,), tuple(f for f in operand if f is not None or keep))


def reduce_listed(call: Call) -> Factors:
    """As `reduction`, but an empty list of dims reduces none of them."""
    return pointwise(call) if call["dim"] == [] else reduction(call)


def reduce_all(call: Call) -> Factors:
    """All dims reduced to a scalar, so all of them whole."""
    return Factors(((None,) * len(shapes(call)[0]),), ())


def diagonal(call: Call) -> Factors:
    """Two dims, which must be whole, become one at the end; the others stay."""
    rank = len(shapes(call)[0])
    taken = {call["dim1"] % rank, call["dim2"] % rank}
    operand: Names = tuple(None if i in taken else i for i in range(rank))
    return Factors((operand,), (*(i for i in range(rank) if i not in taken), None))


def select(call: Call) -> Factors:
    """One index of a dim, which must be whole and is gone from the output."""
    rank = len(shapes(call)[0])
    dim = call["dim"] % rank
    operand: Names = tuple(None if i == dim else i for i in range(rank))
    return Factors((operand,), tuple(i for i in range(rank) if i != dim))


def all_whole(call: Call) -> Factors:
    """An op that needs all of its operands, and whose results every rank computes."""
    operands = tuple((None,) * len(shape) for shape in shapes(call))
    return Factors(operands, (None,) * rank_of(call))


def real_pairs(call: Call) -> Factors:
    """Complex numbers as a last dim of two, or back."""
    operand, out = len(shapes(call)[0]), rank_of(call)
    names: Names = tuple(range(min(operand, out)))
    pair: Names = (None,)
    return Factors((names + pair * (operand > out),), names + pair * (out > operand))


def stack(call: Call) -> Factors:
    """Operands side by side along a new dim, which is whole."""
    rank = rank_of(call)
    dim = call["dim"] % rank
    output: Names = tuple(None if i == dim else i for i in range(rank))
    return Factors((tuple(f for f in output if f is not None),) * len(call.operands), output)


def trailing_whole(call: Call) -> Factors:
    """layer_norm and rms_norm: the normalised trailing dims whole, weights whole."""
    rank = rank_of(call)
    split = rank - len(call["normalized_shape"])
    names: Names = tuple(i if i < split else None for i in range(rank))
    others = tuple((None,) * len(shape) for shape in shapes(call)[1:])
    return Factors((names, *others), names)


def embedding(call: Call) -> Factors:
    """V d, ... -> ... d; the vocabulary whole."""
    index = tuple(range(rank_of(call) - 1))
    return Factors(((None, "d"), index), (*index, "d"))


def last_two_whole(call: Call) -> Factors:
    """Tril and triu: rows and columns are known by position only where they are whole."""
    rank = rank_of(call)
    names: Names = tuple(i if i < rank - 2 else None for i in range(rank))
    return Factors((names,), names)


def _under_filter(call: Call) -> Size:
    """Of a convolution: what lies under one filter."""
    return product(shapes(call)[1][1:])


_UNARY = [
    "abs", "relu", "leaky_relu", "hardswish", "hardsigmoid", "logical_not", "bitwise_not", "sign",
    "floor", "ceil", "round", "trunc", "isnan", "isinf", "square", "hardtanh", "relu6", "isfinite",
    "frac", "hardshrink", "softshrink", "signbit", "imag", "full_like",
]
# Arithmetic that takes longer than it takes to load the operands.
_COSTLY_UNARY = [
    "exp", "exp2", "expm1", "log", "log2", "log1p", "log10", "sqrt", "rsqrt", "reciprocal", "sin",
    "cos", "tan", "tanh", "sigmoid", "erf", "erfc", "erfinv", "silu", "gelu", "elu", "celu", "selu",
    "mish", "softplus", "log_sigmoid", "sinh", "cosh", "asin", "acos", "atan", "asinh", "acosh",
    "atanh", "logit", "angle", "i0",
]
_SAME = ["conj", "_conj", "resolve_conj", "positive"]
_BINARY = [
    "add.Scalar", "sub.Scalar", "rsub.Scalar", "div.Tensor_mode", "div.Scalar_mode",
    "floor_divide.default", "remainder.Scalar", "remainder.Tensor", "fmod.Scalar", "eq.Tensor",
    "eq.Scalar", "ne.Tensor", "ne.Scalar", "lt.Tensor", "lt.Scalar", "le.Tensor", "le.Scalar",
    "gt.Tensor", "gt.Scalar", "ge.Tensor", "ge.Scalar", "maximum.default", "minimum.default",
    "logical_and.default", "logical_or.default", "logical_xor.default", "bitwise_and.Tensor",
    "bitwise_and.Scalar", "bitwise_or.Tensor", "bitwise_or.Scalar", "bitwise_xor.Tensor",
    "__and__.Tensor", "__or__.Tensor", "__and__.Scalar", "__or__.Scalar", "where.self",
    "where.ScalarSelf", "where.Scalar", "masked_fill.Tensor", "clamp.default", "clamp.Tensor",
    "clamp_min.default", "clamp_max.default", "lerp.Scalar", "lerp.Tensor", "addcmul.default",
    "addcdiv.default", "to.dtype", "nan_to_num.default", "complex.default",
    "bitwise_left_shift.Tensor_Scalar", "bitwise_right_shift.Tensor_Scalar", "floor_divide.Scalar",
    "fmod.Tensor", "threshold.default", "heaviside.default", "fill.Tensor", "copy.default",
    "fill.Scalar", "isclose.default", "bitwise_xor.Scalar", "isin.Tensor_Scalar",
    "clamp_min.Tensor", "clamp_max.Tensor", "__lshift__.Scalar", "__rshift__.Scalar",
    "__lshift__.Tensor", "__rshift__.Tensor", "bitwise_left_shift.Tensor",
    "bitwise_right_shift.Tensor", "fmax.default", "fmin.default", "copysign.Tensor",
    "copysign.Scalar", "nextafter.default", "ldexp.Tensor",
]
_COSTLY_BINARY = [
    "atan2.default", "polar.default", "logaddexp.default", "hypot.default", "pow.Tensor_Scalar",
    "pow.Tensor_Tensor", "pow.Scalar", "xlogy.Tensor",
]
_SOFTMAX = ["softmax.int", "_softmax.default", "log_softmax.int", "_log_softmax.default"]
# They go over a row several times, in kernels of their own.
_ALONG_DIM = [
    "diff.default", "topk.default", "cummax.default", "cummin.default", "fft_fft.default",
    "fft_ifft.default", "fft_rfft.default", "fft_irfft.default",
]
# What these return depends on all of what they read, in no way that dims could carry.
_ALL_WHOLE = [
    "nonzero.default", "nonzero_numpy.default", "where.default", "masked_select.default",
    "masked_scatter.default", "bincount.default", "histc.default",
    "eye.default", "eye.m", "linspace.default", "isin.Tensor_Tensor", "fft_fftn.default",
    "fft_fft2.default", "tril_indices.default", "triu_indices.default", "_weight_norm.default",
    "im2col.default", "pixel_shuffle.default", "pixel_unshuffle.default",
    "repeat_interleave.Tensor", "unique_consecutive.default", "_unique2.default",
]
_REDUCTIONS = [
    "amax.default", "amin.default", "any.dim", "all.dim",
    "argmax.default", "argmin.default", "prod.dim_int", "var.correction", "var.dim",
    "linalg_norm.default",
    "std.correction", "logsumexp.default", "linalg_vector_norm.default", "max.dim", "min.dim",
    "count_nonzero.dim_IntList", "var_mean.correction", "nansum.default",
]
_SELECTIONS = ["median.dim", "mode.default", "kthvalue.default"]


def _flip(call: Call) -> Factors:
    rank = rank_of(call)
    turned = {dim % rank for dim in call["dims"]}
    names: Names = tuple(None if i in turned else i for i in range(rank))
    return Factors((names,), names)


def _glu(call: Call) -> Factors:
    rank = rank_of(call)
    names: Names = tuple(None if i == call["dim"] % rank else i for i in range(rank))
    return Factors((names,), names)


def _rows(names: list[str], factors: Callable[[Call], Factors], **columns: Any) -> dict[str, Rule]:
    rule = FactorRule(factors, elementwise=factors is pointwise, **columns)
    return {f"aten.{name}": rule for name in names}


def _fills_zero(argument: str) -> Callable[[Call], bool]:
    return lambda call: call[argument] == 0


_OF_TWO = Linear(together=True, when=lambda call: len(call.operands) == 2)

RULES: dict[str, Rule] = {
    **_rows([f"{name}.default" for name in _UNARY], pointwise),
    **_rows([f"{name}.default" for name in _COSTLY_UNARY], pointwise, cost="special"),
    **_rows([f"{name}.default" for name in _SAME], pointwise, cost="same"),
    **_rows(["real.default"], pointwise, cost="view"),
    **_rows(["contiguous.default"], pointwise, cost="view", linear=FIRST),
    **_rows(_BINARY, pointwise),
    **_rows(_COSTLY_BINARY, pointwise, cost="special"),
    **_rows(["neg.default", "mul.Scalar", "div.Scalar", "div.Tensor"], pointwise, linear=FIRST),
    **_rows(["mul.Tensor"], pointwise, linear=EACH),
    **_rows(["add.Tensor", "sub.Tensor"], pointwise, linear=_OF_TWO),
    **_rows(["masked_fill.Scalar"], pointwise, linear=Linear(0, when=_fills_zero("value"))),
    **_rows(["where.ScalarOther"], pointwise, linear=Linear(1, when=_fills_zero("other"))),
    "ringcompile.tokenwise.default": FactorRule(pointwise, elementwise=True, cost="same"),
    **_rows(_SOFTMAX, along_dim, cost="reduction"),
    **_rows(_ALONG_DIM, along_dim, cost="passes"),
    **_rows(["slice.Tensor"], along_dim, cost="view", linear=FIRST),
    **_rows(["cat.default"], along_dim, cost="join", linear=TOGETHER),
    **_rows(["sort.default", "sort.stable", "argsort.default", "argsort.stable"], along_dim,
            cost="sort"),
    **_rows(["cumsum.default", "cumprod.default", "logcumsumexp.default"], scan, cost="scan"),
    "ringcompile.recurrence.default": FactorRule(scan, cost="recurrence"),
    **_rows(_REDUCTIONS, reduction, cost="reduction"),
    **_rows(_SELECTIONS, reduction, cost="passes"),
    **_rows(["mean.dim", "sum.dim_IntList"], reduction, cost="reduction", linear=FIRST),
    **_rows(["mean.default", "sum.default", "max.default", "min.default", "any.default",
             "all.default", "prod.default"], reduce_all, cost="reduction"),
    **_rows(["any.dims", "all.dims"], reduce_listed, cost="reduction"),
    **_rows(["flip.default"], _flip),
    **_rows(["glu.default"], _glu, cost="special"),
    "aten.reshape.default": ViewRule(),
    "aten.view.dtype": BitsRule(),
    **_rows(["expand.default"], pointwise, cost="view", linear=FIRST, shape_argument="size"),
    **_rows(["permute.default"], permute, cost="view", linear=FIRST),
    **_rows(["diagonal.default"], diagonal, cost="view", linear=FIRST),
    **_rows(["select.int"], select, cost="view", linear=FIRST),
    **_rows(["stack.default"], stack, cost="join", linear=TOGETHER),
    **_rows(["view_as_complex.default", "view_as_real.default"], real_pairs, cost="view"),
    **_rows(["full.default"], creation, shape_argument="size"),
    **_rows(["arange.start_step"], creation),
    **_rows(["tril.default", "triu.default"], last_two_whole),
    **_rows(["layer_norm.default", "rms_norm.default"], trailing_whole, cost="reduction"),
    **_rows(["embedding.default"], embedding, cost="pick_rows"),
    **_rows(["index_select.default"], indexing.index_select, cost="pick_rows", linear=FIRST),
    **_rows(["index.Tensor"], indexing.index, cost="pick_rows", linear=FIRST),
    **_rows(["gather.default"], indexing.gather, cost="pick_rows", linear=FIRST),
    **_rows(["index_put.default"], indexing.index_put, cost="index_put"),
    **_rows(["index_add.default", "index_copy.default", "index_fill.int_Scalar"],
            indexing.index_add, cost="scatter"),
    **_rows(["scatter.src", "scatter.value", "scatter.reduce", "scatter.value_reduce",
             "scatter_add.default", "scatter_reduce.two"], indexing.scatter, cost="scatter"),
    **_rows(["slice_scatter.default"], indexing.slice_scatter),
    **_rows(["select_scatter.default"], indexing.select_scatter),
    **_rows(["one_hot.default"], indexing.one_hot),
    **_rows(["bucketize.Tensor"], indexing.bucketize, cost="search"),
    **_rows(["searchsorted.Tensor"], indexing.searchsorted, cost="search"),
    **_rows(["roll.default"], indexing.roll),
    **_rows(["linear.default"], contraction.matmul, cheap=False, sums=True, bias="bias",
            cost="matmul"),
    **_rows(["addmm.default"], contraction.matmul, cheap=False, sums=True, bias="self",
            without_bias="mm", cost="matmul"),
    **_rows(["baddbmm.default"], contraction.matmul, cheap=False, sums=True, bias="self",
            without_bias="bmm", cost="matmul"),
    **_rows(["matmul.default", "bmm.default", "mm.default", "mv.default", "dot.default",
             "_int_mm.default", "einsum.default"], contraction.matmul, cheap=False, sums=True,
            cost="matmul"),
    **_rows(["outer.default", "ger.default"], contraction.outer, cost="outer"),
    **_rows(["_cdist_forward.default"], contraction.distances, cheap=False, cost="passes",
            inner=ours.features),
    **_rows(["_grouped_mm.default"], contraction.grouped_mm, cheap=False, cost="grouped_matmul",
            inner=ours.features),
    **_rows(["conv1d.default", "conv2d.default", "conv3d.default", "conv1d.padding",
             "conv2d.padding"], spatial.convolution, cheap=False, cost="convolution",
            inner=_under_filter),
    **_rows(["conv_transpose1d.default", "conv_transpose2d.input"],
            spatial.transposed_convolution, cheap=False, cost="transposed_convolution",
            inner=_under_filter),
    **_rows(["avg_pool1d.default", "max_pool1d.default", "adaptive_avg_pool1d.default",
             "upsample_nearest1d.vec", "upsample_linear1d.vec"], partial(spatial.pooling, 1),
            cost="passes"),
    **_rows(["avg_pool2d.default", "max_pool2d.default", "adaptive_avg_pool2d.default",
             "upsample_nearest2d.vec", "upsample_bilinear2d.vec", "upsample_bicubic2d.vec",
             "max_pool2d_with_indices.default", "adaptive_max_pool2d.default"],
            partial(spatial.pooling, 2), cost="passes"),
    **_rows(["avg_pool3d.default", "max_pool3d_with_indices.default"],
            partial(spatial.pooling, 3), cost="passes"),
    **_rows(["pad.default"], spatial.pad),
    **_rows(["constant_pad_nd.default"], spatial.pad, linear=Linear(0, when=_fills_zero("value"))),
    **_rows(["unfold.default"], spatial.unfold, cost="view"),
    **_rows(["batch_norm.default"], spatial.channel_norm, cost="passes"),
    **_rows(["group_norm.default"], spatial.group_norm, cost="passes"),
    **_rows(_ALL_WHOLE, all_whole, cost="passes"),
    "ringcompile.halo.default": WindowRule(cost="join"),
    "ringcompile.trim.default": WindowRule(cost="stream"),
    "ringcompile.own_tokens.default": WindowRule(cost="view", cheap=True),
    "ringcompile.padded_tokens.default": WindowRule(cost="view", cheap=True),
    "ringcompile.attention.default": FactorRule(
        ours.attention, cheap=False, cost="attention", inner=ours.keys_twice
    ),
    "ringcompile.linear_attention.default": FactorRule(
        ours.linear_attention, cheap=False, cost="linear_attention", linear=Linear(2),
        inner=ours.state_twice,
    ),
    "ringcompile.expert_linear.default": FactorRule(
        ours.expert_linear, cheap=False, sums=True, bias="bias", kept=frozenset({"e"}),
        cost="expert_matmul", inner=ours.features,
    ),
    "ringcompile.grouped_linear.default": FactorRule(
        ours.grouped_linear, cheap=False, sums=True, bias="bias", cost="sorted_matmul",
        inner=ours.features,
    ),
}


def find_rule(target: object) -> Rule | None:
    """The row of an op, or None."""
    return RULES.get(target_name(target))
