"""How nnU-Net normalised what a network sees, and so in which unit a level is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ima.units import NORMALISED, Z_SCORE, unit_of

if TYPE_CHECKING:
    from nnunet_ima.evaluation.models import TrainedModel

# These take all that they need from the scan itself; any other may use the training cases' intensities, as CT's does.
_OF_THE_SCAN = (Z_SCORE, "NoNormalization", "RescaleTo01Normalization", "RGBTo01Normalization")
_INTENSITIES = ("mean", "std", "percentile_00_5", "percentile_99_5")


def normalisation_of(model: TrainedModel) -> dict[str, Any]:
    """What decides the unit of a model's input, for JSON, channel by channel; see nnU-Net's plans for the names."""
    schemes = [str(scheme) for scheme in model.configuration.normalization_schemes]
    masks = [bool(use) for use in model.configuration.use_mask_for_norm]
    noted: dict[str, Any] = {
        "channels": model.channels,
        "normalization_schemes": schemes,
        "use_mask_for_norm": masks,
    }
    intensities = intensities_of(model.plans, schemes)
    return {**noted, "intensities": intensities} if intensities else noted


def intensities_of(plans: PlansManager, schemes: Sequence[str]) -> dict[str, dict[str, float]]:
    """Of the channels whose scheme may use them, by number: what plans.json says of the training cases' intensities."""
    others = [str(number) for number, scheme in enumerate(schemes) if scheme not in _OF_THE_SCAN]
    known = plans.foreground_intensity_properties_per_channel if others else {}
    properties = {number: known.get(number, {}) for number in others}
    return {
        number: {name: float(found[name]) for name in _INTENSITIES if name in found}
        for number, found in properties.items()
    }


def scale_of(noted: Mapping[str, Any] | None) -> str:
    """The unit of the network's input in words: z-scores if it is that in all channels.

    Args:
        noted: see :func:`normalisation_of`; None of a run that does not tell.
    """
    if noted is None:
        return f"{NORMALISED} (how it was normalised is not noted)"
    return unit_of(noted["normalization_schemes"])


def in_words(noted: Mapping[str, Any]) -> str:
    """All of it in short: two that differ are told apart, but for percentiles at which a scheme clips."""
    masks, intensities = noted["use_mask_for_norm"], noted.get("intensities", {})
    channels = []
    for number, scheme in enumerate(noted["normalization_schemes"]):
        more = ["nonzero region"] if masks[number] else []
        more += [f"{name} {intensities.get(str(number), {})[name]:g}" for name in ("mean", "std")
                 if name in intensities.get(str(number), {})]  # fmt: skip
        channels.append(f"{scheme} ({', '.join(more)})" if more else str(scheme))
    return ", ".join(channels)
