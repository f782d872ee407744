"""nnU-Net's sliding-window prediction, in a form that gradients can go through."""

from __future__ import annotations

import contextlib
import inspect
import io
from collections.abc import Sequence

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nnunet_ima.evaluation.models import TrainedModel
from nnunet_ima.overlap import Place, add_tiles, cut_tiles

# As nnU-Net's predictor has it; the scale matters only where half precision does.
GAUSSIAN_SCALE = 10


def make_predictor(model: TrainedModel, device: torch.device, mirroring: bool = True) -> nnUNetPredictor:
    """nnU-Net's predictor for a model."""
    with contextlib.redirect_stdout(io.StringIO()):
        predictor = nnUNetPredictor(
            use_mirroring=mirroring,
            perform_everything_on_device=device.type == "cuda",
            device=device,
            allow_tqdm=False,
        )
        predictor.manual_initialization(
            model.network,
            model.plans,
            model.configuration,
            None,
            model.dataset_json,
            model.trainer,
            model.mirroring_axes,
        )
    return predictor


def gaussian(patch_size: Sequence[int], scale: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """nnU-Net's weights of a tile's voxels, shaped as the tile."""
    weight: Tensor = compute_gaussian(tuple(patch_size), value_scaling_factor=scale, dtype=dtype, device=device)
    return weight


class SlidingWindow(nn.Module):
    """Tiles, weights and mirroring are those of nnU-Net's predictor, which itself runs without gradients.

    It adds up logits in single precision. The predictor does so in half precision, which leaves whole numbers of logits
    that only the corner of a 3D tile has seen, where its weight is next to 0.

    Args:
        model: whose network it is.
        device: to run on.
        chunk: tiles that go through the network at once.
        mirroring: whether to predict mirrored tiles too, as nnU-Net does over the model's axes.
    """

    def __init__(self, model: TrainedModel, device: torch.device, chunk: int, mirroring: bool) -> None:
        super().__init__()
        self.network, self._chunk = _Recomputed(model.network), chunk
        self._predictor = make_predictor(model, device, mirroring)
        self._predictor.network = self.network
        patch = model.configuration.patch_size
        self._is_2d = len(patch) == 2
        self._heads: int = model.label_manager.num_segmentation_heads
        weight = gaussian(patch, GAUSSIAN_SCALE, torch.float16, device).float()
        self._gaussian = weight[None] if self._is_2d else weight

    def places(self, shape: Sequence[int]) -> list[Place]:
        """Where the tiles lie in a padded case of ``shape`` (Z, Y, X), in nnU-Net's order."""
        with contextlib.redirect_stdout(io.StringIO()):
            slicers = self._predictor._internal_get_sliding_window_slicers(tuple(shape))
        return [
            tuple(axis if isinstance(axis, slice) else slice(axis, axis + 1) for axis in one[1:]) for one in slicers
        ]

    def weights(self, places: Sequence[Place], shape: Sequence[int]) -> Tensor:
        """Sum of the tiles' weights at each voxel, (1, Z, Y, X)."""
        return add_tiles(self._gaussian.expand(len(places), 1, *self._gaussian.shape), places, shape)

    def sum(self, volume: Tensor, places: Sequence[Place]) -> Tensor:
        """Weighted logits of some tiles of ``volume`` (C, Z, Y, X), added up: (K, Z, Y, X)."""
        total = volume.new_zeros((self._heads, *volume.shape[1:]))
        for start in range(0, len(places), self._chunk):
            part = places[start : start + self._chunk]
            logits = self._predict(cut_tiles(volume, part))
            total = total + add_tiles(logits * self._gaussian, part, volume.shape[1:])
        return total

    def forward(self, volume: Tensor) -> Tensor:
        """Logits (K, Z, Y, X) of a padded case ``volume`` (C, Z, Y, X)."""
        places = self.places(volume.shape[1:])
        return self.sum(volume, places) / self.weights(places, volume.shape[1:])

    def _predict(self, tiles: Tensor) -> Tensor:
        """Logits (n, K, z, y, x) of ``tiles`` (n, C, z, y, x), mirrored by nnU-Net's own code."""
        mirrored = inspect.unwrap(nnUNetPredictor._internal_maybe_mirror_and_predict)
        found: Tensor = mirrored(self._predictor, tiles[:, :, 0] if self._is_2d else tiles)
        return found[:, :, None] if self._is_2d else found


class _Recomputed(nn.Module):
    """A network of whose activations nothing is kept for the gradient, so that a whole case fits into memory."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, tiles: Tensor) -> Tensor:
        """Once more when the gradient needs it."""
        if not tiles.requires_grad:
            plain: Tensor = self.network(tiles)
            return plain
        again: Tensor = checkpoint(self.network, tiles, use_reentrant=False, preserve_rng_state=False)
        return again
