"""A threat model for a whole case: what the network sees of it through any of its windows is bounded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nnunet_ima.lp import Generators, draw_normal, draw_uniform, per_sample
from nnunet_ima.overlap import Place
from nnunet_ima.threat import ThreatModel


@dataclass(frozen=True)
class WindowThreat(ThreatModel):
    """An L2 ball for each window: the perturbation within it has a norm of at most ``shares`` times ε.

    For one image (1, C, *spatial). Where windows do not overlap (slices), each has a ball of its own, and everything
    here is what :class:`ThreatModel` does to a batch of them. Where they do, a voxel is subject to all windows that
    hold it, and a point is brought back not to the nearest point of the set, but to one that is easily found: each
    voxel is scaled down as is asked by that window around it which is farthest outside its ball.

    Attributes:
        windows: boxes of the spatial axes, which hold every voxel that may change.
        shares: (W,), how large each window's ball is in units of ε; None for 1.
    """

    windows: Sequence[Place] = ()
    shares: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm != "l2":
            raise ValueError("windows are for L2; an Linf bound holds for each voxel, whatever windows there are.")
        if torch.as_tensor(self.epsilon).numel() != 1:
            raise ValueError(f"epsilon is {self.epsilon}; windows of one image need one number.")

    def project(self, perturbed: Tensor, images: Tensor) -> Tensor:
        """See :meth:`ThreatModel.project`: into all balls, then into the range."""
        delta = perturbed - images
        excess = self._largest_around(self._norms(delta) / self._radii(delta).clamp_min(_tiny(delta)), delta)
        low, high = self.bounds(images)
        # Inside all balls a voxel keeps its exact bits.
        inside = images + torch.where(excess > 1, delta / excess, delta)
        return torch.maximum(torch.minimum(inside, high), low)

    def distance(self, perturbed: Tensor, images: Tensor) -> Tensor:
        """See :meth:`ThreatModel.distance`: the largest norm in a window, (1,)."""
        return self.window_norms(perturbed, images).amax(0, keepdim=True)

    def window_norms(self, perturbed: Tensor, images: Tensor) -> Tensor:
        """Norm (W,) in each window of the smallest δ with ``perturbed = clamp(images + δ)``."""
        return self._norms(self._smallest_delta(perturbed, images))

    def steepest(self, gradient: Tensor) -> Tensor:
        """See :meth:`ThreatModel.steepest`: of norm 1 in a window by itself, of at most 1 where windows overlap."""
        # Dividing by the largest entry first keeps the smallest gradients from leaving the range of floats.
        scaled = gradient / gradient.abs().max().clamp_min(_tiny(gradient))
        length = self._largest_around(self._norms(scaled), scaled)
        return scaled / torch.where(length > 0, length, torch.ones_like(length))

    def draw_in_ball(self, images: Tensor, generators: Generators) -> Tensor:
        """See :meth:`ThreatModel.draw_in_ball`."""
        share = draw_uniform(images[:, :1].flatten(1)[:, :1], generators)[:, 0]
        return self.draw_on_sphere(images, generators) * per_sample(share, images)

    def draw_on_sphere(self, images: Tensor, generators: Generators) -> Tensor:
        """See :meth:`ThreatModel.draw_on_sphere`: normal noise, as large as the windows allow."""
        noise = draw_normal(images, generators) * self.perturbable(images)
        return self.steepest(noise) * self.radius(images)

    def select(self, index: Tensor) -> WindowThreat:  # noqa: ARG002 (there is one image)
        """Of a batch of one there is nothing to choose."""
        return self

    def _is_small(self, delta: Tensor, images: Tensor, slack: float) -> Tensor:  # noqa: ARG002 (one radius for all)
        return (self._norms(delta) <= self._radii(delta) + slack).all(0, keepdim=True)

    def _norms(self, delta: Tensor) -> Tensor:
        """L2 norm (W,) of ``delta`` (1, C, *spatial) in each window, summed in double precision."""
        # MPS knows no double precision.
        squares = (delta if delta.device.type == "mps" else delta.double()).square().sum((0, 1))
        return torch.stack([squares[window].sum() for window in self.windows]).sqrt().to(delta.dtype)

    def _radii(self, like: Tensor) -> Tensor:
        epsilon = torch.as_tensor(self.epsilon, dtype=like.dtype, device=like.device).reshape(1)
        return epsilon.expand(len(self.windows)) if self.shares is None else epsilon * self.shares.to(like)

    def _largest_around(self, values: Tensor, like: Tensor) -> Tensor:
        """Of ``values`` (W,), for each voxel the largest of the windows that hold it; 0 where none does."""
        largest = torch.zeros_like(like[0, 0])
        for window, value in zip(self.windows, values, strict=True):
            largest[window] = torch.maximum(largest[window], value)
        return largest


def _tiny(like: Tensor) -> float:
    return torch.finfo(like.dtype).tiny
