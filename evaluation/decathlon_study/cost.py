"""What a study costs, from what can be computed: steps, samples, and how often the network runs for each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import SimpleITK

from nnunet_ima.errors import UserError
from nnunet_ima.evaluation.decathlon_study.tasks import SUFFIX, GivenTask
from nnunet_ima.evaluation.most_passes import most_passes
from nnunet_ima.evaluation.pipeline import Attacks
from nnunet_ima.settings import Settings
from nnunet_ima.tiles import count_tiles

# TRADES' own number of steps, see docs/training.md.
TRADES_STEPS = 10


@dataclass(frozen=True)
class Training:
    """What a training costs.

    Attributes:
        steps: of the optimiser.
        batch_size: samples a step.
        fewest, most: forward passes a sample and step.
    """

    steps: int
    batch_size: int
    fewest: int
    most: int

    @property
    def passes(self) -> tuple[int, int]:
        """Forward passes of single samples, at least and at most."""
        return self.steps * self.batch_size * self.fewest, self.steps * self.batch_size * self.most


def training_cost(method: str, settings: Mapping[str, Any], batch_size: int) -> Training:
    """What a training of a method costs; see docs/methods.md for the passes.

    Args:
        method: STD, SAT, TE, TRADES or IMA.
        settings: of the training; with its length.
        batch_size: samples a step.
    """
    steps = settings["num_epochs"] * settings["num_iterations_per_epoch"]
    inner = settings.get("steps", TRADES_STEPS if method == "TRADES" else Settings.steps)
    bisections = settings.get("bisections", Settings.bisections)
    fewest, most = {
        "STD": (1, 1),
        "SAT": (inner + 1, inner + 1),
        # One more once its averages are in use.
        "TE": (inner + 1, inner + 2),
        "TRADES": (inner + 2, inner + 2),
        # One for a sample without foreground, or one that is wrong: it is not perturbed.
        "IMA": (1, inner + bisections + 3),
    }[method]
    return Training(steps, batch_size, fewest, most)


def attack_passes(evaluation: Attacks, samples: int, classes: int) -> int:
    """Forward and backward passes of single samples, at the most: samples that fall to Dice 0 cost less.

    Args:
        evaluation: its attacks and levels.
        samples: slices that are attacked.
        classes: foreground classes; some attacks have a run for each.
    """
    # Beside the attacks: each sample once clean, and once clamped.
    once = 2 if evaluation.protocol == "paper" else 1
    each = sum(most_passes(attack, classes) for attack in evaluation.attacks)
    return samples * (once + len(evaluation.levels) * each)


def count_slices(task: GivenTask, names: Sequence[str], axis: int | None = None) -> int:
    """Slices with foreground of some cases: what a 2D evaluation attacks, if a slice fits into a patch.

    Args:
        task: whose labels are read.
        names: of the cases.
        axis: of the slices; None for that of the largest spacing, which nnU-Net takes for most data.

    Raises:
        UserError: a label file cannot be read.
    """
    return sum(_slices(task, name, axis) for name in names)


def _slices(task: GivenTask, name: str, axis: int | None) -> int:
    file = task.folder / "labelsTr" / f"{name}{SUFFIX}"
    try:
        image = SimpleITK.ReadImage(str(file))
    except RuntimeError:  # many lines, of which none says more
        raise UserError(f"The labels {file} cannot be read; restore the file, or remove it and its scan.") from None
    # SimpleITK's order is x, y, z; that of arrays z, y, x.
    along = int(np.argmax(image.GetSpacing()[::-1])) if axis is None else axis
    foreground = np.moveaxis(SimpleITK.GetArrayFromImage(image) > 0, along, 0)
    return int(foreground.reshape(len(foreground), -1).any(1).sum())


@dataclass(frozen=True)
class Planned:
    """What nnU-Net's plans say of the 2D configuration.

    Attributes:
        batch_size, patch_size: of the planned configuration.
        original_shape: of the median scan, slices first, in its own voxels.
        slice_shape: of the median slice, after resampling.
        slice_axis: of the scan's array, along which slices are taken.
    """

    batch_size: int
    patch_size: tuple[int, ...]
    original_shape: tuple[int, ...]
    slice_shape: tuple[int, ...]
    slice_axis: int

    @property
    def tiles_a_slice(self) -> int:
        """Tiles of the sliding window that a slice of the median size takes."""
        return count_tiles((1, *self.slice_shape), self.patch_size)


def read_planned(plans: Mapping[str, Any], configuration: str = "2d") -> Planned:
    """From the content of a plans file."""
    planned = plans["configurations"][configuration]
    return Planned(
        int(planned["batch_size"]),
        tuple(int(size) for size in planned["patch_size"]),
        tuple(round(float(size)) for size in plans["original_median_shape_after_transp"]),
        tuple(round(float(size)) for size in planned["median_image_size_in_voxels"])[-2:],
        int(plans["transpose_forward"][0]),
    )
