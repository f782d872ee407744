"""Perturbed images in half precision that stay within ball and range."""

from __future__ import annotations

import torch
from torch import Tensor

from nnunet_ima.threat import ThreatModel


class InwardRounding:
    """Rounds perturbed images to a type of fewer digits, voxel by voxel towards the clean image.

    Rounding to the nearest number may leave the ball: at an intensity of 4, neighbours in bfloat16 lie 0.03 apart. What
    lies between a perturbed and the clean image is in every ball and every range that hold both.

    Args:
        threat: gives the range.
        images: clean images (B, C, *spatial) in single precision, each exact in ``dtype``.
        dtype: what is rounded to.
    """

    def __init__(self, threat: ThreatModel, images: Tensor, dtype: torch.dtype) -> None:
        low, high = (bound.expand_as(images) for bound in threat.bounds(images))
        # An image outside the range comes in as its clamped self, which must not be rounded out again.
        clamped = torch.maximum(torch.minimum(images, high), low)
        nearest = clamped.to(dtype)
        lower, upper = (torch.nextafter(nearest, torch.full_like(nearest, end)) for end in (-torch.inf, torch.inf))
        centre = torch.where(nearest.float() > high, lower, torch.where(nearest.float() < low, upper, nearest))
        # A range that holds no number of this type: the nearest one has to do.
        within = (centre.float() >= low) & (centre.float() <= high)
        self._centre = torch.where(within, centre, nearest)
        self._dtype = dtype

    def __call__(self, perturbed: Tensor, index: Tensor) -> Tensor:
        """``perturbed`` (n, C, *spatial) of the samples ``index`` (n,): numbers of the type, in single precision."""
        centre, nearest = self._centre[index], perturbed.to(self._dtype)
        inward = torch.nextafter(nearest, centre)
        beyond = (nearest.float() - centre.float()).abs() > (perturbed - centre.float()).abs()
        return torch.where(beyond, inward, nearest).to(perturbed.dtype)
