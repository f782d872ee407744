"""How far mixed precision leads an attack astray: its gradients beside those in single precision."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from nnunet_ima.attack_losses import LossFunction
from nnunet_ima.attacks.oracle import Oracle, undisturbed
from nnunet_ima.losses import Outputs, first
from nnunet_ima.precision import Autocast


class GradientError(NamedTuple):
    """What mixed precision does to the gradient of a loss with respect to the image.

    Attributes:
        relative: norm of the difference over the norm of the exact gradient, of the sample where it is largest.
        zeros: share of voxels whose gradient became 0.
    """

    relative: float
    zeros: float


def gradient_error(
    network: nn.Module, images: Tensor, targets: Outputs, loss: LossFunction, autocast: Autocast
) -> GradientError:
    """Measure it; a gradient that overflowed counts as it is used, computed again in single precision.

    One sample at a time: a GPU whose memory a training fills has no room for more in single precision.

    Args:
        network: takes images (B, C, *spatial), returns logits or a list of them; it is left as it was found.
        images: (B, C, *spatial), at least one.
        targets: as ``loss`` reads them.
        loss: what attacks climb.
        autocast: makes the context of mixed precision.

    Raises:
        UserError: a gradient is NaN or infinite in single precision.
    """
    index = torch.arange(first(targets).shape[0], device=images.device)
    with undisturbed(network):
        exact = Oracle(network, targets, loss, None, chunk=1).ascent(images, index).gradient.float()
        mixed = Oracle(network, targets, loss, None, chunk=1, autocast=autocast)
        found = mixed.ascent(images, index).gradient.float()
    norms = exact.flatten(1).norm(dim=1)
    # Where the loss is flat there is no direction to be wrong about.
    errors = torch.where(norms > 0, (found - exact).flatten(1).norm(dim=1) / norms, torch.zeros_like(norms))
    return GradientError(float(errors.max()), float(((found == 0) & (exact != 0)).float().mean()))
