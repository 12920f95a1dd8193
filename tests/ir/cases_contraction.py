"""Cases of the rows for products: sums over dims that operands share, attention among them."""

from __future__ import annotations

from typing import Any

import torch

from ringcompile.ir.calls import Call
from ringcompile.ir.layout import Layout
from ringcompile.ir.nodes import type_of
from tests.ir.case import Arguments, Case, Free, called, leading, pairs, shape_of
from tests.ir.draws import Draws


def _linear(draws: Draws) -> Arguments:
    inner, outer = draws.size(), draws.size()
    if draws.number(0, 5) == 0:  # a weight that is one row
        return called(draws.real((*draws.shape(1, 3), inner)), draws.real((inner,)))
    bias = draws.pick([[], [draws.real((outer,))], [draws.real((1,))]])
    return called(draws.real((*draws.shape(0, 3), inner)), draws.real((outer, inner)), *bias)


def _linear_free(call: Call) -> Free:
    weight = shape_of(call, 1)
    outer = {
        (i, 0) for i in range(1, len(call.operands))
        if len(weight) == 2 and shape_of(call, i)[0] == weight[0]
    }
    return leading(1, 0)(call) | outer


def _biased(batched: bool) -> Case:
    """Addmm and baddbmm, with a bias that broadcasts."""

    def make(draws: Draws) -> Arguments:
        batch = (draws.size(),) * batched
        m, k, n = draws.size(), draws.size(), draws.size()
        bias = draws.real(draws.narrower((*batch, m, n)))
        return called(
            bias, draws.real((*batch, m, k)), draws.real((*batch, k, n)), beta=2, alpha=0.5
        )

    free = [(1, 0), (1, 1), (2, 0), (2, 2)] if batched else [(1, 0), (2, 1)]
    return Case(make, pairs(*free))


def _matmul(draws: Draws) -> Arguments:
    m, k, n = draws.size(), draws.size(), draws.size()
    batch = draws.shape(0, 2)
    left, right = (draws.narrower(batch) for _ in range(2))
    return draws.pick([
        called(draws.real((*left, m, k)), draws.real((*right, k, n))),
        called(draws.real((*left, m, k)), draws.real((k,))),
        called(draws.real((k,)), draws.real((*right, k, n))),
        called(draws.real((k,)), draws.real((k,))),
    ])


def _matmul_free(call: Call) -> Free:
    """Rows of the left, columns of the right, and batch dims that are the result's."""
    out = type_of(call.node).shape
    inner = sum(len(shape_of(call, i)) > 1 for i in range(2))
    batch = out[: len(out) - inner]
    found = set()
    for i in range(2):
        shape = shape_of(call, i)
        rank, behind = len(shape), len(batch) - max(len(shape) - 2, 0)
        found |= {(i, d) for d in range(rank - 2) if shape[d] == batch[behind + d]}
        if rank > 1:
            found.add((i, rank - 2 if i == 0 else rank - 1))
    return found


def _product(*shapes: str) -> Case:
    """Operands whose dims are letters; k is summed over."""

    def make(draws: Draws) -> Arguments:
        sizes = {letter: draws.size() for letter in sorted(set("".join(shapes)))}
        return called(*(draws.real(tuple(sizes[c] for c in shape)) for shape in shapes))

    kept = [(i, d) for i, s in enumerate(shapes) for d, letter in enumerate(s) if letter != "k"]
    return Case(make, pairs(*kept))


_EQUATIONS = [
    "bsh,oh->bso", "bsh,bsk->bhk", "bhqd,bhkd->bhqk", "ij,jk", "ba", "Ba,aC", "ii->i", "ij,ij->",
    "bij,bjk,kl->bil", "i,j->ji", "...ij,...jk->...ik", "...i,oi->...o", "b...h->h...b", "...a,a",
    "bsgh,bsg->bsh", "bii->b", "a...,a...b->...b",
]


def _einsum(draws: Draws) -> Arguments:
    equation = draws.pick(_EQUATIONS)
    sizes = {letter: draws.size() for letter in sorted(set(equation)) if letter.isalpha()}
    under = draws.shape(0, 2)
    tensors = []
    for term in equation.partition("->")[0].split(","):
        before, ellipsis, behind = term.partition("...")
        shape = [sizes[c] for c in before]
        shape += draws.narrower(under) if ellipsis else ()
        shape += [sizes[c] for c in behind]
        diagonal = len(set(before + behind)) < len(before + behind)
        tensors.append(draws.real(tuple(
            1 if not diagonal and draws.number(0, 9) == 0 else size for size in shape
        )))
    return called(equation, tensors)


def _einsum_free(call: Call) -> Free:
    """Where all is spelled out: letters of the result that stand once in a term, of full size."""
    inputs, _, output = call["equation"].partition("->")
    if "..." in inputs or not output:
        return set()
    terms = inputs.split(",")
    sizes: dict[str, set[Any]] = {}
    for i, term in enumerate(terms):
        for letter, size in zip(term, shape_of(call, i), strict=True):
            sizes.setdefault(letter, set()).add(size)
    return {
        (i, d) for i, term in enumerate(terms) for d, letter in enumerate(term)
        if letter in output and all(t.count(letter) < 2 for t in terms) and len(sizes[letter]) == 1
    }


def _int_mm(draws: Draws) -> Arguments:
    """int8 times int8, summed in int32."""
    m, k, n = (draws.size() for _ in range(3))
    operands = [draws.integers(size, -128, 127).to(torch.int8) for size in ((m, k), (k, n))]
    return called(*operands)


def _grouped_mm(draws: Draws) -> Arguments:
    """Runs of rows through their matrices; or a matrix each for a batch of equal runs."""
    groups, k = draws.number(1, 3), 8
    n = draws.pick([8, 16, 24, 8 * draws.size()])
    matrices = draws.real((groups, n, k)).float().mT
    rows = draws.size()
    if draws.flag():
        return called(draws.real((groups, rows, k)).float(), matrices)
    ends = draws.integers((groups,), 0, rows).sort().values.int()
    ends[-1] = rows
    return called(draws.real((rows, k)).float(), matrices, ends)


def _expert_linear(draws: Draws) -> Arguments:
    batch, experts = draws.shape(0, 3), draws.number(1, 4)
    inner, outer = draws.size(), draws.size()
    transposed = draws.flag()
    weight = (experts, inner, outer) if transposed else (experts, outer, inner)
    bias = draws.real((experts, outer)) if draws.flag() else None
    return called(
        draws.real((*batch, inner)), draws.integers(batch, 0, experts), draws.real(weight), bias,
        transposed=transposed,
    )


def _expert_linear_free(call: Call) -> Free:
    batch = range(len(shape_of(call, 1)))
    bias = {(3, 1)} if call["bias"] is not None else set()
    outer = {(2, 2 if call["transposed"] else 1)} | bias
    return outer | {(i, d) for i in range(2) for d in batch}


def _grouped_linear(draws: Draws) -> Arguments:
    rows, experts = draws.size(), draws.number(1, 4)
    inner, outer = draws.size(), draws.size()
    transposed, ones = draws.flag(), (1,) * draws.number(0, 2)
    weight = (experts, inner, outer) if transposed else (experts, outer, inner)
    bias = draws.real((experts, outer)) if draws.flag() else None
    ends = draws.integers((experts,), 0, rows).sort().values.int()
    return called(
        draws.real((rows, *ones, inner)), ends, draws.real(weight), bias, transposed=transposed
    )


def _grouped_linear_free(call: Call) -> Free:
    bias = {(3, 1)} if call["bias"] is not None else set()
    ones = range(1, len(shape_of(call, 0)) - 1)
    return {(2, 2 if call["transposed"] else 1)} | bias | {(0, dim) for dim in ones}


def _attention(draws: Draws) -> Arguments:
    batch, groups = draws.size(), draws.pick([1, 2, 4])
    heads = groups * draws.pick([1, 1, 2, 3])
    queries, keys, size, out = draws.size(), draws.size(), draws.number(1, 4), draws.size()
    key_mask = draws.flags((draws.pick([1, batch]), 1, 1, keys)) if draws.flag() else None
    mask = draws.real((*draws.some_ones((batch, heads, queries)), keys))
    return called(
        draws.real((batch, heads, queries, size)), draws.real((batch, groups, keys, size)),
        draws.real((batch, groups, keys, out)), key_mask, draws.pick([None, mask]),
        draws.real((heads,)) if draws.flag() else None,
        scale=0.5, softcap=draws.pick([None, 2.0]), lower=draws.pick([None, 0]),
        upper=draws.pick([None, 2]),
    )


def _attention_free(call: Call) -> Free:
    """Samples, queries, values' features; heads that have keys of their own, or all the same."""
    heads, groups = shape_of(call, 0)[1], shape_of(call, 1)[1]
    found = {(0, 0), (1, 0), (2, 0), (0, 2), (2, 3)}
    if heads == groups:
        found |= {(0, 1), (1, 1), (2, 1)}
    return found | ({(0, 1)} if groups == 1 else set())


def _rows_are_split(call: Call, layout: Layout) -> bool:
    return bool(layout.dims[2])


def _distances(draws: Draws) -> Arguments:
    batch, features = draws.shape(0, 2), draws.size()
    left, right = (
        draws.real((*draws.narrower(batch), draws.size(), features)) for _ in range(2)
    )
    return called(left, right, draws.pick([1.0, 2.0]), None)


def _distances_free(call: Call) -> Free:
    """Rows of both, and batch dims that are the result's."""
    out = type_of(call.node).shape
    found = set()
    for i in range(2):
        shape = shape_of(call, i)
        first = len(out) - len(shape)
        found |= {(i, d) for d in range(len(shape) - 2) if shape[d] == out[first + d]}
        found.add((i, len(shape) - 2))
    return found


_TABLE: dict[str, Case] = {
    "linear.default": Case(_linear, _linear_free),
    "addmm.default": _biased(batched=False),
    "baddbmm.default": _biased(batched=True),
    "matmul.default": Case(_matmul, _matmul_free),
    "mm.default": _product("mk", "kn"),
    "_int_mm.default": Case(_int_mm, pairs((0, 0), (1, 1))),
    "bmm.default": _product("bmk", "bkn"),
    "mv.default": _product("mk", "k"),
    "dot.default": _product("k", "k"),
    "outer.default": _product("m", "n"),
    "ger.default": _product("m", "n"),
    "einsum.default": Case(_einsum, _einsum_free),
    "_cdist_forward.default": Case(_distances, _distances_free),
    "_grouped_mm.default": Case(_grouped_mm, pairs((1, 2))),
}
CASES: dict[str, Case] = {
    **{f"aten.{name}": case for name, case in _TABLE.items()},
    "ringcompile.attention.default": Case(
        _attention, _attention_free, rewritten=_rows_are_split
    ),
    "ringcompile.expert_linear.default": Case(_expert_linear, _expert_linear_free),
    "ringcompile.grouped_linear.default": Case(_grouped_linear, _grouped_linear_free),
}
