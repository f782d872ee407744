"""What stands behind the names of the trainings in a report, for those who do not know them."""

from __future__ import annotations

import re
from collections.abc import Iterable

# By what follows "nnUNetTrainer" in a trainer's name; docs/methods.md has the algorithms.
TRAININGS = {
    "STD": "nnU-Net's own training, as long as those it is compared with.",
    "IMA": "Increasing-margin adversarial training (Ma & Liang 2020): also on perturbed copies of the samples, each "
    "within a bound of its own, which grows as long as the segmentation stays correct.",
    "SAT": "Standard adversarial training (Madry et al. 2018): on perturbed samples only, one bound for all.",
    "TRADES": "Zhang et al. 2019: on untouched samples, and so that the segmentation of perturbed ones stays close to "
    "theirs.",
    "TE": "Temporal ensembling (Dong et al. 2022): as SAT, and towards the average of the network's own past "
    "segmentations.",
}
_OURS = re.compile(rf"nnUNetTrainer({'|'.join(TRAININGS)})(_\w+)?")


def trainings_of(trainers: Iterable[str]) -> dict[str, str]:
    """Of these trainers' names, ours: the short name, and what it is; others are left out."""
    found = {match[1] for match in map(_OURS.fullmatch, trainers) if match}
    return {name: about for name, about in TRAININGS.items() if name in found}
