"""What an attacker may do: the norm, how large the perturbation may be, and which intensities an image may hold."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nnunet_ima.lp import (
    NORMS,
    Generators,
    Norm,
    lp_norm,
    per_sample,
    project_ball,
    random_in_ball,
    random_on_sphere,
    steepest_direction,
)

Bound = float | Tensor


@dataclass(frozen=True)
class ThreatModel:
    """The set of perturbed images that an attacker may choose from, for each sample of a batch.

    A point is allowed when it is ``clamp(x + δ, low, high)`` with ``‖δ‖ ≤ epsilon``. For an image ``x`` that lies
    within ``[low, high]`` (always so under the ``sound`` protocol) that is the intersection of ball and range. For an
    image outside it (``paper`` protocol: z-scores clamped to [0, 1]) it is what the authors' program may return.

    Attributes:
        norm: ``"l2"`` or ``"linf"``.
        epsilon: radius of the ball in the units of the images: a number, (B,), or for Linf also (B, C), one a channel.
        low, high: intensity range: a number, (C,), (B, C), or a tensor of the images' full shape. Where ``low`` equals
            ``high`` a voxel cannot be perturbed (padding, the one-hot channels of a cascade).
    """

    norm: Norm
    epsilon: Bound
    low: Bound = float("-inf")
    high: Bound = float("inf")

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"norm is {self.norm!r}; it must be one of {', '.join(NORMS)}.")
        epsilon = torch.as_tensor(self.epsilon)
        if not bool(torch.isfinite(epsilon).all()) or bool((epsilon < 0).any()):
            raise ValueError(f"epsilon is {self.epsilon}; it must be finite and not negative.")
        if epsilon.ndim > (2 if self.norm == "linf" else 1):
            raise ValueError(f"epsilon has shape {tuple(epsilon.shape)}; (B,) is allowed, for linf also (B, C).")
        low, high = torch.as_tensor(self.low), torch.as_tensor(self.high)
        if bool(low.isnan().any()) or bool(high.isnan().any()):
            raise ValueError("the intensity range is not a number.")
        # Forms of different rank, such as (B, C) and a full shape, only meet once the images are known.
        if (low.ndim == high.ndim or 0 in (low.ndim, high.ndim)) and bool((low > high).any()):
            raise ValueError("the intensity range is empty: low must be at most high everywhere.")

    def radius(self, images: Tensor) -> Tensor:
        """``epsilon`` in a shape that broadcasts against ``images`` (B, C, *spatial)."""
        epsilon = torch.as_tensor(self.epsilon, dtype=images.dtype, device=images.device)
        if epsilon.ndim == 0:
            epsilon = epsilon.expand(images.shape[0])
        if epsilon.shape[0] != images.shape[0]:
            raise ValueError(f"epsilon is given for {epsilon.shape[0]} samples, but the batch has {images.shape[0]}.")
        return per_sample(epsilon, images)

    def bounds(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """``low`` and ``high`` in a shape that broadcasts against ``images``."""
        return _expand(self.low, images), _expand(self.high, images)

    def project(self, perturbed: Tensor, images: Tensor) -> Tensor:
        """Bring ``perturbed`` back: onto the ball around ``images``, then into the range.

        Clamping moves every voxel towards an image that lies in the range, so the result stays in the ball. For an
        image outside the range, what the clamp moves counts as part of δ, as in AutoAttack's own program: an L2 attack
        under the ``paper`` protocol is therefore weaker than the set above would allow.
        """
        low, high = self.bounds(images)
        inside = images + project_ball(perturbed - images, self.norm, self.radius(images))
        return torch.maximum(torch.minimum(inside, high), low)

    def distance(self, perturbed: Tensor, images: Tensor) -> Tensor:
        """Norm (B,) of the smallest δ with ``perturbed = clamp(images + δ)``.

        For images within the range it is ``‖perturbed − images‖``.
        """
        return lp_norm(self._smallest_delta(perturbed, images), self.norm)

    def contains(self, perturbed: Tensor, images: Tensor, tolerance: float = 1e-4) -> Tensor:
        """Whether each sample (B,) is allowed, up to rounding: ``tolerance`` relative to the intensities' size."""
        low, high = self.bounds(images)
        slack = tolerance * max(1.0, float(images.abs().max()) if images.numel() else 1.0)
        in_range = ((perturbed >= low - slack) & (perturbed <= high + slack)).flatten(1).all(1)
        return in_range & self._is_small(self._smallest_delta(perturbed, images), images, slack)

    def steepest(self, gradient: Tensor) -> Tensor:
        """Direction of unit norm in which the loss rises fastest, as ``gradient`` (B, C, *spatial)."""
        return steepest_direction(gradient, self.norm)

    def draw_in_ball(self, images: Tensor, generators: Generators) -> Tensor:
        """Random perturbations within the ball, not yet in the range: see :func:`~nnunet_ima.lp.random_in_ball`."""
        return random_in_ball(images, self.norm, self.radius(images), generators, self.perturbable(images))

    def draw_on_sphere(self, images: Tensor, generators: Generators) -> Tensor:
        """Random perturbations of norm ε, not yet in the range: see :func:`~nnunet_ima.lp.random_on_sphere`."""
        return random_on_sphere(images, self.norm, self.radius(images), generators, self.perturbable(images))

    def perturbable(self, images: Tensor) -> Tensor:
        """True where a voxel may change at all, broadcastable to ``images``."""
        low, high = self.bounds(images)
        return high > low

    def select(self, index: Tensor) -> ThreatModel:
        """The threat model of the samples ``index`` of the batch."""
        # A part of something valid is valid: checking it again would make a GPU wait, at every step of an attack.
        part = copy.copy(self)
        object.__setattr__(part, "epsilon", _pick(self.epsilon, index, batched_from=1))
        object.__setattr__(part, "low", _pick(self.low, index, batched_from=2))
        object.__setattr__(part, "high", _pick(self.high, index, batched_from=2))
        return part

    def with_epsilon(self, epsilon: Bound) -> ThreatModel:
        """The same norm and range with another radius."""
        return replace(self, epsilon=epsilon)

    def _is_small(self, delta: Tensor, images: Tensor, slack: float) -> Tensor:
        """Whether a perturbation of each of ``images`` is in the ball, or no more than ``slack`` outside, (B,)."""
        if self.norm == "linf":
            return (delta.abs() <= self.radius(images) + slack).flatten(1).all(1)
        return lp_norm(delta, "l2") <= self.radius(images).flatten() + slack

    def _smallest_delta(self, perturbed: Tensor, images: Tensor) -> Tensor:
        low, high = self.bounds(images)
        # A voxel that the clamp alone brings to the edge of the range costs the attacker nothing.
        free = ((images <= low) & (perturbed <= low)) | ((images >= high) & (perturbed >= high))
        return torch.where(free, torch.zeros_like(images), perturbed - images)


def image_range(images: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest intensity of each sample and channel, both (B, C), of ``images`` (B, C, *spatial)."""
    flat = images.flatten(2)
    return flat.amin(2), flat.amax(2)


def freeze_channels(threat: ThreatModel, images: Tensor, channels: Sequence[int]) -> ThreatModel:
    """Forbid any change of the given channels (a cascade's one-hot channels are no image)."""
    if not channels:
        return threat
    still = torch.zeros_like(images, dtype=torch.bool)
    still[:, list(channels)] = True
    return freeze_voxels(threat, images, still)


def freeze_voxels(threat: ThreatModel, images: Tensor, still: Tensor) -> ThreatModel:
    """Forbid any change where ``still`` is true (bool, broadcastable to ``images`` (B, C, *spatial))."""
    low, high = (torch.where(still, images, bound) for bound in threat.bounds(images))
    return replace(threat, low=low, high=high)


def _expand(bound: Bound, images: Tensor) -> Tensor:
    value = torch.as_tensor(bound, dtype=images.dtype, device=images.device)
    if value.ndim == 1:  # one value a channel
        value = value[None]
    return per_sample(value, images)


def _pick(bound: Bound, index: Tensor, batched_from: int) -> Bound:
    if isinstance(bound, Tensor) and bound.ndim >= batched_from and bound.shape[0] > 1:
        return bound[index.to(bound.device)]
    if isinstance(bound, Tensor) and bound.ndim >= batched_from:
        return bound.expand(max(1, int(index.max()) + 1) if index.numel() else 1, *bound.shape[1:])[
            index.to(bound.device)
        ]
    return bound
