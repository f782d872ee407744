"""Signs that an attack did its work. A result that fails one is shown, and marked."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from nnunet_ima.evaluation.metrics import adi
from nnunet_ima.evaluation.run import Outcome

# Rounding, and the little by which the worst of 100 draws may beat a weak gradient attack on a tiny sample.
SLACK = 0.005

WHITE_NOISE = "white-noise"
WEAK = ("bpgd",)


def check(unperturbed: Outcome, attacked: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Named checks, each with whether it passed and a sentence.

    Args:
        unperturbed: the clean outcome; under the ``paper`` protocol the clamped one.
        attacked: the outcomes of attacks.
    """
    return [*_never_helps(unperturbed, attacked), *_noise_is_weaker(attacked), *_more_is_worse(attacked)]


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


def _noise_is_weaker(attacked: Sequence[Outcome]) -> list[dict[str, Any]]:
    noise = {outcome.level: _adi(outcome) for outcome in attacked if _kind(outcome) == WHITE_NOISE}
    beaten = [
        _name(outcome)
        for outcome in attacked
        if _kind(outcome) not in (WHITE_NOISE, *WEAK)
        and outcome.level in noise
        and _adi(outcome) > noise[outcome.level] + SLACK
    ]
    if not noise or all(_kind(outcome) in (WHITE_NOISE, *WEAK) for outcome in attacked):
        return []
    return [
        _item(
            "gradients_beat_noise",
            not beaten,
            "every gradient attack is at least as strong as white noise of the same level",
            f"white noise is stronger than {', '.join(beaten)}: the gradients are of no use to the attack, so the "
            f"robustness shown is not real",
        )
    ]


def _more_is_worse(attacked: Sequence[Outcome]) -> list[dict[str, Any]]:
    rising = []
    for attack in dict.fromkeys(outcome.attack for outcome in attacked):
        mine = sorted(
            (outcome for outcome in attacked if outcome.attack == attack and outcome.level),
            key=lambda outcome: outcome.level.value if outcome.level else 0.0,
        )
        if any(_adi(larger) > _adi(smaller) + SLACK for smaller, larger in pairwise(mine)):
            rising.append(attack)
    if len({outcome.level for outcome in attacked}) < 2:
        return []
    return [
        _item(
            "larger_levels_are_worse",
            not rising,
            "no attack gets weaker at a larger level",
            f"{', '.join(rising)} gets weaker at a larger level: give it more steps or restarts",
        )
    ]


def _adi(outcome: Outcome) -> float:
    return adi(np.array([score.dice for score in outcome.samples]))


def _kind(outcome: Outcome) -> str:
    return outcome.attack.partition(":")[0]


def _name(outcome: Outcome) -> str:
    return f"{outcome.attack} at {outcome.level.text}" if outcome.level else outcome.attack


def _item(name: str, passed: bool, good: str, bad: str) -> dict[str, Any]:
    return {"name": name, "passed": passed, "sentence": good if passed else bad}
