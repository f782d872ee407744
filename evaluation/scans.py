"""From a perturbation of preprocessed data back to the scan: nnU-Net's preprocessing, undone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero

from nnunet_ima.errors import UserError
from nnunet_ima.evaluation.cases import Case
from nnunet_ima.evaluation.models import TrainedModel
from nnunet_ima.evaluation.scan_files import Scan, Volume

# Of a channel's range, what rounding on the way to a file may add to it.
ROUNDED = 1e-5
# Of a scheme's values, how far they may lie off the straight line that undoes it.
STRAIGHT = 1e-3
# On the way back through resampling: how often what is missing is added, and what it must at least gain.
CORRECTIONS = 12
WORTHWHILE = 0.97


def perturb_scan(model: TrainedModel, scan: Scan, case: Case, difference: Volume) -> Volume:
    """The scan with a perturbation of its preprocessed version.

    Args:
        model: whose preprocessing it is.
        scan: the raw one.
        case: the preprocessed one.
        difference: (C, Z, Y, X) in z-scores, of the preprocessed and unpadded case.

    Returns:
        (C, Z, Y, X), intensities of the raw scan. Of a perturbation that was made on a finer grid than the scan's, the
        scan cannot hold all; and preprocessing the result again normalises it anew. So what the network then sees may
        not be exactly what was attacked. Where the plans normalise within the scan's nonzero region, nothing changes
        outside of it.

    Raises:
        UserError: the normalisation is not a straight line, or does not belong to this scan.
    """
    plans, configuration, properties = model.plans, model.configuration, case.properties
    forward = [0, *(axis + 1 for axis in plans.transpose_forward)]
    original = scan.image.transpose(forward)
    if original.shape[1:] != tuple(properties["shape_before_cropping"]):
        raise UserError(
            f"The scan {scan.files[0]} has another size than the one that was preprocessed; preprocess again."
        )
    spacing = [float(scan.properties["spacing"][axis]) for axis in plans.transpose_forward]
    current = [float(value) for value in configuration.spacing]
    current = current if len(current) == len(spacing) else [spacing[0], *current]
    cropped, found, box = crop_to_nonzero(original)
    if [list(ends) for ends in box] != [list(ends) for ends in properties["bbox_used_for_cropping"]]:
        raise UserError(f"The scan {scan.files[0]} is not the one that was preprocessed; preprocess again.")
    nonzero = found[0] >= 0
    # A background voxel that is no longer zero would count in the new normalisation.
    free = nonzero if any(configuration.use_mask_for_norm) else np.ones_like(nonzero)
    back = resampled_back(configuration.resampling_fn_data, difference, free, current, spacing)
    where = tuple(slice(int(start), int(end)) for start, end in box)
    perturbed = original.copy()
    for channel, inside in enumerate(cropped):
        perturbed[channel][where] = inside + back[channel] * _slope(model, channel, inside, nonzero)
    backward = [0, *(axis + 1 for axis in plans.transpose_backward)]
    return np.ascontiguousarray(perturbed.transpose(backward))


def beyond_range(scan: Volume, perturbed: Volume) -> float:
    """By how much a perturbed scan leaves the raw one's range, in the channel in which it is most; 0 if it does not.

    An attack keeps the preprocessed case in its range, but what is resampled back may overshoot. It is not clipped: the
    network would see another image than the one that was attacked. What rounding to 32 bits leaves counts as 0.

    Args:
        scan, perturbed: (C, Z, Y, X), intensities.
    """
    found = [0.0]
    for raw, changed in zip(scan, perturbed, strict=True):
        low, high = float(raw.min()), float(raw.max())
        beyond = max(low - float(changed.min()), float(changed.max()) - high)
        found.append(beyond if beyond > ROUNDED * (high - low) else 0.0)
    return max(found)


def resampled_back(
    resample: Callable[..., Any], difference: Volume, free: np.ndarray[Any, Any], current: Sequence[float],
    spacing: Sequence[float],
) -> Volume:  # fmt: skip
    """A perturbation on the scan's grid that nnU-Net's resampling turns into ``difference``, as nearly as it can be.

    Interpolating there and back smooths twice. So what is missing after the way there is added on the way back, again
    and again, for as long as that helps.

    Args:
        resample: nnU-Net's, of data.
        difference: (C, *grid of the network).
        free: of bool, on the scan's grid, cropped as nnU-Net crops: where the scan may change.
        current, spacing: of the network's grid and of the scan's, in mm, in the order of the axes.
    """

    def there(volume: Volume) -> Volume:
        return np.asarray(resample(volume, difference.shape[1:], spacing, current), np.float32)

    def back(volume: Volume) -> Volume:
        return np.asarray(resample(volume, free.shape, current, spacing) * free, np.float32)

    found = trial = back(difference)
    smallest = np.inf
    for _ in range(CORRECTIONS):
        missing = difference - there(trial)
        size = float(np.linalg.norm(missing))
        if size >= WORTHWHILE * smallest or size == 0:
            return trial if size < smallest else found
        found, smallest = trial, size
        trial = trial + back(missing)
    return found


def _slope(model: TrainedModel, channel: int, image: Volume, inside: np.ndarray[Any, Any]) -> float:
    """How many intensities a z-score is, for this channel of this scan; ``inside`` is nnU-Net's non-zero region."""
    configuration = model.configuration
    mask = inside if configuration.use_mask_for_norm[channel] else np.ones(image.shape, bool)
    scheme = configuration.normalization_schemes[channel]
    normalise = _scheme_class(model, scheme)(
        use_mask_for_norm=configuration.use_mask_for_norm[channel],
        intensityproperties=model.plans.foreground_intensity_properties_per_channel.get(str(channel), {}),
    )
    normalised = normalise.run(image.copy(), np.where(inside, 0, -1))
    # Not where a scheme clips: there many intensities have one value.
    between = mask & (normalised > normalised[mask].min()) & (normalised < normalised[mask].max())
    x, y = (values[between].astype(np.float64) for values in (normalised, image))
    if len(x) < 2 or x.min() == x.max():
        raise UserError(f"Channel {channel} of the scan is the same everywhere, so its normalisation cannot be undone.")
    slope, offset = np.polyfit(x, y, 1)
    if np.abs(slope * x + offset - y).max() > STRAIGHT * np.ptp(y):
        raise UserError(f"The normalisation {scheme} of channel {channel} is no straight line, so it cannot be undone.")
    return float(slope)


def _scheme_class(model: TrainedModel, scheme: str) -> Any:
    """nnU-Net's own look-up of a normalisation."""
    import nnunetv2
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    folder = Path(nnunetv2.__file__).parent / "preprocessing" / "normalization"
    found = recursive_find_python_class(str(folder), scheme, "nnunetv2.preprocessing.normalization")
    if found is None:
        raise UserError(f"nnU-Net has no normalisation {scheme}, which the plans of {model.folder} ask for.")
    return found
