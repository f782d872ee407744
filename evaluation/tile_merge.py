"""Perturbed tiles, put together into one volume."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nnunet_ima.evaluation.sliding_window import gaussian
from nnunet_ima.overlap import Place, add_tiles, cut_tiles


class TileMerge:
    """Where tiles overlap, their perturbations are averaged with nnU-Net's own Gaussian weights, as it averages logits.

    The range is kept, and an Linf norm. An L2 norm over a tile can come out smaller than the tiles' largest by the
    averaging, or larger where neighbours add to it; with n tiles over one voxel it is at most sqrt(n) times as large.
    What no tile covers stays as it is.

    Args:
        image: (C, Z, Y, X), unperturbed.
        places: of the tiles, of which there is at least one; a single slice along the axis that a 2D model lacks.
        patch_size: of the network, two or three axes.
    """

    def __init__(self, image: Tensor, places: Sequence[Place], patch_size: Sequence[int]) -> None:
        self._image, self._places = image, places
        weight = gaussian(patch_size, 1, torch.float32, image.device)
        self._weight = weight[None] if len(patch_size) == 2 else weight
        self._weights = add_tiles(self._weight.expand(len(places), 1, *self._weight.shape), places, image.shape[1:])

    def __call__(self, tiles: Tensor) -> Tensor:
        """The volume (C, Z, Y, X) with the perturbations of ``tiles`` (T, C, z, y, x)."""
        difference = tiles - cut_tiles(self._image, self._places)
        total = add_tiles(difference * self._weight, self._places, self._image.shape[1:])
        return self._image + torch.where(self._weights > 0, total / self._weights.clamp_min(1e-12), 0.0)
