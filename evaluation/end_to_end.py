"""Attack whole cases through nnU-Net's sliding window.

The attacker may do what it may at the sample level: change the slices or tiles that hold foreground, and no window of
the network may see more than a perturbation of norm ε. (Where tiles overlap, what is carried over from the samples may
have more in a window, as neighbours add up. There, so may this attack.) What changes is what it climbs: the loss of the
whole case behind the sliding window, instead of that of each tile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from nnunet_ima.attacks.oracle import Watch
from nnunet_ima.errors import UserError
from nnunet_ima.evaluation.attack_choice import AttackChoice
from nnunet_ima.evaluation.case_level import CaseLevel
from nnunet_ima.evaluation.case_network import CaseNetwork
from nnunet_ima.evaluation.cases import Case
from nnunet_ima.evaluation.metrics import CaseScore, nan_mean
from nnunet_ima.evaluation.outcomes import EndToEndScore
from nnunet_ima.evaluation.protocols import Level, Protocol
from nnunet_ima.evaluation.sliding_window import SlidingWindow
from nnunet_ima.overlap import Place
from nnunet_ima.threat import ThreatModel
from nnunet_ima.window_threat import WindowThreat

if TYPE_CHECKING:
    from nnunet_ima.evaluation.run import Evaluation

EndToEnd = Literal["off", "window", "mirroring"]
"""Whether whole cases are attacked, and whether the attack knows that nnU-Net mirrors; the score always mirrors."""

ROUNDING = 1e-5
OWN, CARRIED_OVER, UNPERTURBED = "end-to-end", "carried over", "unperturbed"


def refuse_what_cannot(attacks: Sequence[AttackChoice], case_level: bool) -> None:
    """Say beforehand what does not go with attacks on whole cases.

    Raises:
        UserError: an attack that cannot, or no case level.
    """
    if not case_level:
        raise UserError("--end-to-end attacks whole cases, which --no-cases leaves out; give only one of them.")
    unable = [choice.text for choice in attacks if not choice.make(threat=ThreatModel("l2", 0.0)).takes_windows]
    if unable:
        raise UserError(
            f"The attack {unable[0]} cannot go through the sliding window; --end-to-end takes white-noise, fgsm, "
            f"ifgsm, pgd, apgd, apgd-t and autoattack:version=fast or strong."
        )


@dataclass(frozen=True)
class Carried:
    """A case as it comes from the sample level.

    Attributes:
        case: unperturbed.
        places: of the samples that were attacked.
        volume: (C, Z, Y, X), what their perturbed tiles make together.
        unperturbed: score without attack; under the protocol ``paper`` after its clamp.
        score: of that volume.
    """

    case: Case
    places: Sequence[Place]
    volume: Tensor
    unperturbed: CaseScore
    score: CaseScore


class EndToEndAttack:
    """Attacks whole cases with what an evaluation is made of."""

    def __init__(self, evaluation: Evaluation, case_level: CaseLevel) -> None:
        self._evaluation, self._case_level = evaluation, case_level

    def __call__(
        self, choice: AttackChoice, level: Level, carried: Carried, chunk: int, watch: Watch | None = None
    ) -> EndToEndScore:
        """Attack a case; ``chunk`` windows go through the network at once, and ``watch`` is told of each pass.

        Of the attack's own volume, the one carried over and the unperturbed one, that with the lowest of nnU-Net's
        case Dice is what is reported: no more than any of them.
        """
        evaluation, case = self._evaluation, carried.case
        scores = {CARRIED_OVER: carried.score, UNPERTURBED: carried.unperturbed}
        if not carried.places:
            return EndToEndScore(carried.unperturbed, UNPERTURBED, 0.0, 0.0, 0, 0)
        window = SlidingWindow(evaluation.model, evaluation.device, chunk, evaluation.end_to_end == "mirroring")
        unperturbed = evaluation.protocol.clamp(case.image).to(evaluation.device)
        network = CaseNetwork(window, case, unperturbed, carried.places)
        z, y, x = case.unpad
        image, target, start = (
            volume[None, :, z, y, x].to(evaluation.device)
            for volume in (case.image, case.target, to_the_edge(evaluation.protocol, carried.volume))
        )
        threat = whole_case_threat(evaluation.protocol, level, carried, network.windows, image, start)
        attack = choice.make(
            threat=threat, criterion=evaluation.criterion, seed=evaluation.seed, start=start, watch=watch
        )
        found = attack(network, image, target)
        volume = case.image.clone()
        volume[:, z, y, x] = found.images[0].cpu()
        scores[OWN] = self._case_level.score(case, volume)
        worst = min(scores, key=lambda name: _dice(scores[name]))
        norms = {OWN: float(threat.distance(found.images, image)), CARRIED_OVER: float(threat.distance(start, image))}
        norms[UNPERTURBED] = 0.0
        return EndToEndScore(
            score=scores[worst],
            found_by=worst,
            norm=norms[worst],
            carried_norm=norms[CARRIED_OVER],
            forward_passes=int(found.forward_passes),
            backward_passes=int(found.backward_passes),
        )


def to_the_edge(protocol: Protocol, volume: Tensor) -> Tensor:
    """Without the rounding that putting tiles together leaves at the edge of the range.

    Under the protocol ``paper`` a voxel that the clamp alone brings to the edge costs nothing; one that is next to it
    would cost all the way from the z-score.
    """
    if protocol.name != "paper":
        return volume
    edge = volume.round()
    return torch.where((volume - edge).abs() < ROUNDING, edge, volume)


def whole_case_threat(
    protocol: Protocol, level: Level, carried: Carried, windows: Sequence[Place], image: Tensor, start: Tensor
) -> ThreatModel:
    """What an attacker may do to a case without its padding.

    Args:
        protocol: range and unit.
        level: ε in the protocol's unit.
        carried: what was attacked as samples; nothing else may change.
        windows: of the network, in the case without its padding.
        image: (1, C, z, y, x), unperturbed.
        start: (1, C, z, y, x), carried over; it is allowed.
    """
    case = carried.case
    z, y, x = case.unpad
    attacked = torch.zeros_like(case.fixed[0])
    for place in carried.places:
        attacked[place] = True
    fixed = (case.fixed | ~attacked)[None, :, z, y, x].to(image.device)
    low, high = (end[None].to(image) for end in (case.low, case.high))
    plain = protocol.threat(level, image, low, high, case.fixed[None, :, z, y, x].to(image.device))
    still = protocol.clamp(image)
    low, high = (torch.where(fixed, still, bound) for bound in plain.bounds(image))
    if protocol.norm == "linf":
        return replace(plain, low=low, high=high)
    each = WindowThreat("l2", level.value, low, high, windows)
    # As much as the samples' attacks put into a window, where overlapping tiles make that more than ε.
    return replace(each, shares=(each.window_norms(start, image) / level.value).clamp_min(1))


def _dice(score: CaseScore) -> float:
    """Mean of the classes; what is not defined is no success."""
    mean = nan_mean(list(score.dice))
    return math.inf if math.isnan(mean) else mean
