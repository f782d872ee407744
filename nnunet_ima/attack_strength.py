"""Does an attack in mixed precision find as much as one in single precision?"""

from __future__ import annotations

import torch
from torch import Tensor

from nnunet_ima.attacks.oracle import Oracle
from nnunet_ima.attacks.pgd import climb
from nnunet_ima.threat import ThreatModel

LEAST_STRENGTH = 0.98
"""Under it, attacks run in single precision: in mixed precision they would look weaker than they are."""


def attack_strength(
    oracle: Oracle, exact: Oracle, threat: ThreatModel, images: Tensor, start: Tensor, steps: int, step_size: float
) -> float:
    """By how much ``steps`` of PGD raise the loss, as a share of what they raise it by in single precision.

    Both ends are judged in single precision, by the loss of the full-resolution output, and added up over the samples.
    0 if single precision finds nothing, as then nothing is known of the other one.

    Args:
        oracle: answers in mixed precision.
        exact: answers in single precision, about the same network, targets and loss.
        threat: with one radius a sample.
        images: clean images (n, C, *spatial).
        start: (n, C, *spatial), within the threat model.
        steps: K.
        step_size: as a share of ε.

    Raises:
        UserError: the network's output is NaN or infinite in single precision.
    """
    index = torch.arange(len(images), device=images.device)
    before, _ = exact.score(start, index)
    gains = [
        float((exact.score(climb(one, threat, images, start, steps, step_size), index)[0] - before).double().sum())
        for one in (oracle, exact)
    ]
    return gains[0] / gains[1] if gains[1] > 0 else 0.0
