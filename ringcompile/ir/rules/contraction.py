"""Rows for products that sum over shared dims: linear, matmul, einsum and their kind."""

from __future__ import annotations

import re

from ringcompile.ir.calls import Call
from ringcompile.ir.nodes import type_of
from ringcompile.ir.rules.base import Factors, Names, rank_of, shapes


def linear(call: Call) -> Factors:
    """... i, o i, o -> ... o; a weight that is one row lacks o, and a bias of size 1 has none."""
    weight, *biases = shapes(call)[1:]
    outer: Names = ("o",) if len(weight) == 2 else ()
    batch = tuple(range(rank_of(call) - len(outer)))
    bias = tuple(tuple("o" if weight[0] == size else None for size in b) for b in biases)
    return Factors(((*batch, "i"), (*outer, "i"), *bias), (*batch, *outer))


def addmm(call: Call) -> Factors:
    """Bias (broadcast), [b] m k, [b] k n -> [b] m n; also baddbmm."""
    bias, left, _ = shapes(call)
    batch: Names = ("b",) * (len(left) - 2)
    output: Names = (*batch, "m", "n")
    out = type_of(call.node).shape
    behind = len(out) - len(bias)
    names = tuple(None if b == 1 and o != 1 else f
                  for f, b, o in zip(output[behind:], bias, out[behind:], strict=True))
    return Factors((names, (*batch, "m", "k"), (*batch, "k", "n")), output)


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


def outer(call: Call) -> Factors:
    """M, n -> m n."""
    return Factors((("m",), ("n",)), ("m", "n"))


def grouped_mm(call: Call) -> Factors:
    """Rows in runs, each run through the matrix of its group: which rows, only all of them tell."""
    names = tuple((None,) * (len(shape) - 1) for shape in shapes(call))
    rest = names[2:]
    return Factors(
        ((*names[0], "k"), (*names[1], "n"), *((None,) * (len(r) + 1) for r in rest)),
        (*(None,) * (rank_of(call) - 1), "n"),
    )


def einsum(call: Call) -> Factors:
    """The equation itself; a letter that stands twice in one operand (a diagonal) is whole."""
    operands, output = einsum_terms(call)
    diagonal = {f for names in operands for f in names if names.count(f) > 1}
    sizes: dict[object, set[object]] = {}
    for names, shape in zip(operands, shapes(call), strict=True):
        for factor, size in zip(names, shape, strict=True):
            sizes.setdefault(factor, set()).add(size)

    def kept(names: Names, shape: tuple[object, ...]) -> Names:
        return tuple(
            None if f in diagonal or (size == 1 and sizes[f] != {1}) else f
            for f, size in zip(names, shape, strict=True)
        )

    return Factors(
        tuple(map(kept, operands, shapes(call))),
        tuple(None if f in diagonal else f for f in output),
    )


def einsum_terms(call: Call) -> tuple[list[Names], Names]:
    """A factor for each dim; those that `...` stands for are counted from the right."""
    inputs, arrow, output = call["equation"].replace(" ", "").partition("->")
    given = [_letters(term) for term in inputs.split(",")]
    if arrow:
        wanted = _letters(output)
    else:  # dims under the ellipsis, then letters that occur once, in order of the alphabet
        letters = [c for term in given for c in term if c != "..."]
        once = sorted(c for c in set(letters) if letters.count(c) == 1)
        wanted = (["..."] if any("..." in term for term in given) else []) + once
    operands = [_spelled(t, len(shape)) for t, shape in zip(given, shapes(call), strict=True)]
    return operands, _spelled(wanted, rank_of(call))


def _letters(term: str) -> list[str]:
    return re.findall(r"\.\.\.|[A-Za-z]", term)


def _spelled(term: list[str], rank: int) -> Names:
    if "..." not in term:
        return tuple(term)
    where, count = term.index("..."), rank - len(term) + 1
    return (*term[:where], *(("...", count - i) for i in range(count)), *term[where + 1 :])
