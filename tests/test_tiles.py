"""The tiles are those of nnU-Net's own predictor."""

import itertools
from types import SimpleNamespace

import numpy as np
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from hypothesis import given
from hypothesis import strategies as st
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_ima.tiles import TILE_STEP_SIZE, count_tiles, nearest_tile, tile_grid

shapes = st.tuples(*[st.integers(1, 40)] * 3)
patches = st.one_of(st.tuples(*[st.integers(2, 24)] * 2), st.tuples(*[st.integers(2, 24)] * 3))
Corner = tuple[int, ...]


def nnunets_tiles(shape: Corner, patch_size: Corner) -> list[Corner]:
    """Lower corners, in voxels of the unpadded case, of the tiles nnUNetPredictor visits, in its order."""
    padded, inner = pad_nd_image(np.zeros((1, *shape), np.uint8), patch_size, return_slicer=True)
    predictor = SimpleNamespace(
        configuration_manager=SimpleNamespace(patch_size=patch_size),
        tile_step_size=nnUNetPredictor().tile_step_size,
        verbose=False,
    )
    slicers = nnUNetPredictor._internal_get_sliding_window_slicers(predictor, padded.shape[1:])
    firsts = [[part if isinstance(part, int) else part.start for part in slicer[1:]] for slicer in slicers]
    below = [part.start for part in inner[1:]]
    return [tuple(int(first - pad) for first, pad in zip(corner, below, strict=True)) for corner in firsts]


def sizes(patch_size: Corner) -> Corner:
    return patch_size if len(patch_size) == 3 else (1, *patch_size)


@given(shapes, patches)
def test_the_grid_is_that_of_nnunets_predictor(shape, patch_size):
    expected = nnunets_tiles(shape, patch_size)
    assert list(itertools.product(*tile_grid(shape, patch_size))) == expected
    assert count_tiles(shape, patch_size) == len(expected)
    assert nnUNetPredictor().tile_step_size == TILE_STEP_SIZE


@given(shapes, patches, st.data())
def test_the_nearest_tile_is_that_of_a_search_over_all(shape, patch_size, data):
    size = data.draw(st.tuples(*[st.integers(1, 30)] * 3))
    lower = data.draw(st.tuples(*[st.integers(-15, 45)] * 3))
    upper = tuple(lo + s for lo, s in zip(lower, size, strict=True))
    centres = np.array(nnunets_tiles(shape, patch_size)) + np.array(sizes(patch_size)) / 2
    distances = ((centres - (np.array(lower) + np.array(upper)) / 2) ** 2).sum(1)
    assert nearest_tile(shape, patch_size, lower, upper) == int(distances.argmin())


@given(shapes, patches)
def test_a_box_that_is_a_tile_is_that_tile(shape, patch_size):
    for number, corner in enumerate(nnunets_tiles(shape, patch_size)):
        upper = [first + size for first, size in zip(corner, sizes(patch_size), strict=True)]
        assert nearest_tile(shape, patch_size, corner, upper) == number


@given(shapes, st.data())
def test_with_2d_patches_as_large_as_slices_a_tile_is_a_slice(shape, data):
    patch_size = tuple(n + data.draw(st.integers(0, 5)) for n in shape[1:])
    patch_size = tuple(max(n, 2) for n in patch_size)
    assert count_tiles(shape, patch_size) == shape[0]
    for number in range(shape[0]):
        # Wherever the patch lies within the plane.
        lower = (number, *(data.draw(st.integers(-8, 8)) for _ in range(2)))
        upper = (number + 1, *(lo + size for lo, size in zip(lower[1:], patch_size, strict=True)))
        assert nearest_tile(shape, patch_size, lower, upper) == number
