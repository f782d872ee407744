"""From voxel counts to the figures that are reported.

TVDI and ADI are Eq. 9 and 10 of the earlier version of the IMA paper; a case's Dice is nnU-Net's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from nnunetv2.evaluation.evaluate_predictions import compute_tp_fp_fn_tn, region_or_label_to_mask

Region = int | tuple[int, ...]
Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
Segmentation = np.ndarray[tuple[int, ...], np.dtype[np.integer]]

SURFACE_TOLERANCE_MM = 1.0


def class_scores(true_positives: Array, false_positives: Array, false_negatives: Array) -> Array:
    """Dice (...,) from voxel counts (...,), NaN where a class neither is nor was found."""
    hits = 2.0 * np.asarray(true_positives, float)
    whole = hits + false_positives + false_negatives
    return np.divide(hits, whole, out=np.full_like(whole, np.nan), where=whole > 0)


def tvdi(counts: Array) -> float:
    """Total voxel Dice: counts (n, F, 3) of tp, fp, fn pooled over samples, Dice per class, mean of classes; [0, 1]."""
    return float(pooled_dice(np.asarray(counts, float).sum(0)))


def pooled_dice(pooled: Array) -> Array:
    """Mean over classes (...,) of the Dice of pooled counts (..., F, 3) of tp, fp, fn; NaN if no class occurs."""
    dice = class_scores(pooled[..., 0], pooled[..., 1], pooled[..., 2])
    there = ~np.isnan(dice)
    mean = np.where(there, dice, 0).sum(-1) / np.maximum(there.sum(-1), 1)
    return np.asarray(np.where(there.any(-1), mean, np.nan))


def adi(dice: Array) -> float:
    """Average Dice: the mean of the samples' Dice (n,), each sample counting the same; [0, 1]."""
    return nan_mean(dice)


def nan_mean(values: Array | Sequence[float]) -> float:
    """Mean of what is not NaN; NaN if nothing is."""
    kept = np.asarray(values, float)
    kept = kept[~np.isnan(kept)]
    return float(kept.mean()) if kept.size else float("nan")


@dataclass(frozen=True)
class CaseScore:
    """Scores of one case in its original geometry, one value a class or region, NaN where undefined.

    Attributes:
        dice: nnU-Net's, in [0, 1]; NaN if the class neither is nor was found.
        hd95: 95 % Hausdorff distance in mm; NaN if the class is missing in either segmentation.
        surface_dice: share of both surfaces within 1 mm of each other; 0 if the class is missing in one of the
            segmentations, NaN if in both.
    """

    dice: tuple[float, ...]
    hd95: tuple[float, ...]
    surface_dice: tuple[float, ...]


def score_case(
    prediction: Segmentation,
    reference: Segmentation,
    regions: Sequence[Region],
    ignore_label: int | None,
    spacing: Sequence[float],
) -> CaseScore:
    """Score a segmentation (Z, Y, X) against the reference; spacing in mm, in the same order of axes.

    Of a single slice, or image, the surface is its contour.
    """
    ignored = None if ignore_label is None else reference == ignore_label
    dice, hd95, surface = [], [], []
    for region in regions:
        truth, found = (region_or_label_to_mask(volume, region) for volume in (reference, prediction))
        tp, fp, fn, _ = compute_tp_fp_fn_tn(truth, found, ignored)
        dice.append(float(2 * tp / (2 * tp + fp + fn)) if tp + fp + fn else float("nan"))
        if ignored is not None:
            truth, found = truth & ~ignored, found & ~ignored
        hd95.append(_surface_distance(found, truth, spacing))
        surface.append(_surface_share(found, truth, spacing))
    return CaseScore(tuple(dice), tuple(hd95), tuple(surface))


def mean_case_dice(scores: Sequence[CaseScore]) -> float:
    """nnU-Net's foreground mean: for each class the mean over cases, then the mean over classes."""
    return mean_over_classes([score.dice for score in scores])


def mean_hd95(scores: Sequence[CaseScore]) -> float:
    """Mean of the defined distances, per class and then over classes, in mm; see :func:`count_hd95`."""
    return mean_over_classes([score.hd95 for score in scores])


def count_hd95(scores: Sequence[CaseScore]) -> tuple[int, int]:
    """How many structures (a class in a case) have an HD95, and how many are in the reference or were found at all.

    Those without are wiped out, or made up: the worst that can happen to one, and left out of the mean.
    """
    defined, there = (
        int(sum((~np.isnan(values)).sum() for values in rows))
        for rows in ([score.hd95 for score in scores], [score.surface_dice for score in scores])
    )
    return defined, there


def mean_surface_dice(scores: Sequence[CaseScore]) -> float:
    """Mean of the defined shares, per class and then over classes."""
    return mean_over_classes([score.surface_dice for score in scores])


def mean_over_classes(rows: Sequence[Sequence[float]]) -> float:
    """nnU-Net's mean of a table with a row a case and a column a class: of each class over cases, then of these."""
    if not rows:
        return float("nan")
    return nan_mean([nan_mean(list(column)) for column in zip(*rows, strict=True)])


def _surface_distance(found: Segmentation, truth: Segmentation, spacing: Sequence[float]) -> float:
    if not found.any() or not truth.any():
        return float("nan")
    masks, spacing = _for_monai(found, truth, spacing)
    return float(compute_hausdorff_distance(*masks, include_background=True, percentile=95, spacing=spacing))


def _surface_share(found: Segmentation, truth: Segmentation, spacing: Sequence[float]) -> float:
    if not found.any() or not truth.any():
        return 0.0 if found.any() or truth.any() else float("nan")
    masks, spacing = _for_monai(found, truth, spacing)
    return float(compute_surface_dice(*masks, [SURFACE_TOLERANCE_MM], include_background=True, spacing=spacing))


def _for_monai(
    found: Segmentation, truth: Segmentation, spacing: Sequence[float]
) -> tuple[list[torch.Tensor], list[float]]:
    """Both masks (1, 1, *axes), and the spacing; without the axis of a single slice.

    Along that axis every voxel would lie next to the outside, and so on the surface.
    """
    flat = next((axis for axis, size in enumerate(truth.shape) if size == 1), None)
    masks = [np.ascontiguousarray(mask if flat is None else mask.squeeze(flat)) for mask in (found, truth)]
    return (
        [torch.from_numpy(mask)[None, None].float() for mask in masks],
        [size for axis, size in enumerate(spacing) if axis != flat],
    )
