"""What is said of an evaluation besides its figures, and what these figures depend on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from nnunet_ima.evaluation.attack_choice import definition_of, members_of_choice
from nnunet_ima.evaluation.environment import versions
from nnunet_ima.evaluation.hardware import hardware
from nnunet_ima.evaluation.identity import digest
from nnunet_ima.evaluation.metrics import Region
from nnunet_ima.evaluation.normalisation import normalisation_of, scale_of
from nnunet_ima.provenance import exported_from

if TYPE_CHECKING:
    from nnunet_ima.evaluation.models import TrainedModel
    from nnunet_ima.evaluation.run import Evaluation


def identify(evaluation: Evaluation, cases: Sequence[str], chunk: int) -> dict[str, Any]:
    """Everything that a number of the evaluation depends on, as far as it can be told beforehand.

    Args:
        evaluation: whose.
        cases: names of those that all parts together attack.
        chunk: samples that go through the network at once.
    """
    model = evaluation.model
    members = {attack.text: members_of_choice(attack) for attack in evaluation.attacks}
    ensembles = {text: found for text, found in members.items() if found is not None}
    return {
        "model": _model(model),
        "protocol": evaluation.protocol.name,
        "norm": evaluation.protocol.norm,
        "levels": [level.text for level in evaluation.levels],
        "attacks": [attack.text for attack in evaluation.attacks],
        "max samples": evaluation.max_samples,
        "seed": evaluation.seed,
        "case level": evaluation.case_level,
        "criterion": {"threshold": evaluation.criterion.threshold, "reduction": evaluation.criterion.reduction},
        "cases": list(cases),
        "samples in a pass": chunk,
        "device": evaluation.device.type,
        "version of": versions(),
        # What stands behind the name of an ensemble may change with our version or without.
        **({"ensembles": ensembles} if ensembles else {}),
        # Only then: runs from before there was a choice can still be continued.
        **({"end to end": evaluation.end_to_end} if evaluation.end_to_end != "off" else {}),
        # Before there was a choice, it was the attacks' seed.
        **({"samples seed, if not the attacks'": evaluation.samples_seed} if _chosen_apart(evaluation) else {}),
    }


def describe_run(evaluation: Evaluation, cases: Sequence[str], command: str) -> dict[str, Any]:
    """The head of summary.json."""
    model, protocol = evaluation.model, evaluation.protocol
    normalisation = normalisation_of(model)
    scale = scale_of(normalisation)
    # An exported checkpoint is stock nnU-Net's, and says nothing of this.
    before = exported_from(model.folder, model.fold, model.sha256)
    learned_from = model.training_cases | (frozenset() if before is None else before.training_cases)
    return {
        "model": _model(model),
        "training": model.training,
        "protocol": {
            "name": protocol.name,
            "norm": protocol.norm,
            "range": protocol.range_in(scale),
            "unit": protocol.unit_in(scale),
        },
        "criterion": {
            "dice_threshold": evaluation.criterion.threshold,
            "dice_reduction": evaluation.criterion.reduction,
        },
        # What stands behind these names may change with our version.
        "attacks": {attack.text: definition_of(attack) for attack in evaluation.attacks},
        "classes": [_name_of(region, model.dataset_json) for region in model.foreground],
        "labels": [_key(region) for region in model.foreground],
        "patch_size": [int(size) for size in model.configuration.patch_size],
        "normalisation": normalisation,
        "seed": evaluation.seed,
        "max_samples": evaluation.max_samples,
        "samples_seed": evaluation.samples_seed,
        # Of a stock model, only the splits file beside the preprocessed data tells; it is taken at its word.
        "trained_on_these_cases": model.fold == "all" or bool(learned_from & set(cases)),
        "started_from_unknown_weights": model.started_from_unknown
        or (before is not None and before.started_from_unknown),
        "margins_by_epoch": model.margins,
        **({} if before is None else {"exported_from": before.described}),
        **_end_to_end(evaluation),
        "batch_size": evaluation.batch_size,
        "device": str(evaluation.device),
        **hardware(evaluation.device),
        # When it was begun; no number depends on it.
        "date": datetime.now(timezone.utc).date().isoformat(),
        "command": command,
        "versions": versions(),
    }


def _model(model: TrainedModel) -> dict[str, Any]:
    return {
        **model.describe(),
        "plans.json": digest(model.plans.plans),
        "dataset.json": digest(model.dataset_json),
    }


def _chosen_apart(evaluation: Evaluation) -> bool:
    return evaluation.max_samples is not None and evaluation.samples_seed != evaluation.seed


def _end_to_end(evaluation: Evaluation) -> dict[str, Any]:
    if evaluation.end_to_end == "off":
        return {}
    axes = evaluation.model.mirroring_axes
    known = evaluation.end_to_end == "mirroring"
    return {"end_to_end": {"mirrored_axes": list(axes or ()), "mirroring_known_to_the_attack": known}}


def _name_of(region: Region, dataset_json: Mapping[str, Any]) -> str:
    """The name that dataset.json gives a class or region."""
    for name, label in dataset_json["labels"].items():
        if (tuple(label) if isinstance(label, list) else label) == region:
            return str(name)
    return _key(region)


def _key(region: Region) -> str:
    return "+".join(str(label) for label in region) if isinstance(region, tuple) else str(region)
