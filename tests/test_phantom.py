"""Facts about the phantom dataset."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import SimpleITK
from scipy import ndimage

from nnunet_ima.errors import UserError
from nnunet_ima.evaluation.phantom import LARGEST, SMALLEST, ImageArray, LabelArray, make_phantom_task, phantom_case

SEED = 3
CASES = range(6)


@pytest.fixture(scope="module")
def drawn() -> list[tuple[ImageArray, LabelArray]]:
    return [phantom_case(SEED, number) for number in CASES]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of two cases that no test changes."""
    return make_phantom_task(tmp_path_factory.mktemp("made") / "Task901_Phantom", 2, SEED, progress=False)


def read(path: Path) -> npt.NDArray[np.generic]:
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))


def dice(first: npt.NDArray[np.bool_], second: npt.NDArray[np.bool_]) -> float:
    return float(2 * (first & second).sum() / (first.sum() + second.sum()))


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file under a folder, with its bytes and the time it was last written."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_the_same_seed_gives_the_same_voxels(drawn):
    for number, (image, labels) in zip(CASES, drawn, strict=True):
        again_image, again_labels = phantom_case(SEED, number)
        assert image.tobytes() == again_image.tobytes()
        assert labels.tobytes() == again_labels.tobytes()


def test_another_seed_or_number_gives_another_case(drawn):
    images = [image.tobytes() for image, _ in drawn] + [phantom_case(SEED + 1, 0)[0].tobytes()]
    assert len(set(images)) == len(images)


def test_a_case_does_not_depend_on_how_many_are_made(task, tmp_path, drawn):
    alone = make_phantom_task(tmp_path / "Task902_Alone", 1, SEED, progress=False)
    for kind, expected in zip(("imagesTr", "labelsTr"), drawn[0], strict=True):
        for folder in (task, alone):
            np.testing.assert_array_equal(read(folder / kind / "phantom_000.nii.gz"), expected)


def test_images_are_finite_and_of_hippocampus_size(drawn):
    for image, labels in drawn:
        assert image.shape == labels.shape
        assert all(low <= n <= high for low, n, high in zip(SMALLEST, image.shape, LARGEST, strict=True))
        assert np.isfinite(image).all()
        assert image.min() >= 0
        assert image.std() > 0


def test_no_voxel_is_clipped(drawn):
    assert all(image.max() < np.iinfo(np.int16).max for image, _ in drawn)


def test_intensity_scales_differ_widely_between_cases(drawn):
    medians = [np.median(image) for image, _ in drawn]
    assert max(medians) / min(medians) > 10
    assert max(medians) / min(medians) < 200


def test_labels_are_background_anterior_and_posterior(drawn):
    for _, labels in drawn:
        assert np.unique(labels).tolist() == [0, 1, 2]
        assert min((labels == 1).sum(), (labels == 2).sum()) > 100
        assert 0.01 < (labels > 0).mean() < 0.12


def test_the_two_parts_touch_and_form_one_piece(drawn):
    neighbours = np.ones((3, 3, 3))
    for _, labels in drawn:
        touching = ndimage.binary_dilation(labels == 1, neighbours) & (labels == 2)
        assert touching.sum() > 10
        assert ndimage.label(labels > 0, neighbours)[1] == 1


def test_the_anterior_part_lies_in_front(drawn):
    for _, labels in drawn:
        assert np.argwhere(labels == 1)[:, 1].mean() > np.argwhere(labels == 2)[:, 1].mean()


def test_the_structure_lies_wholly_inside(drawn):
    for _, labels in drawn:
        inner = labels[1:-1, 1:-1, 1:-1]
        assert (inner > 0).sum() == (labels > 0).sum()


def test_no_intensity_window_separates_the_structure(drawn):
    """The best window of each case, chosen knowing its labels; 80 cases reached a Dice of 0.10 to 0.38, mean 0.22."""
    for image, labels in drawn:
        structure = labels > 0
        edges = np.quantile(image, np.linspace(0, 1, 31))
        windows = [(low, high) for i, low in enumerate(edges) for high in edges[i + 1 :]]
        assert max(dice((low <= image) & (image <= high), structure) for low, high in windows) < 0.45


def test_image_and_labels_share_one_geometry(task):
    image, labels = (SimpleITK.ReadImage(str(task / kind / "phantom_000.nii.gz")) for kind in ("imagesTr", "labelsTr"))
    assert image.GetSpacing() == labels.GetSpacing() == (1.0, 1.0, 1.0)
    assert image.GetOrigin() == labels.GetOrigin() != (0.0, 0.0, 0.0)
    assert image.GetDirection() == labels.GetDirection()
    centre = [(n - 1) / 2 for n in image.GetSize()]
    assert image.TransformContinuousIndexToPhysicalPoint(centre) == pytest.approx((0, 0, 0), abs=1e-4)


def test_the_description_names_every_file(task):
    description = json.loads((task / "dataset.json").read_text(encoding="utf-8"))
    assert description["numTraining"] == len(description["training"]) == 2
    assert description["labels"] == {"0": "background", "1": "anterior", "2": "posterior"}
    assert {(task / name).is_file() for pair in description["training"] for name in pair.values()} == {True}
    assert list((task / "imagesTs").iterdir()) == []


def test_a_complete_set_is_returned_as_it_is(task):
    before = contents(task)
    assert make_phantom_task(task, 2, SEED, progress=False) == task
    assert contents(task) == before


def test_an_empty_folder_is_filled(tmp_path):
    folder = tmp_path / "Task901_Phantom"
    folder.mkdir()
    make_phantom_task(folder, 1, SEED, progress=False)
    assert (folder / "labelsTr" / "phantom_000.nii.gz").is_file()


@pytest.mark.parametrize(("cases", "seed"), [(1, SEED), (2, SEED + 1)])
def test_a_set_made_otherwise_is_refused_and_kept(task, cases, seed):
    before = contents(task)
    with pytest.raises(UserError, match="is not the complete phantom dataset"):
        make_phantom_task(task, cases, seed, progress=False)
    assert contents(task) == before


@pytest.mark.parametrize("missing", ["labelsTr/phantom_000.nii.gz", "imagesTr/phantom_000.nii.gz", "dataset.json"])
def test_an_incomplete_set_is_refused(tmp_path, missing):
    folder = make_phantom_task(tmp_path / "Task901_Phantom", 1, SEED, progress=False)
    (folder / missing).unlink()
    with pytest.raises(UserError, match="is not the complete phantom dataset"):
        make_phantom_task(folder, 1, SEED, progress=False)


def test_a_folder_with_other_content_is_refused_and_kept(tmp_path):
    folder = tmp_path / "Task901_Phantom"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="is not the complete phantom dataset"):
        make_phantom_task(folder, 1, SEED, progress=False)
    assert (folder / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(seed: int, number: int, enhancement: float) -> tuple[ImageArray, LabelArray]:
        if number == 1:
            raise KeyboardInterrupt
        return phantom_case(seed, number)

    monkeypatch.setattr("nnunet_ima.evaluation.phantom.phantom_case", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_phantom_task(tmp_path / "Task901_Phantom", 2, SEED, progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "cases", "seed", "complaint"),
    [
        ("Phantom", 1, 0, "TaskNNN_Name"),
        ("Task901_My_Phantom", 1, 0, "TaskNNN_Name"),
        ("Task901_Phantom", 0, 0, "at least 1, but is 0"),
        ("Task901_Phantom", 1, -1, "0 or more, but is -1"),
    ],
)
def test_bad_parameters_are_named(tmp_path, name, cases, seed, complaint):
    with pytest.raises(UserError, match=complaint):
        make_phantom_task(tmp_path / name, cases, seed, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_nnunet_converts_it(task, tmp_path):
    """In a process of its own, because nnU-Net reads its folders from the environment once."""
    folders = {name: str(tmp_path / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    for folder in folders.values():
        Path(folder).mkdir()
    program = (
        "import sys\n"
        "from nnunetv2.dataset_conversion.convert_MSD_dataset import convert_msd_dataset\n"
        "if __name__ == '__main__':\n"
        "    convert_msd_dataset(sys.argv[1], num_processes=1)\n"
    )
    script = tmp_path / "convert.py"
    script.write_text(program, encoding="utf-8")
    result = subprocess.run(
        [sys.executable, str(script), str(task)], env={**os.environ, **folders}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    raw = tmp_path / "nnUNet_raw" / "Dataset901_Phantom"
    description = json.loads((raw / "dataset.json").read_text(encoding="utf-8"))
    assert description["labels"] == {"background": 0, "anterior": 1, "posterior": 2}
    for number in range(2):
        image, labels = phantom_case(SEED, number)
        np.testing.assert_array_equal(read(raw / f"imagesTr/phantom_{number:03d}_0000.nii.gz"), image)
        np.testing.assert_array_equal(read(raw / f"labelsTr/phantom_{number:03d}.nii.gz"), labels)


@pytest.mark.parametrize("number", [0, 3])
def test_enhancement_brightens_the_structure_and_nothing_else_of_its_shape(number):
    plain, labels = phantom_case(0, number)
    bright, same = phantom_case(0, number, 0.5)
    assert np.array_equal(labels, same)
    assert bright[labels == 2].mean() > bright[labels == 1].mean()
    surroundings = [float(np.median(image[labels == 0])) for image in (plain, bright)]
    parts = [[float(image[labels == label].mean()) / s for label in (1, 2)]
             for image, s in zip((plain, bright), surroundings, strict=True)]  # fmt: skip
    assert parts[1][0] > parts[0][0] + 0.2
    assert parts[1][1] > parts[0][1] + 0.4


@pytest.mark.parametrize("enhancement", [-0.1, 3.0, float("nan")])
def test_an_enhancement_out_of_range_is_named(tmp_path, enhancement):
    with pytest.raises(UserError, match="enhancement"):
        make_phantom_task(tmp_path / "Task901_Phantom", 5, enhancement=enhancement)
