"""How far a perturbed prediction is from another one: TRADES' divergence and TE's pull, one value a sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from nnunet_ima.labels import Labels
from nnunet_ima.losses import Outputs, deep_supervision_weights


def kl_divergence(clean: Tensor, perturbed: Tensor, valid: Tensor, regions: bool = False) -> Tensor:
    """KL(clean ‖ perturbed) of each sample (B,), the mean over the voxels that are not ignored; 0 if all are.

    Args:
        clean: logits (B, K, *spatial).
        perturbed: logits of the same shape.
        valid: (B, 1, *spatial) of bool.
        regions: sigmoid outputs, each a Bernoulli distribution of its own: the mean over them, as in nnU-Net's binary
            cross entropy. Else softmax over the K classes.
    """
    clean, perturbed = clean.float(), perturbed.float()
    if regions:
        # With logit z, KL of Bernoullis is σ(z)(z − w) − softplus(z) + softplus(w).
        terms = clean.sigmoid() * (clean - perturbed) - functional.softplus(clean) + functional.softplus(perturbed)
        voxelwise = terms.mean(1, keepdim=True)
    else:
        log_clean, log_perturbed = clean.log_softmax(1), perturbed.log_softmax(1)
        voxelwise = (log_clean.exp() * (log_clean - log_perturbed)).sum(1, keepdim=True)
    return _mean_where(voxelwise, valid)


def squared_distance(probabilities: Tensor, average: Tensor, valid: Tensor) -> Tensor:
    """Mean square (B,) of ``probabilities − average``, over classes and the voxels where ``valid``; 0 without any.

    Args:
        probabilities: (B, K, *spatial).
        average: the same shape.
        valid: (B, 1, *spatial) of bool.
    """
    return _mean_where((probabilities - average).square().mean(1, keepdim=True), valid)


def probabilities_of(logits: Tensor, regions: bool) -> Tensor:
    """Softmax over classes, or a sigmoid for each region, in single precision."""
    return logits.float().sigmoid() if regions else logits.float().softmax(1)


@dataclass(frozen=True)
class Divergence:
    """KL(clean ‖ perturbed) over all outputs of a network, weighted as nnU-Net's loss weights them.

    Attributes:
        labels: classes or regions, ignore label.
        weights: of the outputs of a network with deep supervision; None for nnU-Net's.
    """

    labels: Labels = field(default_factory=Labels)
    weights: tuple[float, ...] | None = None

    def __call__(self, perturbed: Outputs, reference: Outputs) -> Tensor:
        """KL (B,).

        Args:
            perturbed: outputs of the network, with gradients.
            reference: clean outputs followed by the targets, see :meth:`reference`.
        """
        outputs = as_list(perturbed)
        clean, targets = as_list(reference)[: len(outputs)], as_list(reference)[len(outputs) :]
        weights = self.weights or deep_supervision_weights(len(outputs))
        terms = [
            weight * kl_divergence(c, p, self.labels.valid(t), self.labels.regions)
            for weight, c, p, t in zip(weights, clean, outputs, targets, strict=True)
            if weight
        ]
        return torch.stack(terms).sum(0)

    @staticmethod
    def reference(clean: Outputs, targets: Outputs) -> list[Tensor]:
        """Clean outputs and targets (for the ignore label) as one list, as an attack passes them on."""
        return [*as_list(clean), *as_list(targets)]


def as_list(outputs: Outputs) -> Sequence[Tensor]:
    """The outputs of all resolutions; one for a network without deep supervision."""
    return [outputs] if isinstance(outputs, Tensor) else outputs


def _mean_where(values: Tensor, valid: Tensor) -> Tensor:
    # where, not a product: what is left out may be infinite.
    kept = torch.where(valid, values, torch.zeros_like(values))
    return kept.flatten(1).sum(1) / valid.flatten(1).sum(1).clamp_min(1)
