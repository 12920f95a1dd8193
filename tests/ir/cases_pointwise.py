"""Cases of the rows that work element by element, broadcasting their operands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.ir.case import Arguments, Case, aligned, called
from tests.ir.draws import Draws, Shape

Part = Callable[[Draws, Shape], Tensor]
REAL, POSITIVE, UNIT, ROUGH = Draws.real, Draws.positive, Draws.unit, Draws.rough
INTEGERS, SMALL, FLAGS, COMPLEX = Draws.integers, Draws.small, Draws.flags, Draws.complex
MIXED = Draws.mixed


def FEW_BITS(draws: Draws, shape: Shape) -> Tensor:  # noqa: N802 - one of the parts above
    return draws.small(shape).abs() % 5


def broadcast(*parts: Any, grows: bool = True, **kwargs: Any) -> Case:
    """Operands that broadcast, made by `parts`; a part that makes none is passed as it is.

    Args:
        parts: the positional arguments.
        grows: the first operand may be smaller than the result too.
        kwargs: passed as they are.
    """

    def make(draws: Draws) -> Arguments:
        shape, args, large = draws.shape(), [], True
        for part in parts:
            if not callable(part):
                args.append(part)
                continue
            # One operand at least has the whole shape, or the result might be smaller.
            args.append(part(draws, shape if large and not grows else draws.narrower(shape)))
            large = False
        return called(*args, **kwargs)

    return Case(make, aligned)


def _scalar_tensor(*parts: Any) -> Case:
    """The last operand has no dims."""

    def make(draws: Draws) -> Arguments:
        shape = draws.shape()
        full = (part(draws, draws.narrower(shape)) for part in parts[:-1])
        return called(*full, parts[-1](draws, ()))

    return Case(make, aligned)


def _unary(part: Part = REAL, *options: tuple[Any, ...], **kwargs: Any) -> Case:
    """One operand, and one of the options as further arguments."""
    return Case(
        lambda draws: called(
            part(draws, draws.shape(0, 5)), *draws.pick(options or ((),)), **kwargs
        ),
        aligned,
    )


def _gelu(draws: Draws) -> Arguments:
    return called(draws.real(draws.shape()), approximate=draws.pick(["none", "tanh"]))


_OF_REAL = [
    "abs", "neg", "exp", "exp2", "expm1", "sin", "cos", "tan", "tanh", "sigmoid", "erf", "relu",
    "silu", "mish", "hardswish", "hardsigmoid", "sign", "floor", "ceil", "round", "trunc", "square",
    "selu", "relu6", "log_sigmoid", "sinh", "cosh", "atan", "asinh", "erfc", "frac", "signbit",
    "positive", "reciprocal", "i0", "contiguous",
]
_UNARY: dict[str, Case] = {
    **{name: _unary() for name in _OF_REAL},
    **{name: _unary(POSITIVE)
       for name in ("log", "log2", "log1p", "sqrt", "rsqrt", "log10")},
    **{name: _unary(UNIT) for name in ("asin", "acos", "atanh", "erfinv")},
    **{name: _unary(ROUGH) for name in ("isnan", "isinf", "isfinite")},
    **{name: _unary(COMPLEX)
       for name in ("conj", "_conj", "real", "imag", "resolve_conj", "angle")},
    "acosh": _unary(Draws.at_least_one),
    "logit": _unary(UNIT, (), (0.1,)),
    "gelu": Case(_gelu, aligned),
    "elu": _unary(REAL, (), (0.5, 1.5, 2.0)),
    "celu": _unary(REAL, (), (0.5,)),
    "leaky_relu": _unary(REAL, (), (0.3,)),
    "softplus": _unary(REAL, (), (2.0, 0.5)),
    "hardtanh": _unary(REAL, (), (-0.2, 0.3)),
    "hardshrink": _unary(REAL, (), (0.2,)),
    "softshrink": _unary(REAL, (), (0.2,)),
    "logical_not": _unary(MIXED),
    "bitwise_not": _unary(INTEGERS),
    "full_like": _unary(MIXED, (2.5,), (0,)),
}

_COMPARISONS = ["eq", "ne", "lt", "le", "gt", "ge"]
_BINARY: dict[str, Case] = {
    **{f"{name}.Tensor": broadcast(SMALL, INTEGERS) for name in _COMPARISONS},
    **{f"{name}.Scalar": broadcast(INTEGERS, 2) for name in _COMPARISONS},
    "add.Tensor": broadcast(REAL, MIXED, alpha=2),
    "add.Scalar": broadcast(REAL, 1.5, 2),
    "sub.Tensor": broadcast(REAL, INTEGERS),
    "sub.Scalar": broadcast(INTEGERS, 3),
    "rsub.Scalar": broadcast(REAL, 3, 2),
    "mul.Tensor": broadcast(MIXED, REAL),
    "mul.Scalar": broadcast(COMPLEX, 0.5),
    "div.Tensor": broadcast(REAL, INTEGERS),
    "div.Scalar": broadcast(INTEGERS, 3),
    "div.Tensor_mode": broadcast(REAL, POSITIVE, rounding_mode="floor"),
    "div.Scalar_mode": broadcast(INTEGERS, 4, rounding_mode="trunc"),
    "pow.Tensor_Scalar": broadcast(REAL, 3),
    "pow.Tensor_Tensor": broadcast(POSITIVE, REAL),
    "pow.Scalar": broadcast(2.5, REAL),
    "floor_divide.default": broadcast(REAL, POSITIVE),
    "floor_divide.Scalar": broadcast(INTEGERS, 4),
    "remainder.Scalar": broadcast(INTEGERS, 4),
    "remainder.Tensor": broadcast(REAL, POSITIVE),
    "fmod.Scalar": broadcast(INTEGERS, 4),
    "fmod.Tensor": broadcast(REAL, POSITIVE),
    "maximum.default": broadcast(SMALL, INTEGERS),
    "minimum.default": broadcast(ROUGH, REAL),
    "logical_and.default": broadcast(FLAGS, MIXED),
    "logical_or.default": broadcast(MIXED, FLAGS),
    "logical_xor.default": broadcast(FLAGS, MIXED),
    **{f"{name}.Tensor": broadcast(INTEGERS, SMALL)
       for name in ("bitwise_and", "bitwise_or", "bitwise_xor", "__and__", "__or__")},
    **{f"{name}.Scalar": broadcast(INTEGERS, 5)
       for name in ("bitwise_and", "bitwise_or", "bitwise_xor", "__and__", "__or__")},
    "bitwise_left_shift.Tensor_Scalar": broadcast(INTEGERS, 2),
    "bitwise_right_shift.Tensor_Scalar": broadcast(INTEGERS, 1),
    "__lshift__.Scalar": broadcast(INTEGERS, 2),
    "__rshift__.Scalar": broadcast(INTEGERS, 1),
    **{f"{name}.Tensor": broadcast(INTEGERS, FEW_BITS)
       for name in ("__lshift__", "__rshift__", "bitwise_left_shift", "bitwise_right_shift")},
    "fmax.default": broadcast(ROUGH, REAL),
    "fmin.default": broadcast(REAL, ROUGH),
    "copysign.Tensor": broadcast(REAL, REAL),
    "copysign.Scalar": broadcast(REAL, -1.0),
    "nextafter.default": broadcast(REAL, REAL),
    "ldexp.Tensor": broadcast(REAL, FEW_BITS),
    "where.self": broadcast(FLAGS, REAL, REAL),
    "where.ScalarOther": broadcast(FLAGS, REAL, -1.5),
    "where.ScalarSelf": broadcast(FLAGS, 0.5, REAL),
    "where.Scalar": broadcast(FLAGS, 0.5, -1.0),
    "masked_fill.Scalar": broadcast(REAL, FLAGS, -2.0),
    "masked_fill.Tensor": _scalar_tensor(REAL, FLAGS, REAL),
    "clamp.default": broadcast(REAL, -0.2, 0.6),
    "clamp.Tensor": broadcast(REAL, UNIT, POSITIVE),
    "clamp_min.default": broadcast(REAL, 0.1),
    "clamp_min.Tensor": broadcast(REAL, UNIT),
    "clamp_max.default": broadcast(REAL, 0.1),
    "clamp_max.Tensor": broadcast(REAL, UNIT),
    "lerp.Scalar": broadcast(REAL, REAL, 0.3),
    "lerp.Tensor": broadcast(REAL, REAL, UNIT),
    "addcmul.default": broadcast(REAL, REAL, REAL, value=2),
    "addcdiv.default": broadcast(REAL, REAL, POSITIVE, value=2),
    "atan2.default": broadcast(REAL, REAL),
    "to.dtype": broadcast(REAL, torch.int64),
    "nan_to_num.default": broadcast(ROUGH, 0.5),
    "polar.default": broadcast(POSITIVE, REAL),
    "complex.default": broadcast(REAL, REAL),
    "xlogy.Tensor": broadcast(REAL, POSITIVE),
    "threshold.default": broadcast(REAL, 0.2, -3.0),
    "heaviside.default": broadcast(REAL, REAL),
    "fill.Tensor": _scalar_tensor(REAL, REAL),
    "fill.Scalar": broadcast(REAL, 2.0),
    "copy.default": broadcast(REAL, MIXED, grows=False),
    "isclose.default": broadcast(ROUGH, ROUGH, equal_nan=True),
    "logaddexp.default": broadcast(REAL, REAL),
    "hypot.default": broadcast(REAL, REAL),
    "isin.Tensor_Scalar": broadcast(INTEGERS, 3),
}

CASES: dict[str, Case] = {
    **{f"aten.{name}.default": case for name, case in _UNARY.items()},
    **{f"aten.{name}": case for name, case in _BINARY.items()},
    "ringcompile.tokenwise.default": _unary(region=0, leaves=True),
}
