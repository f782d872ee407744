"""From a perturbation of preprocessed data back to the scan: nnU-Net's preprocessing, undone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK
from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunet_ima.errors import UserError
from nnunet_ima.evaluation.cases import Case
from nnunet_ima.evaluation.environment import nnunet_folder
from nnunet_ima.evaluation.models import TrainedModel

Volume = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
# Of a scheme's values, how far they may lie off the straight line that undoes it.
STRAIGHT = 1e-3
# On the way back through resampling: how often what is missing is added, and what it must at least gain.
CORRECTIONS = 12
WORTHWHILE = 0.97


@dataclass(frozen=True)
class Scan:
    """A raw scan as nnU-Net reads it.

    Attributes:
        files: one a channel.
        image: (C, Z, Y, X), intensities.
        properties: of the reader, with the spacing.
    """

    files: list[Path]
    image: Volume
    properties: dict[str, Any]


def read_scan(model: TrainedModel, name: str) -> Scan:
    """The raw scan of a training case.

    Raises:
        UserError: the raw dataset or the scan is missing or cannot be read.
    """
    folder = nnunet_folder("nnUNet_raw") / model.plans.dataset_name
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist; perturbed scans are made from the raw ones, so it is needed.")
    files = get_filenames_of_train_images_and_targets(str(folder), model.dataset_json).get(name, {}).get("images", [])
    if not files or not all(Path(file).is_file() for file in files):
        raise UserError(f"The scan of case {name} is missing in {folder}; restore it.")
    try:
        image, properties = model.plans.image_reader_writer_class().read_images(files)
    except (RuntimeError, OSError, ValueError, EOFError) as error:
        raise UserError(f"The scan {files[0]} cannot be read; restore it.") from error
    return Scan([Path(file) for file in files], np.asarray(image, np.float32), properties)


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
        not be exactly what was attacked.

    Raises:
        UserError: the normalisation is not a straight line, or does not belong to this scan.
    """
    plans, configuration, properties = model.plans, model.configuration, case.properties
    shape = tuple(int(size) for size in properties["shape_after_cropping_and_before_resampling"])
    forward = [0, *(axis + 1 for axis in plans.transpose_forward)]
    original = scan.image.transpose(forward)
    if original.shape[1:] != tuple(properties["shape_before_cropping"]):
        raise UserError(
            f"The scan {scan.files[0]} has another size than the one that was preprocessed; preprocess again."
        )
    spacing = [float(scan.properties["spacing"][axis]) for axis in plans.transpose_forward]
    current = [float(value) for value in configuration.spacing]
    current = current if len(current) == len(shape) else [spacing[0], *current]
    back = resampled_back(configuration.resampling_fn_data, difference, shape, current, spacing)
    cropped, outside, box = crop_to_nonzero(original)
    if [list(ends) for ends in box] != [list(ends) for ends in properties["bbox_used_for_cropping"]]:
        raise UserError(f"The scan {scan.files[0]} is not the one that was preprocessed; preprocess again.")
    where = tuple(slice(int(start), int(end)) for start, end in box)
    perturbed = original.copy()
    for channel, inside in enumerate(cropped):
        perturbed[channel][where] = inside + back[channel] * _slope(model, channel, inside, outside[0] >= 0)
    backward = [0, *(axis + 1 for axis in plans.transpose_backward)]
    return np.ascontiguousarray(perturbed.transpose(backward))


def resampled_back(
    resample: Callable[..., Any], difference: Volume, shape: Sequence[int], current: Sequence[float],
    spacing: Sequence[float],
) -> Volume:  # fmt: skip
    """A perturbation on the scan's grid that nnU-Net's resampling turns into ``difference``, as nearly as it can be.

    Interpolating there and back smooths twice. So what is missing after the way there is added on the way back, again
    and again, for as long as that helps.

    Args:
        resample: nnU-Net's, of data.
        difference: (C, *grid of the network).
        shape: of the scan's grid, cropped as nnU-Net crops.
        current, spacing: of the network's grid and of the scan's, in mm, in the order of the axes.
    """

    def there(volume: Volume) -> Volume:
        return np.asarray(resample(volume, difference.shape[1:], spacing, current), np.float32)

    def back(volume: Volume) -> Volume:
        return np.asarray(resample(volume, shape, current, spacing), np.float32)

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


def write_channels(scan: Scan, image: Volume, folder: Path, name: str, file_ending: str) -> list[Path]:
    """Write a volume with the geometry of a scan, a file a channel as nnU-Net names them; 32-bit float.

    Raises:
        UserError: SimpleITK does not write such files.
    """
    written = []
    for channel, source in enumerate(scan.files):
        target = folder / f"{name}_{channel:04d}{file_ending}"
        write_like(source, image[channel], target)
        written.append(target)
    return written


def write_like(source: Path, volume: np.ndarray[Any, Any], target: Path) -> None:
    """Write (Z, Y, X) with the geometry of the file ``source``; whole or not at all.

    Raises:
        UserError: SimpleITK does not read or write such files, or the shapes differ.
    """
    temporary = target.with_name(f".tmp.{target.name}")
    try:
        geometry = SimpleITK.ReadImage(str(source))
        made = SimpleITK.GetImageFromArray(volume.reshape(SimpleITK.GetArrayViewFromImage(geometry).shape))
        made.CopyInformation(geometry)
        SimpleITK.WriteImage(made, str(temporary), True)
        temporary.replace(target)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{target} cannot be written as {source} is: {str(error).splitlines()[-1]}.") from error
    finally:
        temporary.unlink(missing_ok=True)


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
