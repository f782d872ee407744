"""nnU-Net's features under every method, with the real commands: regions, ignore label, channels, cascade, ResEnc."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
import torch
from nnunet_project import PLANS, SETTINGS, Project, easy_task, make_project, read, tiny, write, write_tiny_plans

pytestmark = pytest.mark.slow

METHODS = ("IMA", "SAT", "TE", "TRADES")
DEVICE = ("-device", "cpu")
IGNORE = 3


@pytest.fixture(scope="module")
def regions(tmp_path_factory) -> Project:
    """Two channels, overlapping regions, an ignore label: a dataset of its own, planned by nnU-Net."""
    root = tmp_path_factory.mktemp("regions")
    made = make_project(root, easy_task(root / "Task901_Phantom"))
    source, name = root / "nnUNet_raw" / made.dataset, "Dataset902_Regions"
    target = root / "nnUNet_raw" / name
    for kind in ("imagesTr", "labelsTr"):
        (target / kind).mkdir(parents=True)
    random = np.random.default_rng(0)
    for file in sorted((source / "labelsTr").glob("*.nii.gz")):
        case = file.name.removesuffix(".nii.gz")
        scan = SimpleITK.ReadImage(str(source / "imagesTr" / f"{case}_0000.nii.gz"))
        SimpleITK.WriteImage(scan, str(target / "imagesTr" / f"{case}_0000.nii.gz"))
        noisy = SimpleITK.GetArrayFromImage(scan).astype(np.float32)
        noisy += noisy.std() * random.normal(size=noisy.shape).astype(np.float32)
        second = SimpleITK.GetImageFromArray(noisy)
        second.CopyInformation(scan)
        SimpleITK.WriteImage(second, str(target / "imagesTr" / f"{case}_0001.nii.gz"))
        truth = SimpleITK.ReadImage(str(file))
        labels = SimpleITK.GetArrayFromImage(truth)
        labels[:, :5] = IGNORE  # nobody annotated the rim
        marked = SimpleITK.GetImageFromArray(labels)
        marked.CopyInformation(truth)
        SimpleITK.WriteImage(marked, str(target / "labelsTr" / file.name))
    write(
        target / "dataset.json",
        {
            "channel_names": {"0": "T1", "1": "T2"},
            "labels": {"background": 0, "whole": [1, 2], "posterior": 2, "ignore": IGNORE},
            "regions_class_order": [1, 2],
            "numTraining": len(list((target / "labelsTr").iterdir())),
            "file_ending": ".nii.gz",
        },
    )
    project = Project(root, name)
    project.command("nnUNetv2_plan_and_preprocess", "-d", "902", "-c", "2d", "3d_fullres", "-np", "1")
    write_tiny_plans(project)
    return project


def train(project: Project, configuration: str, method: str, *options: str, fold: str = "0") -> Path:
    trainer = f"nnUNetTrainer{method}"
    project.command(
        "nnUNetv2_train", project.number, configuration, fold, "-tr", trainer, "-p", PLANS, *DEVICE, *options
    )
    return project.model(trainer, configuration)


def evaluate(project: Project, model: Path, output: Path, *options: str) -> dict[str, Any]:
    attack = ("--levels", "3", "--attacks", "apgd:steps=2", "white-noise:draws=2", "--max-samples", "9")
    project.command("nnunet_ima", "evaluate", "-m", str(model), "-o", str(output), *attack, *DEVICE, *options)
    return read(output / "summary.json")


@pytest.mark.parametrize(
    ("method", "configuration"),
    [
        ("IMA", "2d_tiny"),
        ("IMA", "3d_tiny"),
        ("SAT", "2d_tiny"),
        ("TE", "3d_tiny"),
        ("TRADES", "2d_tiny"),
    ],
)
def test_regions_with_an_ignore_label_and_two_channels(regions, tmp_path, method, configuration):
    plans = regions.plans()
    plans["configurations"][configuration]["nnunet_ima"] = {**SETTINGS, "te_start": 0.0}
    write(regions.preprocessed / f"{PLANS}.json", plans)
    model = train(regions, configuration, method)
    assert (model / "fold_0" / "validation" / "summary.json").is_file()
    summary = evaluate(regions, model, tmp_path / "out")
    assert summary["classes"] == ["whole", "posterior"]
    assert all(0 <= result["tvdi"] <= summary["clean"]["tvdi"] + 1e-6 for result in summary["results"][:1])


def test_without_deep_supervision_every_method_trains(project, tmp_path):
    """nnU-Net switches it off in a trainer variant; the same switch on ours."""
    folder = tmp_path / "trainers"
    folder.mkdir()
    lines = []
    # nnU-Net looks at the names in the signature.
    named = "plans, configuration, fold, dataset_json, device"
    for method in METHODS:
        name = f"nnUNetTrainer{method}"
        lines.append(f"from nnunet_ima.trainers.{name} import {name}")
        lines.append(f"class {name}NoDeepSupervision({name}):")
        lines.append(f"    def __init__(self, {named}):")
        lines.append(f"        super().__init__({named})")
        lines.append("        self.enable_deep_supervision = False")
    (folder / "no_deep_supervision_variants.py").write_text("\n".join(lines), encoding="utf-8")
    for method in METHODS:
        project.command(
            "nnUNetv2_train", project.number, "2d_tiny", "0", "-tr", f"nnUNetTrainer{method}NoDeepSupervision",
            "-p", PLANS, *DEVICE, environment={"nnUNet_extTrainer": str(folder)},
        )  # fmt: skip
        model = project.model(f"nnUNetTrainer{method}NoDeepSupervision", "2d_tiny")
        checkpoint = torch.load(model / "fold_0" / "checkpoint_final.pth", weights_only=False)
        assert np.isfinite(checkpoint["logging"]["train_losses"]).all()


@pytest.mark.parametrize("method", ["IMA", "TE"])
def test_a_cascade_trains_is_attacked_and_predicts(project, tmp_path, method):
    """3d_lowres, then the cascade that is given its segmentations; the one-hot channels stay as they are."""
    plans = project.plans()
    spacing = plans["configurations"]["3d_fullres"]["spacing"]
    low = {
        **copy.deepcopy(plans["configurations"]["3d_tiny"]),
        "spacing": [1.5 * s for s in spacing],
        "data_identifier": "nnUNetPlansTiny_3d_lowres",
        "patch_size": [16, 24, 24],
        "next_stage": "3d_cascade_tiny",
    }
    low["nnunet_ima"] = {**SETTINGS, "te_start": 0.0}
    plans["configurations"]["3d_lowres_tiny"] = low
    plans["configurations"]["3d_cascade_tiny"] = {
        "inherits_from": "3d_tiny",
        "previous_stage": "3d_lowres_tiny",
        "nnunet_ima": {**SETTINGS, "te_start": 0.0},
    }
    write(project.preprocessed / f"{PLANS}.json", plans)
    project.command(
        "nnUNetv2_preprocess", "-d", project.number, "-c", "3d_lowres_tiny", "-plans_name", PLANS, "-np", "1"
    )
    # Fold all predicts every case for the next stage.
    train(project, "3d_lowres_tiny", method, fold="all")
    model = train(project, "3d_cascade_tiny", method)
    summary = evaluate(project, model, tmp_path / "out")
    assert summary["clean"]["n_samples"] > 0


def test_residual_encoder_plans(project, tmp_path):
    project.command("nnUNetv2_plan_experiment", "-d", project.number, "-pl", "nnUNetPlannerResEncM")
    planned = project.plans("nnUNetResEncUNetMPlans")
    entry = planned["configurations"]["2d"]
    small = tiny(entry, "2d", [8, 16, 32], 8, None)
    arguments = small["architecture"]["arch_kwargs"]
    arguments["n_blocks_per_stage"] = [1, 1, 1]
    del arguments["n_conv_per_stage"]
    planned["plans_name"] = "nnUNetPlansResEncTiny"
    planned["configurations"]["2d_tiny"] = {**small, "data_identifier": "nnUNetPlans_2d"}
    write(project.preprocessed / "nnUNetPlansResEncTiny.json", planned)
    arguments_of = ("-tr", "nnUNetTrainerIMA", "-p", "nnUNetPlansResEncTiny", *DEVICE)
    project.command("nnUNetv2_train", project.number, "2d_tiny", "0", *arguments_of)
    model = project.results / "nnUNetTrainerIMA__nnUNetPlansResEncTiny__2d_tiny"
    assert "ResidualEncoderUNet" in (model / "plans.json").read_text(encoding="utf-8")
    assert evaluate(project, model, tmp_path / "out")["clean"]["n_samples"] > 0


def test_the_best_configuration_is_found_and_ensembled(project, tmp_path):
    """nnUNetv2_find_best_configuration over 2D and 3D, then prediction by each and nnUNetv2_ensemble."""
    for configuration in ("2d_tiny", "3d_tiny"):
        train(project, configuration, "IMA", "--npz")
    names = ("-tr", "nnUNetTrainerIMA", "-p", PLANS)
    project.command(
        "nnUNetv2_find_best_configuration", project.number, "-c", "2d_tiny", "3d_tiny", *names, "-f", "0", "-np", "1"
    )  # fmt: skip
    assert (project.results / "inference_instructions.txt").is_file()
    raw = project.root / "nnUNet_raw" / project.dataset / "imagesTr"
    images = tmp_path / "images"
    images.mkdir()
    case = project.names()[0]
    shutil.copy(raw / f"{case}_0000.nii.gz", images)
    for configuration in ("2d_tiny", "3d_tiny"):
        project.command(
            "nnUNetv2_predict", "-i", str(images), "-o", str(tmp_path / configuration), "-d", project.number,
            "-c", configuration, *names, "-f", "0", "--save_probabilities", "-npp", "1", "-nps", "1", *DEVICE,
        )  # fmt: skip
    folders = [str(tmp_path / configuration) for configuration in ("2d_tiny", "3d_tiny")]
    project.command("nnUNetv2_ensemble", "-i", *folders, "-o", str(tmp_path / "both"), "-np", "1")
    assert (tmp_path / "both" / f"{case}.nii.gz").is_file()


@pytest.mark.parametrize("method", ["SAT", "TE", "TRADES"])
def test_every_method_validates_again_continues_and_predicts(project, tmp_path, method):
    model = train(project, "2d_tiny", method, fold="1")
    train(project, "2d_tiny", method, "--val", fold="1")
    (model / "fold_1" / "checkpoint_latest.pth").write_bytes((model / "fold_1" / "checkpoint_best.pth").read_bytes())
    (model / "fold_1" / "checkpoint_final.pth").unlink()
    train(project, "2d_tiny", method, "--c", fold="1")
    assert (model / "fold_1" / "checkpoint_final.pth").is_file()
    images = tmp_path / "images"
    images.mkdir()
    case = project.names()[0]
    shutil.copy(project.root / "nnUNet_raw" / project.dataset / "imagesTr" / f"{case}_0000.nii.gz", images)
    project.command(
        "nnUNetv2_predict", "-i", str(images), "-o", str(tmp_path / "out"), "-d", project.number, "-c", "2d_tiny",
        "-tr", f"nnUNetTrainer{method}", "-p", PLANS, "-f", "1", "-npp", "1", "-nps", "1", *DEVICE,
    )  # fmt: skip
    assert (tmp_path / "out" / f"{case}.nii.gz").is_file()
