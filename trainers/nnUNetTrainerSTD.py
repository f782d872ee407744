"""Stock nnU-Net training, with the length taken from the same settings as the adversarial trainers'."""

from __future__ import annotations

from nnunet_ima.trainers.nnUNetTrainerAdversarial import Batch, Step, nnUNetTrainerAdversarial


class nnUNetTrainerSTD(nnUNetTrainerAdversarial):
    """The baseline: nnU-Net's own step on clean images, so that a comparison differs in the method alone."""

    def adversarial_step(self, batch: Batch) -> Step:
        """nnU-Net's loss on the clean batch."""
        samples = len(batch.samples)
        return Step(
            self.nnunet_loss(self.forward(batch.images), batch.targets),
            {"steps": 1, "samples": samples, "forward_passes": samples},
        )
