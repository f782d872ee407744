"""Validation cases as the network sees them, and the tiles (samples) they are made of."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor

from nnunet_ima.errors import UserError
from nnunet_ima.evaluation.environment import nnunet_folder
from nnunet_ima.evaluation.models import TrainedModel
from nnunet_ima.labels import OUTSIDE
from nnunet_ima.overlap import Place
from nnunet_ima.tiles import tile_grid


@dataclass(frozen=True)
class Case:
    """A preprocessed case, padded to at least one patch.

    Attributes:
        name: nnU-Net's identifier.
        image: (C, Z, Y, X) of float32, normalised as the plans say; for a cascade with the one-hot channels of the
            previous stage.
        target: (1 or R, Z, Y, X), as nnU-Net's validation loader makes it.
        fixed: (C, Z, Y, X) of bool: padding and one-hot channels, which no perturbation of a scan can reach; and what
            lies outside of the scan's nonzero region, if the plans normalise within that: where a scan is no longer
            zero, nnU-Net would count it in and normalise everything else otherwise.
        low, high: (C,): smallest and largest intensity of the case, before padding.
        unpad: takes the padding off again.
        properties: nnU-Net's, for going back to the original geometry.
    """

    name: str
    image: Tensor
    target: Tensor
    fixed: Tensor
    low: Tensor
    high: Tensor
    unpad: tuple[slice, ...]
    properties: dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """A tile of a case that holds foreground.

    Attributes:
        case: its name.
        tile: its number in nnU-Net's sliding-window order.
        place: in the padded case, along three axes; a single slice along the one that a 2D model lacks.
    """

    case: str
    tile: int
    place: Place = field(compare=False)


class ValidationCases:
    """The validation cases of a model's fold, read when asked for.

    Raises:
        UserError: preprocessed data, the split or the fold are missing.
    """

    def __init__(self, model: TrainedModel) -> None:
        self.model = model
        self.base = nnunet_folder("nnUNet_preprocessed") / model.plans.dataset_name
        self.folder = self.base / model.configuration.data_identifier
        if not self.folder.is_dir():
            raise UserError(
                f"{self.folder} does not exist: preprocess the dataset for this configuration first "
                f"(nnUNetv2_plan_and_preprocess)."
            )
        self._dataset_class = infer_dataset_class(str(self.folder))
        self.names = self._validation_names()
        self._last: Case | None = None
        self.fingerprints: dict[str, int] = {}
        """Of the cases that were read so far: a number that changes with image or target."""

    def load(self, name: str) -> Case:
        """One case; the last one is kept.

        Raises:
            UserError: its intensities or labels are not usable.
        """
        if self._last is None or self._last.name != name:
            self._last = self._load(name)
        return self._last

    def samples(self, names: Sequence[str]) -> Iterator[Sample]:
        """The tiles with foreground of the named cases, in nnU-Net's order."""
        for name in names:
            case = self.load(name)
            for number, place in enumerate(self._places(case)):
                if self._holds_foreground(case.target[_with_channels(place)]):
                    yield Sample(name, number, place)

    def patch(self, volume: Tensor, place: Place) -> Tensor:
        """The tile at ``place`` of ``volume`` (C, Z, Y, X), as the network takes it: (C, *patch)."""
        tile = volume[_with_channels(place)]
        return tile[:, 0] if self.is_2d else tile

    @cached_property
    def is_2d(self) -> bool:
        """Whether the network takes slices."""
        return len(self.model.configuration.patch_size) == 2

    def _places(self, case: Case) -> Iterator[Place]:
        patch = self.model.configuration.patch_size
        shape = case.image.shape[1:]
        sizes = [1] * (len(shape) - len(patch)) + list(patch)
        axes = tile_grid(shape, patch)  # of the padded case: no corner is negative
        for corner in np.ndindex(*(len(axis) for axis in axes)):
            yield tuple(slice(axis[i], axis[i] + size) for axis, i, size in zip(axes, corner, sizes, strict=True))

    def _holds_foreground(self, target: Tensor) -> bool:
        heads = self.model.label_manager.num_segmentation_heads
        return bool(self.model.labels.foreground(target[None], heads).any())

    def _validation_names(self) -> list[str]:
        if self.model.fold == "all":
            return sorted(self._dataset_class.get_identifiers(str(self.folder)))
        file = self.base / "splits_final.json"
        if not file.is_file():
            raise UserError(f"{file} is missing; it is made when the first fold is trained.")
        splits = _read_splits(file)
        fold = int(self.model.fold)
        if fold >= len(splits):
            raise UserError(f"{file} has {len(splits)} folds, so fold {fold} has no validation cases in it.")
        names = sorted(splits[fold]["val"])
        known = set(self._dataset_class.get_identifiers(str(self.folder)))
        missing = [name for name in names if name not in known]
        if missing:
            raise UserError(
                f"The validation case {missing[0]} of fold {fold} is not in {self.folder}; preprocess again."
            )
        return names

    def _load(self, name: str) -> Case:
        model = self.model
        dataset = self._dataset_class(str(self.folder), [name], self._previous_stage())
        try:
            image, segmentation, previous, properties = dataset.load_case(name)
            image, segmentation = np.asarray(image[:], np.float32), np.asarray(segmentation[:], np.int16)
            previous = None if previous is None else np.asarray(previous[:], np.int16)
        except (OSError, RuntimeError, ValueError, EOFError, LookupError, UnpicklingError) as error:
            raise UserError(
                f"The preprocessed case {name} in {self.folder} cannot be read; preprocess again."
            ) from error
        self._check(name, image, segmentation)
        channels = model.channels
        masked = any(model.configuration.use_mask_for_norm)
        outside = torch.from_numpy((segmentation[:1] == OUTSIDE) & masked)
        low, high = (torch.from_numpy(reduce(image[:channels], axis=(1, 2, 3))) for reduce in (np.min, np.max))
        if previous is not None:
            segmentation = np.concatenate([segmentation, previous.reshape(1, *segmentation.shape[1:])])
        transformed = self._transforms(image=torch.from_numpy(image), segmentation=torch.from_numpy(segmentation))
        full, target = transformed["image"].float(), transformed["segmentation"]
        patch = model.configuration.patch_size
        self.fingerprints[name] = zlib.crc32(target.numpy().tobytes(), zlib.crc32(full.numpy().tobytes()))
        padded, unpad = pad_nd_image(full, patch, "constant", {"value": 0}, True)
        if masked:
            # Of what was begun when the background still counted as part of the scan, nothing may be continued.
            self.fingerprints[name] = zlib.crc32(outside.numpy().tobytes(), self.fingerprints[name])
        fixed = pad_nd_image(outside.expand(full.shape).to(full), patch, "constant", {"value": 1}).bool()
        fixed[channels:] = True
        extra = full.shape[0] - channels
        return Case(
            name=name,
            image=padded,
            target=pad_nd_image(target, patch, "constant", {"value": 0}),
            fixed=fixed,
            low=torch.cat([low, low.new_zeros(extra)]),
            high=torch.cat([high, high.new_ones(extra)]),
            unpad=tuple(unpad[1:]),
            properties=properties,
        )

    @cached_property
    def _transforms(self) -> Any:
        """nnU-Net's own validation transforms, without deep supervision."""
        manager = self.model.label_manager
        return nnUNetTrainer.get_validation_transforms(
            None,
            is_cascaded=self.model.configuration.previous_stage_name is not None,
            foreground_labels=manager.foreground_labels,
            regions=manager.foreground_regions if manager.has_regions else None,
            ignore_label=manager.ignore_label,
        )

    def _previous_stage(self) -> str | None:
        """Where nnU-Net keeps the previous stage's segmentations of a cascade."""
        previous = self.model.configuration.previous_stage_name
        if previous is None:
            return None
        model = self.model
        folder = (
            model.folder.parent
            / f"{model.trainer}__{model.plans.plans_name}__{previous}"
            / "predicted_next_stage"
            / model.configuration_name
        )
        if not folder.is_dir():
            raise UserError(f"The cascade needs the segmentations of its first stage in {folder}; train that first.")
        return str(folder)

    def _check(self, name: str, image: np.ndarray[Any, Any], segmentation: np.ndarray[Any, Any]) -> None:
        if not np.isfinite(image).all():
            raise UserError(f"Case {name} holds NaN or infinite intensities; repair the scan and preprocess it again.")
        constant = [i for i, channel in enumerate(image[: self.model.channels]) if channel.min() == channel.max()]
        if constant:
            raise UserError(
                f"Case {name} has the same intensity everywhere in channel {constant[0]}, so no noise level can be "
                f"measured on it; repair the scan or take the case out of the fold."
            )
        manager = self.model.label_manager
        allowed = {OUTSIDE, *manager.all_labels, *([manager.ignore_label] if manager.has_ignore_label else [])}
        unknown = sorted(set(np.unique(segmentation).tolist()) - allowed)
        if unknown:
            raise UserError(f"Case {name} is labelled with {unknown[0]}, which is not in dataset.json; correct either.")


def _with_channels(place: Place) -> Place:
    return (slice(None), *place)


def _read_splits(file: Path) -> list[dict[str, list[str]]]:

    try:
        splits = json.loads(file.read_text(encoding="utf-8"))
        return [{"val": [str(name) for name in split["val"]]} for split in splits]
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError) as error:
        raise UserError(f"{file} is no list of splits as nnU-Net writes it; restore it.") from error
