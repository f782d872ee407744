"""Projection onto a hyperplane within a box: the geometry of FAB (Croce & Hein 2020, https://arxiv.org/abs/1907.02044)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from nnunet_ima.lp import lp_norm, per_sample
from nnunet_ima.threat import ThreatModel

# How far to look where there is no range, in intensities of the image.
UNBOUNDED = 10.0
TINY = 1e-12


def step_to_hyperplane(points: Tensor, normal: Tensor, gap: Tensor, threat: ThreatModel) -> Tensor:
    """The smallest step δ with ⟨``normal``, δ⟩ = ``gap`` that keeps ``points`` + δ in the range (FAB, Eq. 4 to 6).

    If the range holds no such point, the step leads to the point of it that comes closest. "Smallest" is the L2 norm,
    or for Linf the largest entry, each relative to its own radius if there is one a channel.

    A voxel moves along its entry of ``normal``, by r λ with r = |normal| (L2) or the radius (Linf), until it meets the
    end of the range, at u. So Σ |normal| min(r λ, u) = gap; its left side is piecewise linear in λ, and rises.

    Args:
        points: (B, C, *spatial), within the range.
        normal: (B, C, *spatial).
        gap: (B,); of either sign.
        threat: gives norm, range and relative size of the channels.
    """
    direction = per_sample(gap.sign(), normal) * normal.sign()
    low, high = threat.bounds(points)
    room = torch.where(direction > 0, high - points, points - low).clamp_min(0)
    room = torch.where(direction != 0, room, torch.zeros_like(room))
    slope = normal.abs()
    rate = slope if threat.norm == "l2" else relative_radius(threat, points).expand_as(points)
    multiplier = _solve(slope.flatten(1), rate.flatten(1), room.flatten(1), gap.abs())
    moved = torch.minimum(rate * per_sample(multiplier, rate), room)
    return direction * torch.where(rate > 0, moved, torch.zeros_like(moved))


def relative_radius(threat: ThreatModel, images: Tensor) -> Tensor:
    """The threat model's radius of each channel as a share of the sample's largest; 1 where that is 0."""
    radius = threat.radius(images)
    largest = per_sample(radius.flatten(1).amax(1), radius)
    return torch.where(largest > 0, radius / largest.clamp_min(torch.finfo(radius.dtype).tiny), torch.ones_like(radius))


def farthest(threat: ThreatModel, images: Tensor) -> Tensor:
    """Norm (B,), as :func:`size`, of the largest perturbation in the range; without a range ten times the image.

    Never less than ε.
    """
    low, high = (bound.expand_as(images) for bound in threat.bounds(images))
    reach = torch.maximum((images - low).abs(), (high - images).abs())
    reach = torch.where(torch.isfinite(reach), reach, UNBOUNDED * (1 + images.abs()))
    return torch.maximum(size(threat, reach, images), threat.radius(images).flatten(1).amax(1))


def size(threat: ThreatModel, delta: Tensor, images: Tensor) -> Tensor:
    """Norm (B,) of ``delta``; for Linf relative to the channels' radii, of which the largest counts as 1."""
    if threat.norm == "l2":
        return lp_norm(delta, "l2")
    relative = relative_radius(threat, images)
    reach = torch.where(relative > 0, delta.abs() / relative.clamp_min(TINY), torch.zeros_like(delta))
    return reach.flatten(1).amax(1)


def _solve(slope: Tensor, rate: Tensor, room: Tensor, gap: Tensor) -> Tensor:
    """λ (B,) with Σ slope · min(rate · λ, room) = gap; the last break if the sum never gets there. All (B, n)."""
    # In double precision: sums over thousands of voxels are compared with each other. MPS knows none.
    precise = slope.dtype if slope.device.type == "mps" else torch.float64
    slope, rate, room, gap = (value.to(precise) for value in (slope, rate, room, gap))
    tiny = torch.finfo(precise).tiny
    breaks = torch.where(rate > 0, room / rate.clamp_min(tiny), torch.zeros_like(room))
    order = breaks.argsort(1)
    breaks, slope, rate, room = (value.gather(1, order) for value in (breaks, slope, rate, room))
    gain = slope * rate
    # Before break j: the voxels before it are at their ends, the others still move.
    ended = functional.pad((slope * torch.where(rate > 0, room, torch.zeros_like(room))).cumsum(1), (1, 0))
    moving = gain.sum(1, keepdim=True) - functional.pad(gain.cumsum(1), (1, 0))
    bounded = torch.where(torch.isfinite(breaks), breaks, torch.zeros_like(breaks))
    reached = torch.where(
        torch.isfinite(breaks), ended[:, :-1] + moving[:, :-1] * bounded, torch.full_like(breaks, torch.inf)
    )
    segment = (reached < gap[:, None]).sum(1, keepdim=True)
    beyond = (segment == breaks.shape[1])[:, 0]
    segment = segment.clamp(max=breaks.shape[1] - 1)
    still_moving = moving.gather(1, segment).clamp_min(tiny)
    within = ((gap[:, None] - ended.gather(1, segment)) / still_moving)[:, 0]
    return torch.where(beyond, breaks[:, -1], within.clamp_min(0)).float()
