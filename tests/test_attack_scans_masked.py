"""Scans with an empty background that nnU-Net leaves out of its normalisation, as skull-stripped ones."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
import torch
from nnunet_project import Project, quiet, read, write
from nnunetv2.preprocessing.cropping.cropping import create_nonzero_mask
from scipy.ndimage import binary_dilation

from nnunet_ima.attacks import AttackResult
from nnunet_ima.dice import DiceCriterion
from nnunet_ima.evaluation.attack_choice import parse_attack
from nnunet_ima.evaluation.batch import load_batch
from nnunet_ima.evaluation.cases import Case, ValidationCases
from nnunet_ima.evaluation.command_line import main
from nnunet_ima.evaluation.end_to_end import Carried, whole_case_threat
from nnunet_ima.evaluation.metrics import CaseScore
from nnunet_ima.evaluation.models import TrainedModel, load_model
from nnunet_ima.evaluation.protocols import Protocol, parse_level
from nnunet_ima.evaluation.scan_files import Scan, ScanFiles
from nnunet_ima.evaluation.scans import perturb_scan

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Masked:
    """A model whose plans normalise within the nonzero region, and one case of its dataset."""

    model: TrainedModel
    name: str

    @property
    def cases(self) -> ValidationCases:
        return ValidationCases(self.model)

    @property
    def case(self) -> Case:
        return self.cases.load(self.name)

    @property
    def scan(self) -> Scan:
        return ScanFiles(self.model).read(self.name)

    def seen(self, files: list[Path]) -> np.ndarray:
        """What the network is given of files: nnU-Net reads and preprocesses them, as nnUNetv2_predict does."""
        model = self.model
        preprocessor = model.configuration.preprocessor_class(verbose=False)
        data, _, _ = preprocessor.run_case(
            [str(file) for file in files], None, model.plans, model.configuration, model.dataset_json
        )
        return np.asarray(data)


def strip(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Zeros outside an ellipsoid around the structure, and none inside."""
    axes = np.meshgrid(*(np.linspace(-1, 1, size) for size in image.shape), indexing="ij")
    inside = (sum(axis**2 for axis in axes) < 0.7) | binary_dilation(labels > 0, iterations=2)
    return np.where(inside, np.maximum(image, 1), 0).astype(image.dtype)


def preprocess(masked: TrainedModel, raw: Path, folder: Path, name: str) -> None:
    with quiet():
        masked.configuration.preprocessor_class(verbose=False).run_case_save(
            str(folder / name), [str(raw / "imagesTr" / f"{name}_0000.nii.gz")],
            str(raw / "labelsTr" / f"{name}.nii.gz"), masked.plans, masked.configuration, masked.dataset_json,
        )  # fmt: skip


@pytest.fixture(scope="module", params=["as planned", "resampled"])
def masked(request, project: Project, std_2d: Path, tmp_path_factory) -> Iterator[Masked]:
    root = tmp_path_factory.mktemp("masked")
    shutil.copytree(std_2d, root / std_2d.name)
    plans = read(root / std_2d.name / "plans.json")
    for configuration in plans["configurations"].values():
        if "use_mask_for_norm" in configuration:
            configuration["use_mask_for_norm"] = [True]
        if "spacing" in configuration and request.param == "resampled":
            configuration["spacing"] = [0.8 * size for size in configuration["spacing"]]
    write(root / std_2d.name / "plans.json", plans)
    model = load_model(root / std_2d.name, 0, "checkpoint_final.pth", CPU)
    original = project.root / "nnUNet_raw" / project.dataset
    raw, ready = root / "raw" / project.dataset, root / "preprocessed" / project.dataset
    folder = ready / model.configuration.data_identifier
    for part in (raw / "imagesTr", raw / "labelsTr", folder):
        part.mkdir(parents=True)
    (ready / "gt_segmentations").symlink_to(original / "labelsTr")
    name, *_ = ValidationCases(load_model(std_2d, 0, "checkpoint_final.pth", CPU)).names
    write(ready / "splits_final.json", [{"train": [], "val": [name]}])
    labels = original / "labelsTr" / f"{name}.nii.gz"
    (raw / "labelsTr" / labels.name).symlink_to(labels)
    scan = SimpleITK.ReadImage(str(original / "imagesTr" / f"{name}_0000.nii.gz"))
    stripped = SimpleITK.GetImageFromArray(
        strip(SimpleITK.GetArrayFromImage(scan), SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(labels))))
    )
    stripped.CopyInformation(scan)
    SimpleITK.WriteImage(stripped, str(raw / "imagesTr" / f"{name}_0000.nii.gz"))
    preprocess(model, raw, folder, name)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("nnUNet_raw", str(raw.parent))
        environment.setenv("nnUNet_preprocessed", str(ready.parent))
        yield Masked(model, name)


def resampled(masked: Masked) -> bool:
    properties = masked.case.properties
    cropped = tuple(properties["shape_after_cropping_and_before_resampling"])
    return cropped != tuple(axis.stop - axis.start for axis in masked.case.unpad)


def cropped_mask(masked: Masked) -> np.ndarray:
    """nnU-Net's nonzero region in the box to which it crops."""
    box = masked.case.properties["bbox_used_for_cropping"]
    return np.asarray(create_nonzero_mask(masked.scan.image)[tuple(slice(*ends) for ends in box)])


def inside(masked: Masked) -> tuple[slice, ...]:
    return (slice(None), *masked.case.unpad)


def test_what_is_fixed_is_what_nnunet_leaves_out(masked):
    case = masked.case
    free = ~case.fixed[inside(masked)][0].numpy()
    assert 0.2 < free.mean() < 0.8
    if resampled(masked):
        assert free.mean() == pytest.approx(cropped_mask(masked).mean(), abs=0.02)
    else:
        assert np.array_equal(free, cropped_mask(masked))
        assert bool((case.image[case.fixed] == 0).all())


def test_without_the_plans_saying_so_everything_may_change(masked, project, std_2d):
    plain = replace(masked.model, configuration=load_model(std_2d, 0, "checkpoint_final.pth", CPU).configuration)
    cases = ValidationCases(plain)
    free = ~cases.load(masked.name).fixed[(slice(None), *cases.load(masked.name).unpad)]
    assert bool(free.all())


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_no_attack_may_change_it(masked, norm):
    """Neither on a sample nor on a whole case."""
    cases, case = masked.cases, masked.case
    samples = list(cases.samples([masked.name]))
    protocol, level = Protocol("sound", norm), parse_level("8" if norm == "l2" else "8/255", norm)
    images, targets, threat = load_batch(cases, samples, protocol, level, CPU)
    fixed = torch.stack([cases.patch(case.fixed, sample.place) for sample in samples])
    assert torch.equal(~threat.perturbable(images).expand(images.shape), fixed)
    for name in ("white-noise:draws=1", "pgd:steps=1", "square:n_queries=3"):
        attack = parse_attack(name).make(threat=threat, criterion=DiceCriterion(labels=masked.model.labels), seed=0)
        found: AttackResult = attack(masked.model.network, images, targets)
        assert torch.equal(found.images[fixed], images[fixed])
    nothing = CaseScore((), (), ())
    carried = Carried(case, [sample.place for sample in samples], case.image, nothing, nothing)
    image = case.image[inside(masked)][None]
    window = [tuple(slice(0, size) for size in image.shape[2:])]
    whole = whole_case_threat(protocol, level, carried, window, image, image)
    low, high = whole.bounds(image)
    assert not bool((high > low)[0][case.fixed[inside(masked)]].any())
    assert bool((high > low).any())


def test_a_perturbed_scan_is_read_again_as_what_was_evaluated(masked, tmp_path):
    """The hardest for it: a perturbation that shifts and scales all it may."""
    case, scan = masked.case, masked.scan
    free = ~case.fixed[inside(masked)].numpy()
    clean = case.image[inside(masked)].numpy()
    noise = np.random.default_rng(0).normal(0.4, 0.3, clean.shape).astype(np.float32) * free
    perturbed = perturb_scan(masked.model, scan, case, noise)
    files = ScanFiles(masked.model).write_image(scan, perturbed, tmp_path, masked.name)
    seen = masked.seen(files)
    assert np.array_equal(create_nonzero_mask(perturbed), create_nonzero_mask(scan.image))
    assert np.array_equal(perturbed[scan.image == 0], scan.image[scan.image == 0])
    if resampled(masked):
        # White noise on a finer grid: the scan cannot hold all of it.
        return
    assert bool((seen[~free] == 0).all())
    wanted = (clean + noise)[free]
    wanted = (wanted - wanted.mean()) / wanted.std()
    assert np.allclose(seen[free], wanted, atol=2e-3)


def test_attacked_from_end_to_end(masked, tmp_path):
    output = tmp_path / "out"
    with quiet():
        assert main(["attack", "-device", "cpu", "-m", str(masked.model.folder), "--level", "8", "--attack",
                     "apgd:steps=3", "-o", str(output)]) == 0  # fmt: skip
    (case,) = read(output / "attack.json")["cases"]
    difference: Any = SimpleITK.GetArrayFromImage(
        SimpleITK.ReadImage(str(output / "perturbation" / f"{masked.name}_0000.nii.gz"))
    )
    assert np.abs(difference).max() > 0
    assert not difference[masked.scan.image[0] == 0].any()
    assert case["dice_after"] == pytest.approx(case["dice_in_evaluation"], abs=0.01)
    if not resampled(masked):
        assert case["lost"] < 1e-3
