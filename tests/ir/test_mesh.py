"""Ranks on a mesh: a peer along some axes is the one in that place of the group."""

from __future__ import annotations

import pytest

from ringcompile.mesh import Mesh


@pytest.mark.parametrize("axis", ["ring", "tp", "ulysses", "ring,tp", "tp,ulysses", "ring,tp,pp"])
def test_peers_are_the_places_of_a_group(axis: str) -> None:
    mesh = Mesh("pp=2,ring=3,time=2,ulysses=2,tp=4")
    for rank in range(mesh.world_size):
        places = range(mesh.size(axis))
        assert [mesh.peer(rank, axis, place) for place in places] == mesh.group_of(rank, axis)
