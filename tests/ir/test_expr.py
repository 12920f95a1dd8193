"""Size expressions: written, read back, bound and divided, against Python's own integers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product as pairs

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._sympy.functions import (
    FloatPow,
    FloatTrueDiv,
    IntTrueDiv,
    OpaqueUnaryFn_log2,
    OpaqueUnaryFn_sqrt,
    ToFloat,
)

from ringcompile.errors import RingCompileError
from ringcompile.ir.expr import (
    Size,
    bind,
    coordinate,
    divide,
    equal,
    is_symbolic,
    parse,
    product,
    simplify,
    symbol,
    to_text,
)
from ringcompile.ir.torch_sizes import real

S, N, RING = symbol("s"), symbol("n"), coordinate("ring")
SYMBOLS = {name: symbol(name) for name in ("s", "n")}
SYMBOLS.update({name: coordinate(name) for name in ("ring", "tp", "ep")})
Values = dict[str, int]


@dataclass(frozen=True)
class Term:
    """An expression, and the same computed with Python's integers."""

    size: Size
    value: Callable[[Values], int]


def leaf(name: str) -> Term:
    return Term(SYMBOLS[name], lambda values: values[name])


def number(value: int) -> Term:
    return Term(value, lambda _: value)


def joined(name: str, a: Term, b: Term) -> Term:
    symbolic, concrete = OPERATIONS[name]
    size = symbolic(sympy.sympify(a.size), sympy.sympify(b.size))
    return Term(simplify(size), lambda v: concrete(a.value(v), b.value(v)))


def divided(name: str, a: Term, by: int) -> Term:
    symbolic, concrete = DIVISIONS[name]
    return Term(simplify(symbolic(sympy.sympify(a.size), by)), lambda v: concrete(a.value(v), by))


OPERATIONS: dict[str, tuple[Callable[..., sympy.Expr], Callable[[int, int], int]]] = {
    "+": (lambda a, b: a + b, lambda a, b: a + b),
    "-": (lambda a, b: a - b, lambda a, b: a - b),
    "*": (lambda a, b: a * b, lambda a, b: a * b),
    "Max": (sympy.Max, max),
    "Min": (sympy.Min, min),
}
DIVISIONS: dict[str, tuple[Callable[..., sympy.Expr], Callable[[int, int], int]]] = {
    "floor": (lambda a, by: sympy.floor(a / by), lambda a, by: a // by),
    "ceiling": (lambda a, by: sympy.ceiling(a / by), lambda a, by: -(-a // by)),
    "Mod": (sympy.Mod, lambda a, by: a % by),
}
terms = st.recursive(
    st.builds(leaf, st.sampled_from(sorted(SYMBOLS))) | st.builds(number, st.integers(-9, 99)),
    lambda inner: (
        st.builds(joined, st.sampled_from(sorted(OPERATIONS)), inner, inner)
        | st.builds(divided, st.sampled_from(sorted(DIVISIONS)), inner, st.integers(1, 8))
    ),
    max_leaves=4,
)
assignments = st.fixed_dictionaries(
    {name: st.integers(1 if size.is_positive else 0, 40) for name, size in sorted(SYMBOLS.items())}
)
few = settings(max_examples=100, deadline=None)


@few
@given(terms, assignments)
def test_text_reads_back(term: Term, values: Values) -> None:
    read = parse(to_text(term.size))
    assert bind(read, values) == term.value(values)
    # sympy may leave Max(2, 3) inside a larger expression; what was read once stays as it is.
    assert parse(to_text(read)) == read
    assert isinstance(read, int) or is_symbolic(read)


@few
@given(terms, assignments)
def test_binding_everything_gives_the_number(term: Term, values: Values) -> None:
    bound = bind(term.size, values)
    assert isinstance(bound, int)
    assert bound == term.value(values)


@few
@given(terms, assignments, st.sets(st.sampled_from(sorted(SYMBOLS))))
def test_binding_in_two_steps_is_binding_at_once(
    term: Term, values: Values, first: set[str]
) -> None:
    some = {name: values[name] for name in first}
    rest = {name: values[name] for name in values if name not in first}
    assert bind(bind(term.size, some), rest) == bind(term.size, values)


@few
@given(terms, terms, assignments)
def test_equal_sizes_have_equal_values(a: Term, b: Term, values: Values) -> None:
    assert equal(a.size, a.size)
    assert equal(a.size, b.size) == equal(b.size, a.size)
    if equal(a.size, b.size):
        assert a.value(values) == b.value(values)


@few
@given(terms, terms, assignments)
def test_a_quotient_times_the_divisor_is_the_whole(a: Term, b: Term, values: Values) -> None:
    quotient = divide(a.size, b.size)
    if quotient is not None and b.value(values) != 0:
        assert bind(quotient, values) * b.value(values) == a.value(values)


@few
@given(st.lists(terms, max_size=3), assignments)
def test_a_product_is_that_of_the_numbers(factors: list[Term], values: Values) -> None:
    sizes = [factor.size for factor in factors]
    whole = product(sizes)
    assert bind(whole, values) == math.prod(factor.value(values) for factor in factors)
    assert product(sizes[::-1]) == whole, "equal products compare equal"


TEXTS: dict[str, tuple[str, Size]] = {
    "a number": ("12", 12),
    "a negative number": ("-3", -3),
    "the length": ("s", S),
    "a share": ("2*n", 2 * N),
    "a coordinate": ("ring", RING),
    "half a share": ("n/2", N / 2),
    "the mirrored chunk": ("7 - ring", 7 - RING),
    "padded chunks": ("ceiling(s/8)", sympy.ceiling(S / 8)),
    "a power": ("s**8", S**8),
    "nested": ("Max(0, Min(n, s - n*ring))", sympy.Max(0, sympy.Min(N, S - N * RING))),
    "the rest": ("Mod(s, 4)", sympy.Mod(S, 4)),
    "numbers only": ("floor(7/2)*Max(1, 5)", 15),
}


@pytest.mark.parametrize("name", TEXTS)
def test_reads(name: str) -> None:
    text, expected = TEXTS[name]
    assert parse(text) == expected
    assert type(parse(text)) is type(expected)


T = sympy.Symbol("s0", integer=True, positive=True)  # as torch names it
REAL: dict[str, tuple[sympy.Expr, str, Callable[[int], float]]] = {
    "1 / s": (IntTrueDiv(1, T), "float(1/s)", lambda n: 1 / n),
    "s as a float": (ToFloat(T), "float(s)", float),
    "s / 2": (IntTrueDiv(T, 2), "float(s/2)", lambda n: n / 2),
    "a root": (OpaqueUnaryFn_sqrt(ToFloat(T)), "sqrt(s)", math.sqrt),
    "a power": (FloatPow(ToFloat(T), -1.5), "pow(s, -3/2)", lambda n: n**-1.5),
    "a quarter": (0.25 * ToFloat(T), "float(s/4)", lambda n: 0.25 * n),
    "two roundings": (
        FloatTrueDiv(IntTrueDiv(T, 49), 3), "float(float(s/49)/3)", lambda n: n / 49 / 3),
    "a quotient, back again": (
        49.0 * IntTrueDiv(T, 49), "float(49*float(s/49))", lambda n: n / 49 * 49),
    "a logarithm": (math.log(2) * OpaqueUnaryFn_log2(ToFloat(T)), "log(s)", math.log),
}


@pytest.mark.parametrize("name", REAL)
def test_numbers_with_fractions_round_as_in_python(name: str) -> None:
    value, text, python = REAL[name]
    written = real(value, {"s0": S})
    assert to_text(written) == text
    assert parse(text) == written
    for length in range(1, 200):
        bound = bind(written, {"s": length})
        assert isinstance(bound, float)
        assert bound == python(length), length
    assert to_text(bind(written, {"n": 3})) == text, "it stays a float where s is not known"


def test_lengths_are_positive_and_coordinates_are_not_negative() -> None:
    assert S.is_positive
    assert N.is_positive
    assert parse("tp") == coordinate("tp") != symbol("tp"), "s and n are the only lengths"
    assert RING.is_nonnegative
    assert not RING.is_positive


REFUSED = {
    "nothing": "",
    "code": "__import__('os').system('true')",
    "two statements": "s; n",
    "an assignment": "s = 1",
    "a walrus": "(s := 1)",
    "a lambda": "lambda: 0",
    "a comprehension": "[s for s in n]",
    "a condition": "s if n else 1",
    "a comparison": "s < n",
    "an attribute": "s.real",
    "a method": "s.subs(1, 2)",
    "a dunder attribute": "().__class__.__base__",
    "an item": "s[0]",
    "a tuple": "s, n",
    "a text": "'s'",
    "a formatted text": "f'{s}'",
    "a float": "1.5",
    "an exponent": "1e5",
    "a complex number": "1j",
    "an ellipsis": "...",
    "None": "None",
    "an unknown function": "abs(s)",
    "a dunder function": "__import__(s)",
    "eval": "eval(s)",
    "a function of a function": "floor(s)(n)",
    "a keyword": "floor(x=s)",
    "a starred argument": "floor(*s)",
    "floor division": "s//2",
    "a remainder": "s % 2",
    "a shift": "1 << 9",
    "a bitwise operator": "s | n",
    "an inversion": "~s",
    "a matrix product": "s @ n",
    "a boolean operator": "s and n",
    "a power past the limit": "s**9",
    "a huge power": "9**999999999",
    "a power of a power on the right": "2**2**9",
    "a symbolic power": "2**s",
    "a negative power": "s**-1",
    "a number of too many digits": "9" * 5000,
    "parentheses too deep": "(" * 300 + "s" + ")" * 300,
    "signs too deep": "-" * 5000 + "s",
    "functions too deep": "floor(" * 250 + "s" + ")" * 250,
    "too long a sum": "s+" * 5000 + "s",
    "a name of nothing": "s9",
    "a null byte": "s\0",
    "a line break inside": "s\n+n",
    "an infinite maximum": "Max(1/0, 2)",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str) -> None:
    with pytest.raises(RingCompileError, match="is not a size expression") as caught:
        parse(REFUSED[name])
    assert len(caught.value.message) < 120, "a long text is not repeated in full"


# `ir/serialize.size_from_text`, which files are read with, turns all of these away; `parse` itself
# says that it raises RingCompileError on anything but integer arithmetic.
LET_THROUGH = {
    "a division by zero": "1/0",
    "zero by zero": "0/0",
    "a remainder by zero": "Mod(s, 0)",
    "a function without arguments": "floor()",
    "a function of too many arguments": "floor(s, n)",
    "a maximum of nothing": "Max()",
    "True": "True",
    "a power of True": "s**True",
    "a tower of powers": "((((9**8)**8)**8)**8)",
    "a tower of symbolic powers": "((s**8)**8)**8",
    "a dunder name": "__import__",
}


@pytest.mark.parametrize("name", LET_THROUGH)
def test_refuses_what_is_no_integer(name: str) -> None:
    with pytest.raises(RingCompileError, match="is not a size expression"):
        parse(LET_THROUGH[name])


BOUND: dict[str, tuple[Size, Values, Size]] = {
    "a number": (5, {"s": 1}, 5),
    "all": (4 * N + RING, {"n": 3, "ring": 2}, 14),
    "some": (4 * N + RING, {"ring": 2}, 4 * N + 2),
    "none": (4 * N, {"s": 2}, 4 * N),
    "a fraction": (N / 2, {"n": 6}, 3),
    "zero": (RING * N, {"ring": 0}, 0),
}


@pytest.mark.parametrize("name", BOUND)
def test_binds(name: str) -> None:
    size, values, expected = BOUND[name]
    assert bind(size, values) == expected
    assert type(bind(size, values)) is type(expected)


QUOTIENTS: dict[str, tuple[Size, Size, Size | None]] = {
    "numbers": (12, 4, 3),
    "numbers with a rest": (12, 5, None),
    "by zero": (12, 0, None),
    "a length by zero": (S, 0, None),
    "a length by itself": (S, S, 1),
    "a multiple": (6 * S, 3, 2 * S),
    "a multiple by a length": (6 * S * N, 2 * S, 3 * N),
    "a length by a number": (S, 2, None),
    "a number by a length": (6, S, None),
    "a sum": (2 * S + 4, 2, S + 2),
    "a sum by a factor": (S * S + S, S + 1, S),
    "other lengths": (S, N, None),
    "a rounded half": (2 * sympy.floor(S / 2), 2, sympy.floor(S / 2)),
}


@pytest.mark.parametrize("name", QUOTIENTS)
def test_divides(name: str) -> None:
    a, b, expected = QUOTIENTS[name]
    assert divide(a, b) == expected


SAME: dict[str, tuple[Size, Size, bool]] = {
    "numbers": (3, 3, True),
    "a number and a length": (3, S, False),
    "factored": (S * (N + 1), S * N + S, True),
    "lengths": (S, N, False),
    "a length and its coordinate": (symbol("s"), coordinate("s"), False),
    "half and whole": (N / 2 * 2, N, True),
}


@pytest.mark.parametrize("name", SAME)
def test_equal(name: str) -> None:
    a, b, expected = SAME[name]
    assert equal(a, b) is expected
    assert equal(b, a) is expected


def test_numbers_divide_like_numbers() -> None:
    for a, b in pairs(range(-12, 13), range(-4, 5)):
        expected = a // b if b and a % b == 0 else None
        assert divide(a, b) == expected
        if b:
            assert divide(sympy.Integer(a), sympy.Integer(b)) == expected


def test_the_empty_product_is_one() -> None:
    assert product([]) == 1
    assert type(product([2, sympy.Integer(3)])) is int
