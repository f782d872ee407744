"""TRADES: Zhang et al. 2019, https://arxiv.org/abs/1901.08573, Algorithm 1, for segmentation."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor

from nnunet_ima.attacks.oracle import undisturbed
from nnunet_ima.divergence import Divergence
from nnunet_ima.losses import Outputs
from nnunet_ima.lp import draw_normal
from nnunet_ima.precision import training_autocast
from nnunet_ima.settings import PERTURBATION
from nnunet_ima.threat import ThreatModel
from nnunet_ima.trainers.nnUNetTrainerAdversarial import Batch, Step
from nnunet_ima.trainers.nnUNetTrainerSAT import nnUNetTrainerSAT
from nnunet_ima.training_log import Panel

# Line 5: standard deviation of the noise that the ascent starts from, in z-scores.
START = 0.001


class nnUNetTrainerTRADES(nnUNetTrainerSAT):
    """Train on clean samples, and keep the prediction on a perturbed sample close to the one on the clean sample.

    The divergence is KL(clean ‖ perturbed), averaged over voxels and weighted over the outputs of deep supervision as
    nnU-Net's loss is.
    """

    reads: ClassVar[Collection[str]] = (*PERTURBATION, "trades_beta")
    # Ten steps of 2ε/10.
    defaults: ClassVar[Mapping[str, Any]] = {"steps": 10, "step_factor": 2.0}
    # The ascent starts 0.001 from the clean image, which is less than fp16 resolves.
    exact_steps: ClassVar[int] = 1
    panels: ClassVar[Sequence[Panel]] = (
        Panel("loss", {"clean_losses": "clean", "divergences": "KL(clean ‖ perturbed)"}),
        Panel("share of samples", {"correct_share": "correct though perturbed"}),
        Panel("per sample", {"passes_per_sample": "forward passes a step"}),
    )

    def adversarial_step(self, batch: Batch) -> Step:
        """Lines 4 to 9 of Algorithm 1: L(clean) + β · KL(clean ‖ perturbed)."""
        divergence = Divergence(self.labels, self.sample_loss.weights)
        outputs = self.forward(batch.images)
        clean_loss = self.nnunet_loss(outputs, batch.targets)
        # In the ascent the clean prediction stands still; in the loss both learn.
        fixed, extra = self._fixed(outputs, batch.images)
        perturbed, passes = self.perturb(batch, divergence.reference(fixed, batch.targets), divergence)
        again = self.forward(perturbed)
        kl = divergence(again, divergence.reference(outputs, batch.targets)).mean()
        passes += extra + len(batch.images) + len(perturbed)
        counts = self.counts(again, batch.targets, passes, clean_losses=clean_loss, divergences=kl)
        return Step(clean_loss + self.settings.trades_beta * kl, counts)

    def _fixed(self, outputs: Outputs, images: Tensor) -> tuple[Outputs, int]:
        """The clean prediction as the ascent sees it, and passes spent.

        Predictions 0.001 apart can be compared only if both are in the precision of the attack.
        """
        if training_autocast(self.device) is nullcontext:
            return _detached(outputs), 0
        with undisturbed(self.bare_network), torch.no_grad():
            predicted: Outputs = self.bare_network(images)
        return predicted, len(images)

    def start(self, images: Tensor, threat: ThreatModel) -> Tensor:
        """Line 5: the clean image and a little noise, without which the divergence has no gradient."""
        noise = START * draw_normal(images, self.generator)
        return threat.project(images + torch.where(threat.perturbable(images), noise, 0.0), images)


def _detached(outputs: Outputs) -> Outputs:
    return outputs.detach() if isinstance(outputs, Tensor) else [output.detach() for output in outputs]
