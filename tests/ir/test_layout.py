"""Layouts behind views: a rank's share of a view is the view of its share, element by element."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product as pairs

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ringcompile.ir.expr import Size, bind, symbol
from ringcompile.ir.layout import WHOLE, Atom, DimLayout, Layout, format_dim, normalise, regroup
from ringcompile.ir.types import SequenceSplit, TensorType, local_shape
from ringcompile.mesh import Mesh
from ringcompile.ops.sequence import positions

S = symbol("s")
RING = ("ring",)
TP = ("tp",)
few = settings(max_examples=120, deadline=None)


def split_share(x: torch.Tensor, layout: Layout, ranks: int, rank: int) -> torch.Tensor:
    """One rank's share of a whole tensor, by taking every dim apart into its atoms."""
    mesh = Mesh((("tp", ranks),))
    for dim, atoms in enumerate(layout.dims):
        if not atoms:
            continue
        sizes = [int(atom.size) for atom in atoms]
        opened = x.reshape(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])
        for i, atom in enumerate(atoms):
            for axis in atom.axes:
                place = mesh.index({"tp": rank}, axis)
                opened = opened.chunk(mesh.size(axis), dim + i)[place]
        x = opened.flatten(dim, dim + len(atoms) - 1)
    return x


def arange(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(math.prod(shape)).reshape(shape)


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


@st.composite
def shapes(draw: st.DrawFn, total: int, max_dims: int = 4) -> tuple[int, ...]:
    """A shape of `total` elements; dims of size 1 are welcome."""
    dims = []
    for _ in range(draw(st.integers(0, max_dims - 1))):
        dims.append(draw(st.sampled_from(divisors(total))))
        total //= dims[-1]
    return (*dims, total)


TOTALS = [d for d in range(2, 97) if len(divisors(d)) >= 4]


@st.composite
def placed(draw: st.DrawFn) -> tuple[tuple[int, ...], Layout, int]:
    """A shape, a layout that splits one of its dims over the ring, and the number of ranks."""
    ranks = draw(st.integers(2, 4))
    shape = draw(shapes(draw(st.sampled_from(TOTALS))))
    dims = [i for i, size in enumerate(shape) if size % ranks == 0]
    assume(dims)
    dim = draw(st.sampled_from(dims))
    return shape, Layout.split(len(shape), dim, shape[dim], TP), ranks


def check_view(
    shape: tuple[int, ...], layout: Layout, out: tuple[int, ...], found: Layout, ranks: int
) -> None:
    x = arange(shape)
    mesh = Mesh((("tp", ranks),))
    here = local_shape(TensorType(torch.int64, out, found), mesh, None)
    for rank in range(ranks):
        share = split_share(x, layout, ranks, rank)
        expected = split_share(x.reshape(out), found, ranks, rank)
        assert torch.equal(share.reshape(here), expected)


def layouts_of(shape: tuple[int, ...], ranks: int) -> Iterator[Layout]:
    """Every layout that splits one dim of the shape: major whole, the rest split."""
    for dim, size in enumerate(shape):
        for major in divisors(size):
            if size // major % ranks == 0:
                atoms = normalise([Atom(major), Atom(size // major, TP)])
                yield Layout(tuple(atoms if i == dim else WHOLE for i in range(len(shape))))


def expressible(
    shape: tuple[int, ...], layout: Layout, out: tuple[int, ...], ranks: int
) -> list[Layout]:
    """The layouts of the viewed whole under which every rank already holds its share."""
    x = arange(shape)
    shares = [split_share(x, layout, ranks, rank).flatten() for rank in range(ranks)]
    return [
        candidate
        for candidate in layouts_of(out, ranks)
        if all(
            torch.equal(split_share(x.reshape(out), candidate, ranks, rank).flatten(), share)
            for rank, share in enumerate(shares)
        )
    ]


@few
@given(placed(), st.data())
def test_a_share_of_a_view_is_the_view_of_the_share(
    start: tuple[tuple[int, ...], Layout, int], data: st.DataObject
) -> None:
    """Through a chain of views, so that dims of several atoms come in too."""
    shape, layout, ranks = start
    for _ in range(3):
        out = data.draw(shapes(math.prod(shape)))
        found = regroup(shape, layout, out, {"tp": ranks})
        if found is None:
            return
        assert not found.is_whole, "a split is never lost"
        check_view(shape, layout, out, found, ranks)
        shape, layout = out, found


@few
@given(placed(), st.data())
def test_there_and_back(start: tuple[tuple[int, ...], Layout, int], data: st.DataObject) -> None:
    shape, layout, ranks = start
    axes = {"tp": ranks}
    flat = (math.prod(shape),)
    flattened = regroup(shape, layout, flat, axes)
    assert flattened is not None, "flattening cuts nothing"
    assert regroup(flat, flattened, shape, axes) == layout
    out = data.draw(shapes(math.prod(shape)))
    found = regroup(shape, layout, out, axes)
    if found is not None:
        assert regroup(out, found, shape, axes) == layout, "equal placements compare equal"
        assert regroup(out, found, flat, axes) == flattened


@few
@given(placed(), st.data())
def test_a_view_that_leaves_the_split_dim_alone_is_never_refused(
    start: tuple[tuple[int, ...], Layout, int], data: st.DataObject
) -> None:
    shape, layout, ranks = start
    dim = next(i for i, atoms in enumerate(layout.dims) if atoms)
    before = data.draw(shapes(math.prod(shape[:dim]), max_dims=3))
    after = data.draw(shapes(math.prod(shape[dim + 1 :]), max_dims=3))
    out = (*before, shape[dim], *after)
    found = regroup(shape, layout, out, {"tp": ranks})
    assert found == Layout.split(len(out), len(before), shape[dim], TP)


@few
@given(placed(), st.data())
def test_what_is_found_is_the_only_layout(
    start: tuple[tuple[int, ...], Layout, int], data: st.DataObject
) -> None:
    shape, layout, ranks = start
    out = data.draw(shapes(math.prod(shape)))
    found = regroup(shape, layout, out, {"tp": ranks})
    possible = expressible(shape, layout, out, ranks)
    assert len(set(possible)) <= 1, "a placement is written in one way"
    if found is not None and found.axes == TP:  # else the axis itself was cut in two
        assert possible == [found]


def small_views() -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """All views between shapes of at most 3 dims with 4 to 24 elements, without dims of size 1."""
    found = []
    for total in (4, 6, 8, 12, 16, 24):
        some = [
            shape
            for length in (1, 2, 3)
            for shape in pairs(divisors(total)[1:], repeat=length)
            if math.prod(shape) == total
        ]
        found += list(pairs(some, repeat=2))
    return found


def splits() -> Iterator[tuple[tuple[int, ...], Layout, tuple[int, ...], int]]:
    """The small views with every dim that divides split: shape, layout, out, ranks."""
    for (shape, out), ranks in pairs(small_views(), (2, 3)):
        for dim, size in enumerate(shape):
            if size % ranks == 0:
                yield shape, Layout.split(len(shape), dim, size, TP), out, ranks


def test_through_the_flat_shape_a_layout_is_found_wherever_there_is_one() -> None:
    found_some = found_none = 0
    for shape, layout, out, ranks in splits():
        axes, flat = {"tp": ranks}, (math.prod(shape),)
        flattened = regroup(shape, layout, flat, axes)
        assert flattened is not None
        found = regroup(flat, flattened, out, axes)
        assert expressible(shape, layout, out, ranks) == ([] if found is None else [found])
        found_some, found_none = found_some + (found is not None), found_none + (found is None)
    assert found_some > 300
    assert found_none > 100


def test_a_layout_is_found_wherever_there_is_one() -> None:
    for shape, layout, out, ranks in splits():
        found = regroup(shape, layout, out, {"tp": ranks})
        assert expressible(shape, layout, out, ranks) == ([] if found is None else [found])


# -- a split length that is not known yet ----------------------------------------------------------

ORDERS = ("contiguous", "zigzag")


def sequence_share(
    x: torch.Tensor, type_: TensorType, sequence: SequenceSplit, rank: int, length: int
) -> torch.Tensor:
    """One rank's share of a whole tensor whose dims have a length among their atoms."""
    chunk = sequence.local_length(length) // sequence.chunks_per_rank
    here = positions([int(c) for c in sequence.chunks(rank)], chunk, length)
    for dim, atoms in enumerate(type_.layout.dims):
        if not atoms:
            continue
        sizes = [int(bind(atom.size, {"s": length})) for atom in atoms]
        x = x.reshape(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])
        split = next(i for i, atom in enumerate(atoms) if atom.axes)
        x = x.index_select(dim + split, here).flatten(dim, dim + len(atoms) - 1)
    return x


@st.composite
def around_a_length(draw: st.DrawFn) -> tuple[tuple[Size, ...], int, tuple[Size, ...]]:
    """A shape with `s` among its dims, where it is, and a view of it that does not cut `s`."""
    before, after = draw(shapes(24, max_dims=3)), draw(shapes(24, max_dims=3))
    left, right = draw(shapes(24, max_dims=3)), draw(shapes(24, max_dims=3))
    how = draw(st.sampled_from(["alone", "before", "after", "both"]))
    middle: tuple[Size, ...] = {
        "alone": (*left, S, *right),
        "before": (*left[:-1], left[-1] * S, *right),
        "after": (*left, S * right[0], *right[1:]),
        "both": (*left[:-1], left[-1] * S * right[0], *right[1:]),
    }[how]
    return (*before, S, *after), len(before), middle


@settings(max_examples=60, deadline=None)
@given(around_a_length(), st.integers(2, 4), st.sampled_from(ORDERS), st.integers(1, 9))
def test_views_around_a_symbolic_length(
    view: tuple[tuple[Size, ...], int, tuple[Size, ...]], ranks: int, order: str, length: int
) -> None:
    shape, dim, out = view
    sequence = SequenceSplit((("ring", ranks),), order)
    layout = Layout.split(len(shape), dim, S, RING)
    found = regroup(shape, layout, out, {"ring": ranks})
    assert found is not None
    assert regroup(out, found, shape, {"ring": ranks}) == layout
    known = sequence.bindings({"s": length})
    x = arange(tuple(int(bind(size, known)) for size in shape))
    view_type = TensorType(torch.int64, out, found)
    here = tuple(int(bind(n, known)) for n in local_shape(view_type, None, sequence))
    viewed = x.reshape([int(bind(size, known)) for size in out])
    for rank in range(ranks):
        share = sequence_share(x, TensorType(x.dtype, shape, layout), sequence, rank, length)
        expected = sequence_share(viewed, view_type, sequence, rank, length)
        assert torch.equal(share.reshape(here), expected)


CUT: dict[str, tuple[tuple[Size, ...], tuple[Size, ...]]] = {
    "in two": ((S, 4), (2, S * 2)),
    "off its front": ((S * 2,), (S, 2)),
    "with what is behind": ((S, 6), (S * 2, 3)),
}


@pytest.mark.parametrize("name", CUT)
def test_a_split_length_is_cut_only_where_its_atoms_end(name: str) -> None:
    shape, out = CUT[name]
    layout = Layout.split(len(shape), 0, S, RING)
    if name == "off its front":
        layout = Layout(((Atom(S, RING), Atom(2)),))
    found = regroup(shape, layout, out, {"ring": 2})
    assert (found is None) == (name == "in two")


# -- normal forms ----------------------------------------------------------------------------------

FORMS: dict[str, tuple[list[Atom], DimLayout]] = {
    "nothing": ([], WHOLE),
    "whole": ([Atom(6)], WHOLE),
    "whole in parts": ([Atom(2), Atom(S), Atom(3)], WHOLE),
    "ones": ([Atom(1), Atom(1)], WHOLE),
    "split": ([Atom(6, RING)], (Atom(6, RING),)),
    "split beside ones": ([Atom(1), Atom(6, RING), Atom(1)], (Atom(6, RING),)),
    "a known split takes in what is behind it": ([Atom(4, TP), Atom(3)], (Atom(12, TP),)),
    "all of it": ([Atom(4, TP), Atom(3), Atom(5)], (Atom(60, TP),)),
    "the sequence stays apart": ([Atom(26, RING), Atom(3)], (Atom(26, RING), Atom(3))),
    "not what is before it": ([Atom(3), Atom(4, RING)], (Atom(3), Atom(4, RING))),
    "a length stays apart": ([Atom(S, RING), Atom(3)], (Atom(S, RING), Atom(3))),
    "what is behind a length is one": (
        [Atom(S, RING), Atom(3), Atom(2)],
        (Atom(S, RING), Atom(6)),
    ),
    "what is before is one": ([Atom(2), Atom(3), Atom(4, RING)], (Atom(6), Atom(4, RING))),
    "symbolic parts are one": ([Atom(2), Atom(S), Atom(4, RING)], (Atom(2 * S), Atom(4, RING))),
    "two axes": ([Atom(4, RING), Atom(6, ("tp",))], (Atom(4, RING), Atom(6, ("tp",)))),
}


@pytest.mark.parametrize("name", FORMS)
def test_normal_form(name: str) -> None:
    atoms, expected = FORMS[name]
    assert normalise(atoms) == expected
    assert normalise(expected) == expected, "a normal form is its own"


@few
@given(
    st.lists(
        st.builds(Atom, st.sampled_from([1, 2, 3, 4, 6, S]), st.sampled_from([(), (), RING])),
        max_size=5,
    ).filter(lambda atoms: sum(bool(atom.axes) for atom in atoms if atom.size != 1) <= 1)
)
def test_equal_placements_compare_equal(atoms: list[Atom]) -> None:
    """However the unsplit atoms are written, the normal form is the same."""
    apart = [
        part
        for atom in atoms
        for part in ([Atom(2), Atom(1), Atom(atom.size)] if not atom.axes else [atom, Atom(1)])
    ]
    doubled = [
        part for atom in atoms for part in ([Atom(2 * atom.size)] if not atom.axes else [atom])
    ]
    assert normalise(apart) == normalise(doubled)
    assert normalise(normalise(atoms)) == normalise(atoms)


TEXTS: dict[str, tuple[Size | None, DimLayout, str]] = {
    "whole": (64, WHOLE, "64"),
    "whole, of unknown size": (None, WHOLE, "*"),
    "split": (4096, (Atom(4096, RING),), "4096/ring"),
    "over two axes": (64, (Atom(64, ("ring", "tp")),), "64/ring/tp"),
    "a padded length": (S + 1, (Atom(S + 1, RING),), "(s + 1)/ring"),
    "flattened": (2 * S, (Atom(2), Atom(S, RING)), "2*(s/ring)"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_text(name: str) -> None:
    size, dim, expected = TEXTS[name]
    assert format_dim(size, dim) == expected


def test_a_layout_says_which_axes_split_it() -> None:
    layout = Layout(((Atom(2), Atom(S, RING)), WHOLE, (Atom(8, ("tp",)),)))
    assert layout.axes == ("ring", "tp")
    assert str(layout) == "[2*(s/ring), *, 8/tp]"
    assert not layout.is_whole
    assert Layout.whole(3).is_whole
    assert Layout.whole(3).axes == ()


def test_sizes_that_nothing_proves_equal_stay_whole_beside_what_is_split() -> None:
    """A view keeps its elements: between dims that both sides have, whatever those dims are."""
    batch, length = symbol("b"), symbol("s")
    padded, halved = length + length % 2, (length + 1) // 2
    for dim, size, axis in ((0, batch, "dp"), (3, 8, "tp")):
        split = Layout.split(4, dim, size, (axis,))
        found = regroup((batch, padded, 4, 8), split, (batch, halved, 8, 8), {axis: 2})
        assert found == split
    behind = Layout.split(3, 1, padded, ("ring",))
    assert regroup((batch, padded, 8), behind, (batch, halved, 16), {"ring": 2}) is None
