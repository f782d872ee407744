"""Scans as files: read by nnU-Net's own reader, and written so that this reader finds in them what was meant."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO, SimpleITKIOWithReorient
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunet_ima.errors import UserError
from nnunet_ima.evaluation.environment import nnunet_folder
from nnunet_ima.evaluation.models import TrainedModel

Volume = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
# Formats keep origins and directions in single precision; in mm, and shares of 1.
SAME_PLACE = 1e-4
CANNOT_READ = (RuntimeError, OSError, ValueError, EOFError, AssertionError)


@dataclass(frozen=True)
class Scan:
    """A raw scan as nnU-Net reads it.

    Attributes:
        files: one a channel.
        image: (C, Z, Y, X), intensities, with the axes in the reader's order and directions.
        properties: of the reader, with the spacing.
    """

    files: list[Path]
    image: Volume
    properties: dict[str, Any]


class ScanFiles:
    """Reads and writes the scans of a model's dataset as nnU-Net does.

    Args:
        model: whose plans name the reader.

    Raises:
        UserError: nothing can be written for this reader.
    """

    def __init__(self, model: TrainedModel) -> None:
        self._model = model
        try:
            self._reader: BaseReaderWriter = model.plans.image_reader_writer_class()
        except RuntimeError as error:
            raise UserError(f"The plans of {model.folder} ask for a reader of images that nnU-Net lacks.") from error
        self._write_channel = WRITERS.get(type(self._reader))
        if self._write_channel is None:
            known = ", ".join(sorted(reader.__name__ for reader in WRITERS))
            raise UserError(
                f"Perturbed scans cannot be written for data that nnU-Net reads with {type(self._reader).__name__}, as "
                f"{model.plans.dataset_name} is; only for {known}."
            )

    def read(self, name: str) -> Scan:
        """The raw scan of a training case.

        Raises:
            UserError: the raw dataset or the scan is missing, cannot be read, or holds all channels in one file.
        """
        folder, description = nnunet_folder("nnUNet_raw") / self._model.plans.dataset_name, self._model.dataset_json
        if not folder.is_dir():
            raise UserError(f"{folder} does not exist; perturbed scans are made from the raw ones, so it is needed.")
        files = get_filenames_of_train_images_and_targets(str(folder), description).get(name, {}).get("images", [])
        if not files or not all(Path(file).is_file() for file in files):
            raise UserError(f"The scan of case {name} is missing in {folder}; restore it.")
        try:
            image, properties = self._read(files)
        except CANNOT_READ as error:
            raise UserError(f"The scan {files[0]} cannot be read; restore it.") from error
        if len(image) != len(files):
            raise UserError(f"The scan {files[0]} holds several channels; give each of them a file of its own.")
        return Scan([Path(file) for file in files], image, properties)

    def write_image(self, scan: Scan, image: Volume, folder: Path, name: str) -> list[Path]:
        """Write (C, Z, Y, X) as 32-bit float in the place of a scan, a file a channel, named as nnU-Net names them.

        Raises:
            UserError: it cannot be written, or is not what the reader finds in the files, which are then removed.
        """
        assert self._write_channel is not None
        files = [folder / f"{name}_{channel:04d}{self._ending}" for channel in range(len(scan.files))]
        with _nothing_left(files):
            for source, channel, file in zip(scan.files, image, files, strict=True):
                self._write_channel(source, channel, file)
            self._check(files, image, scan, scan.properties)
        return files

    def write_segmentation(self, scan: Scan, segmentation: np.ndarray[Any, Any], folder: Path, name: str) -> Path:
        """Write labels (Z, Y, X) in the place of a scan, as nnU-Net writes them.

        Raises:
            UserError: as for :meth:`write_image`.
        """
        file = folder / f"{name}{self._ending}"
        with _nothing_left([file]):
            with contextlib.redirect_stdout(io.StringIO()):
                self._reader.write_seg(segmentation, str(file), scan.properties)
            # Written by its axes alone: a scan whose header says another spacing than its axes is read with that.
            place = {key: value for key, value in scan.properties.items() if key != "spacing"}
            self._check([file], segmentation[None], scan, place)
        return file

    @property
    def _ending(self) -> str:
        return str(self._model.dataset_json["file_ending"])

    def _read(self, files: Sequence[Path | str]) -> tuple[Volume, dict[str, Any]]:
        # It prints what it warns of.
        with contextlib.redirect_stdout(io.StringIO()):
            image, properties = self._reader.read_images([str(file) for file in files])
        return np.asarray(image, np.float32), dict(properties)

    def _check(self, files: Sequence[Path], meant: np.ndarray[Any, Any], scan: Scan, place: Mapping[str, Any]) -> None:
        """What nnU-Net reads must be what was written, and lie where the scan lies: at ``place``."""
        found, properties = self._read(files)
        if not np.array_equal(found, meant):
            raise UserError(
                f"nnU-Net's {type(self._reader).__name__} reads other values from {files[0].name} than were written; "
                f"please report this with the header of {scan.files[0]}."
            )
        if not all(_same_place(properties[key], place[key]) for key in place):
            raise UserError(
                f"{files[0].name} would not lie where {scan.files[0]} lies, whose orientation or spacing it cannot "
                f"hold; convert the dataset to another format."
            )


@contextlib.contextmanager
def _nothing_left(files: Sequence[Path]) -> Iterator[None]:
    """Remove the files if anything goes wrong, and say so in a sentence."""
    try:
        yield
    except BaseException as error:
        for file in files:
            file.unlink(missing_ok=True)
        if isinstance(error, CANNOT_READ):
            reason = (str(error).splitlines() or [type(error).__name__])[-1].rstrip(".")
            raise UserError(f"{files[0].name} cannot be written as the scan is: {reason}.") from error
        raise


def _with_simpleitk(source: Path, volume: Volume, target: Path) -> None:
    """Write (Z, Y, X) with the geometry of a file."""
    geometry = SimpleITK.ReadImage(str(source))
    flat = geometry.GetDimension() == 2
    made = SimpleITK.GetImageFromArray(volume[0] if flat else volume, isVector=False)
    # Refuses another size.
    made.CopyInformation(geometry)
    SimpleITK.WriteImage(made, str(target), True)


def _with_simpleitk_reoriented(source: Path, volume: Volume, target: Path) -> None:
    """The same of a volume that was turned to RAS."""
    geometry = SimpleITK.ReadImage(str(source))
    own = SimpleITK.DICOMOrientImageFilter_GetOrientationFromDirectionCosines(geometry.GetDirection())
    made = SimpleITK.GetImageFromArray(volume, isVector=False)
    made.CopyInformation(SimpleITK.DICOMOrient(geometry, "RAS"))
    SimpleITK.WriteImage(SimpleITK.DICOMOrient(made, own), str(target), True)


def _with_nibabel(source: Path, volume: Volume, target: Path) -> None:
    """Write (Z, Y, X) with the header of a NIfTI file, whose axes are (X, Y, Z)."""
    _write_nifti(nibabel.load(source), volume.transpose(2, 1, 0), target)


def _with_nibabel_reoriented(source: Path, volume: Volume, target: Path) -> None:
    """The same of a volume that was turned to RAS."""
    scan: Any = nibabel.load(source)
    back = ornt_transform(axcodes2ornt("RAS"), io_orientation(scan.affine))
    _write_nifti(scan, apply_orientation(volume.transpose(2, 1, 0), back), target)


def _write_nifti(scan: Any, array: np.ndarray[Any, Any], target: Path) -> None:
    if array.shape != scan.shape:
        raise ValueError(f"its shape is {scan.shape}, not {array.shape}")
    made = type(scan)(np.asarray(array, np.float32), scan.affine, scan.header)
    made.set_data_dtype(np.float32)
    nibabel.save(made, target)


WRITERS: Mapping[type[BaseReaderWriter], Callable[[Path, Volume, Path], None]] = {
    SimpleITKIO: _with_simpleitk,
    SimpleITKIOWithReorient: _with_simpleitk_reoriented,
    NibabelIO: _with_nibabel,
    NibabelIOWithReorient: _with_nibabel_reoriented,
}


def _same_place(found: Any, wanted: Any) -> bool:
    """Whether a reader's properties are the same but for rounding."""
    if isinstance(wanted, Mapping):
        return found.keys() == wanted.keys() and all(_same_place(found[key], wanted[key]) for key in wanted)
    if isinstance(wanted, str):
        return bool(found == wanted)
    one, other = np.asarray(found, float), np.asarray(wanted, float)
    return one.shape == other.shape and bool(np.allclose(one, other, rtol=SAME_PLACE, atol=SAME_PLACE))
