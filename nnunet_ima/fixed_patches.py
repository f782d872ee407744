"""The same validation patches at every call, for measurements that are to be compared between epochs."""

from __future__ import annotations

import itertools
import random
from typing import Any, NamedTuple

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from torch import Tensor

from nnunet_ima.labels import OUTSIDE
from nnunet_ima.losses import Outputs
from nnunet_ima.tiles import tile_grid


class FixedPatches(NamedTuple):
    """Patches of validation cases.

    Attributes:
        images: (n, C, *patch).
        targets: as the loader gives them.
        outside: (n, 1, *patch) of bool: what nnU-Net's cropping found to be empty, and padding.
    """

    images: Tensor
    targets: Outputs
    outside: Tensor


def fixed_patches(loader: nnUNetDataLoader, count: int, ignore_label: int | None = None, seed: int = 0) -> FixedPatches:
    """Tiles with foreground from as many of the loader's cases as possible, in an order that depends on the seed alone.

    Args:
        loader: nnU-Net's of the validation cases; its transforms have nothing random.
        count: how many; fewer if the cases do not hold so many.
        ignore_label: a voxel of it is no foreground.
        seed: another seed chooses other patches.

    Returns:
        The patches; n is 0 if no case holds any foreground.
    """
    cases = sorted(map(str, loader.indices))
    random.Random(seed).shuffle(cases)
    images: list[Tensor] = []
    targets: list[Any] = []
    outside: list[Tensor] = []
    for turn, case in enumerate(cases):
        # What is left is shared by the cases that are left.
        share = -(-(count - len(images)) // (len(cases) - turn))
        if share <= 0:
            break
        data, segmentation, previous, _ = loader._data.load_case(case)
        boxes = _boxes_with_foreground(loader, segmentation, ignore_label)
        for box in random.Random(f"{seed} {case}").sample(boxes, min(share, len(boxes))):
            cropped = _cropped(loader, data, segmentation, previous, box)
            # The transforms make background of it.
            outside.append(cropped["segmentation"][:1] == OUTSIDE)
            patch = loader.transforms(**cropped)
            images.append(patch["image"])
            targets.append(patch["segmentation"])
    if not images:
        return FixedPatches(torch.empty(0), torch.empty(0), torch.empty(0, dtype=torch.bool))
    stacked: Outputs
    if isinstance(targets[0], list):
        stacked = [torch.stack(list(resolution)) for resolution in zip(*targets, strict=True)]
    else:
        stacked = torch.stack(targets)
    return FixedPatches(torch.stack(images), stacked, torch.stack(outside))


Box = list[list[int]]


def _boxes_with_foreground(loader: nnUNetDataLoader, segmentation: Any, ignore_label: int | None) -> list[Box]:
    size = [int(length) for length in loader.final_patch_size]
    grid = tile_grid(segmentation.shape[1:], size[1:] if loader.patch_size_was_2d else size)
    boxes: list[Box] = [
        [[low, low + length] for low, length in zip(corner, size, strict=True)] for corner in itertools.product(*grid)
    ]
    labels = np.asarray(segmentation[0])
    foreground = labels > 0 if ignore_label is None else (labels > 0) & (labels != ignore_label)
    inside = [tuple(slice(max(low, 0), high) for low, high in box) for box in boxes]
    return [box for box, place in zip(boxes, inside, strict=True) if foreground[place].any()]


def _cropped(loader: nnUNetDataLoader, data: Any, segmentation: Any, previous: Any, box: Box) -> dict[str, Tensor]:
    """As nnU-Net's loader crops; a cascade's previous segmentation becomes the second channel."""
    image = torch.from_numpy(crop_and_pad_nd(data, box, 0)).float()
    labels = torch.from_numpy(crop_and_pad_nd(segmentation, box, OUTSIDE, cast_cropped_to=np.int16)).to(torch.int16)
    if previous is not None:
        lower = torch.from_numpy(crop_and_pad_nd(previous, box, OUTSIDE, cast_cropped_to=np.int16)).to(torch.int16)
        labels = torch.cat((labels, lower[None]))
    if loader.patch_size_was_2d:
        image, labels = image[:, 0], labels[:, 0]
    return {"image": image, "segmentation": labels}
