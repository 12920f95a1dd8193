"""Rows for matmuls of all kinds: linear, addmm, matmul, einsum and their kin.

`TERMS` names the dims of each one's operands and output, einsum-like, and is the only place that
does: layouts, recognised attention, the balance of stages and costs all read it.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from ringcompile.ir.calls import Call, target_name
from ringcompile.ir.nodes import type_of
from ringcompile.ir.rules.base import Factors, Names, rank_of, shapes


def _linear(call: Call) -> Factors:
    """... i, o i, o -> ... o; a weight that is a vector lacks o."""
    weight, *biases = shapes(call)[1:]
    outer: Names = ("o",) if len(weight) == 2 else ()
    batch = tuple(range(rank_of(call) - len(outer)))
    return Factors(((*batch, "i"), (*outer, "i"), *(("o",) * len(b) for b in biases)),
                   (*batch, *outer))


def _addmm(call: Call) -> Factors:
    """Bias (broadcast), [b] m k, [b] k n -> [b] m n; also baddbmm."""
    bias, left, _ = shapes(call)
    batch: Names = ("b",) * (len(left) - 2)
    output: Names = (*batch, "m", "n")
    return Factors(
        (output[len(output) - len(bias) :], (*batch, "m", "k"), (*batch, "k", "n")), output
    )


def _matmul(call: Call) -> Factors:
    """... m k, ... k n -> ... m n, batch dims broadcast; a vector lacks its outer dim."""
    left, right = shapes(call)
    m = ("m",) if len(left) > 1 else ()
    n = ("n",) if len(right) > 1 else ()
    batch = tuple(range(rank_of(call) - len(m) - len(n)))

    def of(shape: tuple[object, ...]) -> Names:
        return batch[len(batch) - max(len(shape) - 2, 0) :]

    return Factors(((*of(left), *m, "k"), (*of(right), "k", *n)), (*batch, *m, *n))


def _einsum(call: Call) -> Factors:
    """The equation itself; dims that `...` stands for are counted from the right."""
    inputs, arrow, output = call["equation"].replace(" ", "").partition("->")
    given = [letters(term) for term in inputs.split(",")]
    if arrow:
        wanted = letters(output)
    else:  # dims under the ellipsis, then letters that occur once, in order of the alphabet
        held = [c for term in given for c in term if c != "..."]
        once = sorted(c for c in set(held) if held.count(c) == 1)
        wanted = (["..."] if any("..." in term for term in given) else []) + once
    operands = (spelled(t, len(shape)) for t, shape in zip(given, shapes(call), strict=True))
    return Factors(tuple(operands), spelled(wanted, rank_of(call)))


def letters(term: str) -> list[str]:
    """The names in one term of an equation, `...` among them."""
    return re.findall(r"\.\.\.|[A-Za-z]", term)


def spelled(term: list[str], rank: int) -> Names:
    """A name for each of `rank` dims; those that `...` stands for are numbered from the right."""
    if "..." not in term:
        return tuple(term)
    where, count = term.index("..."), rank - len(term) + 1
    return (*term[:where], *(("...", count - i) for i in range(count)), *term[where + 1 :])


# The names of all dims, those that broadcast and those on a diagonal included.
TERMS: dict[str, Callable[[Call], Factors]] = {
    "aten.linear.default": _linear,
    "aten.addmm.default": _addmm,
    "aten.baddbmm.default": _addmm,
    **{f"aten.{name}.default": _matmul for name in ("matmul", "bmm", "mm", "_int_mm", "mv", "dot")},
    "aten.einsum.default": _einsum,
}


def matmul(call: Call) -> Factors:
    """The terms of a matmul, but for dims that no split may pass through.

    These are dims of size 1 that broadcast, and those whose name stands twice in one operand (a
    diagonal).
    """
    terms = TERMS[target_name(call.target)](call)
    diagonal = {f for names in terms.operands for f in names if names.count(f) > 1}
    sizes: dict[object, set[object]] = {}
    for names, shape in zip(terms.operands, shapes(call), strict=True):
        for factor, size in zip(names, shape, strict=True):
            sizes.setdefault(factor, set()).add(size)

    def kept(names: Names, shape: tuple[object, ...]) -> Names:
        return tuple(
            None if f in diagonal or (size == 1 and sizes[f] != {1}) else f
            for f, size in zip(names, shape, strict=True)
        )

    return Factors(
        tuple(map(kept, terms.operands, shapes(call))),
        tuple(None if f in diagonal else f for f in terms.output),
    )


def distances(call: Call) -> Factors:
    """... m k, ... n k -> ... m n, batch dims broadcast; a distance is of all features."""
    rank = rank_of(call)
    out = type_of(call.node).shape

    def batch(shape: tuple[object, ...]) -> Names:
        first = rank - len(shape)
        return tuple(
            None if size == 1 and out[first + i] != 1 else first + i
            for i, size in enumerate(shape[:-2])
        )

    left, right = shapes(call)
    return Factors(((*batch(left), "m", None), (*batch(right), "n", None)),
                   (*range(rank - 2), "m", "n"))


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
