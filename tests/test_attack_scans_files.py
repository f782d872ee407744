"""Files of ``nnunet_ima attack``: nnU-Net's own reader finds in them what was meant, wherever the axes point."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunet_ima.errors import UserError
from nnunet_ima.evaluation import scan_files
from nnunet_ima.evaluation.scan_files import ScanFiles

DATASET = "Dataset905_Turned"
READERS = ("SimpleITKIO", "SimpleITKIOWithReorient", "NibabelIO", "NibabelIOWithReorient")
# To where the axes of a file may point; the last two in another order.
ORIENTATIONS = ("RAS", "LAS", "LPS", "PIR", "SAL")
SPACING = (0.8, 1.1, 2.5)
# A cube keeps its shape however it is turned.
SHAPES = ((6, 7, 8), (6, 6, 6))


def files_for(root: Path, reader: str, channels: int = 1, ending: str = ".nii.gz") -> Any:
    """What reads and writes a dataset whose plans name a reader."""
    names = {str(number): "MRI" for number in range(channels)}
    plans = PlansManager({"image_reader_writer": reader, "dataset_name": DATASET})
    (root / DATASET / "imagesTr").mkdir(parents=True, exist_ok=True)
    return ScanFiles(
        SimpleNamespace(
            plans=plans, dataset_json={"file_ending": ending, "channel_names": names}, folder=root, channels=channels
        )  # type: ignore[arg-type]  # of a model, what the class reads
    )


def turned_scan(
    file: Path, orientation: str, shape: tuple[int, ...] = SHAPES[0], oblique: bool = False, seed: int = 0
) -> None:
    """A NIfTI file of int16, each voxel with a value of its own, whose axes point to ``orientation``."""
    size = int(np.prod(shape))
    values = np.random.default_rng(seed).permutation(size).reshape(shape).astype(np.int16)
    affine = np.diag([*SPACING, 1.0])
    if oblique:
        angle = np.radians(20)
        turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
        affine[:3, :3] = turn @ affine[:3, :3]
    affine[:3, 3] = (-31.0, 12.0, 55.0)
    image = nibabel.Nifti1Image(values, affine)
    turned = image.as_reoriented(ornt_transform(io_orientation(affine), axcodes2ornt(orientation)))
    assert nibabel.aff2axcodes(turned.affine) == tuple(orientation)
    nibabel.save(turned, file)


def as_stored(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels in the order in which the file has them, and where they lie."""
    image: Any = nibabel.load(file)
    return np.asarray(image.get_fdata()), np.asarray(image.affine)


@pytest.fixture
def raw(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("oblique", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("reader", READERS)
def test_every_voxel_stays_where_it_is(raw, reader, orientation, shape, oblique):
    files = files_for(raw, reader)
    source = raw / DATASET / "imagesTr" / "case_0000.nii.gz"
    turned_scan(source, orientation, shape, oblique)
    scan = files.read("case")
    # What is done to a value does not ask where it is: so a reader's order of the axes cannot matter in the file.
    meant = scan.image * 2 + 0.25
    (written,) = files.write_image(scan, meant, raw, "case")
    labels = (scan.image[0] > 100).astype(np.int16) + (scan.image[0] > 300)
    segmentation = files.write_segmentation(scan, labels, raw, "case")
    before, place = as_stored(source)
    after, there = as_stored(written)
    assert np.array_equal(after, before * 2 + 0.25)
    assert np.allclose(there, place, atol=1e-4)
    found, also_there = as_stored(segmentation)
    assert np.array_equal(found, (before > 100).astype(int) + (before > 300))
    assert np.allclose(also_there, place, atol=1e-4)
    # And nnU-Net's own reader finds it.
    own = PlansManager({"image_reader_writer": reader}).image_reader_writer_class()
    image, properties = own.read_images([str(written)])
    assert np.array_equal(image, meant)
    assert np.allclose(properties["spacing"], scan.properties["spacing"], atol=1e-4)
    assert np.array_equal(own.read_seg(str(segmentation))[0][0], labels)
    # As the file itself, it is 32-bit float.
    assert SimpleITK.ReadImage(str(written)).GetPixelID() == SimpleITK.sitkFloat32


def test_each_channel_is_turned_back_as_its_own_file_is(raw):
    files, folder = files_for(raw, "NibabelIOWithReorient", channels=2), raw / DATASET / "imagesTr"
    turned_scan(folder / "case_0000.nii.gz", "LAS", seed=1)
    turned_scan(folder / "case_0001.nii.gz", "PIR", seed=2)
    scan = files.read("case")
    meant = scan.image + np.array([1000, 2000], np.float32).reshape(2, 1, 1, 1)
    for channel, file in enumerate(files.write_image(scan, meant, raw, "case")):
        before, place = as_stored(folder / file.name)
        after, there = as_stored(file)
        assert np.array_equal(after, before + 1000 * (channel + 1))
        assert np.allclose(there, place)


def test_a_single_slice_stays_one(raw):
    files = files_for(raw, "SimpleITKIO", ending=".mha")
    source = raw / DATASET / "imagesTr" / "case_0000.mha"
    values = np.arange(30, dtype=np.int16).reshape(5, 6)
    image = SimpleITK.GetImageFromArray(values)
    image.SetSpacing((0.5, 0.7))
    SimpleITK.WriteImage(image, str(source))
    scan = files.read("case")
    assert scan.image.shape == (1, 1, 5, 6)
    (written,) = files.write_image(scan, scan.image + 0.5, raw, "case")
    found = SimpleITK.ReadImage(str(written))
    assert found.GetSpacing() == pytest.approx((0.5, 0.7))
    assert np.array_equal(SimpleITK.GetArrayFromImage(found), values + 0.5)


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO", "NibabelIOWithReorient"])
def test_a_volume_of_another_shape_is_never_pressed_into_it(raw, reader):
    files = files_for(raw, reader)
    turned_scan(raw / DATASET / "imagesTr" / "case_0000.nii.gz", "LAS")
    scan = files.read("case")
    with pytest.raises(UserError, match=r"cannot be written"):
        files.write_image(scan, scan.image.transpose(0, 3, 2, 1), raw, "case")
    assert not list(raw.glob("*.nii.gz"))


@pytest.mark.parametrize("reader", ["Tiff3DIO", "NaturalImage2DIO"])
def test_other_readers_are_refused(raw, reader):
    with pytest.raises(UserError, match=f"{reader}.* only for NibabelIO, .*SimpleITKIO"):
        files_for(raw, reader)


def test_a_reader_that_nnunet_does_not_have_is_refused(raw):
    with pytest.raises(UserError, match="reader of images that nnU-Net lacks"):
        files_for(raw, "NoSuchIO")


def test_channels_in_one_file_are_refused(raw):
    files = files_for(raw, "SimpleITKIO", channels=2)
    both = np.random.default_rng(0).normal(size=(2, 4, 5, 6)).astype(np.float32)
    target = raw / DATASET / "imagesTr" / "case_0000.nii.gz"
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(both, isVector=False), str(target))
    assert len(get_filenames_of_train_images_and_targets(str(raw / DATASET), {"file_ending": ".nii.gz"})) == 1
    with pytest.raises(UserError, match="several channels"):
        files.read("case")


def mirrored(source: Path, volume: np.ndarray, target: Path) -> None:
    scan_files._with_simpleitk(source, volume[:, :, ::-1], target)


def moved(source: Path, volume: np.ndarray, target: Path) -> None:
    scan_files._with_simpleitk(source, volume, target)
    image = SimpleITK.ReadImage(str(target))
    image.SetOrigin((1.0, 2.0, 3.0))
    SimpleITK.WriteImage(image, str(target))


@pytest.mark.parametrize(("wrong", "words"), [(mirrored, "reads other values"), (moved, "would not lie where")])
def test_a_file_that_reads_otherwise_does_not_stay(raw, monkeypatch, wrong, words):
    own = PlansManager({"image_reader_writer": "SimpleITKIO"}).image_reader_writer_class
    monkeypatch.setattr(scan_files, "WRITERS", {own: wrong})
    files = files_for(raw, "SimpleITKIO")
    turned_scan(raw / DATASET / "imagesTr" / "case_0000.nii.gz", "LPS")
    scan = files.read("case")
    with pytest.raises(UserError, match=words):
        files.write_image(scan, scan.image, raw, "case")
    assert not list(raw.glob("*.nii.gz"))


def test_a_segmentation_that_reads_otherwise_does_not_stay(raw, monkeypatch):
    files = files_for(raw, "NibabelIO")
    turned_scan(raw / DATASET / "imagesTr" / "case_0000.nii.gz", "LPS")
    scan = files.read("case")
    own = PlansManager({"image_reader_writer": "NibabelIO"}).image_reader_writer_class
    write = own.write_seg
    monkeypatch.setattr(own, "write_seg", lambda self, seg, *more: write(self, seg[::-1], *more))
    with pytest.raises(UserError, match="reads other values"):
        files.write_segmentation(scan, (scan.image[0] > 100).astype(np.uint8), raw, "case")
    assert not list(raw.glob("*.nii.gz"))
