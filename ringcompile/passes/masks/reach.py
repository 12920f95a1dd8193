"""How large the numbers of an additive mask may be: whether it may hide keys.

A mask is followed to what it is made of. A float input may hold anything; a number in the graph is
what it is; the data of buffers and parameters is looked at. What is computed of them is bounded by
the same arithmetic: (keep - 1) * 1e9 reaches 1e9, as x / 1e-9 does. Flags, positions and what
comes out of matmuls count as one: scores are of that size, and nobody hides a key by a position.
The result of an op that is in no table here may be anything.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import exp, inf, isinf, isnan, prod
from typing import Any

import torch
from torch import fx

from ringcompile.ir.calls import Call, target_name
from ringcompile.ir.nodes import reached
from ringcompile.ir.program import Program
from ringcompile.passes.contraction import read

# Numbers of this size may be meant to hide keys.
_HIDES = 1e6


@dataclass(frozen=True)
class Magnitude:
    """How far from zero the elements of a tensor may lie.

    Attributes:
        size: bound of the finite ones; inf where nothing is known.
        infinite: whether some may be infinite.
    """

    size: float = 1.0
    infinite: bool = False


def may_hide(program: Program | None, nodes: Sequence[fx.Node], infinite: bool = False) -> bool:
    """Whether additive masks may hold numbers so low that scores vanish beside them.

    Args:
        program: of the graph; without it every placeholder is an input.
        nodes: the masks, in 4 dims.
        infinite: whether -inf counts too.
    """
    reaches: dict[fx.Node, Magnitude] = {}
    for node in _made_of(nodes):
        reaches[node] = _reach(program, node, reaches)
    return any(
        reaches[node].size >= _HIDES or (infinite and reaches[node].infinite) for node in nodes
    )


def _made_of(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The nodes and all that they are computed of up to matmuls, operands first."""
    found = reached(nodes, lambda node: node.all_input_nodes if read(node) is None else [])
    return [node for node in nodes[0].graph.nodes if node in found] if nodes else []


def _reach(program: Program | None, node: fx.Node, known: dict[fx.Node, Magnitude]) -> Magnitude:
    if node.op == "placeholder":
        return _of_placeholder(program, node)
    if node.target is operator.getitem:  # one of several results
        return known[node.args[0]]  # type: ignore[index]
    if node.target is torch.ops.aten.view.dtype:
        return _ANYTHING
    name = target_name(node.target).split(".")[1] if node.op == "call_function" else ""
    is_flag = getattr(node.meta["type"], "dtype", None) == torch.bool
    if is_flag or read(node) is not None or name in _COUNTS:
        return Magnitude()
    operands = [known[value] if isinstance(value, fx.Node) else _of_number(value)
                for value in _numbers(node)]
    if name in _PICK:
        operands = operands[:1]
    sizes = [operand.size for operand in operands]
    if name in _KEEP or name in _PICK:
        size = max(sizes, default=1.0)
    elif name in _ARITHMETIC and sizes:
        size = _ARITHMETIC[name](sizes)
    else:
        return _ANYTHING
    by_number = len(node.args) > 1 and isinstance(node.args[1], int | float)
    infinite = name in _MAY_BE_INFINITE and not by_number
    infinite |= any(operand.infinite for operand in operands)
    return Magnitude(inf if isnan(size) else size, infinite)


def _of_placeholder(program: Program | None, node: fx.Node) -> Magnitude:
    weight = None if program is None else program.weights.get(node.name)
    dtype = node.meta["type"].dtype
    if weight is None or program is None or program.source is None:
        return _ANYTHING if dtype.is_floating_point else Magnitude()
    tensor = program.source(weight.name)
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.is_meta:
        alone = prod(weight.shape) == 1 and dtype.is_floating_point
        return _ANYTHING if alone else Magnitude()
    finite = tensor.isfinite()
    sizes = tensor[finite].abs()
    return Magnitude(float(sizes.max()) if sizes.numel() else 0.0, not bool(finite.all()))


def _of_number(number: float) -> Magnitude:
    return Magnitude(0.0, infinite=True) if isinf(number) else Magnitude(abs(float(number)))


def _numbers(node: fx.Node) -> Iterator[Any]:
    """The tensors and numbers that an op computes with; sizes, dims and places are none."""
    call = Call(node)
    for argument in call.target._schema.arguments:
        value = call[argument.name]
        several: Sequence[Any] = value if isinstance(value, list | tuple) else (value,)
        yield from (x for x in several if isinstance(x, fx.Node))
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and str(argument.type) in _OF_NUMBERS:
            yield value


def _product(sizes: Sequence[float]) -> float:
    return 0.0 if 0.0 in sizes else prod(sizes)


def _inverse(size: float) -> float:
    """Of a number below one its reciprocal; what is computed, as a norm is, divides as one."""
    return 1 / size if 0.0 < size < 1.0 else 1.0


def _quotient(sizes: Sequence[float]) -> float:
    return _product([sizes[0], *map(_inverse, sizes[1:])])


def _power(sizes: Sequence[float]) -> float:
    base, exponent = sizes[0], sizes[1] if len(sizes) > 1 else 1.0
    try:
        return float(max(base, _inverse(base)) ** exponent)
    except OverflowError:
        return inf


def _exponential(sizes: Sequence[float]) -> float:
    return exp(min(sizes[0], 700.0))


_ANYTHING = Magnitude(inf, infinite=True)
_OF_NUMBERS = frozenset({"number", "Optional[number]", "float", "Optional[float]", "Tensor"})
# What is counted or chosen by position, averages, and what is normalised.
_COUNTS = frozenset({
    "arange", "positions", "argmax", "argmin", "argsort", "floor_divide", "remainder", "fmod",
    "attention", "softmax", "_softmax", "layer_norm", "rms_norm", "sin", "cos", "tanh", "sigmoid",
    "sign", "erf", "one_hot", "searchsorted", "bucketize", "bitwise_and", "bitwise_or",
    "bitwise_not", "bitwise_xor", "__and__", "__or__", "__xor__", "zeros", "ones", "zeros_like",
    "ones_like", "new_zeros", "new_ones", "eye",
})
# Results no larger than the largest operand, but for the number of terms of a sum.
_KEEP = frozenset({
    "reshape", "view", "expand", "permute", "transpose", "t", "unsqueeze", "squeeze", "slice",
    "select", "index_put", "scatter", "cat", "stack", "to", "clone", "contiguous", "copy", "detach",
    "alias", "neg", "abs", "where", "masked_fill", "clamp", "clamp_min", "clamp_max", "minimum",
    "maximum", "amax", "amin", "max", "min", "relu", "gelu", "silu", "elu", "leaky_relu",
    "hardtanh", "floor", "ceil", "round", "trunc", "sqrt", "tril", "triu", "flip", "roll", "repeat",
    "repeat_interleave", "full", "full_like", "new_full", "linspace", "scalar_tensor",
    "lift_fresh_copy", "constant_pad_nd", "pad", "unfold", "chunk", "split", "split_with_sizes",
    "unbind", "narrow", "unflatten", "flatten", "sort", "topk", "mean", "sum", "cumsum", "cummax",
    "cummin", "diff", "slice_scatter", "select_scatter", "fill", "masked_scatter", "broadcast_to",
    "expand_as", "movedim", "diagonal",
})
# Of these the first operand alone: the others say which of its entries.
_PICK = frozenset({"index", "index_select", "gather", "embedding", "take_along_dim"})
_ARITHMETIC: dict[str, Callable[[Sequence[float]], float]] = {
    "add": sum, "sub": sum, "rsub": sum, "mul": _product, "div": _quotient, "pow": _power,
    "square": lambda sizes: _power([sizes[0], 2.0]),
    "reciprocal": lambda sizes: _inverse(sizes[0]), "rsqrt": lambda sizes: _inverse(sizes[0]),
    **dict.fromkeys(("exp", "exp2", "expm1", "sinh", "cosh"), _exponential),
    # Of the smallest number above zero, and of the largest.
    **dict.fromkeys(("log", "log2", "log10", "log1p"), lambda sizes: max(sizes[0], 1100.0)),
}
_MAY_BE_INFINITE = frozenset({"div", "reciprocal", "rsqrt", "log", "log2", "log10", "log1p"})
