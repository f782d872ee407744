"""Cross entropy with the weights of SegPGD and CosPGD."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nnunet_ima.attack_losses.voxels import look_at
from nnunet_ima.labels import Labels
from nnunet_ima.losses import Outputs, first


@dataclass(frozen=True)
class SegPGD:
    """(1 − λ) · cross entropy of correct voxels + λ · that of wrong ones; λ grows from 0 to 1/2 during the attack.

    APGD, which compares losses of different steps, then compares them under slightly different λ.

    Gu, Zhao, Tresp & Torr 2022, https://arxiv.org/abs/2207.12391, Eq. 4: λ(t) = (t − 1) / 2T.

    Attributes:
        progress: (t − 1) / T; :meth:`at` sets it.
    """

    labels: Labels
    progress: float = 0.0

    def at(self, progress: float) -> SegPGD:
        """The loss at a share ``progress`` of the attack."""
        return replace(self, progress=progress)

    def __call__(self, outputs: Outputs, targets: Outputs) -> Tensor:
        """Loss (B,) of the full-resolution output."""
        voxels = look_at(first(outputs), first(targets), self.labels)
        wrong = self.progress / 2
        return voxels.mean(-voxels.log_truth * torch.where(voxels.correct, 1 - wrong, wrong))


@dataclass(frozen=True)
class CosPGD:
    """Cross entropy, each voxel weighted with the cosine between its probabilities and the truth.

    Agnihotri, Jung & Keuper 2024, https://arxiv.org/abs/2302.02213, Eq. 5, with softmax probabilities; for a region
    those of inside and outside. No gradient flows through the weights, as in the authors' program.
    """

    labels: Labels

    def __call__(self, outputs: Outputs, targets: Outputs) -> Tensor:
        """Loss (B,) of the full-resolution output."""
        logits = first(outputs).float()
        voxels = look_at(logits, first(targets), self.labels)
        if self.labels.regions:
            length = torch.stack([voxels.log_truth, voxels.log_wrong]).exp().norm(dim=0)
        else:
            length = logits.softmax(1).norm(dim=1, keepdim=True)
        cosine = (voxels.log_truth.exp() / length).detach()
        return voxels.mean(-voxels.log_truth * cosine)
