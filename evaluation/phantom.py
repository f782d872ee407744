"""A phantom dataset: small MRI-like crops with two touching structures, to try nnU-Net on without patient data.

Every case resembles a crop of T1-weighted brain MRI around a hippocampus: an anterior and a posterior part of one
curved, tapered tube, embedded in folded grey matter, white matter and cerebrospinal fluid (CSF), with unlabelled
grey matter of the same brightness around it. The folder is laid out as a task of the Medical Segmentation Decathlon,
so ``nnUNetv2_convert_MSD_dataset -i FOLDER`` takes it.

Array axes are (z, y, x): superior, anterior, and lateral in a right-handed brain. Lengths are in mm. Tissue
brightness is relative to white matter = 1 until the very last step gives a case its own scale.
"""

import json
import math
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypedDict

import numpy as np
import numpy.typing as npt
import SimpleITK
from scipy import fft, ndimage
from tqdm import tqdm

from nnunet_ima.errors import UserError

FloatArray: TypeAlias = npt.NDArray[np.float32]
BoolArray: TypeAlias = npt.NDArray[np.bool_]
LabelArray: TypeAlias = npt.NDArray[np.uint8]
ImageArray: TypeAlias = npt.NDArray[np.int16]
Shape: TypeAlias = tuple[int, int, int]


class Recipe(TypedDict):
    """What a set was made by; it stands in its dataset.json."""

    cases: int
    seed: int
    version: int
    enhancement: float


VERSION = 1
"""Raised whenever the voxels that a seed gives change, so that an old folder is not taken for a new one."""

BACKGROUND, ANTERIOR, POSTERIOR = 0, 1, 2
LABELS = {"0": "background", "1": "anterior", "2": "posterior"}

OVERSAMPLING = 2
FINE_MM = 1.0 / OVERSAMPLING
"""Edge of a voxel of the fine grid in which a case is drawn; averaging it down to 1 mm gives the partial volume."""

SMALLEST: Shape = (25, 47, 34)
LARGEST: Shape = (31, 57, 42)


@dataclass(frozen=True)
class Tube:
    """Size and shape of the labelled structure, in mm; ``u`` runs from -1 (posterior tip) to 1 (anterior tip)."""

    half_length: float
    radius: float
    flattening: float
    neck: float
    """Position in ``u`` of the waist at which the anterior part ends."""
    bend_up: float
    bend_side: float


@dataclass(frozen=True)
class TubeSpace:
    """A volume seen from the tube: maps of shape (z, y, x) on the fine grid."""

    u: FloatArray
    """Position along the tube; -1 and 1 are its tips."""
    up: FloatArray
    """Height above the centre line, in mm."""
    side: FloatArray
    """Lateral distance from the centre line, in mm."""
    level: FloatArray
    """Distance from the centre line as a multiple of the tube's radius there: 1 on its surface."""


def make_phantom_task(
    folder: Path, cases: int = 60, seed: int = 0, progress: bool = True, enhancement: float = 0.0
) -> Path:
    """Write the phantom dataset as a task of the Medical Segmentation Decathlon.

    The set appears under its name only once it is complete. A folder that already holds the same set is left as it is.

    Args:
        folder: where to write; its name must be of the form ``TaskNNN_Name``, as nnU-Net's converter reads it.
        cases: number of training cases. nnU-Net's five folds need at least five.
        seed: non-negative; the same seed gives the same voxels, and case k does not depend on ``cases``.
        progress: whether to show a progress bar.
        enhancement: by how much a contrast agent brightens the structure, relative to white matter: the anterior part
            by this, the posterior by 1.6 times this. At 0 it is as bright as the grey matter around it, which takes a
            network long to learn.

    Returns:
        ``folder``.

    Raises:
        UserError: a parameter is out of range, or ``folder`` holds something else.
    """
    folder = Path(folder)
    _check_parameters(folder, cases, seed)
    if not 0 <= enhancement <= 2:
        raise UserError(f"enhancement is {enhancement!r}; it must be a number from 0 to 2.")
    recipe: Recipe = {"cases": cases, "seed": seed, "version": VERSION, "enhancement": enhancement}
    if _is_complete(folder, recipe):
        return folder
    if folder.exists() and not _is_empty_folder(folder):
        raise UserError(
            f"{folder} exists but is not the complete phantom dataset of {cases} cases with seed {seed}, version "
            f"{VERSION}; choose another folder or remove this one."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A folder inside the temporary one, because the temporary one itself is private to its owner.
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as room:
        unfinished = Path(room) / folder.name
        _write_task(unfinished, recipe, progress)
        if folder.exists():
            folder.rmdir()
        unfinished.rename(folder)
    return folder


def phantom_case(seed: int, number: int, enhancement: float = 0.0) -> tuple[ImageArray, LabelArray]:
    """Draw one case.

    Args:
        seed: seed of the dataset, non-negative.
        number: number of the case in the dataset, from 0.
        enhancement: see :func:`make_phantom_task`.

    Returns:
        Image (z, y, x), int16, in this case's own arbitrary units, at least 0; labels (z, y, x), uint8, 0 background,
        1 anterior, 2 posterior. Voxels are 1 mm wide.
    """
    rng = _generator(seed, number)
    low, high = np.array(SMALLEST), np.array(LARGEST)
    size = rng.integers(low, high + 1)
    fine: Shape = (int(size[0]) * OVERSAMPLING, int(size[1]) * OVERSAMPLING, int(size[2]) * OVERSAMPLING)

    tube = _draw_tube(rng)
    space = _tube_space(rng, fine, tube)
    fine_labels = _label(rng, space, tube)
    brightness = _tissues(rng, fine)
    brightness = _embed(rng, brightness, space, tube, fine_labels, enhancement)
    brightness *= _bias_field(rng, fine)
    return _acquire(rng, brightness), _majority(fine_labels)


def _generator(seed: int, number: int) -> np.random.Generator:
    """Return the random numbers of one case, independent of those of any other case."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(number,)))


# ---- random fields -------------------------------------------------------------------------------------------------


def _random_field(rng: np.random.Generator, shape: Shape, smoothness: float | tuple[float, float, float]) -> FloatArray:
    """Draw a smooth Gaussian random field of mean 0 and variance 1.

    Args:
        rng: source of random numbers.
        shape: (z, y, x) on the fine grid.
        smoothness: standard deviation of the smoothing kernel in mm, for all axes or for each.
    """
    # By Fourier transform, for speed. The field is periodic, which keeps its variance at the border what it is inside.
    noise = rng.standard_normal(shape, dtype=np.float32)
    sigma = np.asarray(smoothness) / FINE_MM
    spectrum = ndimage.fourier_gaussian(fft.rfftn(noise), sigma, n=shape[-1])
    field = fft.irfftn(spectrum, s=shape)
    standard: FloatArray = (field - field.mean()) / field.std()
    return standard


def _ramp(values: FloatArray, start: float, stop: float) -> FloatArray:
    """Rise smoothly from 0 where ``values`` is ``start`` to 1 where it is ``stop``, and stay there."""
    t: FloatArray = np.clip((values - start) / (stop - start), 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def _mix(first: FloatArray, second: FloatArray | float, share: FloatArray) -> FloatArray:
    """Blend two brightness maps; ``share`` in [0, 1] is the part of the second."""
    return first + share * (second - first)


# ---- the labelled structure ----------------------------------------------------------------------------------------


def _draw_tube(rng: np.random.Generator) -> Tube:
    return Tube(
        half_length=rng.uniform(15.0, 19.0),
        radius=rng.uniform(6.8, 8.8),
        flattening=rng.uniform(0.62, 0.85),
        neck=rng.uniform(0.1, 0.35),
        bend_up=rng.uniform(-1.0, 4.0),
        bend_side=rng.uniform(1.0, 5.0),
    )


def _tube_space(rng: np.random.Generator, shape: Shape, tube: Tube) -> TubeSpace:
    """Lay the tube into the volume: turned, shifted, mirrored for the other hemisphere, and uneven."""
    up, along, side = _posed_axes(rng, shape)
    for axis in (up, along, side):
        axis += rng.uniform(0.5, 1.1) * _random_field(rng, shape, 3.5)
    u = along / tube.half_length
    up -= tube.bend_up * (u * u - 0.4)
    side -= tube.bend_side * (u * u - 0.4)
    radius = np.maximum(tube.radius * _profile(u, tube), 1e-3)
    level = np.hypot(side / radius, up / (tube.flattening * radius))
    return TubeSpace(u, up, side, level)


def _posed_axes(rng: np.random.Generator, shape: Shape) -> list[FloatArray]:
    """Return the coordinates up, along and side of every voxel of the fine grid, in mm from the tube's middle."""
    z, y, x = np.indices(shape, dtype=np.float32)
    z, y, x = ((axis - (n - 1) / 2) * FINE_MM + rng.normal(0.0, 1.3) for axis, n in zip((z, y, x), shape, strict=True))
    if rng.random() < 0.5:
        x = -x
    # The front of a hippocampus lies lower than its tail.
    z, y = _turn(z, y, rng.normal(12.0, 6.0))
    y, x = _turn(y, x, rng.normal(0.0, 8.0))
    x, z = _turn(x, z, rng.normal(0.0, 12.0))
    return [z, y, x]


def _turn(first: FloatArray, second: FloatArray, angle: float) -> tuple[FloatArray, FloatArray]:
    """Rotate two coordinates by an angle in degrees."""
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    return cos * first + sin * second, cos * second - sin * first


def _profile(u: FloatArray, tube: Tube) -> FloatArray:
    """Return the radius along the tube relative to the largest: thick in front, a waist, a thin tail, round tips."""
    body = 0.55 + 0.45 * _ramp(u, -0.7, tube.neck + 0.25)
    waist = 1.0 - 0.22 * np.exp(-(((u - tube.neck) / 0.12) ** 2))
    tips = np.sqrt(np.clip(1.0 - u**4, 0.0, 1.0))
    result: FloatArray = body * waist * tips
    return result


def _label(rng: np.random.Generator, space: TubeSpace, tube: Tube) -> LabelArray:
    """Split the tube at its waist, along a tilted and wavy interface; (z, y, x) on the fine grid."""
    wave = rng.uniform(0.4, 0.9) * _random_field(rng, space.u.shape, 1.5)
    tilt = rng.normal(0.0, 0.2) * space.up + rng.normal(0.0, 0.2) * space.side
    front = (space.u - tube.neck) * tube.half_length + wave + tilt > 0
    inside = _largest_piece(space.level < 1.0)
    return np.where(inside, np.where(front, ANTERIOR, POSTERIOR), BACKGROUND).astype(np.uint8)


def _largest_piece(mask: BoolArray) -> BoolArray:
    """Keep the largest connected piece: unevenness may have cut a crumb off a thin tip."""
    pieces, _ = ndimage.label(mask)
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    result: BoolArray = pieces == sizes.argmax()
    return result


def _majority(fine_labels: LabelArray) -> LabelArray:
    """Give every 1 mm voxel the label that fills most of it; background on a tie."""
    shares = [_average_down((fine_labels == int(label)).astype(np.float32)) for label in LABELS]
    result: LabelArray = np.argmax(np.stack(shares), axis=0).astype(np.uint8)
    return result


# ---- brightness ----------------------------------------------------------------------------------------------------


GREY, CSF = 0.66, 0.24
"""Typical brightness of grey matter and CSF in a T1-weighted image where white matter is 1."""


def _tissues(rng: np.random.Generator, shape: Shape) -> FloatArray:
    """Draw the surroundings: brightness of folded grey matter, white matter, CSF and deep grey matter, (z, y, x)."""
    grey = GREY + rng.normal(0.0, 0.03)
    # Both sides of the zero level of a smooth field: a folded sheet, like the banks of a sulcus.
    fold = np.abs(_random_field(rng, shape, (3.2, 4.5, 3.2))) + 0.08 * _random_field(rng, shape, 0.9)
    grey_share = 1.0 - _ramp(fold, 0.42, 0.62)
    csf_share = (1.0 - _ramp(fold, 0.03, 0.16)) * _ramp(_random_field(rng, shape, 5.0), -0.8, 0.4)
    deep_grey = _ramp(_random_field(rng, shape, 2.2), 1.0, 1.3)

    brightness = np.ones(shape, dtype=np.float32)
    brightness = _mix(brightness, grey, grey_share)
    brightness = _mix(brightness, grey + rng.normal(0.0, 0.03), deep_grey)
    return _mix(brightness, CSF + rng.uniform(-0.06, 0.06), csf_share)


def _embed(
    rng: np.random.Generator,
    brightness: FloatArray,
    space: TubeSpace,
    tube: Tube,
    fine_labels: LabelArray,
    enhancement: float,
) -> FloatArray:
    """Put the structure and what lies next to it into the surroundings."""
    shape = brightness.shape
    structure = GREY + rng.normal(0.0, 0.03)
    brightness = _add_neighbours(rng, brightness, space, tube, structure)
    brightness = _add_sheath(rng, brightness, space)

    # Contrast drifts along the structure and between its two parts.
    inner = structure + 0.025 * _random_field(rng, shape, 4.0)
    inner += np.where(fine_labels == ANTERIOR, rng.uniform(-0.13, -0.04), 0.0).astype(np.float32)
    # A contrast agent, taken up unevenly.
    uptake = enhancement * np.array([0.0, 1.0, 1.6], dtype=np.float32)[fine_labels]
    if enhancement:
        inner += uptake * (1.0 + 0.15 * _random_field(rng, shape, 3.0))
    # Layers of white matter run inside a hippocampus as a thin, incomplete spiral.
    layer = np.exp(-(((space.level - 0.55) / 0.12) ** 2)) * _ramp(_random_field(rng, shape, 2.0), 0.0, 1.0)
    inner += rng.uniform(0.0, 0.14) * layer
    brightness = np.where(fine_labels > 0, inner, brightness)
    return _add_texture(rng, brightness)


def _add_neighbours(
    rng: np.random.Generator, brightness: FloatArray, space: TubeSpace, tube: Tube, structure: float
) -> FloatArray:
    """Add unlabelled grey matter as bright as the structure: a nucleus in front of it and a gyrus below it.

    They stand for amygdala and parahippocampal gyrus, which a network has to tell apart by shape and place.
    """
    uneven = 0.2 * _random_field(rng, brightness.shape, 2.0)
    ahead = (space.u - 1.0) * tube.half_length - rng.uniform(0.0, 2.0)
    height = space.up - rng.uniform(1.0, 4.0)
    aside = space.side + rng.normal(0.0, 2.0)
    nucleus: FloatArray = np.sqrt(ahead**2 + height**2 + aside**2) / rng.uniform(4.5, 6.5)

    below = space.up + tube.flattening * tube.radius + rng.uniform(2.5, 4.5)
    beside = space.side + rng.uniform(2.0, 6.0)
    gyrus: FloatArray = np.hypot(below / rng.uniform(2.0, 3.2), beside / rng.uniform(3.5, 5.5))

    for neighbour in (nucleus, gyrus):
        share = 1.0 - _ramp(neighbour + uneven, 0.9, 1.1)
        brightness = _mix(brightness, structure + rng.normal(0.0, 0.03), share)
    return brightness


def _add_sheath(rng: np.random.Generator, brightness: FloatArray, space: TubeSpace) -> FloatArray:
    """Add what borders the structure: a patchy film of white matter, and above and lateral a horn of the ventricle.

    Where both are missing, grey matter touches grey matter and the border can only be guessed from its course.
    """
    shape = brightness.shape
    film = 1.0 - _ramp(space.level, 1.2, 1.35)
    film *= _ramp(_random_field(rng, shape, 3.0), -1.3, -0.4)
    brightness = _mix(brightness, rng.uniform(0.85, 1.0), film)

    facing = space.up + 0.8 * space.side
    facing /= np.hypot(space.up, space.side) + 1e-3
    horn = (1.0 - _ramp(space.level, 1.3, 1.5)) * _ramp(facing, 0.3, 0.8)
    horn *= _ramp(_random_field(rng, shape, 3.5), -0.5, 0.5)
    return _mix(brightness, CSF + rng.uniform(-0.04, 0.1), horn)


def _add_texture(rng: np.random.Generator, brightness: FloatArray) -> FloatArray:
    """Add fine grain and slow drift, as no tissue is of one brightness."""
    grain = rng.uniform(0.03, 0.06) * _random_field(rng, brightness.shape, 0.6)
    drift = rng.uniform(0.01, 0.03) * _random_field(rng, brightness.shape, 3.0)
    return brightness * (1.0 + grain + drift)


def _bias_field(rng: np.random.Generator, shape: Shape) -> FloatArray:
    """Draw the factor by which the receiving coil weighs each voxel: the exponential of a quadratic, around 1."""
    exponent = np.zeros(shape, dtype=np.float32)
    for axis, length in enumerate(shape):
        position = np.linspace(-1.0, 1.0, length, dtype=np.float32).reshape([-1 if i == axis else 1 for i in range(3)])
        exponent += rng.normal(0.0, 0.1) * position + rng.normal(0.0, 0.06) * (position**2 - 1 / 3)
    return np.exp(exponent)


# ---- acquisition ---------------------------------------------------------------------------------------------------


def _acquire(rng: np.random.Generator, brightness: FloatArray) -> ImageArray:
    """Scan a brightness map of the fine grid: blur, partial volume, Rician noise, the scanner's arbitrary scale."""
    blurred = ndimage.gaussian_filter(brightness, rng.uniform(0.4, 0.7) / FINE_MM)
    signal = _average_down(blurred)
    noise_level = rng.uniform(0.025, 0.06)
    real, imaginary = noise_level * rng.standard_normal((2, *signal.shape), dtype=np.float32)
    magnitude = np.hypot(signal + real, imaginary)
    scale = 10.0 ** rng.uniform(2.0, 4.0)
    result: ImageArray = np.clip(np.rint(scale * magnitude), 0, np.iinfo(np.int16).max).astype(np.int16)
    return result


def _average_down(volume: FloatArray) -> FloatArray:
    """Average blocks of the fine grid into 1 mm voxels."""
    z, y, x = (length // OVERSAMPLING for length in volume.shape)
    blocks = volume.reshape(z, OVERSAMPLING, y, OVERSAMPLING, x, OVERSAMPLING)
    result: FloatArray = blocks.mean(axis=(1, 3, 5), dtype=np.float32)
    return result


# ---- files ---------------------------------------------------------------------------------------------------------


def _check_parameters(folder: Path, cases: int, seed: int) -> None:
    if not re.fullmatch(r"Task\d+_[^_]+", folder.name):
        raise UserError(
            f"The phantom's folder must be named TaskNNN_Name with one underscore, as nnU-Net's converter reads it, "
            f"but is named '{folder.name}'."
        )
    if cases < 1:
        raise UserError(f"The number of phantom cases must be at least 1, but is {cases}.")
    if seed < 0:
        raise UserError(f"The phantom's seed must be 0 or more, but is {seed}.")


def _is_empty_folder(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def _is_complete(folder: Path, recipe: Recipe) -> bool:
    """Tell whether a folder holds every file of the set made by this recipe."""
    try:
        description = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(description, dict) or description.get("phantom") != recipe:
        return False
    names = [_case_name(number) for number in range(recipe["cases"])]
    return (folder / "imagesTs").is_dir() and all(
        (folder / kind / name).is_file() for kind in ("imagesTr", "labelsTr") for name in names
    )


def _case_name(number: int) -> str:
    return f"phantom_{number:03d}.nii.gz"


def _write_task(folder: Path, recipe: Recipe, progress: bool) -> None:
    for kind in ("imagesTr", "labelsTr", "imagesTs"):
        (folder / kind).mkdir(parents=True)
    for number in tqdm(range(recipe["cases"]), desc="phantom", unit="case", disable=not progress):
        image, labels = phantom_case(recipe["seed"], number, recipe["enhancement"])
        _write_volume(image, folder / "imagesTr" / _case_name(number))
        _write_volume(labels, folder / "labelsTr" / _case_name(number))
    text = json.dumps(_description(recipe), indent=4)
    (folder / "dataset.json").write_text(text + "\n", encoding="utf-8")


def _write_volume(volume: ImageArray | LabelArray, path: Path) -> None:
    """Write a (z, y, x) volume as NIfTI: 1 mm voxels, axes towards right, anterior and superior, centred on 0."""
    image = SimpleITK.GetImageFromArray(volume)
    image.SetSpacing((1.0, 1.0, 1.0))
    # SimpleITK counts towards left and posterior.
    image.SetDirection((-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0))
    z, y, x = volume.shape
    image.SetOrigin(((x - 1) / 2, (y - 1) / 2, -(z - 1) / 2))
    SimpleITK.WriteImage(image, str(path), useCompression=True)


def _description(recipe: Recipe) -> dict[str, object]:
    """Return the contents of dataset.json, in the Decathlon's form, with the recipe under ``phantom``."""
    names = [_case_name(number) for number in range(recipe["cases"])]
    return {
        "name": "Phantom",
        "description": "Synthetic MRI-like crops with an anterior and a posterior part of one structure",
        "reference": "nnunet_ima.evaluation.phantom",
        "licence": "CC0-1.0",
        "release": f"{VERSION}.0",
        "tensorImageSize": "3D",
        "modality": {"0": "MRI"},
        "labels": LABELS,
        "numTraining": recipe["cases"],
        "numTest": 0,
        "training": [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names],
        "test": [],
        "phantom": recipe,
    }
