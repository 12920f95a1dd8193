"""How large an expression of a file would become, told from its text before it is built.

Expanding a power of a sum, or the remainder of two polynomials, takes time that grows with degree
and number of terms and not with the length of the text: `Mod((s+n)**8, (n+m)**8+1)` runs for
20 seconds. Sizes of tensors are products of few lengths, so low limits leave room for all of them.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass

# Of a whole expression, and of what stands inside a function such as floor or Mod.
_DEGREE, _TERMS = 8, 256
_DEGREE_INSIDE, _TERMS_INSIDE = 3, 24
_CALLS, _ARGUMENTS = 24, 4
_POWER = 8


@dataclass(frozen=True)
class _Size:
    """Bounds on an expression once it is expanded: degree, terms, and calls of functions in it."""

    degree: int = 0
    terms: int = 1
    calls: int = 0

    def __add__(self, other: _Size) -> _Size:
        return _Size(
            max(self.degree, other.degree), self.terms + other.terms, self.calls + other.calls
        )

    def __mul__(self, other: _Size) -> _Size:
        return _Size(
            self.degree + other.degree, self.terms * other.terms, self.calls + other.calls
        )

    def within(self, degree: int, terms: int) -> bool:
        return self.degree <= degree and self.terms <= terms and self.calls <= _CALLS


def is_bounded(text: str) -> bool:
    """Whether an expression is one that can be built and compared in a short time."""
    try:
        return _size(ast.parse(text, mode="eval").body).within(_DEGREE, _TERMS)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _size(node: ast.AST) -> _Size:
    match node:
        case ast.Constant():
            return _Size()
        case ast.Name():
            return _Size(degree=1)
        case ast.UnaryOp(operand=operand):
            return _size(operand)
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub(), right=right):
            return _checked(_size(left) + _size(right))
        case ast.BinOp(left=left, op=ast.Mult() | ast.Div(), right=right):
            return _checked(_size(left) * _size(right))
        case ast.BinOp(left=left, op=ast.Pow(), right=ast.Constant(value=int() as power)):
            return _power(_size(left), power)
        case ast.Call(args=args) if len(args) <= _ARGUMENTS:
            inside = [_size(argument) for argument in args]
            if all(size.within(_DEGREE_INSIDE, _TERMS_INSIDE) for size in inside):
                return _Size(1, 1, 1 + sum(size.calls for size in inside))
    raise ValueError(node)


def _power(base: _Size, power: int) -> _Size:
    if not 0 <= power <= _POWER:
        raise ValueError(power)
    size = _Size()
    for _ in range(power):
        size = _checked(size * base)
    return size


def _checked(size: _Size) -> _Size:
    if not size.within(_DEGREE, _TERMS):
        raise ValueError(size)
    return size
