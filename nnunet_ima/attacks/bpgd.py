"""GenAdv: PGD until the segmentation stops being correct, then bisection onto the boundary.

Algorithms 2 and 3 of the IMA paper (arXiv 2005.09147 v10); BPGD is the earlier versions' name for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from nnunet_ima.attacks.attack import Attack
from nnunet_ima.attacks.oracle import BestSoFar, Oracle
from nnunet_ima.attacks.pgd import ascend
from nnunet_ima.dice import DiceCriterion
from nnunet_ima.lp import per_sample
from nnunet_ima.threat import ThreatModel

BoundarySearch = Literal["path", "origin"]
BOUNDARY_SEARCHES: tuple[BoundarySearch, ...] = get_args(BoundarySearch)


class Boundary(NamedTuple):
    """Where GenAdv ended for each sample.

    Attributes:
        images: (n, C, *spatial): next to the boundary if ``crossed``, else where the last step ended.
        crossed: (n,) of bool, β of Algorithm 2: a point that is not correct was met.
    """

    images: Tensor
    crossed: Tensor


def generate_adversarial(
    oracle: Oracle,
    criterion: DiceCriterion,
    threat: ThreatModel,
    images: Tensor,
    start: Tensor,
    index: Tensor,
    steps: int = 20,
    step_factor: float = 4.0,
    bisections: int = 10,
    boundary_search: BoundarySearch = "path",
) -> Boundary:
    """GenAdv (Algorithm 2; Algorithm 3 with ``boundary_search="origin"``) for samples whose clean image is correct.

    A sample leaves at its first crossing, and costs no further pass of the ascent. All crossings are then bisected
    together, between the last correct and the first wrong point (``path``) or the clean image and the latter
    (``origin``), which is the only difference to Algorithm 3 that has an effect: that one goes on climbing after a
    crossing and bisects towards its last point, which may be correct again.

    Args:
        oracle: of the network and the targets.
        criterion: what "correct" means.
        threat: one radius a sample: the estimated margins E(i).
        images: clean images (n, C, *spatial), n samples.
        start: where the ascent starts (n, C, *spatial): the clean images plus random noise.
        index: (n,) of the samples, as ``oracle`` counts them.
        steps: K.
        step_factor: the step is ``step_factor`` · E / K.
        bisections: N of BinarySearch.
        boundary_search: between which points to bisect.
    """
    ended = start.clone()
    # Under the paper's protocol a clean image lies outside the range: its side of the boundary is the clamped one.
    correct_side, wrong_side = threat.project(images, images), start.clone()
    crossed = torch.zeros(len(index), dtype=torch.bool, device=images.device)
    point, active = start, torch.arange(len(index), device=images.device)
    for step in range(steps + 1):
        last = step == steps
        if last:
            dice = oracle.dice(point, index[active])
        else:
            answer = oracle.ascent(point, index[active], progress=step / steps)
            dice = answer.dice
        correct = criterion.is_correct(dice)
        wrong_side[active[~correct]] = point[~correct]
        crossed[active[~correct]] = True
        if last:
            ended[active] = point
            break
        if boundary_search == "path":
            correct_side[active[correct]] = point[correct]
        point, gradient, active = point[correct], answer.gradient[correct], active[correct]
        if not len(active):
            break
        point = ascend(threat.select(active), point, images[active], gradient, step_factor / steps)
    found = crossed.nonzero()[:, 0]
    ended[found] = bisect(oracle, criterion, correct_side[found], wrong_side[found], index[found], bisections)
    return Boundary(ended, crossed)


def bisect(
    oracle: Oracle, criterion: DiceCriterion, correct_side: Tensor, wrong_side: Tensor, index: Tensor, halvings: int
) -> Tensor:
    """BinarySearch of Algorithm 2: halve ``halvings`` times the way between a correct and a wrong point."""
    middle = (correct_side + wrong_side) / 2
    if not len(index):
        return middle
    for _ in range(halvings):
        correct = per_sample(criterion.is_correct(oracle.dice(middle, index)), middle)
        correct_side = torch.where(correct, middle, correct_side)
        wrong_side = torch.where(correct, wrong_side, middle)
        middle = (correct_side + wrong_side) / 2
    return middle


@dataclass(frozen=True)
class BPGD(Attack):
    """GenAdv as an attack: PGD that is content when the Dice has fallen under the threshold.

    It returns the point with the lowest Dice on its way, which is usually the first wrong one; it does not go on from
    there, so its Dice stays close to the threshold. It shows how many samples can be made wrong, not how wrong.
    """

    name: ClassVar[str] = "bpgd"
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"boundary_search": BOUNDARY_SEARCHES}
    steps: int = 40
    step_factor: float = 4.0
    bisections: int = 10
    boundary_search: BoundarySearch = "path"

    def run(self, oracle: Oracle, images: Tensor, best: BestSoFar) -> None:
        """See :meth:`Attack.run`."""
        index = self.criterion.is_correct(best.dice).nonzero()[:, 0]
        if not len(index):
            return
        generate_adversarial(
            oracle,
            self.criterion,
            self.threat.select(index),
            images[index],
            best.images[index].clone(),
            index,
            self.steps,
            self.step_factor,
            self.bisections,
            self.boundary_search,
        )
