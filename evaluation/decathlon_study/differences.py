"""What a study does otherwise than the paper, in sentences: so that nobody takes one for the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from nnunet_ima.evaluation.decathlon_study.cost import Planned
from nnunet_ima.evaluation.decathlon_study.evaluations import AUTOATTACK
from nnunet_ima.evaluation.decathlon_study.tasks import GivenTask

EPOCHS, ITERATIONS = 50, 50

# Of any study made by this command.
ALWAYS = (
    "nnU-Net is version 2; the paper's was an earlier one, whose augmentation and planning may differ.",
    "The attacked cases are drawn here from nnU-Net's fold 0; the paper does not name its own.",
    "The validation cases of the paper's split are left aside: nothing is chosen by them, the last checkpoint is "
    "attacked. nnU-Net's pseudo Dice in the logs is that of the attacked cases, and changes no weight.",
    "Trainings have 5 validation batches an epoch, of whose number the paper says nothing; they change no weight.",
    "No training clamps to [0, 1]; the program behind the paper clamped in TE and TRADES.",
)


def of_study(
    settings: Mapping[str, Any], changed: Iterable[str], features: int | None, attack: str, samples: int | None
) -> list[str]:
    """Sentences on what all tasks share, those of :data:`ALWAYS` last.

    Args:
        settings: of all trainings.
        changed: names of settings that the user changed.
        features: of the first stage of a small network, None for the planned one.
        attack: the strong one.
        samples: slices attacked at most, None for all.
    """
    return [*_of_trainings(settings, changed, features), *_of_attacks(attack, samples), *ALWAYS]


def of_task(task: GivenTask, batch_size: int | None, planned: Planned | None) -> list[str]:
    """Sentences on one task.

    Args:
        task: what was given.
        batch_size: of all trainings, None for the planned one.
        planned: what nnU-Net planned, None if it has not yet.
    """
    return [*_of_data(task), *_of_plans(task, batch_size, planned)]


def _of_data(task: GivenTask) -> Iterator[str]:
    paper, split = task.paper, task.split
    if task.folder.name != f"{task.title}_{paper.name}":
        said = f" ({task.description!r}, it says of itself)" if task.description else ""
        yield (
            f"The folder {task.folder.name} stands in for the Decathlon's {task.title}_{paper.name}{said}: scans and "
            f"labels are to be judged by their own source."
        )
    if len(task.cases) != paper.cases:
        yield (
            f"{len(task.cases)} cases, the paper had {paper.cases}: {len(split.training)} for training, "
            f"{len(split.validation)} left aside, {len(split.test)} attacked, instead of {paper.training}, "
            f"{paper.validation} and {paper.test}."
        )
    if task.channels != paper.channels:
        yield f"{_count(task.channels, 'channel')}, the Decathlon's scans have {paper.channels}."
    if task.classes != paper.classes:
        yield f"{_count(task.classes, 'foreground class')}, the Decathlon's labels have {paper.classes}."


def _of_plans(task: GivenTask, batch_size: int | None, planned: Planned | None) -> Iterator[str]:
    paper = task.paper
    if batch_size is not None and batch_size != paper.batch_size:
        yield f"Trainings take batches of {batch_size}, the paper's {paper.batch_size}."
    if planned is None:
        yield "nnU-Net has not planned yet, so its batch and patch cannot be compared with the paper's."
        return
    if batch_size is None and planned.batch_size != paper.batch_size:
        yield f"nnU-Net plans batches of {planned.batch_size} for these scans, the paper's had {paper.batch_size}."
    if planned.patch_size != paper.patch_size:
        yield f"nnU-Net plans patches of {_size(planned.patch_size)}, the paper's had {_size(paper.patch_size)} pixels."
    if planned.original_shape != paper.median_shape:
        yield (
            f"The median scan has {_size(planned.original_shape)} voxels, the paper's had {_size(paper.median_shape)}."
        )


def _of_trainings(settings: Mapping[str, Any], changed: Iterable[str], features: int | None) -> Iterator[str]:
    epochs, iterations = settings["num_epochs"], settings["num_iterations_per_epoch"]
    if (epochs, iterations) != (EPOCHS, ITERATIONS):
        yield f"{epochs} epochs of {iterations} iterations, the paper's trainings had {EPOCHS} of {ITERATIONS}."
    if features is not None:
        yield f"A small network of {_count(features, 'feature')} in its first stage, not the planned one."
    for name in changed:
        yield f"The setting {name} is {settings[name]} for all methods."


def _of_attacks(attack: str, samples: int | None) -> Iterator[str]:
    if attack == AUTOATTACK:
        yield "AutoAttack has more losses here than in the original program."
    else:
        yield f"The strong attack is {attack}, not AutoAttack at its full budget as in Table 3."
    if samples is not None:
        yield f"At most {samples} slices of the attacked cases are attacked, not all."


def _size(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))


def _count(number: int, what: str) -> str:
    plural = "es" if what.endswith("s") else "s"
    return f"{number} {what}{'' if number == 1 else plural}"
