"""SPSA: gradients from differences alone, for networks that show none. Uesato et al. 2018, arxiv.org/abs/1802.05666."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nnunet_ima.attacks.attack import Attack
from nnunet_ima.attacks.oracle import BestSoFar, Oracle
from nnunet_ima.attacks.pgd import ascend
from nnunet_ima.lp import draw_uniform, per_sample, steepest_direction
from nnunet_ima.seeds import sample_generators
from nnunet_ima.threat import ThreatModel


@dataclass(frozen=True)
class SPSA(Attack):
    """Projected ascent along simultaneous-perturbation estimates of the gradient; it never asks for a true one.

    An estimate is the mean over ``samples`` / 2 random directions v of ±1 of v (L(x + δv) − L(x − δv)) / 2δ. The probes
    may lie just outside ball and range, and earn no credit. The steps are PGD's, of a fixed share of ε, where the
    paper uses Adam's.

    Attributes:
        steps: of the ascent.
        samples: images asked about for each estimate (2,048 in the IMA paper's supplement, H.2).
        step_size: of a step, as a share of ε.
        delta: the size of a probe, as a share of ε: in each voxel for Linf, over all voxels for L2.
    """

    name: ClassVar[str] = "spsa"
    default_loss: ClassVar[str] = "dice-odds"
    steps: int = 20
    samples: int = 2048
    step_size: float = 0.2
    delta: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 2 or self.samples % 2:
            raise ValueError(f"spsa: samples is {self.samples}; it must be an even number, two for each direction.")

    def run(self, oracle: Oracle, images: Tensor, best: BestSoFar) -> None:
        """See :meth:`Attack.run`."""
        index = self.worth_attacking(best)
        probing = oracle.under(best=BestSoFar(images))
        generators = sample_generators(images, self.seed, self.name)
        threat, clean = self.threat.select(index), images[index]
        point = threat.project(clean, clean)
        for step in range(self.steps):
            if not len(index):
                return
            drawn = [generators[i] for i in index.tolist()]
            estimate = self._estimate(probing, threat, clean, point, index, drawn, step / self.steps)
            point = ascend(threat, point, clean, estimate, self.step_size)
            stays = self.unfinished(torch.minimum(oracle.dice(point, index), best.dice[index])).nonzero()[:, 0]
            threat, clean, point, index = threat.select(stays), clean[stays], point[stays], index[stays]

    def _estimate(
        self,
        oracle: Oracle,
        threat: ThreatModel,
        images: Tensor,
        point: Tensor,
        index: Tensor,
        generators: list[torch.Generator],
        progress: float = 0.0,
    ) -> Tensor:
        where = threat.perturbable(images)
        estimate = torch.zeros_like(point)
        for _ in range(self.samples // 2):
            signs = (2 * (draw_uniform(point, generators) < 0.5).to(point) - 1) * where
            unit = signs if threat.norm == "linf" else steepest_direction(signs, "l2")
            probe = self.delta * threat.radius(images) * unit
            higher, _ = oracle.score(point + probe, index, progress)
            lower, _ = oracle.score(point - probe, index, progress)
            estimate += per_sample(higher - lower, point) * signs
        return estimate
