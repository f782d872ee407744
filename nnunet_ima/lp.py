"""Geometry of the Lp balls that bound a perturbation (L2 and Linf), one value a sample.

Shapes: a perturbation or gradient is ``(B, C, *spatial)``; a radius is broadcastable to it, that is ``(B, 1, ..., 1)``
or, for Linf with one radius a channel, ``(B, C, 1, ..., 1)``. Units are those of the images (z-scores in nnU-Net).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

Norm = Literal["l2", "linf"]
NORMS: tuple[Norm, ...] = get_args(Norm)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Append axes of length one to ``values`` (B, ...) until it broadcasts against ``like`` (B, C, *spatial)."""
    return values.reshape(*values.shape, *[1] * (like.ndim - values.ndim))


def lp_norm(delta: Tensor, norm: Norm) -> Tensor:
    """Lp norm of each sample of ``delta`` (B, ...), as (B,).

    L2 is summed in double precision: then the result does not depend on how a batch is split over threads.
    """
    flat = delta.flatten(1)
    if norm == "l2":
        # MPS knows no double precision.
        precise = flat if flat.device.type == "mps" else flat.double()
        return precise.square().sum(1).sqrt().to(delta.dtype)
    return flat.abs().amax(1)


def project_ball(delta: Tensor, norm: Norm, radius: Tensor) -> Tensor:
    """Nearest point of the ball of ``radius`` around 0 to ``delta`` (Π_ε of the paper's Eq. 3, without the centre)."""
    if norm == "linf":
        return torch.maximum(torch.minimum(delta, radius), -radius)
    length = per_sample(lp_norm(delta, "l2"), delta)
    # A sample inside the ball keeps its exact bits; the tiny floor avoids 0/0 and never acts outside the ball.
    shrink = (radius / length.clamp_min(torch.finfo(delta.dtype).tiny)).clamp(max=1.0)
    return torch.where(length > radius, delta * shrink, delta)


def steepest_direction(gradient: Tensor, norm: Norm) -> Tensor:
    """Direction of unit Lp norm in which the loss rises fastest (the normalisation h of the paper's Eq. 3).

    The sign for Linf, g/‖g‖₂ for L2. A sample whose gradient is zero everywhere gets the zero direction.
    """
    if norm == "linf":
        return gradient.sign()
    # Dividing by the largest entry first keeps the smallest gradients and the largest from leaving the range of floats.
    largest = per_sample(gradient.flatten(1).abs().amax(1), gradient)
    scaled = gradient / torch.where(largest > 0, largest, torch.ones_like(largest))
    length = per_sample(lp_norm(scaled, "l2"), scaled)
    return scaled / torch.where(length > 0, length, torch.ones_like(length))


Generators = torch.Generator | Sequence[torch.Generator]
"""One generator for the whole batch, on its device (training), or a CPU generator for each sample (evaluation).

With one each, a sample's draw does not depend on the batch it is in.
"""


def random_in_ball(
    like: Tensor, norm: Norm, radius: Tensor, generators: Generators, where: Tensor | bool = True
) -> Tensor:
    """Random perturbations inside the ball: uniform for Linf; for L2 a uniform direction with a uniform radius.

    Zero where ``where`` (broadcastable to ``like``) is False.
    """
    if norm == "linf":
        return (2 * draw_uniform(like, generators) - 1) * radius * where
    share = draw_uniform(like[:, :1].flatten(1)[:, :1], generators)[:, 0]
    return random_on_sphere(like, "l2", radius, generators, where) * per_sample(share, like)


def random_on_sphere(
    like: Tensor, norm: Norm, radius: Tensor, generators: Generators, where: Tensor | bool = True
) -> Tensor:
    """Random perturbations of norm ``radius``: a uniform direction (L2) or a rescaled uniform cube (Linf).

    Zero where ``where`` (broadcastable to ``like``) is False. With one Linf radius a channel, the channel that holds
    the largest entry reaches its radius.
    """
    if norm == "linf":
        noise = (2 * draw_uniform(like, generators) - 1) * where
        largest = per_sample(lp_norm(noise, "linf"), noise)
        return noise / torch.where(largest > 0, largest, torch.ones_like(largest)) * radius
    return steepest_direction(draw_normal(like, generators) * where, "l2") * radius


def draw_uniform(like: Tensor, generators: Generators) -> Tensor:
    """Uniform numbers in [0, 1), shaped and placed as ``like`` (B, ...)."""
    if isinstance(generators, torch.Generator):
        return torch.rand(like.shape, generator=generators, device=generators.device).to(like)
    draws = [torch.rand(like.shape[1:], generator=g) for g in _one_each(generators, like)]
    return torch.stack(draws).to(like) if draws else torch.empty_like(like)


def draw_normal(like: Tensor, generators: Generators) -> Tensor:
    """Standard normal numbers, shaped and placed as ``like`` (B, ...)."""
    if isinstance(generators, torch.Generator):
        return torch.randn(like.shape, generator=generators, device=generators.device).to(like)
    draws = [torch.randn(like.shape[1:], generator=g) for g in _one_each(generators, like)]
    return torch.stack(draws).to(like) if draws else torch.empty_like(like)


def _one_each(generators: Sequence[torch.Generator], like: Tensor) -> Sequence[torch.Generator]:
    if len(generators) != like.shape[0]:
        raise ValueError(f"{len(generators)} random generators were given for {like.shape[0]} samples; give one each.")
    return generators
