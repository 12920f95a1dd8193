"""Sizes, offsets and mesh coordinates as integer expressions.

A graph's arguments hold numbers that are known (an int) or not known yet (a sympy expression): the
global sequence length `s`, the length `n` of one rank's share, the sequences `b` of the whole batch
and `k` of one part of it, a mesh coordinate such as `ring`.
`bind` fills symbols in; what remains symbolic stays symbolic. A number that is not whole, such as
`1 / x.shape[1]` in a model, is written `float(1/s)`; only inside such a call does `/` not stand for
a whole number, and may logarithms and roots be. Expressions are written to files as text and read
back by a small parser that knows eight functions and never evaluates anything.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeAlias, TypeGuard

import sympy
from torch.utils._sympy import functions as torch_functions

from ringcompile.axes import AXES, refs
from ringcompile.errors import RingCompileError

Size: TypeAlias = int | sympy.Expr


class Real(sympy.Function):  # type: ignore[misc]
    """A number with a fraction, computed of sizes: an argument of an op, never a size."""

    nargs = 1
    is_integer = False
    is_extended_real = True

    def _pythoncode(self, printer: Any) -> str:
        return f"float({printer.doprint(self.args[0])})"


Real.__name__ = "float"  # as it is written

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "float": Real,
    "floor": sympy.floor,
    "ceiling": sympy.ceiling,
    "Mod": sympy.Mod,
    "Max": sympy.Max,
    "Min": sympy.Min,
}
_OF_FRACTIONS: dict[str, Callable[..., Any]] = {"log": sympy.log, "sqrt": sympy.sqrt}
_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
}


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
    torch_functions.FloatPow: operator.pow,
    torch_functions.PowByNatural: operator.pow,
    torch_functions.OpaqueUnaryFn_sqrt: sympy.sqrt,
    torch_functions.OpaqueUnaryFn_log2: lambda a: sympy.log(a) / sympy.log(2),
    torch_functions.Max: sympy.Max,
    torch_functions.Min: sympy.Min,
}


@lru_cache
def symbol(name: str) -> sympy.Symbol:
    """The positive integer symbol of that name; the first of some sequences may be number 0."""
    if name == FIRST:
        return sympy.Symbol(name, integer=True, nonnegative=True)
    return sympy.Symbol(name, integer=True, positive=True)


@lru_cache
def coordinate(axis: str) -> sympy.Symbol:
    """This rank's coordinate on a mesh axis, as a symbol."""
    return sympy.Symbol(axis, integer=True, nonnegative=True)


def coordinate_on(sizes: Mapping[str, int], axes: Sequence[str]) -> Size:
    """This rank's place on several axes together, row-major, or on parts such as `tp//4`."""
    place: Any = 0
    for ref in refs(",".join(axes)):
        place = place * ref.size(sizes) + ref.place(coordinate(ref.name))
    return simplify(place)


@lru_cache
def unbacked(name: str) -> sympy.Symbol:
    """A size that only the data tells, `u0`: it stands in types, never in an argument."""
    return sympy.Symbol(name, integer=True, nonnegative=True)


def depends_on_data(value: object) -> bool:
    """Whether a size holds an unbacked symbol."""
    return is_symbolic(value) and any(_UNBACKED.fullmatch(s.name) for s in value.free_symbols)


def spelled(shape: Iterable[Size]) -> list[Size]:
    """A shape as an argument: a size that only the data tells is -1, what is left over."""
    return [-1 if depends_on_data(size) else size for size in shape]


def simplify(value: Any) -> Size:
    """An int where the expression is a known integer, else the expression."""
    if isinstance(value, int):
        return value
    return int(value) if value.is_Integer else value


def is_symbolic(value: object) -> TypeGuard[sympy.Expr]:
    """Whether `value` is an expression with symbols in it."""
    return isinstance(value, sympy.Basic)


def equal(a: Size, b: Size) -> bool:
    """Whether two sizes are equal for every value of their symbols, as far as can be told."""
    return a == b or bool(sympy.expand(a - b) == 0)


@lru_cache(maxsize=65536)
def _bind(expression: sympy.Expr, values: tuple[tuple[str, int], ...]) -> Any:
    known = dict(values)
    bound = expression.xreplace(
        {s: sympy.Integer(known[s.name]) for s in expression.free_symbols if s.name in known}
    )
    if isinstance(bound, Real) and not bound.free_symbols:
        return float(bound.args[0])  # an argument of an op; sizes are whole numbers
    return simplify(bound)


def bind(value: Size, values: Mapping[str, int]) -> Size:
    """Fill in the symbols named in `values`; a number with a fraction becomes a float."""
    if isinstance(value, int):
        return value
    return _bind(value, tuple(sorted(values.items())))


def bind_to(value: Any, values: Mapping[sympy.Symbol, Any]) -> Any:
    """An expression with other expressions in place of symbols; anything else as it is."""
    return simplify(value.xreplace(dict(values))) if is_symbolic(value) else value


def divide(a: Size, b: Size) -> Size | None:
    """A / b where that is an integer for all values of the symbols, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    return _quotient(a, b)


@lru_cache(maxsize=65536)  # sympy takes a millisecond; layers ask for the same ones
def _quotient(a: Size, b: Size) -> Size | None:
    quotient = sympy.cancel(sympy.sympify(a) / b)
    return simplify(quotient) if quotient.is_integer else None


def product(sizes: Any) -> Size:
    """The product of sizes, expanded so that equal products compare equal."""
    return _product(tuple(sizes))


@lru_cache(maxsize=65536)
def _product(sizes: tuple[Size, ...]) -> Size:
    result: Any = 1
    for size in sizes:
        result = result * size
    return simplify(sympy.expand(result)) if is_symbolic(result) else int(result)


def from_torch(expression: sympy.Expr, renamed: Mapping[str, sympy.Symbol]) -> Size:
    """Read an expression of a torch SymInt; `renamed` maps torch's symbols to ours.

    Raises:
        RingCompileError: a symbol or a function that sizes are not expected to hold.
    """
    if expression.is_Symbol and expression.name in renamed:
        return renamed[expression.name]
    if expression.is_Symbol and _UNBACKED.fullmatch(expression.name):
        return unbacked(expression.name)
    if expression.is_Number:
        return simplify(_exact(expression))
    if expression.func in _ROUNDING:
        _check_rounding(expression.args[0])
    arguments = [from_torch(argument, renamed) for argument in expression.args]
    convert = _FROM_TORCH.get(expression.func)
    if convert is not None:
        return simplify(convert(*map(sympy.sympify, arguments)))
    if expression.func in (sympy.Add, sympy.Mul, sympy.Pow, sympy.log, *_FUNCTIONS.values()):
        return simplify(expression.func(*arguments))
    raise RingCompileError(f"a size is computed by {expression.func.__name__}, which is not known")


def _exact(number: sympy.Expr) -> sympy.Expr:
    """A number such as 0.5 as the fraction that it is, where products with it are not rounded."""
    if number == math.log(2):  # torch has log2 alone: log(n) comes as log2(n) * log(2)
        return sympy.log(2)
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


def real(value: Size | float) -> Any:
    """A number that a model computes of sizes in floating point, as an argument of an op."""
    if not is_symbolic(value):
        return float(value)
    written = Real(value.xreplace({f: sympy.Rational(f) for f in value.atoms(sympy.Float)}))
    return parse(to_text(written))  # in the form that is read back


def to_text(value: Size) -> str:
    """The expression as text that `parse` reads back."""
    return _text(value) if is_symbolic(value) else str(value)


@lru_cache(maxsize=65536)  # sympy takes long to print; a program has few expressions, many times
def _text(expression: sympy.Expr) -> str:
    return str(expression)


@lru_cache(maxsize=65536)
def symbols_in(value: sympy.Expr) -> frozenset[str]:
    """The names of an expression's symbols."""
    return frozenset(symbol.name for symbol in value.free_symbols)


@lru_cache(maxsize=65536)
def parse(text: str) -> Size:
    """Read an expression; raises RingCompileError on anything but integer arithmetic."""
    try:
        return simplify(_built(ast.parse(text, mode="eval").body))
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError):
        raise RingCompileError(f"'{text[:80]}' is not a size expression") from None


def _built(node: ast.AST, fractions: bool = False) -> Any:
    """The expression, held to be a number that a size can be, at every step."""
    made = sympy.sympify(_build(node, fractions))
    if made.is_finite is False or made is sympy.nan or made.has(sympy.zoo, sympy.oo):
        raise ValueError(made)
    if made.is_number and abs(made) >= _TOO_LARGE:
        raise ValueError(made)
    if made.is_Pow and made.exp > _MAX_POWER:
        raise ValueError(made)
    return made


def _build(node: ast.AST, fractions: bool) -> Any:
    """`fractions`: whether it is inside `float`, where roots and logarithms may be."""
    match node:
        case ast.Constant(value=int() as number) if not isinstance(number, bool):
            return sympy.Integer(number)
        case ast.Name(id=name) if name in SIZE_NAMES:
            return symbol(name)
        case ast.Name(id=name) if name in AXES:
            return coordinate(name)
        case ast.Name(id=name) if _UNBACKED.fullmatch(name):
            return unbacked(name)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_built(left, fractions), _built(right, fractions))
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            power = power_of(right)
            if not fractions and not (power.is_Integer and power >= 0):
                raise ValueError(power)
            return _built(left, fractions) ** power
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_built(operand, fractions)
        case ast.Call(func=ast.Name(id=name), args=[_, *_] as args, keywords=[]) if (
            name in _FUNCTIONS or (name in _OF_FRACTIONS and fractions)
        ):
            inside = [_built(argument, fractions or name == "float") for argument in args]
            return {**_FUNCTIONS, **_OF_FRACTIONS}[name](*inside)
    raise ValueError(node)


def power_of(node: ast.AST) -> sympy.Rational:
    """The exponent of a power in an expression, such as 2, -1 or 3/2.

    Raises:
        ValueError: it is none, or too large.
    """
    match node:
        case ast.Constant(value=int() as power) if not isinstance(power, bool):
            found = sympy.Rational(power)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            found = -power_of(operand)
        case ast.BinOp(left=left, op=ast.Div(), right=ast.Constant(value=2)):
            found = power_of(left) / 2
        case _:
            raise ValueError(node)
    if abs(found) > _MAX_POWER:
        raise ValueError(node)
    return found


# Fractions with larger denominators than this are not taken for exact.
_EXACT = 1024
# A file must not be able to ask for a number with a million digits.
_MAX_POWER = 8
_TOO_LARGE = 2**63

# Sizes have these names; the only other ones in an expression are mesh axes, for coordinates.
SEQUENCE = "s"
LOCAL = "n"
OWN = "m"
BATCH = "b"
PART = "k"
FIRST = "k0"
# The axis of layouts along the batch; a part is what one replica runs at a time.
PART_AXIS = "part"
SIZE_NAMES = frozenset({SEQUENCE, LOCAL, OWN, BATCH, PART, FIRST})
_UNBACKED = re.compile(r"u\d{1,6}")
