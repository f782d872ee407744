"""Jensen–Shannon divergence between prediction and truth, a loss of SEA: https://arxiv.org/abs/2306.12941."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nnunet_ima.attack_losses.voxels import look_at
from nnunet_ima.labels import Labels
from nnunet_ima.losses import Outputs, first


@dataclass(frozen=True)
class JensenShannon:
    """(KL(p ‖ m) + KL(y ‖ m)) / 2 with m = (p + y) / 2, the mean over voxels; in [0, log 2].

    y is 1 at the truth alone, so with q = p(truth): KL(y ‖ m) = −log((1 + q) / 2), and KL(p ‖ m) is
    q log(2q / (1 + q)) plus, as all other classes have m = p / 2, (1 − q) log 2. Its gradient fades where the
    prediction is very wrong, unlike that of cross entropy.
    """

    labels: Labels

    def __call__(self, outputs: Outputs, targets: Outputs) -> Tensor:
        """Loss (B,) of the full-resolution output."""
        voxels = look_at(first(outputs), first(targets), self.labels)
        truth = voxels.log_truth.exp()
        log_middle = torch.log1p(truth) - math.log(2)
        towards_middle = truth * (voxels.log_truth - log_middle) + (1 - truth) * math.log(2)
        return voxels.mean((towards_middle - log_middle) / 2)
