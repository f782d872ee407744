"""``nnunet_ima attack``: perturbed scans that nnU-Net reads as the attack meant them."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK
import torch
from hypothesis import given
from hypothesis import strategies as st
from little_memory import make_memory_little
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from nnunet_project import Project, quiet, read, write

from nnunet_ima.errors import UserError
from nnunet_ima.evaluation import attack_scans
from nnunet_ima.evaluation.case_level import CaseLevel
from nnunet_ima.evaluation.cases import ValidationCases
from nnunet_ima.evaluation.command_line import main
from nnunet_ima.evaluation.locks import alone
from nnunet_ima.evaluation.metrics import CaseScore
from nnunet_ima.evaluation.models import TrainedModel, load_model
from nnunet_ima.evaluation.run import Evaluation
from nnunet_ima.evaluation.scan_files import Scan, ScanFiles
from nnunet_ima.evaluation.scans import beyond_range, perturb_scan

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


def read_scan(model: TrainedModel, name: str) -> Scan:
    return ScanFiles(model).read(name)


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


def test_the_record_says_by_how_much_the_file_leaves_the_scans_range(model, written, project):
    (case,) = read(written / "attack.json")["cases"]
    name = f"{case['case']}_0000.nii.gz"
    scan = array(project.root / "nnUNet_raw" / project.dataset / "imagesTr" / name).astype(float)
    perturbed = array(written / "images" / name).astype(float)
    beyond = max(scan.min() - perturbed.min(), perturbed.max() - scan.max(), 0.0)
    assert case["beyond_range"] == pytest.approx(beyond, abs=1e-4 * np.ptp(scan))


@pytest.mark.parametrize("where", ["above", "below", None])
def test_a_scan_that_leaves_its_range_is_said_to(small, tmp_path, monkeypatch, capsys, where):
    """As one does whose perturbation overshoots when it is resampled to a coarser grid."""

    def perturb(model: TrainedModel, scan: Scan, *rest: Any) -> np.ndarray:
        perturbed = perturb_scan(model, scan, *rest)
        if where is not None:
            far = np.ptp(scan.image) / 2
            perturbed[0, 0, 0, 0] = scan.image.max() + far if where == "above" else scan.image.min() - far
        return perturbed

    monkeypatch.setattr("nnunet_ima.evaluation.attack_scans.perturb_scan", perturb)
    output, name = tmp_path / "out", ValidationCases(small).names[0]
    capsys.readouterr()
    assert main(["attack", "-device", "cpu", "-m", str(small.folder), "--level", "1", "--attack", "pgd:steps=1",
                 "--cases", name, "-o", str(output)]) == 0  # fmt: skip
    (case,) = read(output / "attack.json")["cases"]
    wanted = 0.0 if where is None else float(np.ptp(read_scan(small, name).image)) / 2
    assert case["beyond_range"] == pytest.approx(wanted)
    table = capsys.readouterr().out
    assert ("beyond range (scan)" in table) is (where is not None)
    assert (f"| {case['beyond_range']:.4g} |" in table) is (where is not None)


@given(st.lists(st.lists(st.integers(-9, 9), min_size=4, max_size=4), min_size=4, max_size=4))
def test_how_far_a_scan_is_beyond_its_range_is_what_a_clip_would_change_most(values):
    """Of two channels, each with a range of its own."""
    scan, perturbed = np.array(values, np.float32).reshape(2, 2, 1, 2, 2)
    clipped = [np.clip(found, own.min(), own.max()) for own, found in zip(scan, perturbed, strict=True)]
    assert beyond_range(scan, perturbed) == np.abs(np.array(clipped) - perturbed).max()


def test_what_rounding_leaves_is_not_beyond_the_range():
    scan = np.linspace(0, 1000, 8, dtype=np.float32).reshape(1, 2, 2, 2)
    assert beyond_range(scan, np.nextafter(scan, np.float32(2000))) == 0
    assert beyond_range(scan, scan + np.float32(0.1)) == pytest.approx(0.1, rel=1e-3)


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


def test_of_a_ct_scan_nothing_is_called_z_scores(small, tmp_path, capsys):
    def as_ct(plans: dict[str, Any]) -> None:
        for configuration in plans["configurations"].values():
            if "normalization_schemes" in configuration:
                configuration["normalization_schemes"] = ["CTNormalization"]

    for folder, unit in ((small.folder, "z-scores"), (tmp_path / "ct", "units of the normalised scan")):
        ct = small if folder == small.folder else with_plans(small, folder, as_ct)
        name, output = ValidationCases(ct).names[0], tmp_path / f"out {unit}"
        capsys.readouterr()
        assert main(["attack", "-device", "cpu", "-m", str(folder), "--level", "1", "--attack", "pgd:steps=1",
                     "--cases", name, "-o", str(output)]) == 0  # fmt: skip
        assert f"| L2 ({unit}) |" in capsys.readouterr().out
        named = read(output / "attack.json")["unit"].partition(",")[0].partition(" (")
        assert named[0] == unit
        assert named[2] == ("CTNormalization)" if ct is not small else "")


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
    assert not (tmp_path / "b").exists()


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
        "identity",
        "seal",
        "cases",
    } <= content.keys()


# ---- axes that nnU-Net turns


def turned(source: Path, target: Path, orientation: str) -> None:
    image = nibabel.load(source)
    own = io_orientation(image.affine)
    nibabel.save(image.as_reoriented(ornt_transform(own, axcodes2ornt(orientation))), target)


@pytest.mark.parametrize("orientation", ["LAS", "LPS", "PIR"])
def test_scans_that_nnunet_turns_are_written_as_they_lie(project, std_2d, tmp_path, monkeypatch, orientation):
    """The phantom lies as RAS, to which the reader turns: what was preprocessed belongs to the turned scans, too."""

    def reader(plans: dict[str, Any]) -> None:
        plans["image_reader_writer"] = "NibabelIOWithReorient"

    turning = with_plans(load_model(std_2d, 0, "checkpoint_final.pth", CPU), tmp_path / std_2d.name, reader)
    name = ValidationCases(turning).names[0]
    raw, there = project.root / "nnUNet_raw" / project.dataset, tmp_path / "raw" / project.dataset / "imagesTr"
    there.mkdir(parents=True)
    turned(raw / "imagesTr" / f"{name}_0000.nii.gz", there / f"{name}_0000.nii.gz", orientation)
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    output = tmp_path / "out"
    run("-m", turning.folder, "--level", 8, "--attack", "apgd:steps=2", "--cases", name, "-o", output)
    (case,) = read(output / "attack.json")["cases"]

    # What the files hold, voxel by voxel in their own order.
    scan, perturbed, difference = (
        nibabel.load(folder / f"{name}_0000.nii.gz") for folder in (there, output / "images", output / "perturbation")
    )
    assert nibabel.aff2axcodes(perturbed.affine) == tuple(orientation)
    assert np.allclose(perturbed.affine, scan.affine)
    assert np.allclose(perturbed.get_fdata() - scan.get_fdata(), difference.get_fdata(), atol=0.1)
    assert np.abs(difference.get_fdata()).max() == pytest.approx(case["scan"]["linf"], rel=1e-4)

    # What nnU-Net reads in them and finds.
    own, cases = turning.plans.image_reader_writer_class(), ValidationCases(turning)
    image, properties = own.read_images([str(output / "images" / f"{name}_0000.nii.gz")])
    whole = CaseLevel(cases, CPU)
    found, _ = whole.predict_scan(image, properties)
    after = own.read_seg(str(output / "after" / f"{name}.nii.gz"))[0][0]
    assert np.array_equal(found, after)
    dice = np.mean(whole.score_segmentation(cases.load(name), found).dice)
    assert dice == pytest.approx(case["dice_after"], abs=1e-6)
    assert case["dice_after"] == pytest.approx(case["dice_in_evaluation"], abs=0.01)
    assert case["dice_after"] < case["dice_before"] - 0.05


def test_a_reader_that_cannot_be_written_for_is_refused_at_once(model, tmp_path, capsys):
    def reader(plans: dict[str, Any]) -> None:
        plans["image_reader_writer"] = "Tiff3DIO"

    tiff = with_plans(model, tmp_path / model.folder.name, reader)
    assert "Tiff3DIO" in refused(capsys, "-m", tiff.folder, "-o", tmp_path / "out", "--level", 5)
    assert not (tmp_path / "out").exists()


# ---- killed, refused, short of memory


@pytest.fixture(scope="module")
def small(project: Project, std_2d: Path) -> TrainedModel:
    return load_model(std_2d, 0, "checkpoint_final.pth", CPU)


@pytest.fixture(scope="module")
def both(small: TrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two cases, attacked in peace."""
    output = tmp_path_factory.mktemp("both") / "out"
    run(*request_of(small, output))
    return output


def request_of(model: TrainedModel, output: Path, level: int = 8) -> list[object]:
    names = ValidationCases(model).names[:2]
    return ["-m", model.folder, "--level", level, "--attack", "apgd:steps=2", "--cases", *names, "-o", output]


def contents(folder: Path) -> dict[str, np.ndarray]:
    return {str(file.relative_to(folder)): array(file) for file in sorted(folder.rglob("*.nii.gz"))}


def same(one: Path, other: Path) -> None:
    there, here = contents(one), contents(other)
    assert there.keys() == here.keys()
    assert all(np.array_equal(there[name], here[name]) for name in there)
    assert read(one / "attack.json")["cases"] == read(other / "attack.json")["cases"]


def stop_at(monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException) -> None:
    """The scan that is perturbed as number ``number`` is the last one."""
    calls: list[int] = []

    def perturb(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            raise error
        return perturb_scan(*arguments)

    monkeypatch.setattr("nnunet_ima.evaluation.attack_scans.perturb_scan", perturb)


def test_finished_cases_are_kept_and_the_rest_is_done(small, both, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_at(patch, 2, UserError("The scan is gone."))
        assert "The scan is gone" in refused(capsys, *request_of(small, output))
    first, second = ValidationCases(small).names[:2]
    assert [case["case"] for case in read(output / "attack.json")["cases"]] == [first]
    assert not list(output.rglob(f"*{second}*"))
    kept = {file: file.stat().st_mtime_ns for file in output.rglob("*.nii.gz")}
    assert len(kept) == len(PARTS)
    with monkeypatch.context() as patch:
        # One is left.
        stop_at(patch, 2, AssertionError("a finished case was attacked again"))
        run(*request_of(small, output))
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    same(output, both)
    # A third time there is nothing to do, and a file that went missing is made again.
    lost = output / "after" / f"{first}.nii.gz"
    lost.unlink()
    run(*request_of(small, output))
    assert lost.is_file()
    assert contents(output).keys() == contents(both).keys()


def test_a_refusal_in_the_first_case_leaves_nothing(small, tmp_path, monkeypatch, capsys):
    stop_at(monkeypatch, 1, UserError("The scan is gone."))
    assert "The scan is gone" in refused(capsys, *request_of(small, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_what_a_kill_leaves_is_no_obstacle(small, both, tmp_path):
    """Of the first case: part of its files in a room of their own, and a table that was being written."""
    output, name = tmp_path / "out", ValidationCases(small).names[0]
    (output / f".{name}.tmp" / "images").mkdir(parents=True)
    (output / f".{name}.tmp" / "images" / f"{name}_0000.nii.gz").write_bytes(b"half")
    (output / ".attack.json.123.tmp").write_text("{")
    run(*request_of(small, output))
    same(output, both)
    assert not list(output.glob(".*.tmp/*"))


def test_two_at_once_do_not_write_into_one_folder(small, both, tmp_path, capsys):
    output = tmp_path / "out"
    with alone(output / ".lock", "never"):
        assert "Another process is writing perturbed scans to" in refused(capsys, *request_of(small, output))
        assert [file.name for file in output.iterdir()] == [".lock"]
    run(*request_of(small, output))
    same(output, both)


def test_another_request_does_not_go_on_there(small, both, capsys, tmp_path):
    before = (both / "attack.json").read_bytes()
    assert "levels: 8 there, 5 here" in refused(capsys, *request_of(small, both, level=5))
    assert "seed: 0 there, 1 here" in refused(capsys, *request_of(small, both), "--seed", 1)
    assert (both / "attack.json").read_bytes() == before
    edited = tmp_path / "edited"
    shutil.copytree(both, edited)
    write(edited / "attack.json", {**read(edited / "attack.json"), "level": "5"})
    assert "was changed after it was written" in refused(capsys, *request_of(small, edited))


def test_a_case_that_was_preprocessed_anew_is_noticed(small, both, capsys, monkeypatch):
    load = ValidationCases._load

    def changed(self: ValidationCases, name: str) -> Any:
        case = load(self, name)
        self.fingerprints[name] += 1
        return case

    monkeypatch.setattr(ValidationCases, "_load", changed)
    assert "has changed since" in refused(capsys, *request_of(small, both))


def test_with_too_little_memory_fewer_samples_go_at_once(small, both, tmp_path, monkeypatch, capsys):
    # Gradients take most.
    sizes = make_memory_little(monkeypatch, 2, only_gradients=True)
    output = tmp_path / "out"
    run(*request_of(small, output))
    assert sizes.count(8) == 1  # not tried again, in another case either
    assert [case["samples_in_a_pass"] for case in read(output / "attack.json")["cases"]] == [2, 2]
    found, wanted = (read(folder / "attack.json")["cases"] for folder in (output, both))
    for one, other in zip(found, wanted, strict=True):
        assert other["samples_in_a_pass"] == 8
        # Rounding may decide about a voxel here and there.
        assert one["dice_after"] == pytest.approx(other["dice_after"], abs=0.02)


def test_the_batch_size_changes_no_number(small, both, tmp_path):
    run(*request_of(small, tmp_path / "out"), "--batch-size", 3)
    same(tmp_path / "out", both)


def test_by_default_passes_are_full(small, tmp_path, monkeypatch):
    """As on a GPU, where one holds 128 samples; the choice of the size is tested beside it."""
    made: list[int] = []

    class StoppedError(Exception):
        pass

    def attacker(evaluation: Evaluation, *_: object) -> None:
        made.append(evaluation.batch_size)
        raise StoppedError

    monkeypatch.setattr(attack_scans, "_Attacker", attacker)
    for samples in (128, 15):
        monkeypatch.setattr(attack_scans, "samples_in_a_pass", lambda *_, samples=samples: samples)
        with pytest.raises(StoppedError):
            run(*request_of(small, tmp_path / "out"))
    assert made == [128, 60]


def test_what_is_not_defined_is_null(small, tmp_path, monkeypatch, capsys):
    """A case without foreground has nothing to be attacked, of which nothing can be lost, and may have no Dice."""
    monkeypatch.setattr(ValidationCases, "_holds_foreground", lambda *_: False)
    nothing = CaseScore(*((math.nan, math.nan),) * 3)
    monkeypatch.setattr(CaseLevel, "score_segmentation", lambda *_: nothing)
    output, name = tmp_path / "out", ValidationCases(small).names[0]
    assert main(["attack", "-device", "cpu", "-m", str(small.folder), "--level", "8", "--attack", "apgd:steps=2",
                 "--cases", name, "-o", str(output)]) == 0  # fmt: skip
    (case,) = json.loads((output / "attack.json").read_text("utf-8"), parse_constant=pytest.fail)["cases"]
    assert [case[key] for key in ("lost", "dice_before", "dice_after", "dice_in_evaluation")] == [None] * 4
    assert case["scan"] == case["preprocessed"] == {"l2": 0.0, "linf": 0.0}
    assert f"| {name} | – | – | – | 0 | – | 0 | 0 |" in capsys.readouterr().out
