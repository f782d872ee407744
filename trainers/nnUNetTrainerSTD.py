"""Stock nnU-Net training, with the length taken from the same settings as the adversarial trainers'."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nnunet_ima.losses import Outputs
from nnunet_ima.margins import SampleId
from nnunet_ima.trainers.nnUNetTrainerAdversarial import Step, nnUNetTrainerAdversarial


class nnUNetTrainerSTD(nnUNetTrainerAdversarial):
    """The baseline: nnU-Net's own step on clean images, so that a comparison differs in the method alone."""

    def adversarial_step(self, images: Tensor, targets: Outputs, samples: Sequence[SampleId]) -> Step:
        """nnU-Net's loss on the clean batch."""
        return Step(self.nnunet_loss(self.forward(images), targets), {"samples": len(samples)})
