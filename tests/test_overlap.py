"""Cutting tiles out of a volume and adding them back are each other's gradient."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_networks import seeded

from nnunet_ima.overlap import Place, add_tiles, cut_tiles

SHAPE = (4, 5, 6)


@st.composite
def several_places(draw: st.DrawFn) -> list[Place]:
    size = [draw(st.integers(1, length)) for length in SHAPE]
    count = draw(st.integers(1, 5))
    corners = [[draw(st.integers(0, n - s)) for n, s in zip(SHAPE, size, strict=True)] for _ in range(count)]
    return [tuple(slice(c, c + s) for c, s in zip(corner, size, strict=True)) for corner in corners]


@given(several_places(), st.integers(0, 100))
def test_they_do_what_indexing_does(places, seed):
    volume = torch.randn((2, *SHAPE), generator=seeded(seed))
    tiles = cut_tiles(volume, places)
    assert all(torch.equal(tile, volume[:, x, y, z]) for tile, (x, y, z) in zip(tiles, places, strict=True))
    expected = torch.zeros_like(volume)
    for tile, (x, y, z) in zip(tiles, places, strict=True):
        expected[:, x, y, z] += tile
    assert torch.equal(add_tiles(tiles, places, SHAPE), expected)


@given(several_places(), st.integers(0, 100))
def test_their_gradients_are_those_of_finite_differences(places, seed):
    volume = torch.randn((2, *SHAPE), generator=seeded(seed), dtype=torch.double, requires_grad=True)
    tiles = cut_tiles(volume.detach(), places).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda v: cut_tiles(v, places), (volume,))
    assert torch.autograd.gradcheck(lambda t: add_tiles(t, places, SHAPE), (tiles,))
