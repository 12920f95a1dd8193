"""Specs: all meshes of a size, their variants, and what of them is simulated."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest

from ringcompile.axes import AXES
from ringcompile.cost.specs import (
    Variant,
    factorisations,
    in_time,
    overlapping,
    reordered,
    short_rings,
    slowest_place,
    variants,
)
from ringcompile.mesh import Mesh
from tests.cost.clusters import cluster


@pytest.mark.parametrize(("number", "count"), [(1, 1), (7, 6), (8, 56), (12, 21 * 6), (16, 126)])
def test_all_factorisations(number: int, count: int) -> None:
    found = list(factorisations(number))
    assert len(found) == len(set(found)) == count
    for mesh in found:
        assert prod(size for _, size in mesh.axes) == number
        assert [name for name in AXES if name in mesh.names] == mesh.names or number == 1


def test_variants_of_a_mesh() -> None:
    ring = list(variants(Mesh.parse("ring=4"), 1))
    assert [(v.order, v.ring) for v in ring] == [
        ("zigzag", "rotate"), ("contiguous", "rotate"), ("contiguous", "gather")]
    assert [v.tp_sequence for v in variants(Mesh.parse("tp=4"), 1)] == [False, True]
    counts = [v.microbatches for v in variants(Mesh.parse("pp=2,dp=2"), 16)]
    assert counts == [1, 2, 4, 8]
    assert [v.microbatches for v in variants(Mesh.parse("ring=2"), 16)] == [1, 1, 1]


def test_axes_of_the_sequence_change_places() -> None:
    found = list(map(str, reordered(Mesh.parse("pp=2,ring=4,ulysses=2,tp=2"), 8)))
    assert found == ["pp=2,ring=4,ulysses=2,tp=2", "pp=2,ulysses=2,ring=4,tp=2"]
    assert list(map(str, reordered(Mesh.parse("ring=4,tp=2"), 4))) == ["ring=4,tp=2"]
    assert len(list(reordered(Mesh.parse("pp=2,ring=4,ulysses=2"), 8))) == 1  # all on one node
    assert len(list(reordered(Mesh.parse("pp=2,ring=4,ulysses=2"), 4))) == 2


def test_a_variant_says_what_is_not_as_usual() -> None:
    assert str(Variant(Mesh.parse("ring=4"))) == "ring=4"
    assert str(Variant(Mesh.parse("ring=4"), order="zigzag", microbatches=2)) == (
        "ring=4 --order zigzag --microbatches 2")


def test_what_can_overlap() -> None:
    ring = Variant(Mesh.parse("ring=4"))
    assert [v.overlap for v in overlapping(ring, 1)] == ["schedule"]
    assert [v.overlap for v in overlapping(ring, 4)] == ["schedule", "halves"]
    assert overlapping(Variant(Mesh.parse("tp=4")), 4) == []


def test_what_can_be_cut_in_time() -> None:
    ring = Variant(Mesh.parse("ring=4,tp=2"), order="zigzag")
    assert str(in_time(ring)) == "time=2,ring=4,tp=2 --order zigzag"
    for other in (Variant(Mesh.parse("tp=4")), Variant(Mesh.parse("pp=2,ring=2")),
                  replace(ring, ring="gather"), replace(ring, capacity="local")):
        assert in_time(other) is None


def test_places_and_short_rings() -> None:
    assert slowest_place(Variant(Mesh.parse("ring=16"), order="contiguous")) == 15
    assert slowest_place(Variant(Mesh.parse("ring=4"), order="contiguous")) == 3
    assert slowest_place(Variant(Mesh.parse("ring=4"), order="zigzag")) == 0
    assert short_rings(Mesh.parse("ring=64"), cluster(per_node=8)) == (16, 32)
    assert short_rings(Mesh.parse("ring=64,tp=4"), cluster(per_node=8)) == (8, 16)
