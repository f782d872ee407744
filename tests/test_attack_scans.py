"""``nnunet_ima attack``: perturbed scans that nnU-Net reads as the attack meant them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
import torch
from nnunet_project import Project, quiet, read, write

from nnunet_ima.errors import UserError
from nnunet_ima.evaluation.cases import ValidationCases
from nnunet_ima.evaluation.command_line import main
from nnunet_ima.evaluation.models import TrainedModel, load_model
from nnunet_ima.evaluation.scans import perturb_scan, read_scan

CPU = torch.device("cpu")
PARTS = ("images", "perturbation", "before", "after")


def run(*arguments: object) -> None:
    with quiet():
        assert main(["attack", "-device", "cpu", *map(str, arguments)]) == 0


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main(["attack", "-device", "cpu", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1]


def array(file: Path) -> np.ndarray:
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(file)))


@pytest.fixture(scope="module", params=["2d", "3d"])
def model(request: pytest.FixtureRequest, project: Project) -> TrainedModel:
    return load_model(request.getfixturevalue(f"std_{request.param}"), 0, "checkpoint_final.pth", CPU)


@pytest.fixture(scope="module")
def written(model: TrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One case, attacked."""
    name = ValidationCases(model).names[0]
    output = tmp_path_factory.mktemp("attacked") / "out"
    run("-m", model.folder, "--level", 8, "--attack", "apgd:steps=3", "--cases", name, "-o", output)
    return output


def test_everything_is_there_with_the_geometry_of_the_scan(model, written, project):
    (case,) = read(written / "attack.json")["cases"]
    name = case["case"]
    scan = project.root / "nnUNet_raw" / project.dataset / "imagesTr" / f"{name}_0000.nii.gz"
    original = SimpleITK.ReadImage(str(scan))
    assert {file.parent.name for file in written.rglob("*.nii.gz")} == set(PARTS)
    for file in written.rglob("*.nii.gz"):
        image = SimpleITK.ReadImage(str(file))
        assert image.GetSize() == original.GetSize()
        for where in ("GetOrigin", "GetSpacing", "GetDirection"):
            assert getattr(image, where)() == pytest.approx(getattr(original, where)(), abs=1e-5)
    assert not list(written.rglob("*tmp*"))


def test_the_files_say_what_the_record_says(model, written, project):
    (case,) = read(written / "attack.json")["cases"]
    name = case["case"]
    scan = array(project.root / "nnUNet_raw" / project.dataset / "imagesTr" / f"{name}_0000.nii.gz").astype(float)
    perturbed, difference = (array(written / part / f"{name}_0000.nii.gz") for part in ("images", "perturbation"))
    assert perturbed.dtype == np.float32
    assert np.allclose(perturbed - scan, difference, atol=1e-2 * max(np.abs(difference).max(), 1))
    assert np.linalg.norm(difference.astype(float)) == pytest.approx(case["scan"]["l2"], rel=1e-4)
    assert np.abs(difference).max() == pytest.approx(case["scan"]["linf"], rel=1e-4)
    reference = array(project.root / "nnUNet_raw" / project.dataset / "labelsTr" / f"{name}.nii.gz")
    for part, key in (("before", "dice_before"), ("after", "dice_after")):
        found = array(written / part / f"{name}.nii.gz")
        dice = [2 * ((found == c) & (reference == c)).sum() / ((found == c).sum() + (reference == c).sum())
                for c in (1, 2)]  # fmt: skip
        assert np.mean(dice) == pytest.approx(case[key], abs=1e-6)
    assert case["dice_after"] < case["dice_before"]
    assert case["largest_tile_norm"] <= 8 * (1 + 1e-4)


def test_what_is_read_from_the_file_is_what_was_attacked(model, written):
    """Through the way back to a file and nnU-Net's preprocessing the case keeps its Dice within a point."""
    (case,) = read(written / "attack.json")["cases"]
    assert case["dice_after"] == pytest.approx(case["dice_in_evaluation"], abs=0.01)


def test_no_perturbation_gives_the_scan_and_its_segmentation(model, project):
    name = ValidationCases(model).names[0]
    scan, case = read_scan(model, name), ValidationCases(model).load(name)
    nothing = np.zeros(case.image[(slice(None), *case.unpad)].shape, np.float32)
    assert np.array_equal(perturb_scan(model, scan, case, nothing), scan.image)


def test_a_perturbation_comes_back_as_it_was(model):
    """Preprocessed again, a scan differs from the untouched one by the perturbation, but for the new normalisation."""
    name = ValidationCases(model).names[0]
    scan, case = read_scan(model, name), ValidationCases(model).load(name)
    clean = case.image[(slice(None), *case.unpad)].numpy()
    smooth = np.cumsum(np.random.default_rng(0).normal(0, 0.02, clean.shape), -1).astype(np.float32)
    perturbed = perturb_scan(model, scan, case, smooth)
    preprocessor = model.configuration.preprocessor_class(verbose=False)
    again, _, _ = preprocessor.run_case_npy(
        perturbed, None, dict(scan.properties), model.plans, model.configuration, model.dataset_json
    )
    wanted = clean + smooth
    wanted = (wanted - wanted.mean()) / wanted.std()
    error = np.asarray(again) - wanted
    assert np.sqrt((error**2).mean()) < 0.02 * smooth.std() + 1e-3


def with_plans(model: TrainedModel, folder: Path, change: Any) -> TrainedModel:
    shutil.copytree(model.folder, folder)
    plans = read(folder / "plans.json")
    change(plans)
    write(folder / "plans.json", plans)
    return load_model(folder, 0, "checkpoint_final.pth", CPU)


def test_a_ct_scan_is_undone_where_it_is_not_clipped(model, tmp_path):
    def as_ct(plans: dict[str, Any]) -> None:
        for configuration in plans["configurations"].values():
            if "normalization_schemes" in configuration:
                configuration["normalization_schemes"] = ["CTNormalization"]
        plans["foreground_intensity_properties_per_channel"]["0"].update(
            mean=100.0, std=25.0, percentile_00_5=20.0, percentile_99_5=5000.0
        )

    ct = with_plans(model, tmp_path / "ct", as_ct)
    name = ValidationCases(model).names[0]
    scan, case = read_scan(ct, name), ValidationCases(model).load(name)
    ones = np.ones(case.image[(slice(None), *case.unpad)].shape, np.float32)
    difference = perturb_scan(ct, scan, case, ones) - scan.image
    assert np.median(difference[difference != 0]) == pytest.approx(25.0, rel=1e-3)


# ---- bad input


def test_what_cannot_be_attacked_is_said_and_nothing_is_left(model, project, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    name = ValidationCases(model).names[0]
    ask = ("-m", model.folder, "-o", out)
    assert "is no validation case" in refused(capsys, *ask, "--level", 5, "--cases", "somebody")
    assert "There is no attack" in refused(capsys, *ask, "--level", 5, "--attack", "magic")
    assert "The level" in refused(capsys, *ask, "--level", "x")
    assert not out.exists()
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert "is not empty" in refused(capsys, *ask, "--level", 5, "--cases", name)
    assert [file.name for file in out.iterdir()] == ["mine.txt"]
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    assert "the raw ones" in refused(capsys, "-m", model.folder, "-o", tmp_path / "b", "--level", 5, "--cases", name)


def test_another_scan_under_the_same_name_is_noticed(model, project, tmp_path, monkeypatch):
    first, second = ValidationCases(model).names[:2]
    scan = read_scan(model, first)
    case = ValidationCases(model).load(second)
    nothing = np.zeros(case.image[(slice(None), *case.unpad)].shape, np.float32)
    shifted = type(scan)(scan.files, scan.image[:, 1:], scan.properties)
    with pytest.raises(UserError, match="preprocess again"):
        perturb_scan(model, shifted, case, nothing)


def test_a_scan_without_contrast_cannot_be_undone(model):
    name = ValidationCases(model).names[0]
    scan, case = read_scan(model, name), ValidationCases(model).load(name)
    flat = type(scan)(scan.files, np.full_like(scan.image, 7.0), scan.properties)
    nothing = np.zeros(case.image[(slice(None), *case.unpad)].shape, np.float32)
    with pytest.raises(UserError, match=r"same everywhere|preprocess again"):
        perturb_scan(model, flat, case, nothing)


def test_the_record_is_json_for_everybody(written):
    content = json.loads((written / "attack.json").read_text(encoding="utf-8"))
    assert {
        "schema",
        "model",
        "attack",
        "norm",
        "level",
        "seed",
        "unit",
        "range",
        "versions",
        "cases",
    } <= content.keys()
