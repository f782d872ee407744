"""Small random segmentation problems: a network of two convolutions, images, and targets it mostly agrees with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nnunet_ima.dice import DiceCriterion
from nnunet_ima.labels import Labels

IGNORE = 3

# Name of a kind of problem: number of spatial axes, how the target is read.
KINDS: dict[str, tuple[int, Labels]] = {
    "2d classes": (2, Labels()),
    "3d classes": (3, Labels()),
    "2d regions": (2, Labels(regions=True)),
    "2d classes, ignore label": (2, Labels(ignore_label=IGNORE)),
    "3d regions, ignore label": (3, Labels(regions=True, ignore_label=IGNORE)),
}


@dataclass(frozen=True)
class Problem:
    network: nn.Module
    images: Tensor
    targets: Tensor
    criterion: DiceCriterion


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny_network(axes: int, channels: int, heads: int, seed: int, training: bool = False) -> nn.Sequential:
    """Two convolutions with batch norm and dropout between them, which show whether evaluation mode was set."""
    convolution, norm, dropout = (
        (nn.Conv2d, nn.BatchNorm2d, nn.Dropout2d) if axes == 2 else (nn.Conv3d, nn.BatchNorm3d, nn.Dropout3d)
    )
    layers = [
        convolution(channels, 4, 3, padding=1),
        norm(4),
        nn.LeakyReLU(0.1),
        dropout(0.5),
        convolution(4, heads, 3, padding=1),
    ]
    network = nn.Sequential(*layers)
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            # Biases smaller than weights: otherwise one class fills the image.
            scale = 0.6 if parameter.ndim > 1 else 0.2
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
        network[1].weight.fill_(1.0)
    return network.train(training)


def random_target(logits: Tensor, labels: Labels, wrong: float, ignored: float, generator: torch.Generator) -> Tensor:
    """The network's own prediction with a share ``wrong`` of the voxels drawn at random, as nnU-Net would store it."""
    where = (logits.shape[0], 1, *logits.shape[2:])
    if labels.regions:
        truth = (logits > 0).float()
        noise = (torch.rand(truth.shape, generator=generator) < 0.5).float()
    else:
        truth = logits.argmax(1, keepdim=True).float()
        noise = torch.randint(0, logits.shape[1], where, generator=generator).float()
    truth = torch.where(torch.rand(where, generator=generator) < wrong, noise, truth)
    hidden = torch.rand(where, generator=generator) < ignored
    if labels.ignore_label is None:
        return truth
    if labels.regions:
        return torch.cat([truth, hidden.float()], 1)
    return torch.where(hidden, float(labels.ignore_label), truth)


def make_problem(kind: str, seed: int, samples: int = 3, channels: int = 2, wrong: float = 0.15) -> Problem:
    axes, labels = KINDS[kind]
    generator = seeded(1000 + seed)
    spatial = (8, 8) if axes == 2 else (6, 6, 6)
    heads = 2 if labels.regions else 3
    network = tiny_network(axes, channels, heads, seed)
    images = torch.randn((samples, channels, *spatial), generator=generator)
    with torch.no_grad():
        targets = random_target(network(images), labels, wrong, 0.2, generator)
    return Problem(network, images, targets, DiceCriterion(labels=labels))
