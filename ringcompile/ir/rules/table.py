"""The rule table: one row an op, by the op's full name.

An op that is not here is an error that names the op, the layer and the user's line; it is never
treated as pointwise. The table is also the allowlist of ops that a saved graph may contain.
"""

from __future__ import annotations

from collections.abc import Callable

from ringcompile.ir.calls import Call
from ringcompile.ir.nodes import type_of
from ringcompile.ir.rules.base import FactorRule, Factors, Names, Rule, ViewRule, rank_of, shapes


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


def expand(call: Call) -> Factors:
    """Dims grown from size 1 are made where they are needed."""
    return pointwise(call)


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


def reduction(call: Call) -> Factors:
    """`dim` (one, several or all) reduced, with or without keepdim."""
    rank = len(shapes(call)[0])
    dims = call["dim"]
    listed = [dims] if isinstance(dims, int) else list(dims or range(rank))
    reduced = {dim % rank for dim in listed} if rank else set()
    keep = call.get("keepdim", False)
    operand: Names = tuple(None if i in reduced else i for i in range(rank))
    return Factors((operand,), tuple(f for f in operand if f is not None or keep))


def reduce_all(call: Call) -> Factors:
    """All dims reduced to a scalar, so all of them whole."""
    return Factors(((None,) * len(shapes(call)[0]),), ())


def select(call: Call) -> Factors:
    """One index of a dim, which must be whole and is gone from the output."""
    rank = len(shapes(call)[0])
    dim = call["dim"] % rank
    operand: Names = tuple(None if i == dim else i for i in range(rank))
    return Factors((operand,), tuple(i for i in range(rank) if i != dim))


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


def linear(call: Call) -> Factors:
    """... i, o i, o -> ... o."""
    batch = tuple(range(rank_of(call) - 1))
    bias: tuple[Names, ...] = (("o",),) if len(call.operands) == 3 else ()
    return Factors(((*batch, "i"), ("o", "i"), *bias), (*batch, "o"))


def addmm(call: Call) -> Factors:
    """Bias (broadcast), m k, k n -> m n."""
    bias = shapes(call)[0]
    names: Names = ("m", "n")[2 - len(bias):]
    out = type_of(call.node).shape[2 - len(bias):]
    names = tuple(None if b == 1 and o != 1 else f
                  for f, b, o in zip(names, bias, out, strict=True))
    return Factors((names, ("m", "k"), ("k", "n")), ("m", "n"))


def matmul(call: Call) -> Factors:
    """... m k, ... k n -> ... m n, batch dims broadcast; a vector lacks its outer dim."""
    left, right = shapes(call)
    out = type_of(call.node).shape
    m = ("m",) if len(left) > 1 else ()
    n = ("n",) if len(right) > 1 else ()
    num_batch = len(out) - len(m) - len(n)

    def batch(shape: tuple[object, ...]) -> Names:
        count = max(len(shape) - 2, 0)
        offset = num_batch - count
        return tuple(None if shape[i] == 1 and out[offset + i] != 1 else offset + i
                     for i in range(count))

    return Factors(
        ((*batch(left), *m, "k"), (*batch(right), "k", *n)), (*range(num_batch), *m, *n)
    )


def embedding(call: Call) -> Factors:
    """V d, ... -> ... d; the vocabulary whole."""
    index = tuple(range(rank_of(call) - 1))
    return Factors(((None, "d"), index), (*index, "d"))


def index_select(call: Call) -> Factors:
    """One dim is picked from, and must be whole; the picked entries may be split."""
    rank = rank_of(call)
    dim = call["dim"] % rank
    names: Names = tuple(None if i == dim else i for i in range(rank))
    return Factors((names, ("picked",)), tuple("picked" if i == dim else i for i in range(rank)))


def index(call: Call) -> Factors:
    """x[i, j, ...] with index tensors side by side: indexed dims whole, indices broadcast."""
    entries = list(call["indices"])
    source = shapes(call)[0]
    where = [i for i, entry in enumerate(entries) if entry is not None]
    adjacent = where == list(range(where[0], where[-1] + 1))
    index_shapes = [type_of(entries[i]).shape for i in where]
    width = max(map(len, index_shapes))
    out = type_of(call.node).shape
    start = where[0] if adjacent else 0
    operand: list[object] = [None] * len(source)
    kept = [i for i in range(len(source)) if i not in where]
    free = [i for i in range(len(out)) if not start <= i < start + width]
    for i, name in zip(kept, free, strict=True):
        operand[i] = ("kept", name)
    output: Names = tuple(
        ("picked", i - start) if start <= i < start + width else ("kept", i)
        for i in range(len(out))
    )
    picked = tuple(
        tuple(None if size == 1 and out[start + width - len(shape) + i] != 1
              else ("picked", width - len(shape) + i) for i, size in enumerate(shape))
        for shape in index_shapes
    )
    return Factors((tuple(operand), *picked), output)


def gather(call: Call) -> Factors:
    """torch.gather: only where index and source agree on the other dims; kept to whole there."""
    rank = rank_of(call)
    dim = call["dim"] % rank
    source, picked = shapes(call)
    same = tuple(i if i != dim and source[i] == picked[i] else None for i in range(rank))
    index_names: Names = tuple("picked" if i == dim else same[i] for i in range(rank))
    return Factors((same, index_names), index_names)


def last_two_whole(call: Call) -> Factors:
    """Tril and triu: rows and columns are known by position only where they are whole."""
    rank = rank_of(call)
    names: Names = tuple(i if i < rank - 2 else None for i in range(rank))
    return Factors((names,), names)


def attention(call: Call) -> Factors:
    """B h q d, b g k d, b g k e -> b h q e.

    Keys and values may be split along their sequence on the axis that splits the queries: that
    is ring attention, and `passes/place.py` keeps such a split. The key mask must know all keys.
    """
    names: list[Names] = [("b", "h", "q", "d"), ("b", "g", "k", "d"), ("b", "g", "k", "e")]
    if call["key_mask"] is not None:
        shape = type_of(call["key_mask"]).shape
        names.append((None if shape[0] == 1 else "b", None, None, None))
    if call["mask"] is not None:
        shape = type_of(call["mask"]).shape
        rows = zip(("b", "h", "q"), shape, strict=False)
        names.append((*(None if size == 1 else f for f, size in rows), None))
    return Factors(tuple(names), ("b", "h", "q", "e"))


_UNARY = [
    "abs", "neg", "exp", "exp2", "expm1", "log", "log2", "log1p", "sqrt", "rsqrt", "reciprocal",
    "sin", "cos", "tan", "tanh", "sigmoid", "erf", "relu", "silu", "gelu", "elu", "leaky_relu",
    "mish", "hardswish", "hardsigmoid", "softplus", "logical_not", "bitwise_not", "sign", "floor",
    "ceil", "round", "trunc", "isnan", "isinf", "square", "selu", "hardtanh", "relu6",
    "log_sigmoid",
]
_BINARY = [
    "add.Tensor", "add.Scalar", "sub.Tensor", "sub.Scalar", "rsub.Scalar", "mul.Tensor",
    "mul.Scalar", "div.Tensor", "div.Scalar", "div.Tensor_mode", "div.Scalar_mode",
    "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "floor_divide.default",
    "remainder.Scalar", "remainder.Tensor", "fmod.Scalar", "eq.Tensor", "eq.Scalar", "ne.Tensor",
    "ne.Scalar", "lt.Tensor", "lt.Scalar", "le.Tensor", "le.Scalar", "gt.Tensor", "gt.Scalar",
    "ge.Tensor", "ge.Scalar", "maximum.default", "minimum.default", "logical_and.default",
    "logical_or.default", "logical_xor.default", "bitwise_and.Tensor", "bitwise_and.Scalar",
    "bitwise_or.Tensor", "bitwise_or.Scalar", "bitwise_xor.Tensor", "__and__.Tensor",
    "__or__.Tensor", "__and__.Scalar", "__or__.Scalar", "where.self", "where.ScalarOther",
    "where.ScalarSelf", "where.Scalar", "masked_fill.Scalar", "masked_fill.Tensor", "clamp.default",
    "clamp.Tensor", "clamp_min.default", "clamp_max.default", "lerp.Scalar", "lerp.Tensor",
    "addcmul.default", "atan2.default", "to.dtype", "nan_to_num.default",
]
_ALONG_DIM = [
    "softmax.int", "_softmax.default", "log_softmax.int", "cumsum.default", "cumprod.default",
    "slice.Tensor", "cat.default", "diff.default", "logcumsumexp.default",
]
_REDUCTIONS = [
    "mean.dim", "sum.dim_IntList", "amax.default", "amin.default", "any.dim", "any.dims", "all.dim",
    "all.dims", "argmax.default", "argmin.default", "prod.dim_int", "var.correction", "var.dim",
    "std.correction", "logsumexp.default", "linalg_vector_norm.default",
]


def _flip(call: Call) -> Factors:
    rank = rank_of(call)
    turned = {dim % rank for dim in call["dims"]}
    names: Names = tuple(None if i in turned else i for i in range(rank))
    return Factors((names,), names)


def _glu(call: Call) -> Factors:
    rank = rank_of(call)
    names: Names = tuple(None if i == call["dim"] % rank else i for i in range(rank))
    return Factors((names,), names)


def _rows(
    names: list[str], factors: Callable[[Call], Factors], cheap: bool = True
) -> dict[str, Rule]:
    return {f"aten.{name}": FactorRule(factors, cheap=cheap) for name in names}


RULES: dict[str, Rule] = {
    **_rows([f"{name}.default" for name in _UNARY], pointwise),
    **_rows(_BINARY, pointwise),
    **_rows(_ALONG_DIM, along_dim),
    **_rows(_REDUCTIONS, reduction),
    **_rows(["mean.default", "sum.default", "max.default", "min.default", "any.default",
             "all.default"], reduce_all),
    "aten.flip.default": FactorRule(_flip),
    "aten.glu.default": FactorRule(_glu),
    "aten.reshape.default": ViewRule(),
    "aten.expand.default": FactorRule(expand, shape_argument="size"),
    "aten.permute.default": FactorRule(permute),
    "aten.select.int": FactorRule(select),
    "aten.stack.default": FactorRule(stack),
    "aten.full.default": FactorRule(creation, shape_argument="size"),
    "aten.arange.start_step": FactorRule(creation),
    "aten.tril.default": FactorRule(last_two_whole),
    "aten.triu.default": FactorRule(last_two_whole),
    "aten.layer_norm.default": FactorRule(trailing_whole),
    "aten.rms_norm.default": FactorRule(trailing_whole),
    "aten.embedding.default": FactorRule(embedding),
    "aten.index_select.default": FactorRule(index_select),
    "aten.index.Tensor": FactorRule(index),
    "aten.gather.default": FactorRule(gather),
    "aten.linear.default": FactorRule(linear, cheap=False),
    "aten.addmm.default": FactorRule(addmm, cheap=False),
    "aten.matmul.default": FactorRule(matmul, cheap=False),
    "aten.bmm.default": FactorRule(matmul, cheap=False),
    "aten.mm.default": FactorRule(matmul, cheap=False),
    "ringcompile.attention.default": FactorRule(attention, cheap=False),
}


def find_rule(target: object) -> Rule | None:
    """The row of an op, or None."""
    return RULES.get(str(target))
