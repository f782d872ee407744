"""``nnunet_ima configure``: the user's configurations stay as they are; what is shown is what a training uses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from nnunet_project import PLANS, Project, quiet, read, write
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from test_trainers import started

from nnunet_ima.evaluation.command_line import main
from nnunet_ima.evaluation.environment import our_trainers_too
from nnunet_ima.trainers import nnUNetTrainer_robust_lengths as lengths
from nnunet_ima.trainers.nnUNetTrainerIMA import nnUNetTrainerIMA


@pytest.fixture
def plans_file(project: Project):
    file = project.preprocessed / f"{PLANS}.json"
    kept = file.read_bytes()
    yield file
    file.write_bytes(kept)


def configure(*arguments: str) -> int:
    return main(["configure", "-d", "901", "-p", PLANS, *arguments])


def test_what_is_shown_is_what_a_training_uses(project, results, capsys):
    assert configure("-c", "2d_tiny") == 0
    shown = capsys.readouterr().out
    trainer = started(project, nnUNetTrainerIMA, "2d_tiny")
    assert trainer.configured.describe() in shown
    assert f"{trainer.count_samples()} training samples" in shown
    assert "nnUNetv2_train 901 2d_tiny 0 -tr nnUNetTrainerIMA -p nnUNetPlansTiny" in shown


def test_looking_leaves_nothing_behind(project, results, capsys):
    before = (project.preprocessed / f"{PLANS}.json").read_bytes()
    assert configure("-c", "2d_tiny") == 0
    assert list(results.iterdir()) == []
    assert (project.preprocessed / f"{PLANS}.json").read_bytes() == before


def test_a_new_configuration_inherits_and_the_users_stay(project, plans_file, capsys):
    before = read(plans_file)
    assert configure("-c", "2d_tiny", "--set", "epsilon=7.5", "norm=linf", "--name", "2d_mine") == 0
    after = read(plans_file)
    mine = after["configurations"].pop("2d_mine")
    assert after == before
    parents = before["configurations"]["2d_tiny"]["nnunet_ima"]
    assert mine == {"inherits_from": "2d_tiny", "nnunet_ima": {**parents, "epsilon": 7.5, "norm": "linf"}}
    out = capsys.readouterr().out
    assert "7.5  (user)" in out
    assert "nnUNetv2_train 901 2d_mine 0" in out
    # The same again is no conflict.
    assert configure("-c", "2d_tiny", "--set", "epsilon=7.5", "norm=linf", "--name", "2d_mine") == 0


def test_self_configuration_is_explained(project, plans_file, capsys):
    plans = read(plans_file)
    del plans["configurations"]["2d_tiny"]["nnunet_ima"]["epsilon"]
    del plans["configurations"]["2d_tiny"]["nnunet_ima"]["delta_epsilon"]
    write(plans_file, plans)
    assert configure("-c", "2d_tiny") == 0
    out = capsys.readouterr().out
    assert "(self-configured)" in out
    assert "power law" in out
    assert "So few visits" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("-c", "5d"), "no configuration '5d'"),
        (("-c", "2d_tiny", "--set", "epsilon"), "is no setting"),
        (("-c", "2d_tiny", "--set", "epsilon=-1"), "at least 0"),
        (("-c", "2d_tiny", "--set", "epsilom=1"), "unknown setting"),
        (("-c", "2d_tiny", "--set", "epsilon=1", "--name", "3d_tiny"), "another one"),
        (("-c", "2d_tiny", "-tr", "nnUNetTrainerNone"), "no trainer nnUNetTrainerNone"),
        (("-c", "2d_tiny", "-tr", "nnUNetTrainer"), "none of our trainers"),
        (("-c", "2d_tiny", "-f", "x"), "neither a number nor all"),
        (("-c", "2d_tiny", "-p", "None"), "no plans None"),
        (("-c", "2d_tiny", "-p", "dataset"), "no plans file"),
        (("-c", "2d_tiny", "--name", "a/b"), "name 'a/b' is not possible"),
        (("-c", "2d_tiny", "--name", "a__b"), "name 'a__b' is not possible"),
        (("-c", "2d_tiny", "--set", "te_start=0.9"), "te_start must not be above te_end"),
        (("-c", "2d_tiny", "--set", "epsilon=" + "9" * 5000), "at least 0"),
        (("-c", "2d_tiny", "--set", "epsilon=" + "[" * 5000), "at least 0"),
        # What cannot be trained does not end up in the user's plans.
        (("-c", "2d_tiny", "--set", "epsilon=3", "-tr", "nnUNetTrainer"), "none of our trainers"),
    ],
)
def test_what_cannot_be_done_ends_with_a_sentence_and_changes_nothing(project, plans_file, capsys, arguments, said):
    before = plans_file.read_bytes()
    assert configure(*arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert plans_file.read_bytes() == before


def test_an_unknown_dataset_ends_with_a_sentence(project, capsys):
    assert main(["configure", "-d", "777", "-c", "2d"]) == 2
    assert "no dataset '777'" in capsys.readouterr().err


# ---- lengths


@pytest.mark.parametrize("method", ["IMA", "SAT", "TE", "TRADES", "STD"])
@pytest.mark.parametrize(("suffix", "expected"), [("50epochs", (50, 50, 0.01)), ("250epochs", (250, 250, 0.01))])
def test_a_variant_differs_in_length_alone(project, results, monkeypatch, method, suffix, expected):
    variant = getattr(lengths, f"nnUNetTrainer{method}_{suffix}")
    trainer = bare(project, variant)
    assert (trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.initial_lr) == expected
    assert vars(variant).keys() <= {"lengths", "__module__", "__doc__", "__abstractmethods__", "_abc_impl"} | {
        "__annotations__", "__firstlineno__", "__static_attributes__"
    }  # fmt: skip
    with our_trainers_too():
        assert recursive_find_trainer_class_by_name(variant.__name__).__name__ == variant.__name__


def bare(project: Project, kind: type) -> Any:
    """A trainer of the configuration without any setting of the user."""
    import torch

    plans = project.plans()
    plans["configurations"]["2d_tiny"]["nnunet_ima"] = {}
    plans["continue_training"] = False
    with quiet():
        return kind(plans, "2d_tiny", 0, read(project.preprocessed / "dataset.json"), torch.device("cpu"))


def test_finetuning_is_shorter_and_gentler_than_nnunets_training(project, results):
    trainer = bare(project, lengths.nnUNetTrainerIMA_finetune)
    assert trainer.num_epochs < 1000
    assert trainer.initial_lr < 0.01
    configured, _, _ = trainer.preview()
    assert configured.origins["num_epochs"] == configured.origins["initial_lr"] == "trainer"
    assert configured.settings.num_epochs == trainer.num_epochs


def test_the_users_length_goes_before_the_variants(project, results):
    trainer = started(project, lengths.nnUNetTrainerIMA_50epochs, "2d_tiny")
    assert trainer.num_epochs == 2
    assert trainer.configured.origins["num_epochs"] == "user"


# ---- plans that cannot be read


def test_a_plans_file_that_is_no_json_ends_with_a_sentence(project, plans_file, capsys):
    plans_file.write_text("{", encoding="utf-8")
    assert configure("-c", "2d_tiny") == 2
    assert "no valid JSON" in capsys.readouterr().err


def test_a_configuration_that_was_not_preprocessed_ends_with_a_sentence(project, capsys):
    folder = project.preprocessed / "nnUNetPlans_2d"
    away = folder.with_name("away")
    shutil.move(folder, away)
    try:
        assert configure("-c", "2d_tiny") == 2
    finally:
        shutil.move(away, folder)
    assert "plan_and_preprocess" in capsys.readouterr().err


def test_inheritance_that_goes_in_circles_ends_with_a_sentence(project, plans_file, capsys):
    plans = read(plans_file)
    plans["configurations"]["a"] = {"inherits_from": "b"}
    plans["configurations"]["b"] = {"inherits_from": "a"}
    Path(plans_file).write_text(json.dumps(plans), encoding="utf-8")
    assert configure("-c", "a") == 2
    assert "inherits from itself" in capsys.readouterr().err


def test_a_setting_is_judged_together_with_those_it_is_added_to(project, plans_file, capsys):
    plans = read(plans_file)
    plans["configurations"]["2d_tiny"]["nnunet_ima"]["te_end"] = 0.95
    write(plans_file, plans)
    assert configure("-c", "2d_tiny", "--set", "te_start=0.9", "-tr", "nnUNetTrainerTE") == 0


def test_a_cascade_can_be_looked_at_before_its_first_stage_is_trained(project, plans_file, results, capsys):
    plans = read(plans_file)
    plans["configurations"]["3d_low"] = {**plans["configurations"]["3d_tiny"], "next_stage": "3d_high"}
    plans["configurations"]["3d_high"] = {"inherits_from": "3d_tiny", "previous_stage": "3d_low"}
    write(plans_file, plans)
    assert configure("-c", "3d_high") == 0
    assert "training samples" in capsys.readouterr().out


@pytest.mark.parametrize("parent", ["2d", "2d_tiny", "2d_child"])
def test_a_smaller_network_has_the_stages_of_the_planned_one(project, plans_file, results, parent):
    """Also of a parent that inherits its network from another one; a trainer builds it."""
    plans = read(plans_file)
    plans["configurations"]["2d_child"] = {"inherits_from": "2d_tiny"}
    write(plans_file, plans)
    before = read(plans_file)["configurations"]
    assert configure("-c", parent, "--features", "6", "--batch-size", "3", "--name", "2d_less") == 0
    mine = read(plans_file)["configurations"]["2d_less"]
    assert mine["inherits_from"] == parent
    assert mine["batch_size"] == 3
    original = before["2d" if parent == "2d" else "2d_tiny"]["architecture"]["arch_kwargs"]
    features = mine["architecture"]["arch_kwargs"].pop("features_per_stage")
    planned = original.pop("features_per_stage")
    assert features == [min(6 * 2**stage, most) for stage, most in enumerate(planned)]
    assert mine["architecture"]["arch_kwargs"] == original
    trainer = started(project, nnUNetTrainerIMA, "2d_less")
    assert trainer.network.encoder.output_channels == features
    assert trainer.batch_size == 3


def test_a_network_without_stages_cannot_be_made_smaller(project, plans_file, capsys):
    plans = read(plans_file)
    del plans["configurations"]["2d_tiny"]["architecture"]["arch_kwargs"]["features_per_stage"]
    write(plans_file, plans)
    before = plans_file.read_bytes()
    assert configure("-c", "2d_tiny", "--features", "6", "--name", "2d_less") == 2
    assert "--features cannot be used with it" in capsys.readouterr().err
    assert plans_file.read_bytes() == before
