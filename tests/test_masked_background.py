"""Training on scans with an empty background that nnU-Net leaves out of its normalisation, as skull-stripped ones."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import SimpleITK
import torch
from batchgeneratorsv2.transforms.utils.remove_label import RemoveLabelTansform
from nnunet_project import PLANS, Project, make_trainer, quiet, read, write
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from test_attack_scans_masked import strip

from nnunet_ima.labels import OUTSIDE
from nnunet_ima.lp import lp_norm
from nnunet_ima.trainers.nnUNetTrainerIMA import nnUNetTrainerIMA
from nnunet_ima.trainers.nnUNetTrainerSAT import nnUNetTrainerSAT
from nnunet_ima.trainers.nnUNetTrainerTRADES import nnUNetTrainerTRADES


@pytest.fixture(scope="module")
def stripped(project: Project, tmp_path_factory) -> Iterator[Project]:
    """The phantom with nothing around its structure, normalised within the rest, and resampled to smaller voxels."""
    mine = Project(tmp_path_factory.mktemp("stripped"), project.dataset)
    raw = project.root / "nnUNet_raw" / project.dataset
    mine.preprocessed.mkdir(parents=True)
    (mine.root / "nnUNet_results").mkdir()
    (mine.root / "scans").mkdir()
    for name in ("dataset.json", "dataset_fingerprint.json"):
        shutil.copyfile(project.preprocessed / name, mine.preprocessed / name)
    shutil.copytree(project.preprocessed / "gt_segmentations", mine.preprocessed / "gt_segmentations")
    plans = project.plans()
    for configuration in plans["configurations"].values():
        if "use_mask_for_norm" in configuration:
            configuration["use_mask_for_norm"] = [True]
        if "spacing" in configuration:
            configuration["spacing"] = [0.8 * size for size in configuration["spacing"]]
    write(mine.preprocessed / f"{PLANS}.json", plans)
    manager = PlansManager(plans)
    dataset_json = read(mine.preprocessed / "dataset.json")
    for parent in ("2d", "3d_fullres"):
        configuration = manager.get_configuration(parent)
        folder = mine.preprocessed / configuration.data_identifier
        folder.mkdir()
        for name in project.names():
            scan, labels = (
                SimpleITK.ReadImage(str(raw / file))
                for file in (f"imagesTr/{name}_0000.nii.gz", f"labelsTr/{name}.nii.gz")
            )
            inside = SimpleITK.GetImageFromArray(strip(*map(SimpleITK.GetArrayFromImage, (scan, labels))))
            inside.CopyInformation(scan)
            file = mine.root / "scans" / f"{name}_0000.nii.gz"
            SimpleITK.WriteImage(inside, str(file))
            with quiet():
                configuration.preprocessor_class(verbose=False).run_case_save(
                    str(folder / name), [str(file)], str(raw / "labelsTr" / f"{name}.nii.gz"),
                    manager, configuration, dataset_json,
                )  # fmt: skip
    with mine.in_force():
        yield mine


def started(stripped: Project, kind: type[Any], configuration: str, **settings: Any) -> Any:
    trainer = make_trainer(stripped, kind, configuration, **settings)
    with quiet():
        trainer.initialize()
        trainer.on_train_start()
    trainer.network.train()
    return trainer


def test_augmented_patches_are_0_in_their_background_and_hardly_anywhere_else(stripped, configuration):
    trainer = started(stripped, nnUNetTrainerSAT, configuration)
    loader = trainer.dataloader_train.data_loader
    transforms = copy.deepcopy(loader.transforms)
    # The mark of the background stays, for us to compare with.
    last = next(i for i, one in enumerate(transforms.transforms) if isinstance(one, RemoveLabelTansform))
    transforms.transforms = transforms.transforms[:last]
    seen, elsewhere = 0, 0
    for _ in range(12):
        loader.transforms, kept = transforms, loader.transforms
        batch = loader.generate_train_batch()
        loader.transforms = kept
        background, zero = batch["target"] == OUTSIDE, batch["data"] == 0
        seen += int(background.sum())
        assert zero[background].all()
        elsewhere += int((zero & ~background).sum())
    assert seen > 1000
    assert elsewhere < 1e-4 * seen


@pytest.mark.parametrize("kind", [nnUNetTrainerIMA, nnUNetTrainerSAT, nnUNetTrainerTRADES])
def test_a_step_leaves_the_background_alone(stripped, configuration, kind, monkeypatch):
    trainer = started(stripped, kind, configuration, dice_threshold=0.0, epsilon=6.0)
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    name = "_generate" if kind is nnUNetTrainerIMA else "perturb"
    inner = getattr(trainer, name)

    def spy(first: Any, *others: Any) -> Any:
        answer = inner(first, *others)
        found.append((first if isinstance(first, torch.Tensor) else first.images, answer[0]))
        return answer

    monkeypatch.setattr(trainer, name, spy)
    loader = trainer.dataloader_train.data_loader
    monkeypatch.setattr(loader, "get_do_oversample", lambda _: True)
    trainer.train_step(next(trainer.dataloader_train))
    ((images, perturbed),) = found
    background = images == 0
    assert 0.05 < float(background.float().mean()) < 0.95
    assert torch.equal(perturbed[background], images[background])
    assert (lp_norm(perturbed - images, "l2") > 0.1).any()


def test_the_robust_dice_leaves_the_background_alone(stripped, configuration):
    trainer = started(stripped, nnUNetTrainerSAT, configuration, robust_patches=4, robust_epsilon=6.0)
    patches, threat = trainer._patches, trainer._robust_dice.threat
    low, high = threat.bounds(patches.images)
    still = (low == high).expand_as(patches.images)
    assert torch.equal(still, patches.outside)
    assert 0.05 < float(still.float().mean()) < 0.95
    # Resampling rings where the scan ends, so that not all of it is 0.
    assert (patches.images[still] != 0).any()
    moved = threat.project(patches.images + 1, patches.images)
    assert torch.equal(moved[still], patches.images[still])


def test_without_the_setting_a_scans_zeros_may_change(project, results):
    trainer = started(project, nnUNetTrainerSAT, "2d_tiny")
    images = torch.from_numpy(np.array([[[[0.0, 1.0], [2.0, -1.0]]]], np.float32))
    low, high = trainer.patch_threat(images, torch.tensor([5.0])).bounds(images)
    assert (low < high).all()


def test_where_one_channel_is_not_0_there_is_a_scan(project, results, monkeypatch):
    trainer = started(project, nnUNetTrainerSAT, "2d_tiny")
    monkeypatch.setattr(type(trainer), "image_channels", property(lambda _: 2))
    trainer.configuration_manager.configuration["use_mask_for_norm"] = [True, True]
    images = torch.tensor([[[[0.0, 0.0], [2.0, -1.0]], [[0.0, 3.0], [0.0, -1.0]]]])
    low, high = (bound.expand_as(images) for bound in trainer.patch_threat(images, torch.tensor([5.0])).bounds(images))
    still = torch.tensor([[True, False], [False, False]])
    for channel in range(2):
        assert torch.equal(low[0, channel] == high[0, channel], still)
