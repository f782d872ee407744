"""Signs that an attack did its work. A result that fails one is shown, and marked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from nnunet_ima.evaluation.metrics import adi, mean_case_dice, nan_mean
from nnunet_ima.evaluation.outcomes import Outcome
from nnunet_ima.evaluation.protocols import Level

# Rounding, and the little by which the worst of 100 draws may beat a weak gradient attack on a tiny sample.
SLACK = 0.005

WHITE_NOISE = "white-noise"
# These are content with little, or take a single step.
WEAK = ("bpgd", "fab", "fgsm")
BLACK_BOX = ("square", "spsa")
WHITE_BOX = ("pgd", "apgd", "ifgsm")


def check(unperturbed: Outcome, attacked: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Named checks, each with whether it passed and a sentence.

    Args:
        unperturbed: the clean outcome; under the ``paper`` protocol the clamped one.
        attacked: the outcomes of attacks.
    """
    whole = [outcome for outcome in attacked if outcome.end_to_end]
    return [
        *_never_helps(unperturbed, attacked),
        *_noise_is_weaker(attacked, _adi, "gradients_beat_noise", ""),
        *_black_box_is_weaker(attacked),
        *_more_is_worse(attacked),
        *_end_to_end_is_no_weaker(unperturbed, whole),
        *_noise_is_weaker(whole, _whole, "end_to_end_gradients_beat_noise", " on whole cases"),
    ]


def _never_helps(unperturbed: Outcome, attacked: Sequence[Outcome]) -> list[dict[str, Any]]:
    before = {score.sample: score.dice for score in unperturbed.samples}
    helped = [
        _name(outcome)
        for outcome in attacked
        if any(score.dice > before[score.sample] + 1e-6 for score in outcome.samples)
    ]
    return [
        _item(
            "no_sample_gained",
            not helped,
            "no attack left a sample with a higher Dice than without it",
            f"a sample has a higher Dice under {', '.join(helped)} than without: the network's output is not the same "
            f"twice",
        )
    ]


def _noise_is_weaker(
    attacked: Sequence[Outcome], dice: Callable[[Outcome], float], name: str, where: str
) -> list[dict[str, Any]]:
    noise: dict[Level | None, float] = {}
    for outcome in attacked:
        if _kind(outcome) == WHITE_NOISE:
            noise[outcome.level] = min(dice(outcome), noise.get(outcome.level, np.inf))
    # A black box uses no gradients, and so tells nothing of them.
    others = (WHITE_NOISE, *WEAK, *BLACK_BOX)
    strong = [o for o in attacked if not _is_of(_kind(o), others) and not _content_with_wrong(o)]
    beaten = [_name(o) for o in strong if o.level in noise and dice(o) > noise[o.level] + SLACK]
    if not noise or not strong:
        return []
    return [
        _item(
            name,
            not beaten,
            f"every gradient attack that goes for the lowest Dice is at least as strong as white noise of the same "
            f"level{where}",
            f"white noise is stronger than {', '.join(beaten)}{where}: the gradients are of no use to the attack, so "
            f"the robustness shown is not real",
        )
    ]


def _black_box_is_weaker(attacked: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Of each level the best black box against the best gradient attack, members of ensembles included."""
    black, white = _lowest(attacked, BLACK_BOX), _lowest(attacked, WHITE_BOX)
    levels = [level for level in black if level in white]
    if not levels:
        return []
    beaten = [str(level.text) for level in levels if level and black[level] + SLACK < white[level]]
    return [
        _item(
            "white_box_beats_black_box",
            not beaten,
            "no black-box attack is stronger than the gradient attacks",
            f"at level {', '.join(beaten)} a black-box attack is stronger than every gradient attack: gradients are "
            f"hidden, so the robustness shown by gradient attacks is not real",
        )
    ]


def _lowest(attacked: Sequence[Outcome], kinds: Sequence[str]) -> dict[Level | None, float]:
    """Lowest ADI of the attacks of these kinds at each level, of those that go for the lowest Dice."""
    found: dict[Level | None, float] = {}
    for outcome in attacked:
        if _content_with_wrong(outcome):
            continue
        values = [_adi(outcome)] if _is_of(_kind(outcome), kinds) else []
        for name in outcome.samples[0].by_attack if outcome.samples else {}:
            if _is_of(name, kinds):
                # A sample that a member was not asked about was at 0 before.
                dice = [0.0 if (part := s.by_attack[name]) is None else part.dice for s in outcome.samples]
                values.append(adi(np.array(dice)))
        if values:
            found[outcome.level] = min([*values, found.get(outcome.level, np.inf)])
    return found


def _is_of(name: str, kinds: Sequence[str]) -> bool:
    """Whether an attack or a member, as ``apgd`` or ``apgd-ce``, is of one of these kinds."""
    return any(name == kind or name.startswith(f"{kind}-") for kind in kinds)


def _content_with_wrong(outcome: Outcome) -> bool:
    """Whether an attack stops where a sample is wrong, so that its mean Dice says little."""
    return "mode=threshold" in outcome.attack


def _more_is_worse(attacked: Sequence[Outcome]) -> list[dict[str, Any]]:
    rising = []
    # Who stops where a sample is wrong leaves what Dice it happens to have there, at any level.
    lasting = [o for o in attacked if _kind(o) not in WEAK and not _content_with_wrong(o)]
    for attack in dict.fromkeys(outcome.attack for outcome in lasting):
        mine = sorted(
            (outcome for outcome in lasting if outcome.attack == attack and outcome.level),
            key=lambda outcome: outcome.level.value if outcome.level else 0.0,
        )
        if any(_adi(larger) > _adi(smaller) + SLACK for smaller, larger in pairwise(mine)):
            rising.append(attack)
    if len({outcome.level for outcome in lasting}) < 2:
        return []
    return [
        _item(
            "larger_levels_are_worse",
            not rising,
            "no attack gets weaker at a larger level",
            f"{', '.join(rising)} gets weaker at a larger level: give it more steps or restarts",
        )
    ]


def _end_to_end_is_no_weaker(unperturbed: Outcome, attacked: Sequence[Outcome]) -> list[dict[str, Any]]:
    """A case keeps no more under an attack on the whole case than under what is carried over, or under none."""
    weaker = [
        _name(outcome)
        for outcome in attacked
        for name, found in outcome.end_to_end.items()
        for other in (outcome.cases[name], unperturbed.cases[name])
        if nan_mean(found.score.dice) > nan_mean(other.dice) + 1e-6
    ]
    if not attacked:
        return []
    return [
        _item(
            "end_to_end_is_no_weaker",
            not weaker,
            "no case keeps more Dice end to end than under the perturbation that is carried over",
            f"a case keeps more Dice end to end than without, under {', '.join(dict.fromkeys(weaker))}",
        )
    ]


def _whole(outcome: Outcome) -> float:
    """Dice of whole cases, end to end."""
    return mean_case_dice([found.score for found in outcome.end_to_end.values()])


def _adi(outcome: Outcome) -> float:
    return adi(np.array([score.dice for score in outcome.samples]))


def _kind(outcome: Outcome) -> str:
    return outcome.attack.partition(":")[0]


def _name(outcome: Outcome) -> str:
    return f"{outcome.attack} at {outcome.level.text}" if outcome.level else outcome.attack


def _item(name: str, passed: bool, good: str, bad: str) -> dict[str, Any]:
    return {"name": name, "passed": passed, "sentence": good if passed else bad}
