"""nnU-Net's training loader, that also says which tile of its case each patch was taken from.

It lives here and not beside the trainers because nnU-Net forgets the modules of an external trainer folder after the
look-up, and a loader that is sent to a spawned worker must stay importable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader

from nnunet_ima.tiles import nearest_tile


class TileDataLoader(nnUNetDataLoader):
    """nnU-Net's loader; its batches hold one more entry, ``tiles``: the number (B,) of the tile nearest to each patch.

    The patch's place is known only inside ``get_bbox``, which is called once a sample.
    """

    def get_bbox(self, data_shape: Sequence[int], *args: Any, **kwargs: Any) -> tuple[list[int], list[int]]:
        """nnU-Net's random box of a case of shape ``data_shape``, noted on the way."""
        lower, upper = super().get_bbox(data_shape, *args, **kwargs)
        final = self.final_patch_size[1:] if self.patch_size_was_2d else self.final_patch_size
        self._tiles.append(nearest_tile(data_shape, final, lower, upper))
        return lower, upper

    def generate_train_batch(self) -> dict[str, Any]:
        """nnU-Net's batch, with ``tiles``."""
        self._tiles: list[int] = []
        batch: dict[str, Any] = super().generate_train_batch()
        batch["tiles"] = np.array(self._tiles, dtype=np.int64)
        return batch
