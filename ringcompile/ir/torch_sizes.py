"""Sizes and numbers of sizes as torch.export writes them, read into expressions of ours."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import sympy
from torch.utils._sympy import functions as torch_functions

from ringcompile.errors import RingCompileError
from ringcompile.ir.expr import (
    FUNCTIONS,
    ROUNDED,
    UNBACKED,
    Rounded,
    Size,
    parse,
    simplify,
    to_text,
    unbacked,
)

# Fractions with larger denominators than this are not taken for exact.
_EXACT = 1024


def _floor(value: sympy.Expr) -> sympy.Expr:
    """The integer below; `-(-a // b)`, the usual way to round up, becomes the ceiling it is."""
    if value.could_extract_minus_sign():
        return -sympy.ceiling(-value)
    return sympy.floor(value)


_ROUNDING: dict[Any, Callable[..., Any]] = {
    torch_functions.CeilToInt: sympy.ceiling,
    torch_functions.FloorToInt: _floor,
    torch_functions.TruncToInt: _floor,  # of sizes, which are positive
}
_INEXACT = (
    torch_functions.FloatPow, torch_functions.OpaqueUnaryFn_sqrt, torch_functions.OpaqueUnaryFn_log2
)
_QUOTIENTS = (torch_functions.IntTrueDiv, torch_functions.FloatTrueDiv)
_float = ROUNDED["float"]
# What rounds its result once, in floating point.
_STEPS: dict[Any, Callable[..., Any]] = {
    torch_functions.IntTrueDiv: lambda a, b: _float(a / b),
    torch_functions.FloatTrueDiv: lambda a, b: _float(a / b),
    sympy.Add: lambda a, b: _float(a + b),
    sympy.Mul: lambda a, b: _float(a * b),
    sympy.Pow: lambda a, b: _float(a**b),
    torch_functions.FloatPow: ROUNDED["pow"],
    torch_functions.OpaqueUnaryFn_sqrt: ROUNDED["sqrt"],
    torch_functions.OpaqueUnaryFn_log2: ROUNDED["log2"],
    torch_functions.Max: sympy.Max,
    torch_functions.Min: sympy.Min,
}
# torch.export writes arithmetic of sizes with functions of its own.
_FROM_TORCH: dict[Any, Callable[..., Any]] = {
    torch_functions.FloorDiv: lambda a, b: _floor(a / b),
    torch_functions.CleanDiv: lambda a, b: a / b,
    torch_functions.Mod: sympy.Mod,
    torch_functions.PythonMod: sympy.Mod,
    **_ROUNDING,
    torch_functions.IntTrueDiv: lambda a, b: a / b,
    torch_functions.FloatTrueDiv: lambda a, b: a / b,
    torch_functions.ToFloat: lambda a: a,
    torch_functions.PowByNatural: operator.pow,
    torch_functions.Max: sympy.Max,
    torch_functions.Min: sympy.Min,
}


def from_torch(expression: sympy.Expr, renamed: Mapping[str, sympy.Symbol]) -> Size:
    """Read an expression of a torch SymInt; `renamed` maps torch's symbols to ours.

    Raises:
        RingCompileError: a symbol or a function that sizes are not expected to hold.
    """
    if expression.is_Symbol and expression.name in renamed:
        return renamed[expression.name]
    if expression.is_Symbol and UNBACKED.fullmatch(expression.name):
        return unbacked(expression.name)
    if expression.is_Number:
        return simplify(_exact(expression))
    if expression.func in _ROUNDING:
        _check_rounding(expression.args[0])
    arguments = [from_torch(argument, renamed) for argument in expression.args]
    convert = _FROM_TORCH.get(expression.func)
    if convert is not None:
        return simplify(convert(*map(sympy.sympify, arguments)))
    if expression.func in (sympy.Add, sympy.Mul, sympy.Pow, *FUNCTIONS.values()):
        return simplify(expression.func(*arguments))
    raise RingCompileError(f"a size is computed by {expression.func.__name__}, which is not known")


def _exact(number: sympy.Expr) -> sympy.Expr:
    """A number such as 0.5 as the fraction that it is, where products with it are not rounded."""
    fraction = sympy.Rational(number)
    return fraction if fraction.q <= _EXACT else number


def _check_rounding(value: sympy.Expr) -> None:
    """A number is rounded to a size: it must not depend on how floating point rounds.

    The quotient of two sizes does not, since it is at least 1 / divisor away from the next whole
    number; nor do products with a half, a quarter and so on.
    """
    quotients = value.atoms(*_QUOTIENTS) - {value}
    exact = all(_exact(number).is_Rational for number in value.atoms(sympy.Number))
    if quotients or not exact or value.atoms(*_INEXACT):
        raise RingCompileError(
            "a size is rounded from a number that depends on how floating point rounds",
            hint="use whole numbers, for example (7 * n) // 10 in place of floor(0.7 * n)",
        )


def real(value: sympy.Expr, renamed: Mapping[str, sympy.Symbol]) -> Any:
    """Read an expression of a torch SymFloat: a float, or a `Rounded` as `parse` reads it back.

    Raises:
        RingCompileError: a symbol or a function that sizes are not expected to hold.
    """
    found = _steps(value, renamed)
    if found.is_number:
        return float(found)
    return parse(to_text(found if isinstance(found, Rounded) else _float(found)))


def _steps(value: sympy.Expr, renamed: Mapping[str, sympy.Symbol]) -> sympy.Expr:
    """Floating-point arithmetic of sizes, with a `Rounded` for each step that rounds."""
    if value.is_Number:
        return sympy.Rational(value)
    if value.is_integer or value.func is torch_functions.ToFloat:
        return sympy.sympify(from_torch(value, renamed))
    logarithm = _natural_logarithm(value)
    if logarithm is not None:
        return ROUNDED["log"](_steps(logarithm, renamed))
    step = _STEPS.get(value.func)
    if step is None:
        raise RingCompileError(f"a number is computed by {value.func.__name__}, which is not known")
    arguments = [_steps(argument, renamed) for argument in value.args]
    return step(*arguments) if len(arguments) == 1 else reduce(step, arguments)


def _natural_logarithm(value: sympy.Expr) -> sympy.Expr | None:
    """The x of log2(x) * log(2): torch has log2 alone, and capture writes log(x) as this."""
    match value.args:
        case (sympy.Float() as factor, torch_functions.OpaqueUnaryFn_log2(args=(x,))):
            return x if value.is_Mul and factor == math.log(2) else None
    return None
