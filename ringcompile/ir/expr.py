"""Sizes, offsets and mesh coordinates as integer expressions.

A graph's arguments hold numbers that are known (an int) or not known yet (a sympy expression): the
global sequence length `s`, the length `n` of one rank's share, the sequences `b` of the whole batch
and `k` of one part of it, a mesh coordinate such as `ring`. Where inputs are of several lengths, as
those of an encoder and a decoder, the others are `s2`, `s3`, .. and their shares `n2`, `n3`, ...
`bind` fills symbols in; what remains symbolic stays symbolic. A number that is not whole, such as
`1 / x.shape[1]` in a model, is written `float(1/s)`. Expressions are written to files as text and
read back by a small parser that knows ten functions and never evaluates anything.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar, TypeAlias, TypeGuard

import sympy

from ringcompile.axes import AXES, refs
from ringcompile.errors import RingCompileError

Size: TypeAlias = int | sympy.Expr


class Rounded(sympy.Function):  # type: ignore[misc]
    """A number that a model computes of sizes in floating point: an argument of an op, no size.

    Each step of the model's that rounds is one of these, inside the next one, and rounds as Python
    does. So a comparison with the number is decided as in the model.
    """

    is_integer = False
    is_extended_real = True
    compute: ClassVar[Callable[..., float]]

    @classmethod
    def eval(cls, *values: sympy.Expr) -> sympy.Expr | None:
        """The nearest float64 as a fraction, once all sizes are known.

        Raises:
            RingCompileError: there is no such number, as of a logarithm of 0.
        """
        if not all(value.is_number for value in values):
            return None
        try:
            return sympy.Rational(cls.compute(*(value.p / value.q for value in values)))
        except (ArithmeticError, AttributeError, TypeError, ValueError):
            text = f"{cls.__name__}({', '.join(map(str, values))})"
            raise RingCompileError(f"{text} has no value, or none that is finite") from None

    def _pythoncode(self, printer: Any) -> str:
        return f"{type(self).__name__}({', '.join(map(printer.doprint, self.args))})"


def _rounded(name: str, compute: Callable[..., float], nargs: int = 1) -> type[Rounded]:
    return type(name, (Rounded,), {"compute": staticmethod(compute), "nargs": nargs})


# By the names that they are written with.
ROUNDED = {
    "float": _rounded("float", float),
    "sqrt": _rounded("sqrt", math.sqrt),
    "log": _rounded("log", math.log),
    "log2": _rounded("log2", math.log2),
    "pow": _rounded("pow", operator.pow, 2),
}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    **ROUNDED,
    "floor": sympy.floor,
    "ceiling": sympy.ceiling,
    "Mod": sympy.Mod,
    "Max": sympy.Max,
    "Min": sympy.Min,
}
_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
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
    return is_symbolic(value) and any(UNBACKED.fullmatch(s.name) for s in value.free_symbols)


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
    return _known(expression, bound)


def bind(value: Size, values: Mapping[str, int]) -> Size:
    """Fill in the symbols named in `values`; a number with a fraction becomes a float."""
    if isinstance(value, int):
        return value
    return _bind(value, tuple(sorted(values.items())))


def bind_to(value: Any, values: Mapping[sympy.Symbol, Any]) -> Any:
    """An expression with other expressions in place of symbols; anything else as it is."""
    return _known(value, value.xreplace(dict(values))) if is_symbolic(value) else value


def _known(before: sympy.Expr, bound: sympy.Expr) -> Any:
    """What became of an expression: where all sizes are known an int, or of `Rounded` a float."""
    if isinstance(before, Rounded) and bound.is_Rational:
        return float(bound)
    return simplify(bound)


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


def _built(node: ast.AST) -> Any:
    """The expression, held to be a number that a size can be, at every step."""
    made = sympy.sympify(_build(node))
    if made.is_finite is False or made is sympy.nan or made.has(sympy.zoo, sympy.oo):
        raise ValueError(made)
    if made.is_number and abs(made) >= _TOO_LARGE:
        raise ValueError(made)
    if made.is_Pow and made.exp > _MAX_POWER:
        raise ValueError(made)
    return made


def _build(node: ast.AST) -> Any:
    match node:
        case ast.Constant(value=int() as number) if not isinstance(number, bool):
            return sympy.Integer(number)
        case ast.Name(id=name) if name in SIZE_NAMES:
            return symbol(name)
        case ast.Name(id=name) if name in AXES:
            return coordinate(name)
        case ast.Name(id=name) if UNBACKED.fullmatch(name):
            return unbacked(name)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_built(left), _built(right))
        case ast.BinOp(left=left, op=ast.Pow(), right=ast.Constant(value=int() as power)):
            if isinstance(power, bool) or not 0 <= power <= _MAX_POWER:
                raise ValueError(power)
            return _built(left) ** power
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_built(operand)
        case ast.Call(func=ast.Name(id=name), args=[_, *_] as args, keywords=[]) if (
            name in FUNCTIONS
        ):
            return FUNCTIONS[name](*map(_built, args))
    raise ValueError(node)


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
# Of each length of a program: its symbol, and that of a rank's share of it.
SHARES = {SEQUENCE: LOCAL, "s2": "n2", "s3": "n3", "s4": "n4"}
LENGTHS = tuple(SHARES)
SIZE_NAMES = frozenset({*SHARES, *SHARES.values(), OWN, BATCH, PART, FIRST})
UNBACKED = re.compile(r"u\d{1,6}")


def of_tokens(size: Size) -> bool:
    """Whether a size grows with a sequence."""
    return is_symbolic(size) and not _OF_TOKENS.isdisjoint(symbols_in(size))


_OF_TOKENS = frozenset({*SHARES, *SHARES.values(), OWN})
