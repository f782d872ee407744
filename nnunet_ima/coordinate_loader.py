"""nnU-Net's training loader, that also says where in its case each voxel of an augmented patch comes from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nnunet_ima.tile_loader import TileDataLoader

# Where less of a voxel than this was interpolated from within the crop, padding has moved its coordinates.
_INSIDE = 0.99999


class CoordinateDataLoader(TileDataLoader):
    """Batches hold one more entry, ``coordinates``: (B, 3, *patch) of float32, in voxels of the preprocessed case.

    NaN where a voxel shows no place of the case (padding). Two-dimensional patches have coordinates (slice, y, x), too.
    Coordinates are moved along with the image by nnU-Net's own augmentation, which treats a ``regression_target`` as
    it treats an image: cropped, rotated, scaled, mirrored.
    """

    transforms: Any

    def get_bbox(self, data_shape: Sequence[int], *args: Any, **kwargs: Any) -> tuple[list[int], list[int]]:
        """nnU-Net's random box of a case of shape ``data_shape``, noted on the way."""
        lower, upper = super().get_bbox(data_shape, *args, **kwargs)
        self._box = (tuple(data_shape), tuple(lower))
        return lower, upper

    def generate_train_batch(self) -> dict[str, Any]:
        """nnU-Net's batch, with ``tiles`` and ``coordinates``."""
        self._coordinates: list[Tensor] = []
        self._augment = self.transforms
        self.transforms = self._augment_with_coordinates
        try:
            batch = super().generate_train_batch()
        finally:
            self.transforms = self._augment
        batch["coordinates"] = torch.stack(self._coordinates)
        return batch

    def _augment_with_coordinates(self, image: Tensor, segmentation: Tensor) -> dict[str, Any]:
        shape, lower = self._box
        size = image.shape[1:] if len(image.shape) == 4 else (1, *image.shape[1:])
        axes = [torch.arange(low, low + length, dtype=torch.float32) for low, length in zip(lower, size, strict=True)]
        grid = torch.stack([*torch.meshgrid(*axes, indexing="ij"), torch.ones(size)])
        grid = grid.reshape(4, *image.shape[1:])
        augmented: dict[str, Any] = self._augment(image=image, segmentation=segmentation, regression_target=grid)
        moved, inside = augmented["regression_target"][:3], augmented["regression_target"][3:] > _INSIDE
        highest = torch.tensor(shape).reshape(3, *[1] * (moved.ndim - 1)) - 0.5
        # Half a voxel beyond the outermost centres is still that voxel.
        inside = inside & ((moved >= -0.5) & (moved <= highest)).all(0, keepdim=True)
        self._coordinates.append(torch.where(inside, moved, torch.nan))
        return augmented
