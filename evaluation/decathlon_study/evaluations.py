"""What each model goes through: both protocols, at the levels for which the papers give figures."""

from __future__ import annotations

import re
from collections.abc import Sequence

from nnunet_ima.evaluation.attack_choice import parse_attack
from nnunet_ima.evaluation.decathlon_study.tasks import PaperTask
from nnunet_ima.evaluation.pipeline import Attacks
from nnunet_ima.evaluation.report.published import published_levels

AUTOATTACK = "autoattack:version=standard"
NOISE = "white-noise:draws=100"
# The earlier version's PGD: K = 100 steps of 4ε/K.
PGD100 = "pgd:steps=100,step_size=0.04"

NAMES = ("sound_l2", "paper_l2", "paper_linf", "paper_linf_noise")


def evaluations_of(
    task: PaperTask, attack: str = AUTOATTACK, samples: int | None = None, names: Sequence[str] = NAMES
) -> list[Attacks]:
    """The evaluations of a task.

    ``sound_l2`` has the levels of the earlier version's 100-PGD tables, the others those of Table 3, whose Linf levels
    of white noise are others than those of AutoAttack.

    Args:
        task: whose levels.
        attack: the strong one, as ``nnunet_ima evaluate`` takes it.
        samples: attack no more slices than this; None for all.
        names: which evaluations.

    Raises:
        UserError: there is no such attack.
    """
    parse_attack(attack)
    levels = {
        "sound_l2": published_levels(task.name, "PGD", "l2"),
        "paper_l2": published_levels(task.name, "AutoAttack", "l2"),
        "paper_linf": published_levels(task.name, "AutoAttack", "linf"),
        "paper_linf_noise": published_levels(task.name, "WhiteNoise", "linf"),
    }
    attacks = {
        "sound_l2": (NOISE, PGD100, attack),
        "paper_l2": (NOISE, attack),
        "paper_linf": (attack,),
        "paper_linf_noise": (NOISE,),
    }
    further = ["--no-cases", *(["--max-samples", str(samples)] if samples else [])]
    return [
        Attacks(
            # Results of other attacks, or of fewer samples, have a folder of their own: nothing is lost by trying.
            name=_name(name, attack, samples),
            levels=levels[name],
            attacks=tuple(dict.fromkeys(attacks[name])),
            norm="linf" if "linf" in name else "l2",
            protocol=name.partition("_")[0],
            further=further,
        )
        for name in names
    ]


def _name(name: str, attack: str, samples: int | None) -> str:
    own = [] if attack == AUTOATTACK or name == "paper_linf_noise" else [re.sub(r"[^A-Za-z0-9.]+", "-", attack)]
    return "_".join([name, *own, *([f"{samples}samples"] if samples else [])])
