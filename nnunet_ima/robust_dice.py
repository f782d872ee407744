"""How a network in training does under attack: the Dice that is left on fixed patches after PGD-10."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nnunet_ima.attacks.oracle import finite_logits, undisturbed
from nnunet_ima.attacks.pgd import PGD
from nnunet_ima.dice import Confusion as Counts
from nnunet_ima.dice import DiceCriterion, class_dice, confusion
from nnunet_ima.precision import Autocast
from nnunet_ima.threat import ThreatModel

STEPS, STEP_SIZE = 10, 0.25


@dataclass(frozen=True)
class RobustDice:
    """PGD-10 on fixed patches.

    Attributes:
        images: (n, C, *patch), on the network's device.
        targets: (n, 1 or R, *patch).
        threat: what PGD may do.
        criterion: how targets are read.
        batch_size: patches attacked at once.
    """

    images: Tensor
    targets: Tensor
    threat: ThreatModel
    criterion: DiceCriterion
    batch_size: int

    def __call__(self, network: nn.Module, autocast: Autocast = nullcontext) -> float:
        """Dice over all voxels of the patches, mean of classes, as nnU-Net's pseudo Dice; NaN without foreground.

        Args:
            network: to be attacked.
            autocast: makes the context in which it runs.

        Raises:
            UserError: the network's output is NaN or infinite.
        """
        parts = []
        for start in range(0, len(self.images), self.batch_size):
            index = torch.arange(start, min(start + self.batch_size, len(self.images)), device=self.images.device)
            attack = PGD(
                self.threat.select(index),
                self.criterion,
                steps=STEPS,
                step_size=STEP_SIZE,
                chunk=self.batch_size,
                autocast=autocast,
            )
            perturbed = attack(network, self.images[index], self.targets[index]).images
            with undisturbed(network), torch.no_grad():
                logits = finite_logits(network, perturbed, autocast, len(perturbed))
            parts.append(confusion(logits, self.targets[index], self.criterion.labels))
        pooled = Counts(*(torch.cat(part).sum(0, keepdim=True) for part in zip(*parts, strict=True)))
        return float(class_dice(pooled).nanmean())
